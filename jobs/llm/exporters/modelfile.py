"""Writes the Modelfile that `ollama create` reads: the chat template in Ollama's language, the stop tokens and the sampling parameters."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from jobs.llm.chat_templates import TEMPLATE_ERRORS
from jobs.llm.exporters.go_template import NoGoTemplate, Turn, TurnPieces, derive_turn_pieces, render_go_template, write_go_template
from jobs.llm.llama_cpp.vocabulary import with_parts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jobs.llm.chat_format import ChatFormat
    from jobs.llm.trained_model import UserPrompt

MODELFILE_SUFFIX = ".Modelfile"  # in place of the GGUF file's own
# generation_config.json's names, and Ollama's.
SAMPLING_PARAMETERS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}


@dataclass(frozen=True)
class OllamaTemplate:
    """How Ollama renders conversations with a model."""

    pieces: TurnPieces | None  # None where Ollama chooses a template by the one that the GGUF file holds, or the model continues texts
    notes: tuple[str, ...]  # what the Modelfile says about it, in words
    is_raw: bool = False

    def render(self, prompt: "UserPrompt") -> str | None:
        """What Ollama writes for a prompt, without a BOS token; None where the Modelfile does not say, or cannot."""
        if prompt.text is not None:
            return prompt.text if self.is_raw else None
        turns = _read_turns(prompt)
        if self.pieces is None or turns is None:
            return None
        if self.pieces.trims and any(content != content.strip() for _, content in turns):
            return None
        return render_go_template(self.pieces, turns)


def make_ollama_template(
    chat_format: "ChatFormat", tokenizer: "PreTrainedTokenizerBase", prompts: "Sequence[UserPrompt]" = ()
) -> OllamaTemplate:
    """The template for a model that was trained with this format; `prompts` are questions of its rows."""
    if chat_format.template is None:
        return OllamaTemplate(None, ("The model continues texts: it was trained without a chat template.",), is_raw=True)
    if any(prompt.tools for prompt in prompts):
        return _leave_to_gguf("the model was trained with tools")

    def render(turns: Sequence[Turn]) -> str:
        plain: list[dict[str, Any]] = [{"role": role, "content": content} for role, content in turns]
        messages = [with_parts(message) if chat_format.content_parts else message for message in plain]
        ends_with_answer = turns[-1][0] == "assistant"
        text = tokenizer.apply_chat_template(
            messages, chat_template=chat_format.template, tokenize=False, add_generation_prompt=not ends_with_answer
        )
        return str(text).removeprefix(str(tokenizer.bos_token or ""))

    try:
        pieces = derive_turn_pieces(chat_format.template, render)
    except NoGoTemplate as error:
        return _leave_to_gguf(str(error))
    notes = ["Derived from the chat template in the GGUF file, and writes the same conversations."]
    if not pieces.has_system:
        notes.append("The chat template has no system messages, so they are left out.")
    if pieces.trims:
        notes.append("The chat template also removes spaces around a message, which Ollama cannot.")
    if "tools" in chat_format.template:
        notes.append("The chat template also writes tools, which this one does not.")
    if _rewrites_reasoning(render):
        notes.append("The chat template also removes the reasoning of earlier answers, which this one does not.")
    return OllamaTemplate(pieces, tuple(notes))


def make_modelfile(
    name: str,
    template: OllamaTemplate,
    stop_tokens: Sequence[str],
    sampling: Mapping[str, float],
    adapter: str | None = None,
) -> str:
    """The Modelfile of a GGUF file of that name and, where given, an adapter file."""
    own_name = PurePosixPath(adapter or name).with_suffix(MODELFILE_SUFFIX)
    lines = [f"# In the folder of this file, run: ollama create NAME -f {own_name}"]
    if adapter:
        lines += [f"# First put the base model's own GGUF file here, as {name}.", f"FROM ./{name}", f"ADAPTER ./{adapter}"]
    else:
        lines.append(f"FROM ./{name}")
    lines += [f"# {note}" for note in template.notes]
    if template.is_raw:
        lines.append('TEMPLATE "{{ .Prompt }}"')
    elif template.pieces is not None:
        lines.append(f'TEMPLATE """{write_go_template(template.pieces)}"""')
    lines += [f"PARAMETER stop {json.dumps(token, ensure_ascii=False)}" for token in stop_tokens]
    lines += [f"PARAMETER {parameter} {value:g}" for parameter, value in sampling.items()]
    return "\n".join(lines) + "\n"


def read_sampling(base_folder: Path) -> dict[str, float]:
    """The sampling parameters that the base's author recommends, by Ollama's names; empty without a generation_config.json."""
    path = base_folder / "generation_config.json"
    config: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}  # Any: JSON
    if config.get("do_sample") is False:
        return {}
    values = {name: config.get(source) for source, name in SAMPLING_PARAMETERS.items()}
    return {name: value for name, value in values.items() if isinstance(value, int | float) and not isinstance(value, bool)}


def _leave_to_gguf(reason: str) -> OllamaTemplate:
    note = f"No template can be written here, because {reason}: Ollama uses the chat template stored in the GGUF file."
    return OllamaTemplate(None, (note,))


def _read_turns(prompt: "UserPrompt") -> list[Turn] | None:
    """The prompt's messages; None if it has tools, or a message that is more than a text."""
    turns: list[Turn] = []
    for message in prompt.messages:
        match message:
            case {"role": "system" | "user" | "assistant" as role, "content": str(content)} if not message.get("tool_calls"):
                turns.append((role, content))
            case _:
                return None
    return None if prompt.tools else turns


def _rewrites_reasoning(render: Any) -> bool:
    reasoning = "<think>\nMarkText\n</think>\n\nYes."
    try:
        return "MarkText" not in render([("user", "One?"), ("assistant", reasoning), ("user", "Two?")])
    except TEMPLATE_ERRORS:
        return False

"""How a training turns conversations into text, and what the exported model needs to be asked in the same way.

`choose_chat_format` decides it once, before any row is tokenized. Everything that renders, trains on, generates from or exports turns
reads the ChatFormat: no other module knows the tokens of a particular model's turns.

The rows are rendered by a training template, which marks what the assistant says. The exported template must ask in the same way: its
generation prompt must be the beginning of what was trained. `_list_candidates` has the ways to make it so, in order of preference.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jobs.llm.chat_rendering import GENERATION_TAG, Span, remove_generation_tags, render
from jobs.llm.chat_templates import TEMPLATE_ERRORS
from jobs.llm.data.turns import Turns, change_calls
from jobs.llm.neutral_templates import choose_neutral_template
from jobs.runtime.errors import JobFailed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from schema.training import TrainingConfig

# Who wrote the template: the base model's author, the caller, or nobody: then a neutral one is chosen that the tokenizer can carry.
# With `raw` there is none: the model continues texts.
FormatSource = Literal["base", "request", "neutral", "raw"]


@dataclass(frozen=True)
class ChatFormat:
    """The form of the texts that a model is trained on, and asked with."""

    source: FormatSource
    name: str  # for decisions and messages, such as "gemma3" or "of the base model"
    template: str | None  # the chat template that is exported with the model; None with source `raw`
    # Renders the same texts and marks what the assistant says; None where the answers are found by rendering the turns before them.
    training_template: str | None
    stop_token_ids: tuple[int, ...]  # sorted; each ends an answer: the tokenizer's EOS, and the end of a turn
    turn_token_ids: tuple[int, ...]  # sorted; the special tokens that the template writes around turns
    turn_tokens_are_trained: bool  # the base has seen its turn tokens in training: it came with a template
    content_parts: bool = False  # the template reads content only as parts, as some for images do: strings become parts of text
    in_pieces: bool = False  # the tokens of prompts and answers depend on each other, so they are tokenized apart
    generation_prompt: str = ""  # the text between a user's turn and the answer
    reason: str = ""  # why this format was chosen, for the decision event

    @property
    def owner(self) -> str:
        """What errors call the template."""
        return _describe_owner(self.source, self.name)


TEST_SAMPLE: tuple[Turns, ...] = (
    Turns([{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]),
    Turns(
        [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Good day"},
            {"role": "user", "content": "Bye"},
            {"role": "assistant", "content": "See you"},
        ]
    ),
)
OPENED_REASONING = re.compile(r"<think>(\\n|\n)?(?=['\"])")  # at the end of a string of the template
NO_THINKING = "{%- set enable_thinking = false %}"
HINT = "send training_config.chat_template, or use another base_model_id"


def choose_chat_format(tokenizer: "PreTrainedTokenizerBase", config: "TrainingConfig", sample: Sequence[Turns | str] = ()) -> ChatFormat:
    """The format for this tokenizer and request, checked on a sample of the rows. Raises JobFailed.

    The tokenizer's own template is replaced by the chosen one. The sample has conversations, and texts of rows that are none.
    """
    conversations = [turns for turns in sample if isinstance(turns, Turns)]
    texts = [text for text in sample if isinstance(text, str)]
    if config.prompt_format == "raw" and conversations:
        message = "training_config.prompt_format 'raw' joins strings, and the rows of the dataset are conversations"
        raise JobFailed("invalid_config", message, "leave prompt_format out, or send prompts and completions as strings")
    if config.prompt_format == "raw" or (texts and config.prompt_format is None and tokenizer.chat_template is None):
        return _make_raw_format(tokenizer, "the model continues texts" if texts else "prompt_format is raw")
    own = _read_own_template(tokenizer, config.chat_template)
    if texts:  # rendered by whoever uploaded them; the model is asked with the same template
        chat_format = _build_format(tokenizer, own, TEST_SAMPLE)
        turn_tokens = [str(token) for token in tokenizer.convert_ids_to_tokens(list(chat_format.turn_token_ids))]
        if config.prompt_format is None and not (turn_tokens and all(token in text for text in texts for token in turn_tokens)):
            return _make_raw_format(tokenizer, f"the texts are not conversations as {chat_format.owner} renders them")
    else:
        chat_format = _build_format(tokenizer, own, conversations or TEST_SAMPLE)
    tokenizer.chat_template = chat_format.template
    return chat_format


def make_tools_failure(owner: str, missing: str) -> JobFailed:
    """For a template that leaves out tools, or calls of them."""
    hint = "use a base model whose chat template has tools, such as a Qwen 3, or send training_config.chat_template"
    return JobFailed("invalid_config", f"{owner} does not render tools: {missing} are not in the text of a row that has them", hint)


def read_template(tokenizer: "PreTrainedTokenizerBase", requested: str | None) -> str | None:
    """The caller's template or the tokenizer's own, None without one. Raises JobFailed for several without a default."""
    if requested is not None:
        return requested
    if not tokenizer.chat_template:
        return None
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:  # several templates, and none is the default
        raise JobFailed("invalid_config", "the base model has several chat templates and no default", HINT) from error


@dataclass(frozen=True)
class _OwnTemplate:
    """The template to begin with."""

    source: FormatSource
    name: str
    text: str
    prefix: str = ""  # goes before it, in training too

    @property
    def owner(self) -> str:
        return _describe_owner(self.source, self.name)


def _read_own_template(tokenizer: "PreTrainedTokenizerBase", requested: str | None) -> _OwnTemplate:
    template = read_template(tokenizer, requested)
    if template is not None:
        return (
            _OwnTemplate("request", "of the request", template)
            if requested is not None
            else _OwnTemplate("base", "of the base model", template)
        )
    neutral, text, prefix = choose_neutral_template(tokenizer)
    return _OwnTemplate("neutral", neutral.name, text, prefix)


def _describe_owner(source: FormatSource, name: str) -> str:
    match source:
        case "base":
            return "the base model's chat template"
        case "request":
            return "training_config.chat_template"
        case _:
            return f"the neutral chat template {name}"


def _make_raw_format(tokenizer: "PreTrainedTokenizerBase", reason: str) -> ChatFormat:
    tokenizer.chat_template = None
    stops = tuple(sorted(_read_eos_ids(tokenizer)))
    return ChatFormat("raw", "raw", None, None, stops, (), turn_tokens_are_trained=True, reason=reason)


def _build_format(tokenizer: "PreTrainedTokenizerBase", own: _OwnTemplate, sample: Sequence[Turns]) -> ChatFormat:
    renderer, change = _choose_renderer(tokenizer, own, sample)
    turn_token_ids = _find_turn_tokens(tokenizer, renderer)
    match own.source:
        case "base":
            reason = "the base model's own chat template"
        case "request":
            reason = "the request has a chat template"
        case _ if own.name == "plain":
            reason = "the base model has no chat template, and its tokenizer no tokens for turns: plain words"
        case _:
            reason = "the base model has no chat template; its tokenizer has the tokens of this one"
    return ChatFormat(
        source=own.source,
        name=own.name,
        template=renderer.export,
        training_template=renderer.training,
        stop_token_ids=tuple(sorted(_find_stop_tokens(tokenizer, renderer, sample) | _read_eos_ids(tokenizer))),
        turn_token_ids=tuple(sorted(turn_token_ids)),
        turn_tokens_are_trained=bool(tokenizer.chat_template) or not turn_token_ids,
        content_parts=renderer.content_parts,
        in_pieces=renderer.in_pieces,
        generation_prompt=renderer.find_generation_prompt(),
        reason=f"{reason}; {change}" if change else reason,
    )


# --- templates -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Renderer:
    """A pair of templates: what is exported, and what renders the rows."""

    export: str
    training: str | None
    special_tokens: dict[str, Any]
    owner: str
    content_parts: bool = False
    in_pieces: bool = False

    def render_row(self, turns: Turns) -> tuple[str, list[Span]]:
        return self._render(self.training or self.export, turns, len(turns.messages))

    def render_prompt(self, turns: Turns, count: int) -> str:
        """The first messages, and the start of an answer."""
        return self._render(self.export, turns, count, add_generation_prompt=True)[0]

    def find_generation_prompt(self) -> str:
        """What the exported template adds for an answer; where it also changes the text before, with the end of the user's turn."""
        one, other = (Turns([{"role": "user", "content": text}]) for text in ("Hello", "Bye?"))
        try:
            asked = self.render_prompt(one, 1)
            plain = self._render(self.export, one, 1)[0]
            if asked.startswith(plain):
                return asked[len(plain) :]
            return _common_prefix([asked[::-1], self.render_prompt(other, 1)[::-1]])[::-1]
        except JobFailed:  # a template that requires a system message, for example
            return ""

    def _render(self, template: str, turns: Turns, count: int, *, add_generation_prompt: bool = False) -> tuple[str, list[Span]]:
        return render(
            template,
            turns.messages[:count],
            turns.tools,
            self.special_tokens,
            owner=self.owner,
            content_parts=self.content_parts,
            add_generation_prompt=add_generation_prompt,
        )


def _choose_renderer(tokenizer: "PreTrainedTokenizerBase", own: _OwnTemplate, sample: Sequence[Turns]) -> tuple[_Renderer, str]:
    """The first pair of templates that asks as it trains, and what was changed, in words. Raises JobFailed without one."""
    training = _find_training_template(tokenizer, own)
    text = own.prefix + (remove_generation_tags(own.text) if own.source == "neutral" else own.text)
    renderer = _Renderer(text, training, tokenizer.special_tokens_map, own.owner)
    if problem := _find_problem(renderer, sample):
        renderer = replace(renderer, content_parts=True)
        if _find_problem(renderer, sample):
            raise problem
    # The tokenizer may join the last characters of a prompt to the answer, or split them otherwise at the end of a text. Where every
    # template has that, rows are tokenized in pieces, as the model is asked.
    for in_pieces in (False, True):
        for candidate, change in _list_candidates(renderer):
            if _asks_as_trained(tokenizer, candidate, sample, in_pieces=in_pieces):
                return replace(candidate, in_pieces=in_pieces), change
    message = f"{own.owner} changes earlier turns, or asks for an answer in another way than it renders it, so it cannot be trained"
    raise JobFailed("invalid_config", message, "send every answer as a separate row (prompt and completion), or " + HINT)


def _find_training_template(tokenizer: "PreTrainedTokenizerBase", own: _OwnTemplate) -> str | None:
    """A template that renders the same and marks what the assistant says; None if there is none."""
    from trl.chat_template_utils import get_training_chat_template

    previous = tokenizer.chat_template
    tokenizer.chat_template = own.text
    try:
        training = get_training_chat_template(tokenizer)
    except TEMPLATE_ERRORS:  # unknown to TRL
        training = None
    finally:
        tokenizer.chat_template = previous
    training = training or (own.text if GENERATION_TAG.search(own.text) else None)
    return training and own.prefix + training


def _list_candidates(own: _Renderer) -> Iterator[tuple[_Renderer, str]]:
    """Ways to make the exported template ask as the rows are trained, and what each changes."""
    yield own, ""
    exports = [(own, "")]
    if own.training not in (None, own.export):
        as_trained = replace(own, export=remove_generation_tags(str(own.training)))
        exports.append((as_trained, "it renders earlier turns as they are trained"))
    for renderer, change in exports:
        if change:
            yield renderer, change
        if "enable_thinking" in renderer.export:
            training = renderer.training and NO_THINKING + renderer.training
            without = replace(renderer, export=NO_THINKING + renderer.export, training=training)
            yield without, "; ".join(filter(None, (change, "it asks for answers without reasoning, as the rows have them")))
    for renderer, change in exports:
        text = renderer.export
        asks_at = max(text.rfind("add_generation_prompt"), 0)
        export = text[:asks_at] + OPENED_REASONING.sub("", text[asks_at:])
        if export != text:
            yield replace(renderer, export=export), "; ".join(filter(None, (change, "its answers do not have to begin with reasoning")))


def _asks_as_trained(tokenizer: "PreTrainedTokenizerBase", renderer: _Renderer, sample: Sequence[Turns], *, in_pieces: bool) -> bool:
    """Whether every prompt that the exported template makes is the beginning of a trained row, in characters and in tokens.

    Tokenized in pieces, the tokens are the same if the characters are.
    """
    for turns in sample:
        text, _ = renderer.render_row(turns)
        ids = [] if in_pieces else _encode(tokenizer, text)
        for n in _assistant_indices(turns):
            try:
                prompt = renderer.render_prompt(turns, n)
            except JobFailed:  # the training template accepts more rows than the base's own
                return False
            if not text.startswith(prompt):
                return False
            # An answer that begins with spaces may join them to the prompt's; such a row is tokenized in pieces.
            if not in_pieces and not str(turns.messages[n].get("content") or "")[:1].isspace():
                prompt_ids = _encode(tokenizer, prompt)
                if ids[: len(prompt_ids)] != prompt_ids:
                    return False
    return True


def _assistant_indices(turns: Turns) -> list[int]:
    """Of the answers to train, except one without any message before it."""
    return [n for n, message in enumerate(turns.messages) if n >= max(turns.first, 1) and message["role"] == "assistant"]


# --- checks and tokens ---------------------------------------------------------------------------------------------------


def _find_problem(renderer: _Renderer, sample: Sequence[Turns]) -> JobFailed | None:
    """Why the rows cannot be rendered with all that is said in them; None if they can."""
    for turns in sample:
        try:
            text, _ = renderer.render_row(turns)
        except JobFailed as error:
            return error
        if turns.tools and text == renderer.render_row(replace(turns, tools=None))[0]:
            return make_tools_failure(renderer.owner, "tools")
        if lost := next((name for name, changed in change_calls(turns) if renderer.render_row(changed)[0] == text), None):
            return make_tools_failure(renderer.owner, lost)
        for message in turns.messages:
            if not all(piece in text or json.dumps(piece, ensure_ascii=False)[1:-1] in text for piece in _iter_content_pieces(message)):
                problem = f"{renderer.owner} leaves out the content of messages of the role {message['role']}"
                return JobFailed("invalid_config", problem, HINT)
    return None


def _iter_content_pieces(message: dict[str, Any]) -> Iterator[str]:
    """The texts of a message. Reasoning apart: templates may write its tags in their own way."""
    content = message.get("content") or ""
    texts = [content] if isinstance(content, str) else [part.get("text") or "" for part in content]
    for text in texts:
        for piece in text.replace("</think>", "<think>").split("<think>"):
            yield piece.strip()


def _find_stop_tokens(tokenizer: "PreTrainedTokenizerBase", renderer: _Renderer, sample: Sequence[Turns]) -> set[int]:
    """The control tokens right after an answer. Raises JobFailed if there are none: the model would never learn to end."""
    control_ids = {n for n, token in tokenizer.added_tokens_decoder.items() if not token.content.isspace()}
    for turns in (*TEST_SAMPLE[:1], *sample):
        content = turns.messages[-1].get("content")
        if turns.messages[-1]["role"] != "assistant" or not isinstance(content, str) or not content.strip():
            continue
        try:
            text, _ = renderer.render_row(turns)
        except JobFailed:  # the test conversation; the rows render
            continue
        tail = text[text.rfind(content.strip()) + len(content.strip()) :]
        stops: set[int] = set()
        for token_id in _encode(tokenizer, tail):
            if token_id in control_ids:
                stops.add(token_id)
            elif str(tokenizer.decode([token_id])).strip():
                break
        if stops:
            return stops
    message = f"{renderer.owner} renders no end after an answer that is one token of the tokenizer, so the model would not learn to end"
    raise JobFailed("invalid_config", message, HINT)


def _find_turn_tokens(tokenizer: "PreTrainedTokenizerBase", renderer: _Renderer) -> set[int]:
    """The special tokens of a conversation that separate its turns."""
    not_of_turns = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    special_ids = {n for n, token in tokenizer.added_tokens_decoder.items() if token.special} - not_of_turns
    try:
        text, _ = renderer.render_row(TEST_SAMPLE[1])
    except JobFailed:  # a template that requires a system message, for example
        return set()
    return set(_encode(tokenizer, text)) & special_ids


def _read_eos_ids(tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """The tokenizer's EOS token, and the tokens on which the base's own generation stops."""
    path = Path(tokenizer.name_or_path) / "generation_config.json"
    listed = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
    ids = {tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])}
    return {token_id for token_id in ids if isinstance(token_id, int) and 0 <= token_id < len(tokenizer)}


def _common_prefix(texts: Sequence[str]) -> str:
    shortest = min(texts, key=len, default="")
    return next((shortest[:n] for n in range(len(shortest), 0, -1) if all(text.startswith(shortest[:n]) for text in texts)), "")


def _encode(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])

"""Checks that every way in which a user asks a model gives it the tokens with which it was trained.

tokenizer     transformers' apply_chat_template with the published folder's tokenizer (adapter, merged, onnx)
chat          a GGUF file's own chat template and tokenizer, as jobs/llm/chat/ uses them
server        the same, as llama.cpp's server does it: the tokenizer adds the BOS token
Modelfile     Ollama's template, and the tokens that llama.cpp makes of its text
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jobs.llm.chat_templates import TEMPLATE_ERRORS
from jobs.llm.llama_cpp.vocabulary import ChatPrompt, VocabularyReport, VocabularyTexts, with_parts
from jobs.runtime.errors import JobFailed
from schema.job import FailureCode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jobs.llm.chat_format import ChatFormat
    from jobs.llm.exporters.modelfile import OllamaTemplate
    from jobs.llm.trained_model import UserPrompt

MAX_SHOWN_CHARACTERS = 80  # of a prompt, in an error message
TEMPLATE_HINT = "send chat_template with a template that asks as the rows are written, or prompt_format 'raw'"


# --- paths through transformers ---


def check_tokenizer_path(
    tokenizer: "PreTrainedTokenizerBase",
    chat_format: "ChatFormat",
    prompts: "Sequence[UserPrompt]",
    place: str,
    code: FailureCode = "export_failed",
) -> None:
    """Raise JobFailed unless the tokenizer of a published folder asks the prompts as in training."""
    for prompt in prompts:
        try:
            ids = encode_with_tokenizer(tokenizer, chat_format, prompt)
        except TEMPLATE_ERRORS as error:
            shown = _shorten(prompt.content)
            raise JobFailed(code, f"{place} cannot ask the prompt {shown}: {error}", TEMPLATE_HINT) from error
        mismatch = find_mismatch(prompt, ids, lambda token: str(tokenizer.decode([token])))
        if mismatch is not None:
            raise JobFailed(code, f"{place} asks the model in another way than the training did: {mismatch}", TEMPLATE_HINT)


def encode_with_tokenizer(tokenizer: "PreTrainedTokenizerBase", chat_format: "ChatFormat", prompt: "UserPrompt") -> list[int]:
    """The tokens of a prompt as transformers makes them. Raises what a chat template raises."""
    if prompt.text is not None:
        ids: list[int] = tokenizer.encode(prompt.text, add_special_tokens=False)
        bos_id = tokenizer.bos_token_id
        return [bos_id, *ids] if bos_id is not None and prompt.input_ids[:1] == (bos_id,) else ids
    encoded = tokenizer.apply_chat_template(
        [with_parts(message) if chat_format.content_parts else message for message in prompt.messages],
        tools=list(prompt.tools) or None,
        add_generation_prompt=True,
        return_dict=True,
    )
    return list(encoded["input_ids"])  # pyright: ignore[reportArgumentType, reportCallIssue, reportIndexIssue]  # a dict of token ids


def rows_begin_with_bos(tokenizer: "PreTrainedTokenizerBase", rows: Sequence[Sequence[int]]) -> bool | None:
    """Whether the training's rows begin with a BOS token, which a program must then add to a text; None without rows or such a token."""
    bos_id = tokenizer.bos_token_id
    return None if bos_id is None or not rows else all(ids[0] == bos_id for ids in rows if ids)


# --- paths through llama.cpp ---


@dataclass(frozen=True)
class GgufQuestions:
    """What every GGUF file of a job is asked to tokenize, and what it must answer."""

    texts: tuple[str, ...]
    text_ids: tuple[tuple[int, ...], ...]
    prompts: "tuple[UserPrompt, ...]"
    modelfile_prompts: "tuple[tuple[UserPrompt, str], ...]"  # with the text that the Modelfile's template writes
    stop_token_ids: tuple[int, ...]

    def request(self) -> VocabularyTexts:
        """The same for the child process that loads the file."""
        return VocabularyTexts(
            texts=list(self.texts),
            prompts=[
                ChatPrompt(messages=[dict(message) for message in prompt.messages], tools=list(prompt.tools), text=prompt.text)
                for prompt in self.prompts
            ],
            raw_prompts=[text for _, text in self.modelfile_prompts],
            stop_token_ids=list(self.stop_token_ids),
        )


def make_gguf_questions(
    tokenizer: "PreTrainedTokenizerBase",
    chat_format: "ChatFormat",
    texts: Sequence[str],
    prompts: "Sequence[UserPrompt]",
    template: "OllamaTemplate",
) -> GgufQuestions:
    """The questions for files with this tokenizer."""
    rendered = [(prompt, template.render(prompt)) for prompt in prompts]
    return GgufQuestions(
        texts=tuple(texts),
        text_ids=tuple(tuple(tokenizer.encode(text, add_special_tokens=False)) for text in texts),
        prompts=tuple(prompts),
        modelfile_prompts=tuple((prompt, text) for prompt, text in rendered if text is not None),
        stop_token_ids=chat_format.stop_token_ids,
    )


def find_gguf_problem(questions: GgufQuestions, report: VocabularyReport, decode: Callable[[int], str]) -> str | None:
    """What a GGUF file does differently from the training, as the end of a sentence that begins with its name; None if nothing."""
    differing_texts = sum(list(expected) != actual for expected, actual in zip(questions.text_ids, report.token_ids, strict=True))
    if differing_texts:
        return f"splits {differing_texts} of {len(questions.texts)} texts into other tokens than the model's tokenizer does"
    for prompt, asked in zip(questions.prompts, report.prompts, strict=True):
        if asked.problem:
            return f"cannot ask the prompt {_shorten(prompt.content)}: {asked.problem}"
        for path, ids in (("its chat template", asked.ids), ("its chat template in llama.cpp's server", asked.served_ids)):
            if mismatch := find_mismatch(prompt, ids, decode):
                return f"asks the model by {path} in another way than the training did: {mismatch}"
    for (prompt, _), ids in zip(questions.modelfile_prompts, report.raw_prompt_ids, strict=True):
        if mismatch := find_mismatch(prompt, ids, decode):
            return f"asks the model by its Modelfile in another way than the training did: {mismatch}"
    if report.missing_stops:
        tokens = ", ".join(repr(decode(token)) for token in report.missing_stops)
        return f"does not end an answer at {tokens}, as the training taught"
    return None


# --- the comparison ---


def find_mismatch(prompt: "UserPrompt", ids: Sequence[int], decode: Callable[[int], str]) -> str | None:
    """Where a prompt's tokens leave the row's, in words; None where they are the row's prompt, or more of the row."""
    expected = prompt.input_ids[: max(len(ids), prompt.prompt_tokens)]
    if tuple(ids) == expected:
        return None
    pairs = zip(ids, expected, strict=False)
    position = next((n for n, (actual, trained) in enumerate(pairs) if actual != trained), min(len(ids), len(expected)))

    def describe(tokens: Sequence[int]) -> str:
        return repr(decode(tokens[position])) if position < len(tokens) else "the end"

    where = f"token {position + 1} is {describe(ids)}, and was {describe(expected)} in training"
    return f"in the prompt {_shorten(prompt.content)} {where}"


def _shorten(text: str) -> str:
    return repr(text if len(text) <= MAX_SHOWN_CHARACTERS else text[: MAX_SHOWN_CHARACTERS - 1] + "…")

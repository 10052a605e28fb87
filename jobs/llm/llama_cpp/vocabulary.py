"""`python -m jobs.llm.llama_cpp.vocabulary REQUEST RESPONSE`: how a GGUF file turns texts and conversations into tokens.

A conversation is rendered by the chat template that the file holds, as every program that runs the file does. Only the vocabulary is
loaded, so a file without weights will do. Both arguments are JSON files; exit code 0 means that the response is written.
"""

import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pydantic import Field

from schema.base import ForwardCompatible

if TYPE_CHECKING:
    import ctypes


SETTINGS_OPTION = "--vocabulary-settings="  # of `convert`, which the converter itself does not have
MAX_END_TOKENS = 2  # that a file can name beside the end of a text: of a turn, and of a message


class VocabularySettings(ForwardCompatible):
    """What a converted file says about its vocabulary, where the converter says otherwise or nothing."""

    adds_bos: bool | None = None  # whether a text begins with a BOS token; None leaves that to the converter
    end_token_ids: list[int] = Field(default=[])  # that end an answer, besides those that llama.cpp knows by their text

    def options(self) -> list[str]:
        """The command-line arguments of `convert`."""
        return [] if self == NO_SETTINGS else [f"{SETTINGS_OPTION}{self.model_dump_json()}"]


NO_SETTINGS = VocabularySettings()


class ChatPrompt(ForwardCompatible):
    """A conversation up to a question, or a text to continue."""

    messages: list[dict[str, Any]] = Field(default=[])
    tools: list[dict[str, Any]] = Field(default=[])
    text: str | None = None


class VocabularyTexts(ForwardCompatible):
    """What to tokenize."""

    texts: list[str]  # as they are
    prompts: list[ChatPrompt] = Field(default=[])  # through the file's chat template
    # Rendered already, by a Modelfile's template; the file's settings say whether a BOS token is added.
    raw_prompts: list[str] = Field(default=[])
    stop_token_ids: list[int] = Field(default=[])  # that must end an answer


class AskedPrompt(ForwardCompatible):
    """The tokens of a prompt; `problem` says why there are none."""

    ids: list[int] = Field(default=[])
    served_ids: list[int] = Field(default=[])  # as llama.cpp's server makes them, which leaves the BOS token to the tokenizer
    problem: str = ""


class VocabularyReport(ForwardCompatible):
    """The tokens of what was asked for, in the same order."""

    token_ids: list[list[int]]
    prompts: list[AskedPrompt] = Field(default=[])
    raw_prompt_ids: list[list[int]] = Field(default=[])
    missing_stops: list[int] = Field(default=[])  # stop tokens that llama.cpp does not take for the end of an answer


class VocabularyRequest(VocabularyTexts):
    """Which file to read."""

    model_path: str


def with_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message with its text as a part: some templates for images read no other content."""
    content = message.get("content")
    return dict(message) | ({"content": [{"type": "text", "text": content}]} if isinstance(content, str) and content else {})


class TemplateRejected(Exception):
    """The file's chat template is invalid, or rejects a conversation; the message says why."""


class GgufVocabulary:
    """The vocabulary of a file, with its chat template; None without one. Raises TemplateRejected for an invalid template."""

    def __init__(self, llama_cpp: ModuleType, vocab: "ctypes.c_void_p", template: str | None) -> None:
        from jinja2 import TemplateError
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        self._llama, self._vocab = llama_cpp, vocab
        self._reads_parts = False
        self._bos = self._token_text(llama_cpp.llama_vocab_bos(vocab))
        self._adds_bos = bool(llama_cpp.llama_vocab_get_add_bos(vocab))
        eos = self._token_text(llama_cpp.llama_vocab_eos(vocab))
        try:
            self._template = None if template is None else Jinja2ChatFormatter(template=template, bos_token=self._bos, eos_token=eos)
        except TemplateError as error:
            raise TemplateRejected(f"the chat template is invalid: {error}") from error
        if self._template is not None:
            self._reads_parts = self._loses_text()

    @property
    def has_template(self) -> bool:
        """Whether the file holds a chat template; without one its model continues texts."""
        return self._template is not None

    def tokenize(self, text: str, *, add_special: bool = False) -> list[int]:
        """The text's token ids, special tokens recognized; `add_special` adds the BOS token where the file's settings say so."""
        content = text.encode(errors="replace")
        capacity = len(content) + 8
        tokens = (self._llama.llama_token * capacity)()
        count = self._llama.llama_tokenize(self._vocab, content, len(content), tokens, capacity, add_special, True)
        if count < 0:
            raise ValueError(f"a text of {len(content)} bytes has more tokens than bytes")
        return list(tokens[:count])

    def encode_prompt(self, prompt: ChatPrompt) -> list[int]:
        """The prompt up to the start of the answer: rendered by the chat template, or the text alone. Raises TemplateRejected."""
        if self._template is None or prompt.text is not None:
            return self.tokenize(prompt.text or "", add_special=True)
        return self.tokenize(self._render(prompt))

    def encode_served_prompt(self, prompt: ChatPrompt) -> list[int]:
        """The same as llama.cpp's server does: without the template's BOS token where the tokenizer adds one."""
        if self._template is None or prompt.text is not None:
            return self.encode_prompt(prompt)
        text = self._render(prompt)
        return self.tokenize(text.removeprefix(self._bos) if self._adds_bos else text, add_special=True)

    def is_end_token(self, token: int) -> bool:
        """Whether a token ends a turn or a text."""
        return bool(self._llama.llama_vocab_is_eog(self._vocab, token))

    def report(self, asked: VocabularyTexts) -> VocabularyReport:
        """Tokenize everything that was asked for."""
        return VocabularyReport(
            token_ids=[self.tokenize(text) for text in asked.texts],
            prompts=[self._ask(prompt) for prompt in asked.prompts],
            raw_prompt_ids=[self.tokenize(text, add_special=True) for text in asked.raw_prompts],
            missing_stops=[token for token in asked.stop_token_ids if not self.is_end_token(token)],
        )

    def _ask(self, prompt: ChatPrompt) -> AskedPrompt:
        if prompt.text is None and self._template is None:
            return AskedPrompt(problem="the file has no chat template")
        if prompt.text is not None and self._template is not None:
            return AskedPrompt(problem="the file has a chat template, and the model was trained without one")
        try:
            return AskedPrompt(ids=self.encode_prompt(prompt), served_ids=self.encode_served_prompt(prompt))
        except TemplateRejected as error:
            return AskedPrompt(problem=str(error))

    def _render(self, prompt: ChatPrompt) -> str:
        from jinja2 import TemplateError

        assert self._template is not None
        # Any: its TypedDicts have the same shape
        messages: Any = [with_parts(message) for message in prompt.messages] if self._reads_parts else prompt.messages
        tools: Any = prompt.tools or None
        try:
            return str(self._template(messages=messages, tools=tools).prompt)
        except (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise TemplateRejected(f"the chat template rejects the conversation: {error}") from error

    def _loses_text(self) -> bool:
        """Whether the template writes a message's text only where it is a part, which llama.cpp's server finds out like this."""
        question = {"role": "user", "content": "MarkText"}
        try:
            return "MarkText" not in self._render(ChatPrompt(messages=[question])) and "MarkText" in self._render(
                ChatPrompt(messages=[with_parts(question)])
            )
        except TemplateRejected:
            return False

    def _token_text(self, token: int) -> str:
        return self._llama.llama_vocab_get_text(self._vocab, token).decode(errors="replace") if token >= 0 else ""


@contextmanager
def open_vocabulary(path: Path) -> Generator[GgufVocabulary]:
    """Load a file's vocabulary without its weights. Raises ValueError, and TemplateRejected."""
    import llama_cpp

    from jobs.llm.llama_cpp.log import log_errors_only

    errors = log_errors_only()
    llama_cpp.llama_backend_init()
    parameters = llama_cpp.llama_model_default_params()
    parameters.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
    if not model:
        raise ValueError(errors[0] if errors else f"{path.name} cannot be loaded")
    try:
        yield GgufVocabulary(llama_cpp, llama_cpp.llama_model_get_vocab(model), read_template(llama_cpp, model))
    finally:
        llama_cpp.llama_model_free(model)


def read_template(llama_cpp: ModuleType, model: "ctypes.c_void_p") -> str | None:
    """The chat template that a loaded file holds."""
    template: bytes | None = llama_cpp.llama_model_chat_template(model, None)
    return None if template is None else template.decode(errors="replace")


def main(arguments: Sequence[str]) -> int:
    """Report on the requested file; returns the exit code."""
    request_path, response_path = map(Path, arguments)
    request = VocabularyRequest.load(request_path.read_bytes())
    with open_vocabulary(Path(request.model_path)) as vocabulary:
        response_path.write_text(vocabulary.report(request).model_dump_json())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

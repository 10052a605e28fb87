"""What a conversation needs of a model, whatever runs it."""

from collections.abc import Generator, Mapping, Sequence
from typing import Protocol

CONTEXT_TOKENS = 4096  # of a conversation; Gemma's 32k would take half a gigabyte

# How both backends choose among likely tokens; llama.cpp's defaults. A temperature of 0 takes the most likely one.
TOP_K, TOP_P, MIN_P = 40, 0.95, 0.05

Message = Mapping[str, str]  # role and content


class InvalidPrompt(Exception):
    """This turn cannot be answered; the message says why."""


class InvalidModel(Exception):
    """What is at a location cannot talk; the message says why, and what to use instead."""


class ChatModel(Protocol):
    """A loaded model."""

    @property
    def runs_as(self) -> str:
        """What it is and what runs it, for the banner: "GGUF, llama.cpp"."""
        ...

    @property
    def context_tokens(self) -> int:
        """The longest conversation with its answer."""
        ...

    @property
    def template(self) -> str | None:
        """The chat template that it is asked with; None: it continues texts."""
        ...

    def tokenize(self, messages: Sequence[Message]) -> list[int]:
        """The conversation as tokens up to the start of the answer; without a template, the last message. Raises InvalidPrompt."""
        ...

    def generate(self, tokens: list[int], max_tokens: int, temperature: float) -> Generator[str]:
        """The text of each generated token, up to the end of the answer; empty while a character is incomplete.

        Closing it ends the generation.
        """
        ...

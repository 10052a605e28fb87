"""Texts of control tokens that a person wrote: in a row they are text, and several tokens.

Their first characters are replaced by private ones before a template renders the row, which tells them from the template's own tokens.
"""

import re
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

HIDDEN = 0xF0000  # first of the private characters


class ControlTokens:
    """The special tokens of a tokenizer, and how often their texts are meant as such."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        tokens = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._texts = {token.content for token in tokens}
        # Those that take the spaces and line breaks beside them.
        self._strip_before = {token.content for token in tokens if token.lstrip}
        self._strip_after = {token.content for token in tokens if token.rstrip}
        self._lengths: dict[str, list[int]] = {}
        for first in {text[0] for text in self._texts}:
            self._lengths[first] = sorted({len(text) for text in self._texts if text[0] == first}, reverse=True)

    def hide(self, value: Any) -> Any:  # noqa: ANN401  # a value of JSON, and the same kind of value
        """A string, or the strings in lists and objects, with hidden control tokens. The same object where there are none."""
        if isinstance(value, str):
            return self._hide_in_text(value)
        if isinstance(value, list):
            items = [self.hide(item) for item in value]
            return value if all(new is old for new, old in zip(items, value, strict=True)) else items
        if isinstance(value, dict):
            changed = {name: self.hide(item) for name, item in value.items()}
            return value if all(changed[name] is value[name] for name in value) else changed
        return value

    def has_hidden(self, text: str) -> bool:
        """Whether a text has hidden control tokens."""
        return any(character in text for character in self._hidden.values())

    def count(self, backend: "Tokenizer", text: str) -> int:
        """The tokens of a text, in which hidden ones are text."""
        if not self.has_hidden(text):
            return len(backend.encode(text, add_special_tokens=False))
        count = start = position = 0
        while found := self._first_pattern.search(text, position):
            token = self._match(text, found.start())
            position = found.start() + len(token or " ")
            if token:  # one of the template: no other token crosses it
                piece = text[start : found.start()]
                count += self._count_piece(backend, piece.rstrip() if token in self._strip_before else piece) + 1
                if token in self._strip_after:
                    position += len(text[position:]) - len(text[position:].lstrip())
                start = position
        return count + self._count_piece(backend, text[start:])

    def _count_piece(self, backend: "Tokenizer", text: str) -> int:
        """The tokens of a text without control tokens besides hidden ones."""
        if not text:
            return 0
        backend.encode_special_tokens = True
        count = len(backend.encode(text.translate(self._first_characters), add_special_tokens=False))
        backend.encode_special_tokens = False
        return count

    def _hide_in_text(self, text: str) -> str:
        if not any(first in text for first in self._lengths):
            return text
        pieces: list[str] = []
        position = start = 0
        while found := self._first_pattern.search(text, position):
            token = self._match(text, found.start())
            position = found.start() + len(token or " ")
            if token:
                pieces += (text[start : found.start()], self._hidden[token[0]], token[1:])
                start = position
        return "".join((*pieces, text[start:])) if pieces else text

    def _match(self, text: str, position: int) -> str:
        """The longest control token there; empty if there is none."""
        lengths = self._lengths[text[position]]
        return next((text[position : position + n] for n in lengths if text[position : position + n] in self._texts), "")

    @cached_property
    def _hidden(self) -> dict[str, str]:
        return {first: chr(HIDDEN + n) for n, first in enumerate(sorted(self._lengths))}

    @cached_property
    def _first_pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, sorted(self._lengths))))

    @cached_property
    def _first_characters(self) -> dict[int, str]:
        return {ord(hidden): first for first, hidden in self._hidden.items()}

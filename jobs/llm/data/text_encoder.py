"""Encodes rendered texts in which the text of a control token may be meant literally.

Control tokens that a chat template writes become one token. The same characters in a user's text stay ordinary text: before rendering,
`hide_control_tokens` replaces their first character by a private one, which templates pass on.

Texts without hidden tokens are encoded by the model's own tokenizer, at once. For others there is a second one, which knows control tokens
only under private names: the template's tokens get these names, and the hidden ones their own text again. Both replacements keep the
length, so offsets are those of the text.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jobs.runtime.errors import JobFailed

if TYPE_CHECKING:
    from tokenizers import Tokenizer

HIDDEN = 0xF0000  # first of the private characters that stand for the first characters of hidden tokens
PRIVATE_NAMES = 0xF1000  # first of those that begin the private names; tokenizers have at most some thousand control tokens
BORDER = "\U000fff00"  # no token crosses it
PRIVATE_CHARACTERS = range(HIDDEN, ord(BORDER) + 1)

Offsets = list[tuple[int, int]]


@dataclass(frozen=True)
class TextEncoder:
    """Encodes texts with a tokenizer of transformers. Can be pickled."""

    tokenizer: Any

    def __getstate__(self) -> dict[str, Any]:
        """Without the second tokenizer: pickling would lose how it treats special tokens."""
        return {"tokenizer": self.tokenizer}

    @cached_property
    def control_tokens(self) -> dict[str, int]:
        """Texts and ids of the special tokens."""
        return {token.content: token_id for token_id, token in self.tokenizer.added_tokens_decoder.items() if token.special}

    def hide_control_tokens(self, value: Any) -> Any:
        """A string, or the strings in lists and objects, with hidden control tokens. The same object where there are none."""
        if isinstance(value, str):
            return self._hide_in_text(value)
        if isinstance(value, list):
            items = [self.hide_control_tokens(item) for item in value]
            return value if all(new is old for new, old in zip(items, value, strict=True)) else items
        if isinstance(value, dict):
            pairs = {self.hide_control_tokens(key): self.hide_control_tokens(item) for key, item in value.items()}
            is_unchanged = all(new[0] is old[0] and new[1] is old[1] for new, old in zip(pairs.items(), value.items(), strict=True))
            return value if is_unchanged else pairs
        return value

    def show_control_tokens(self, text: str) -> str:
        """The text with hidden tokens as they were."""
        return text.translate(self._first_characters)

    def encode(self, text: str, borders: Sequence[int] = (), *, in_pieces: bool = False) -> tuple[list[int], Offsets]:
        """Tokens, and their positions in the text. No token crosses a border; `in_pieces`, none depends on it either. Raises JobFailed."""
        if (in_pieces and borders) or any(character in text for character in self._hidden_characters):
            return self._encode_with_private_names(text, borders)
        encoding = self._backend.encode(text, add_special_tokens=False)
        offsets: Offsets = encoding.offsets
        if any(_is_crossed(offsets, border) for border in borders):
            return self._encode_with_private_names(text, borders)
        return encoding.ids, offsets

    # --- control tokens in texts ---

    def _hide_in_text(self, text: str) -> str:
        found = self._find_control_tokens(text)
        if not found:
            return text
        if any(ord(character) in PRIVATE_CHARACTERS for character in text):
            message = f"a row has both the text of the control token {found[0][1]} and private-use Unicode characters"
            raise JobFailed("invalid_data", message, "remove either from the row")
        characters = list(text)
        for position, token in found:
            characters[position] = self._hidden_by_first[token[0]]
        return "".join(characters)

    def _find_control_tokens(self, text: str) -> list[tuple[int, str]]:
        """Positions and texts of control tokens, from left to right; of overlapping ones the longer."""
        found: list[tuple[int, str]] = []
        for first, lengths in self._lengths_by_first.items():
            position = text.find(first)
            while position >= 0:
                token = next((text[position : position + n] for n in lengths if text[position : position + n] in self.control_tokens), None)
                if token is not None:
                    found.append((position, token))
                position = text.find(first, position + len(token or first))
        found.sort()
        return [pair for n, pair in enumerate(found) if not n or found[n - 1][0] + len(found[n - 1][1]) <= pair[0]]

    @cached_property
    def _lengths_by_first(self) -> dict[str, list[int]]:
        """By first character: the lengths of the control tokens, longest first."""
        lengths: dict[str, set[int]] = {}
        for token in self.control_tokens:
            lengths.setdefault(token[0], set()).add(len(token))
        return {first: sorted(values, reverse=True) for first, values in lengths.items()}

    @cached_property
    def _hidden_by_first(self) -> dict[str, str]:
        return {first: chr(HIDDEN + n) for n, first in enumerate(sorted(self._lengths_by_first))}

    @cached_property
    def _hidden_characters(self) -> list[str]:
        return list(self._hidden_by_first.values())

    @cached_property
    def _first_characters(self) -> dict[int, str]:
        return {ord(hidden): first for first, hidden in self._hidden_by_first.items()}

    # --- encoding ---

    @cached_property
    def _backend(self) -> "Tokenizer":
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        return backend

    @cached_property
    def _private_names(self) -> dict[str, str]:
        return {token: chr(PRIVATE_NAMES + n) + token[1:] for n, token in enumerate(self.control_tokens)}

    @cached_property
    def _private_backend(self) -> tuple["Tokenizer", dict[int, int | None]]:
        """The tokenizer that knows control tokens by private names, and the ids that its private ids stand for."""
        from tokenizers import AddedToken, Tokenizer

        backend = Tokenizer.from_str(self._backend.to_str())
        backend.encode_special_tokens = True
        options = {token.content: token for token in self.tokenizer.added_tokens_decoder.values()}
        added = [
            AddedToken(name, lstrip=options[token].lstrip, rstrip=options[token].rstrip, normalized=False, special=False)
            for token, name in self._private_names.items()
        ]
        backend.add_tokens([*added, AddedToken(BORDER, normalized=False, special=False)])
        ids: dict[int, int | None] = {backend.token_to_id(name): self.control_tokens[token] for token, name in self._private_names.items()}
        return backend, ids | {backend.token_to_id(BORDER): None}

    def _encode_with_private_names(self, text: str, borders: Sequence[int]) -> tuple[list[int], Offsets]:
        backend, ids_by_private = self._private_backend
        characters = list(text)
        for position, token in self._find_control_tokens(text):
            characters[position] = self._private_names[token][0]
        borders = sorted(set(borders))
        for count, border in enumerate(borders):
            characters.insert(border + count, BORDER)
        encoding = backend.encode(self.show_control_tokens("".join(characters)), add_special_tokens=False)
        ids: list[int] = []
        offsets: Offsets = []
        control_ids = set(self.control_tokens.values()) - {self.tokenizer.unk_token_id}
        passed = 0  # borders before the token
        for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token_id in control_ids:
                message = f"a row has the text {self.tokenizer.decode([token_id])}, which this tokenizer reads as a control token only"
                raise JobFailed("invalid_data", message, "remove it from the row")
            known = ids_by_private.get(token_id, token_id)
            if known is None:
                passed += 1
                continue
            ids.append(known)
            offsets.append((start - passed, end - passed))
        return ids, offsets


def _is_crossed(offsets: Offsets, border: int) -> bool:
    """Whether a token starts before the border and ends after it."""
    after = bisect_left(offsets, (border,))
    return after > 0 and offsets[after - 1][1] > border

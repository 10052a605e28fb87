"""Held-out rows that nearly repeat a training row, by MinHash signatures of five words in a row.

The held-out rows are indexed, and the training rows only pass by, so memory grows with the held-out rows alone: 512 bytes each, and
the index. What many held-out rows share, such as an instruction, is not compared: it would make all rows look alike.
"""

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from schema.ingestion import NearDuplicates

SHINGLE_WORDS = 5
THRESHOLD = 0.8  # of the shingles that either row has, the share that both have
PERMUTATIONS = 128
BANDS = 16  # of 8 numbers: finds 95 % of the pairs at the threshold, and nearly all above 0.9
CHUNK_ROWS = 512
MAX_WORDS = 5000  # of a row that are compared
MIN_OWN_SHINGLES = 3  # of a row, besides what many rows share
# Held-out rows in which shared text is looked for, and what counts as shared.
SHARED_TEXT_ROWS = 512
MIN_SHARING_ROWS = 5
MIN_SHARING_SHARE = 0.2
MAX_CHECKED = 64  # held-out rows that are compared with one training row
MAX_EXAMPLES = 20
# Scripts without spaces have one word per character.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")

Shingles = list[str]


class NearDuplicateFinder:
    """Add the held-out rows first, then the training rows."""

    def __init__(self) -> None:
        from rensa import RMinHashLSH

        self._index = RMinHashLSH(THRESHOLD, PERMUTATIONS, BANDS)
        self._signatures: dict[int, Any] = {}  # of the held-out rows for which no near-duplicate was found yet
        self._shared: frozenset[str] | None = None  # shingles that many held-out rows have
        self._held_out: list[tuple[int, Shingles]] = []
        self._training: list[tuple[int, Shingles]] = []
        self._compared_rows = self._training_rows = 0
        self._pairs: list[tuple[int, int]] = []

    def add_held_out(self, number: int, text: str) -> None:
        """Add a held-out row by its number in the split."""
        self._compared_rows += 1
        self._held_out.append((number, _make_shingles(text)))
        if len(self._held_out) == max(CHUNK_ROWS, SHARED_TEXT_ROWS):
            self._index_held_out()

    def add_training(self, number: int, text: str) -> None:
        """Add a training row by its number in the split."""
        self._index_held_out()
        self._training_rows += 1
        self._training.append((number, _make_shingles(text)))
        if len(self._training) == CHUNK_ROWS:
            self._compare()

    def finish(self) -> NearDuplicates:
        """What was found."""
        self._compare()
        self._pairs.sort()
        return NearDuplicates(
            compared_rows=self._compared_rows,
            compared_training_rows=self._training_rows,
            held_out_rows_with_a_near_duplicate=len(self._pairs),
            examples=tuple(self._pairs[:MAX_EXAMPLES]),
        )

    def _index_held_out(self) -> None:
        if not self._held_out:
            return
        if self._shared is None:
            self._shared = _find_shared([shingles for _, shingles in self._held_out])
        for number, signature in self._sign(self._held_out):
            self._signatures[number] = signature
            self._index.insert(number, signature)
        self._held_out.clear()

    def _compare(self) -> None:
        for number, signature in self._sign(self._training):
            candidates = sorted(self._index.query(signature))[:MAX_CHECKED]
            for held_out in candidates:
                if signature.jaccard(self._signatures[held_out]) >= THRESHOLD:
                    self._pairs.append((held_out, number))
                    self._index.remove(held_out)
                    del self._signatures[held_out]
        self._training.clear()

    def _sign(self, rows: list[tuple[int, Shingles]]) -> Iterator[tuple[int, Any]]:
        from rensa import RMinHash

        shared = self._shared or frozenset[str]()
        own = [(number, shingles, [each for each in shingles if each not in shared]) for number, shingles in rows]
        kept = [(number, mine) for number, shingles, mine in own if len(mine) >= min(len(shingles), MIN_OWN_SHINGLES) > 0]
        signatures = RMinHash.from_token_sets([mine for _, mine in kept], num_perm=PERMUTATIONS, seed=1)
        return zip((number for number, _ in kept), signatures, strict=True)


def _make_shingles(text: str) -> Shingles:
    """The different runs of words in their order; a shorter text is one run. Case and punctuation do not count."""
    words = WORD.findall(text.lower())[:MAX_WORDS]
    if len(words) <= SHINGLE_WORDS:
        return [" ".join(words)] if words else []
    return list(dict.fromkeys(" ".join(words[n : n + SHINGLE_WORDS]) for n in range(len(words) - SHINGLE_WORDS + 1)))


def _find_shared(rows: list[Shingles]) -> frozenset[str]:
    counts = Counter(shingle for shingles in rows[:SHARED_TEXT_ROWS] for shingle in shingles)
    limit = max(MIN_SHARING_ROWS, MIN_SHARING_SHARE * min(len(rows), SHARED_TEXT_ROWS))
    return frozenset(shingle for shingle, count in counts.items() if count >= limit)

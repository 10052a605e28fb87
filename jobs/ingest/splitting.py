"""Which rows are held out for evaluation, and the files of the splits.

Held-out rows are chosen by the hash of their prompt (everything before the last answer, with its images; for `text`, the whole
text). So a row is never in both splits, nor are two answers to one prompt, and the choice does not depend on the order of the rows.
"""

import hashlib
from array import array
from collections.abc import Iterator
from itertools import groupby
from typing import BinaryIO, Literal

from jobs.ingest.rows.row import Row
from schema.dataset import EVAL_SPLIT, TRAIN_SPLIT
from schema.ingestion import WrittenSplit

MAX_EVAL_FRACTION = 0.5


class Splitter:
    """Decides which rows are held out, after all rows were added.

    When no two rows share a prompt, exactly `eval_fraction` of the distinct rows, rounded, is held out. Rows that share a
    prompt stay in one split, so it may be fewer; it is more only when even the rarest prompt has more rows than requested.
    Unless there are two different prompts, nothing is held out.
    """

    def __init__(self, eval_fraction: float, seed: int) -> None:
        if not 0 <= eval_fraction <= MAX_EVAL_FRACTION:
            raise ValueError(f"eval_fraction is {eval_fraction}; it must be between 0 and {MAX_EVAL_FRACTION}")
        self.duplicates_dropped = 0
        self._eval_fraction = eval_fraction
        self._seed = f"{seed}:".encode()
        self._seen: set[int] = set()  # 128 bits each; as int they take less memory than as bytes
        self._keys = array("Q")  # each kept row's position in the order that the seed gives to prompts

    def add(self, row: Row) -> bool:
        """Add a row; False for a duplicate, which the caller drops."""
        digest = int.from_bytes(row.digest)
        if digest in self._seen:
            self.duplicates_dropped += 1
            return False
        self._seen.add(digest)
        self._keys.append(int.from_bytes(hashlib.blake2b(self._seed + row.prompt_digest, digest_size=8).digest()))
        return True

    def assign_splits(self) -> Iterator[Literal["train", "eval"]]:
        """The split of each kept row, in the order in which they were added."""
        held_out = _choose_held_out(self._keys, self._eval_fraction)
        return (EVAL_SPLIT if key in held_out else TRAIN_SPLIT for key in self._keys)


def _choose_held_out(keys: "array[int]", eval_fraction: float) -> set[int]:
    """The keys of the prompts to hold out: in ascending order, each one whose rows still fit into the requested number."""
    if eval_fraction == 0 or not keys or min(keys) == max(keys):
        return set()
    ordered = sorted(keys)
    remaining = max(1, round(eval_fraction * len(ordered)))
    held_out: set[int] = set()
    for key, rows in _count_rows_per_prompt(ordered):
        if rows <= remaining:
            held_out.add(key)
            remaining -= rows
        if not remaining:
            break
    return held_out or {min(_count_rows_per_prompt(ordered), key=lambda prompt: prompt[1])[0]}


def _count_rows_per_prompt(ordered: list[int]) -> Iterator[tuple[int, int]]:
    """Each prompt's key, with its number of rows."""
    return ((key, sum(1 for _ in rows)) for key, rows in groupby(ordered))


class SplitWriter:
    """Writes the lines of one split and counts them."""

    def __init__(self, out: BinaryIO) -> None:
        self.rows = 0
        self._out = out
        self._size_bytes = 0
        self._sha256 = hashlib.sha256()

    def write(self, line: bytes) -> None:
        self._out.write(line)
        self._sha256.update(line)
        self._size_bytes += len(line)
        self.rows += 1

    def describe(self, file: str) -> WrittenSplit:
        """What was written to the file of that name."""
        return WrittenSplit(file=file, rows=self.rows, size_bytes=self._size_bytes, sha256=self._sha256.hexdigest())

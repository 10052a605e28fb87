"""Which rows are held out for evaluation, and the files of the splits.

Held-out rows are chosen by the hash of their prompt (everything before the last answer, with its images; for `text`, the whole
text). So a row is never in both splits, nor are two answers to one prompt, and the choice does not depend on the order of the rows.
"""

import hashlib
import sys
from array import array
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from jobs.ingest.rows.row import Row
from schema.ingestion import INDEX_INTERVAL_ROWS, WrittenSplit

MAX_EVAL_FRACTION = 0.5
BLOCK_BYTES = 1 << 20  # of rows that are written and hashed together


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

    def choose_held_out(self) -> Iterator[bool]:
        """Whether each kept row is held out for evaluation, in the order in which they were added."""
        held_out = _choose_held_out(self._keys, self._eval_fraction)
        return (key in held_out for key in self._keys)


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
    """Writes the lines of one split, a block at a time, and an index of their positions."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / f"{name}.jsonl"
        self.index_path = folder / f"{name}.index"
        self.rows = 0
        self._size_bytes = 0
        self._sha256 = hashlib.sha256()
        self._positions = array("Q")
        self._block: list[bytes] = []
        self._block_bytes = 0
        self._out = self.path.open("wb")

    def write(self, line: bytes) -> None:
        """Write the next row, with its line feed. Raises OSError."""
        if self.rows % INDEX_INTERVAL_ROWS == 0:
            self._positions.append(self._size_bytes)
        self.rows += 1
        self._size_bytes += len(line)
        self._block.append(line)
        self._block_bytes += len(line)
        if self._block_bytes >= BLOCK_BYTES:
            self._write_block()

    def close(self) -> None:
        """Write what remains and the index; of a split without rows nothing is left. Raises OSError."""
        self._write_block()
        self._out.close()
        if not self.rows:
            self.path.unlink()
            return
        if sys.byteorder == "big":
            self._positions.byteswap()
        self.index_path.write_bytes(self._positions.tobytes())

    def describe(self) -> WrittenSplit:
        """What was written."""
        digest = self._sha256.hexdigest()
        return WrittenSplit(
            file=self.path.name, rows=self.rows, size_bytes=self._size_bytes, sha256=digest, index_file=self.index_path.name
        )

    def _write_block(self) -> None:
        block = b"".join(self._block)
        self._sha256.update(block)
        self._out.write(block)
        self._block.clear()
        self._block_bytes = 0

"""Rows grouped into the blocks that a model sees: one by one, or packed. A block is the numbers of its rows until it is read."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from heapq import heappop, heappush
from typing import TYPE_CHECKING, overload

from jobs.llm.data.arrow_rows import count_lengths
from jobs.llm.data.tokenize import TokenizedExample

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Block = list[TokenizedExample]


class RowBlocks(Sequence[Block]):
    """Blocks of rows. `order` has the numbers of the rows block by block, and `ends` where each block ends in it."""

    def __init__(self, rows: Sequence[TokenizedExample], order: "NDArray[np.int64]", ends: "NDArray[np.int64]") -> None:
        self.rows = rows
        self.order = order
        self.ends = ends

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> Block: ...

    @overload
    def __getitem__(self, index: slice) -> list[Block]: ...

    def __getitem__(self, index: int | slice) -> Block | list[Block]:
        if isinstance(index, slice):
            return [self[n] for n in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        position = index % len(self)
        start = int(self.ends[position - 1]) if position else 0
        return [self.rows[int(n)] for n in self.order[start : int(self.ends[position])]]


def count_block_tokens(blocks: RowBlocks) -> list[int]:
    """The number of tokens of each block."""
    import numpy as np

    sums = np.concatenate([[0], np.cumsum(count_lengths(blocks.rows)[blocks.order])])
    return np.diff(sums[np.concatenate([[0], blocks.ends])]).tolist()


def make_single_blocks(rows: Sequence[TokenizedExample]) -> RowBlocks:
    """Every row as its own block, in order."""
    import numpy as np

    return RowBlocks(rows, np.arange(len(rows)), np.arange(1, len(rows) + 1))


def pack_rows(rows: Sequence[TokenizedExample], max_length: int) -> RowBlocks:
    """Pack rows into blocks of at most `max_length` tokens: best fit, longest row first."""
    import numpy as np

    lengths = count_lengths(rows)
    blocks = np.empty(len(rows), np.int64)  # the block of each row
    free_sizes: list[int] = []  # the numbers of tokens that are free in any block, ascending
    free_blocks: dict[int, list[int]] = {}  # a heap of the blocks with so many free tokens
    longest_first = np.argsort(-lengths, kind="stable")
    count = 0
    for row in longest_first.tolist():
        size = int(lengths[row])
        place = bisect_left(free_sizes, size)
        if place < len(free_sizes):
            left = free_sizes[place]
            block = heappop(free_blocks[left])
            if not free_blocks[left]:
                del free_blocks[left], free_sizes[place]
        else:
            left, block, count = max_length, count, count + 1
        blocks[row] = block
        left -= size
        if left > 0:
            if left not in free_blocks:
                free_blocks[left] = []
                insort(free_sizes, left)
            heappush(free_blocks[left], block)
    # Within a block, rows follow each other as they were packed.
    order = longest_first[np.argsort(blocks[longest_first], kind="stable")]
    return RowBlocks(rows, order, np.cumsum(np.bincount(blocks, minlength=count)))

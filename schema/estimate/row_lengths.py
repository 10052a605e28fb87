"""How long rows are, in tokens, and what follows from it: truncation, padding, packed blocks. Pure, from counts in buckets.

Lengths come from a tokenizer (`exact`), or are guessed from characters; then they have the spread that rows usually have.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

MAX_SIMULATED_ROWS = 4096  # that are packed to find how full blocks become; more rows change it little
BUCKET_WIDTH = 1 / 3  # of its mean length: buckets end at powers of two, and at halves between
CHARACTERS_PER_TOKEN = 3.5  # of English text with a large vocabulary about 4.2; other languages and code have fewer
TURN_TOKENS = 12  # that a chat template adds to a row of two turns
# Share of the rows, and their length beside the mean, of rows whose lengths nobody counted: a log-normal of sigma 0.7 in four parts.
GUESSED_SHAPE = ((0.35, 0.40), (0.35, 0.80), (0.22, 1.55), (0.08, 2.99))


@dataclass(frozen=True)
class RowLengths:
    """The lengths of the rows of a training, ascending: how many rows have about how many tokens each."""

    buckets: tuple[tuple[float, int], ...]  # tokens of a row, and rows
    longest: int  # tokens of the longest row
    exact: bool  # counted with the tokenizer, of all rows
    top: tuple[int, ...] = ()  # of the longest rows, descending, where they were counted
    counted_rows: int = 0  # to which these belong: of all splits of a dataset, where the rows are those of one
    clipped: tuple[tuple[int, int], ...] = ()  # (length, tokens of all rows when each is cut to it), where that was counted

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return sum(count for _, count in self.buckets)

    @property
    def tokens(self) -> float:
        """Tokens of all rows."""
        return sum(tokens * count for tokens, count in self.buckets)

    def truncate(self, max_length: int) -> "RowLengths":
        """The rows cut to at most that many tokens."""
        if self.longest <= max_length:
            return self
        cut = tuple((min(tokens, float(max_length)), count) for tokens, count in self.buckets)
        top = tuple(min(tokens, max_length) for tokens in self.top)
        known = dict(self.clipped).get(max_length)
        truncated = RowLengths(cut, max_length, self.exact and known is not None, top, self.counted_rows)
        return truncated if known is None else truncated.scale_to(known)

    def scale_to(self, total_tokens: int) -> "RowLengths":
        """The rows with their lengths moved so that their sum is that number."""
        factor = total_tokens / self.tokens if self.tokens else 1.0
        return replace(self, buckets=tuple((tokens * factor, count) for tokens, count in self.buckets))

    def count_longer(self, max_length: int) -> int:
        """About how many rows are longer."""
        if self.longest <= max_length:
            return 0
        if self._tops_are_all_that_is_cut(max_length):
            longer = sum(tokens > max_length for tokens in self.top)
            return ceil(longer * min(1.0, self.rows / self.counted_rows)) if self.counted_rows else longer
        return max(1, sum(count for tokens, count in self.buckets if tokens > max_length))

    def resize(self, rows: int) -> "RowLengths":
        """Rows of the same lengths, in another number."""
        if rows == self.rows:
            return self
        total, scaled, given, seen = self.rows, list[tuple[float, int]](), 0, 0
        for tokens, count in self.buckets:  # rounded so that the sum is right
            seen += count
            share = round(rows * seen / total) - given if total else 0
            scaled.append((tokens, share))
            given += share
        return replace(self, buckets=tuple(scaled), exact=False, clipped=())

    def pad(self, batch_size: int) -> float:
        """Tokens of all rows when each batch is as long as its longest row, on average."""
        total = self.rows
        if not total or batch_size <= 1:
            return self.tokens
        mean_of_longest, seen, before = 0.0, 0, 0.0
        for tokens, count in self.buckets:
            seen += count
            chance = (seen / total) ** batch_size  # that no row of a batch is longer
            mean_of_longest += tokens * (chance - before)
            before = chance
        return max(self.tokens, mean_of_longest * total)

    def pack(self, max_length: int) -> int:
        """About how many blocks of at most that many tokens the rows make, best fit and longest first, as the trainer packs them."""
        rows, cut = self.rows, self.truncate(max_length)
        if not rows:
            return 0
        sampled = cut.resize(min(rows, MAX_SIMULATED_ROWS))
        free: list[float] = []  # of each block, ascending
        blocks = 0
        for mean, count in sorted(sampled.buckets, reverse=True):
            for n in range(count):
                tokens = min(mean * (1 + BUCKET_WIDTH * (0.5 - (n + 0.5) / count)), float(max_length))
                place = bisect_left(free, tokens)
                left = max_length - tokens
                if place < len(free):
                    left = free.pop(place) - tokens
                else:
                    blocks += 1
                free.insert(bisect_left(free, left), left)
        return max(1, ceil(blocks * rows / max(1, sampled.rows)), ceil(cut.tokens / max_length))

    def list_longest(self, count: int, max_length: int) -> tuple[int, ...]:
        """The longest rows, descending: those that were counted, and the shortest of them for the others."""
        known = [min(tokens, max_length) for tokens in self.top] or [min(self.longest, max_length)]
        return tuple((known + [known[-1]] * max(0, count - len(known)))[: min(count, max(1, self.rows))])

    def _tops_are_all_that_is_cut(self, max_length: int) -> bool:
        """Whether every row that is longer than that was counted by itself."""
        return bool(self.top) and (self.top[-1] <= max_length or len(self.top) >= self.counted_rows)


def read_histogram(histogram: Sequence[tuple[int, int]], total_tokens: int, longest: Sequence[int], *, exact: bool) -> RowLengths:
    """Lengths from a histogram: (largest length of a bucket, rows), ascending. The buckets' means are moved so that their sum is right."""
    buckets: list[tuple[float, int]] = []
    previous = 0
    for limit, count in histogram:
        if count:
            buckets.append(((previous + 1 + limit) / 2, count))
        previous = limit
    guessed = sum(tokens * count for tokens, count in buckets)
    factor = total_tokens / guessed if guessed else 1.0
    top = tuple(sorted(longest, reverse=True))
    most = top[0] if top else (histogram[-1][0] if histogram else 0)
    rows = sum(count for _, count in buckets)
    return RowLengths(tuple((tokens * factor, count) for tokens, count in buckets), most, exact, top, rows)


def guess_lengths(rows: int, characters: float) -> RowLengths:
    """Lengths of rows of which only the number of characters is known."""
    if rows <= 0:
        return RowLengths((), 0, False)
    mean = characters / CHARACTERS_PER_TOKEN / rows + TURN_TOKENS
    buckets = tuple((mean * length, share) for share, length in GUESSED_SHAPE)
    counts, given, seen = list[tuple[float, int]](), 0, 0.0
    for tokens, share in buckets:
        seen += share
        count = round(rows * seen) - given
        counts.append((tokens, count))
        given += count
    return RowLengths(tuple(counts), ceil(mean * 4), False)


def merge_lengths(parts: Sequence[RowLengths]) -> RowLengths:
    """The lengths of several datasets together."""
    if len(parts) == 1:
        return parts[0]
    buckets = tuple(sorted((bucket for part in parts for bucket in part.buckets if bucket[1]), key=lambda bucket: bucket[0]))
    # Below the shortest row that one of them counted by itself, others of it may be missing.
    known_from = max(
        (part.top[-1] if part.top else part.longest + 1 for part in parts if len(part.top) < part.counted_rows or not part.top), default=0
    )
    top = tuple(sorted((tokens for part in parts for tokens in part.top if tokens >= known_from), reverse=True))
    counted_rows = sum(part.counted_rows for part in parts)
    return RowLengths(buckets, max((part.longest for part in parts), default=0), all(part.exact for part in parts), top, counted_rows)

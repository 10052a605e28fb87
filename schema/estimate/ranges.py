"""A range of numbers: what an estimate promises. Sums and products of ranges stay ranges."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Range:
    """From the least that is likely to the most; `low` is at most `high`, and neither is negative."""

    low: float
    high: float

    def __add__(self, other: "Range") -> "Range":
        return Range(self.low + other.low, self.high + other.high)

    def scale(self, factor: float) -> "Range":
        """The range times a number that is not negative."""
        return Range(self.low * factor, self.high * factor)

    def spread(self, low: float, high: float) -> "Range":
        """The range with its ends times two factors, of which `low` is the smaller one."""
        return Range(self.low * low, self.high * high)


NOTHING = Range(0.0, 0.0)


def sum_ranges(ranges: Iterable[Range]) -> Range:
    """The sum of ranges; zero of none."""
    total = NOTHING
    for each in ranges:
        total = total + each
    return total

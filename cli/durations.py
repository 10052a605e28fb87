"""Durations as a person writes them: `30m`, `12h`, `7d`, `2w`."""

import re
from datetime import timedelta

UNITS = {"m": timedelta(minutes=1), "h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}
EXAMPLES = "30m, 12h, 7d or 2w"
# At most five digits: 99999w from now is still a date.
_DURATION = re.compile(r"(\d{1,5}(?:\.\d{1,3})?)([mhdw])")


def read_duration(text: str) -> timedelta | None:
    """The duration, or None for a text that is none."""
    match = _DURATION.fullmatch(text.strip())
    return float(match[1]) * UNITS[match[2]] if match else None

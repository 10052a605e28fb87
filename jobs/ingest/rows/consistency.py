"""What must be true of all rows of a dataset together."""

from collections import Counter
from typing import Literal

from jobs.ingest.records import InvalidInput
from jobs.ingest.rows.forms import FORMATS
from jobs.ingest.rows.row import Row
from jobs.ingest.rows.values import InvalidValue


class ConsistencyChecker:
    """Checks that all rows have the same form, that their images are not too large together, and that their labels differ."""

    def __init__(self, max_pixels: int, unit: Literal["line", "row"] = "line") -> None:
        self.rows = 0
        self._max_pixels = max_pixels
        self._unit = unit
        self._pixels = 0
        self._first_shape = ""
        self._first_place = ""
        self._images_place = ""
        self._tools_place = ""
        self._labels = Counter[bool]()

    def add(self, row: Row, line: int, part: str = "") -> None:
        """Compare a valid row with those before it. Raises InvalidValue, and then the row counts as never added."""
        if not self.rows:
            self._first_place, self._first_shape = self._describe_place(line, part), row.shape
        elif row.shape != self._first_shape:
            difference = f"this row is {row.shape}, but {self._first_place} is {self._first_shape}"
            raise InvalidValue("", f"{difference}; all rows of a dataset must have one form", "mixed_forms")
        if row.has_tools or row.images:
            self._add_images_or_tools(row, self._describe_place(line, part))
        if row.label is not None:
            self._labels[row.label] += 1
        self.rows += 1

    def check_labels(self) -> None:
        """Raise InvalidInput when all labels are the same, or when there were no rows."""
        if not self.rows:
            raise InvalidInput("there are no rows", f"a row is {FORMATS}")
        if len(self._labels) == 1:
            counts = f"{self._labels[True]:,} rows are true and {self._labels[False]:,} are false"
            raise InvalidInput(f"label is the same in all rows: {counts}", "there must be some of each", "label")

    def _add_images_or_tools(self, row: Row, place: str) -> None:
        """Count the row, which has one of them. Raises InvalidValue."""
        images_place, tools_place = self._images_place, self._tools_place
        if row.has_tools:
            tools_place = tools_place or place
        else:
            images_place = images_place or place
        if images_place and tools_place:
            reason = f"{images_place} has images and {tools_place} has tools; a dataset may have one or the other"
            raise InvalidValue("", reason, "images_and_tools")
        if self._pixels + row.pixels > self._max_pixels:
            reason = f"more than {self._max_pixels:,} pixels in the images so far; scale them down, or split the file"
            raise InvalidValue("", reason, "too_many")
        self._images_place, self._tools_place = images_place, tools_place
        self._pixels += row.pixels

    def _describe_place(self, line: int, part: str) -> str:
        return f"{part} {self._unit} {line}".lstrip()

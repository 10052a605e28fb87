"""What must be true of all rows of a dataset together."""

from collections import Counter
from typing import Literal

from jobs.ingest.records import InvalidInput, Record
from jobs.ingest.rows.forms import FORMATS, ValidatedRow
from jobs.ingest.rows.values import InvalidValue


class ConsistencyChecker:
    """Checks that all rows of a dataset have the same form, and that their labels are not all the same."""

    def __init__(self, unit: Literal["line", "row"] = "line") -> None:
        self.rows = 0
        self._unit = unit
        self._first_shape = ""
        self._first_place = ""
        self._images_place = ""
        self._tools_place = ""
        self._labels = Counter[bool]()

    def add(self, record: Record, content: ValidatedRow) -> None:
        """Compare a valid row with those before it. Raises InvalidValue, and then the row counts as never added."""
        if not self.rows:
            self._first_place, self._first_shape = self._describe_place(record), content.shape
        elif content.shape != self._first_shape:
            difference = f"this row is {content.shape}, but {self._first_place} is {self._first_shape}"
            raise InvalidValue("", f"{difference}; all rows of a dataset must have one form", "mixed_forms")
        if content.has_tools or content.images.uris:
            self._add_images_or_tools(record, content)
        if content.label is not None:
            self._labels[content.label] += 1
        self.rows += 1

    def _add_images_or_tools(self, record: Record, content: ValidatedRow) -> None:
        """Remember the row, which has one of them. Raises InvalidValue."""
        place = self._describe_place(record)
        if content.has_tools and self._images_place:
            raise InvalidValue("", _describe_images_and_tools(self._images_place, place), "images_and_tools")
        if content.images.uris and self._tools_place:
            raise InvalidValue("", _describe_images_and_tools(place, self._tools_place), "images_and_tools")
        if content.has_tools:
            self._tools_place = self._tools_place or place
        else:
            self._images_place = self._images_place or place

    def _describe_place(self, record: Record) -> str:
        return f"{record.part} {self._unit} {record.line}".lstrip()

    def check_labels(self) -> None:
        """Raise InvalidInput when all labels are the same, or when there were no rows."""
        if not self.rows:
            raise InvalidInput("there are no rows", f"a row is {FORMATS}")
        if len(self._labels) == 1:
            counts = f"{self._labels[True]:,} rows are true and {self._labels[False]:,} are false"
            raise InvalidInput(f"label is the same in all valid rows: {counts}", "there must be some of each", "label")


def _describe_images_and_tools(images_place: str, tools_place: str) -> str:
    return f"{images_place} has images and {tools_place} has tools; a dataset may have one or the other"

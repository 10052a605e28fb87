"""What must be true of all rows of a dataset together."""

from collections import Counter

from jobs.ingest.records import InvalidInput
from jobs.ingest.rows.forms import FORMATS, ValidatedRow
from jobs.ingest.rows.values import InvalidValue


class ConsistencyChecker:
    """Checks that all rows of a dataset have the same form, and that their labels are not all the same."""

    def __init__(self) -> None:
        self.rows = 0
        self._first_line = 0
        self._first_shape = ""
        self._images_line: int | None = None
        self._tools_line: int | None = None
        self._labels = Counter[bool]()

    def add(self, number: int, content: ValidatedRow) -> None:
        """Compare a valid row with those before it. Raises InvalidValue, and then the row counts as never added."""
        if not self.rows:
            self._first_line, self._first_shape = number, content.shape
        elif content.shape != self._first_shape:
            difference = f"this row is {content.shape}, but line {self._first_line} is {self._first_shape}"
            raise InvalidValue("", f"{difference}; all rows of a dataset must have one form", "mixed_forms")
        self._add_images_and_tools(number, content)
        if content.label is not None:
            self._labels[content.label] += 1
        self.rows += 1

    def _add_images_and_tools(self, number: int, content: ValidatedRow) -> None:
        if content.images.uris and self._images_line is None:
            self._images_line = number
        if content.has_tools and self._tools_line is None:
            self._tools_line = number
        if self._images_line is not None and self._tools_line is not None:
            lines = f"line {self._images_line} has images and line {self._tools_line} has tools"
            raise InvalidValue("", f"{lines}; a dataset may have one or the other", "images_and_tools")

    def check_labels(self) -> None:
        """Raise InvalidInput when all labels are the same, or when there were no rows."""
        if not self.rows:
            raise InvalidInput("there are no rows", f"a row is {FORMATS}")
        if len(self._labels) == 1:
            counts = f"{self._labels[True]:,} rows are true and {self._labels[False]:,} are false"
            raise InvalidInput(f"label is the same in all rows: {counts}", "there must be some of each", "label")

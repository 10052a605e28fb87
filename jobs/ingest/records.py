"""Records of a file, before it is known what they mean; and the errors of a whole file."""

from typing import NamedTuple

from jobs.ingest.rows.values import JsonObject
from schema.ingestion import InputProblem


class Record(NamedTuple):
    """One record: a line of JSON that is not parsed yet, or the columns of a table's row.

    Values of columns are what `rows.values.parse` makes of JSON: str, bool, None, `Number`, lists and objects.
    """

    line: int  # in its part, from 1: a line of text, or a row of a table whose header is row 1
    content: bytes | JsonObject
    part: str = ""  # the file in an archive or folder, or the sheet; empty for a single file


class InvalidInput(ValueError):
    """A file cannot be read as a whole, or an option does not fit it. `param` is the field of the request to change."""

    def __init__(self, message: str, hint: str = "", param: str = "file") -> None:
        self.problem = InputProblem(message=message, hint=hint, param=param)
        super().__init__(message)

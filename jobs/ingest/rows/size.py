"""How long a row may be: its text has one limit, its images another."""

import re

from jobs.ingest.rows.forms import ValidatedRow
from jobs.ingest.rows.row import Row
from jobs.ingest.rows.values import InvalidValue
from schema.ingestion import IngestLimits

DATA_URI_PATTERN = re.compile(rb'"data:[^"]*', re.IGNORECASE)  # a data: URI within a row, whole or as far as it was read


def check_text_size(row: Row, content: ValidatedRow, limits: IngestLimits) -> None:
    """Raise InvalidValue when the row is too long without its images: text that looks like a data: URI does not count as one."""
    image_bytes = sum(len(image) for image in content.images.uris)
    if len(row.canonical) - image_bytes > limits.max_row_bytes:
        raise InvalidValue("", describe_long_row(limits, has_images=image_bytes > 0), "too_long")


def describe_long_row(limits: IngestLimits, *, has_images: bool) -> str:
    """Why a row is too long, and what would help."""
    without = " without its images" if has_images else ""
    return f"longer than {limits.max_row_bytes:,} bytes{without}; shorten the row, or split it into several"

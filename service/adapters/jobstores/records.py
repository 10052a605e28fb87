"""Stored records as values: the JSON that every job store keeps, read in any version up to the current one."""

import logging
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import TypeVar

from schema.migrations import NewerRecord, VersionedRecord
from service.core.errors import RecordTooNew

log = logging.getLogger(__name__)

Record = TypeVar("Record", bound=VersionedRecord)


def format_timestamp(timestamp: datetime) -> str:
    """UTC text that sorts like the time it stands for."""
    return timestamp.astimezone(UTC).isoformat(timespec="microseconds")


def load_record(model: type[Record], text: str) -> Record:
    """A record from its JSON. Raises RecordTooNew when a newer version of Tunesmith wrote it; the record stays as it is."""
    try:
        return model.load(text)
    except NewerRecord as error:
        raise RecordTooNew(f"{error}", hint="deploy the version that wrote it, or a newer one") from error


def load_readable_records(model: type[Record], texts: Iterable[str]) -> list[Record]:
    """The records that this version can read. For work lists, where one record must not stop the work on all others."""
    records: list[Record] = []
    for text in texts:
        try:
            records.append(load_record(model, text))
        except RecordTooNew as error:
            log.error("record skipped: a newer version of Tunesmith wrote it", extra={"error": error.message})
    return records

"""Stored records as values: the JSON that every job store keeps, read in any version up to the current one."""

import logging
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import TypeVar

from schema.job import Progress
from schema.migrations import NewerRecord, VersionedRecord
from service.core.errors import RecordTooNew, UnreadableRecord

log = logging.getLogger(__name__)

MAX_REPORTED_RECORDS = 10_000

Record = TypeVar("Record", bound=VersionedRecord)


def format_timestamp(timestamp: datetime) -> str:
    """UTC text that sorts like the time it stands for."""
    return timestamp.astimezone(UTC).isoformat(timespec="microseconds")


def load_record(model: type[Record], text: str) -> Record:
    """A record from its JSON. Raises RecordTooNew when a newer version of Tunesmith wrote it, and UnreadableRecord when it is damaged."""
    try:
        return model.load(text)
    except NewerRecord as error:
        raise RecordTooNew(f"{error}", hint="deploy the version that wrote it, or a newer one; DELETE removes it") from error
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:  # a migration can raise any of them
        kind = model.__name__.lower()
        raise UnreadableRecord(
            f"the stored record of this {kind} cannot be read: {str(error).partition(chr(10))[0]}", hint="DELETE removes it with its files"
        ) from error


def load_progress(text: str | None) -> Progress | None:
    """A heartbeat's progress; None also for one that cannot be read, because the next heartbeat replaces it."""
    try:
        return Progress.load(text) if text else None
    except ValueError:
        return None


class RecordReader:
    """Reads records for lists, where one that cannot be read must not hide the others. It is logged once in a process."""

    def __init__(self) -> None:
        self._reported: set[str] = set()

    def load_readable(self, model: type[Record], rows: Iterable[tuple[str, str]], limit: int | None = None) -> list[Record]:
        """The first `limit` readable records of rows with an id and JSON. Reads no more rows than it needs."""
        records: list[Record] = []
        for record_id, text in rows:
            try:
                records.append(load_record(model, text))
            except (RecordTooNew, UnreadableRecord) as error:
                self.report(record_id, error.message)
            if len(records) == limit:
                break
        return records

    def report(self, record_id: str, reason: str) -> None:
        """Log that a record is skipped."""
        if record_id not in self._reported and len(self._reported) < MAX_REPORTED_RECORDS:
            self._reported.add(record_id)
            log.error("record skipped", extra={"record_id": record_id, "error": reason})

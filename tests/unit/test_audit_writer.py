"""Entries of the audit log that are written together."""

import asyncio
from collections.abc import Sequence

import pytest

from service.adapters.access.memory import MemoryAccessStore
from service.api.audit import AuditWriter
from service.core.access.audit import Action, AuditLog
from service.core.access.records import AuditEntry
from service.core.errors import Unavailable
from service.core.principals import LOCAL_PRINCIPAL
from tests.factories import START


class RecordingStore(MemoryAccessStore):
    """Remembers how many entries each write had, and can fail."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self._error = error

    def append_audit_entries(self, entries: Sequence[AuditEntry]) -> None:
        self.sizes.append(len(entries))
        if self._error is not None:
            raise self._error
        super().append_audit_entries(entries)


async def write_together(store: RecordingStore, count: int) -> list[BaseException | None]:
    audit_log = AuditLog(store, lambda: START, random_suffix=lambda: "0")
    writer = AuditWriter(audit_log)
    entry = audit_log.make_entry(LOCAL_PRINCIPAL, Action("create_key", "key_0", 201, None, None, None))
    return await asyncio.gather(*(writer.write(entry) for _ in range(count)), return_exceptions=True)


def test_entries_that_arrive_together_share_a_write() -> None:
    store = RecordingStore()
    assert asyncio.run(write_together(store, 20)) == [None] * 20
    assert sum(store.sizes) == 20
    assert len(store.sizes) <= 2


@pytest.mark.parametrize("error", [Unavailable("away"), RuntimeError("a defect")])
def test_failure_reaches_every_request_that_waits(error: Exception) -> None:
    outcomes = asyncio.run(asyncio.wait_for(write_together(RecordingStore(error), 5), 5))
    assert len(outcomes) == 5
    assert all(isinstance(outcome, Unavailable) for outcome in outcomes)

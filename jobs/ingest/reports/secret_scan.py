"""Looks for secrets in every row, of large files in a process of its own, beside the rest of the report."""

import signal
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection, Pipe
from multiprocessing.context import ForkProcess
from pathlib import Path

import orjson

from jobs.ingest.reports.findings import FindingCounter
from jobs.ingest.reports.row_texts import read_texts
from jobs.ingest.reports.secrets import find_secrets, may_have_secrets

MIN_WORKER_BYTES = 64 << 20  # fewer are scanned in less time than a process needs to start and end


def scan_rows(splits: Mapping[str, Path]) -> FindingCounter:
    """The secrets in all rows of the splits. Raises OSError."""
    found = FindingCounter()
    for split, path in splits.items():
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if may_have_secrets(line):
                    found.add(find_secrets(read_texts(orjson.loads(line)).everything), split, number)
    return found


class SecretScan:
    """A scan that may already be going on. `finish` is to be called once."""

    def __init__(self, splits: Mapping[str, Path]) -> None:
        self._splits = splits
        self._worker: ForkProcess | None = None
        size_bytes = sum(path.stat().st_size for path in splits.values())
        if size_bytes >= MIN_WORKER_BYTES and threading.active_count() == 1:  # with more, a fork could keep a lock forever
            self._connection, workers_end = Pipe(duplex=False)
            worker = self._worker = ForkProcess(target=_scan_and_send, args=(workers_end, splits), daemon=True)
            worker.start()
            workers_end.close()

    def finish(self) -> FindingCounter:
        """What was found. Raises OSError, MemoryError, and RuntimeError when the process failed for another reason."""
        if self._worker is None:
            return scan_rows(self._splits)
        try:
            return self._connection.recv()
        except EOFError:
            self._worker.join()
            if self._worker.exitcode in (-signal.SIGKILL, -signal.SIGABRT):
                raise MemoryError("the process that looks for secrets has no memory left") from None
            raise RuntimeError(f"the process that looks for secrets ended with code {self._worker.exitcode}") from None
        finally:
            self._connection.close()
            self._worker.join()


def _scan_and_send(connection: Connection, splits: Mapping[str, Path]) -> None:
    connection.send(scan_rows(splits))
    connection.close()

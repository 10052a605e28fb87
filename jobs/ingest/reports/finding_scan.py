"""Looks for secrets in every row, and for personal data in the sample; of large files in a process beside the rest of the report."""

import signal
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection, Pipe
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import NamedTuple

import orjson

from jobs.ingest.reports.findings import FindingCounter
from jobs.ingest.reports.personal_data import find_personal_data
from jobs.ingest.reports.row_texts import read_texts
from jobs.ingest.reports.secrets import find_secrets, may_have_secrets

MIN_WORKER_BYTES = 64 << 20  # fewer are scanned in less time than a process needs to start and end


class Findings(NamedTuple):
    """What was found in the rows."""

    secrets: FindingCounter
    personal_data: FindingCounter


def scan_rows(splits: Mapping[str, Path], personal_data_step: int | None) -> Findings:
    """Secrets in all rows, personal data in every row of that step; None: in none. Raises OSError."""
    found = Findings(FindingCounter(), FindingCounter())
    for split, path in splits.items():
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                is_suspicious = may_have_secrets(line)
                is_sampled = personal_data_step is not None and (number - 1) % personal_data_step == 0
                if not (is_suspicious or is_sampled):
                    continue
                text = read_texts(orjson.loads(line)).everything
                if is_suspicious:
                    found.secrets.add(find_secrets(text), split, number)
                if is_sampled:
                    found.personal_data.add(find_personal_data(text), split, number)
    return found


class FindingScan:
    """A scan that may already be going on. `finish` is to be called once."""

    def __init__(self, splits: Mapping[str, Path], personal_data_step: int | None) -> None:
        self._splits = splits
        self._personal_data_step = personal_data_step
        self._worker: ForkProcess | None = None
        size_bytes = sum(path.stat().st_size for path in splits.values())
        if size_bytes >= MIN_WORKER_BYTES and threading.active_count() == 1:  # with more, a fork could keep a lock forever
            self._connection, workers_end = Pipe(duplex=False)
            worker = self._worker = ForkProcess(target=_scan_and_send, args=(workers_end, splits, personal_data_step), daemon=True)
            worker.start()
            workers_end.close()

    def finish(self) -> Findings:
        """What was found. Raises OSError, MemoryError, and RuntimeError when the process failed for another reason."""
        if self._worker is None:
            return scan_rows(self._splits, self._personal_data_step)
        try:
            return self._connection.recv()
        except EOFError:
            self._worker.join()
            if self._worker.exitcode in (-signal.SIGKILL, -signal.SIGABRT):
                raise MemoryError("the process that looks for findings has no memory left") from None
            raise RuntimeError(f"the process that looks for findings ended with code {self._worker.exitcode}") from None
        finally:
            self._connection.close()
            self._worker.join()


def _scan_and_send(connection: Connection, splits: Mapping[str, Path], personal_data_step: int | None) -> None:
    connection.send(scan_rows(splits, personal_data_step))
    connection.close()

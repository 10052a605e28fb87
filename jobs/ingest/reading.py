"""From records to valid rows, in the order of the files: in this process, or for large files in several.

Workers are forked, and read blocks of records by turns; each has up to two, so that it never waits. Memory holds these blocks only.
Everything that depends on other rows is left to the caller, which sees the same rows and problems either way.
"""

import os
import pickle
import queue
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, Pipe
from typing import Literal, NamedTuple

from jobs.ingest.mapping import RowMapper
from jobs.ingest.records import Record
from jobs.ingest.rows.forms import EXPECTED_ROW, check_row
from jobs.ingest.rows.row import Row, make_row
from jobs.ingest.rows.size import check_text_size
from jobs.ingest.rows.values import InvalidValue, JsonObject, parse
from schema.ingestion import IngestLimits, RowProblem

WORKERS = 2
BLOCK_RECORDS = 1000
BLOCK_BYTES = 1 << 20
BLOCKS_PER_WORKER = 4
SWITCH_INTERVAL_S = 0.00005  # the thread that receives must not wait long for the one that computes, or the parent waits for both
OUT_OF_MEMORY = 12  # the exit code of a worker; errno's ENOMEM
Block = list[Record | RowProblem]


class PlacedRow(NamedTuple):
    """A valid row, and where it was."""

    row: Row
    line: int
    part: str


class RowReader:
    """Turns a record into a valid row."""

    def __init__(self, mapper: RowMapper, limits: IngestLimits, unit: Literal["line", "row"] = "line") -> None:
        self._mapper = mapper
        self._limits = limits
        self._unit: Literal["line", "row"] = unit

    def read(self, record: Record | RowProblem) -> PlacedRow | RowProblem:
        """The row of a record, or what is wrong with it."""
        if isinstance(record, RowProblem):
            return record
        try:
            content = check_row(self._mapper.convert(parse_record(record)))
            row = make_row(content)
            if isinstance(record.content, dict) or len(record.content) > self._limits.max_row_bytes:
                check_text_size(row, content, self._limits)
        except InvalidValue as error:
            return self.describe_problem(error, record.line, record.part)
        return PlacedRow(row, record.line, record.part)

    def describe_problem(self, error: InvalidValue, line: int, part: str) -> RowProblem:
        """What is wrong with the row that was read last, and where it is. Its field is named as the file names it."""
        field = self._mapper.describe_field(error.field)
        return RowProblem(part=part, line=line, unit=self._unit, field=field, reason=error.reason, code=error.code)


def parse_record(record: Record) -> JsonObject:
    """The columns of a record. Raises InvalidValue."""
    return record.content if isinstance(record.content, dict) else parse(record.content, EXPECTED_ROW)


def read_rows(records: Iterable[Record | RowProblem], reader: RowReader) -> Iterator[PlacedRow | RowProblem]:
    """The rows and problems of all records."""
    return map(reader.read, records)


def read_rows_concurrently(records: Iterable[Record | RowProblem], reader: RowReader) -> Iterator[PlacedRow | RowProblem]:
    """The same, by workers. This process must have a single thread, and `reader` must not remember rows.

    Raises MemoryError when a worker has no memory left, RuntimeError when it fails for another reason.
    """
    with _start_workers(reader) as workers:
        busy = deque[_Worker]()  # in the order in which their answers are due
        for number, block in enumerate(_iter_blocks(records)):
            if len(busy) == WORKERS * BLOCKS_PER_WORKER:
                yield from busy.popleft().receive()
            worker = workers[number % WORKERS]
            worker.send(block)
            busy.append(worker)
        while busy:
            yield from busy.popleft().receive()


class _Worker:
    """A process that answers each block with its rows, until its connection is closed."""

    def __init__(self, pid: int, connection: Connection) -> None:
        self._pid = pid
        self._connection = connection

    def send(self, block: Block) -> None:
        content = pickle.dumps([tuple(record) if isinstance(record, Record) else record for record in block], pickle.HIGHEST_PROTOCOL)
        try:
            self._connection.send_bytes(content)
        except OSError as error:
            raise self._describe_end() from error

    def receive(self) -> Iterator[PlacedRow | RowProblem]:
        try:
            content = self._connection.recv_bytes()
        except (EOFError, OSError) as error:
            raise self._describe_end() from error
        return _unpack(content)

    def stop(self) -> None:
        """Wait for its end."""
        self._connection.close()
        with suppress(ChildProcessError):  # it is known to have ended
            os.waitpid(self._pid, 0)

    def _describe_end(self) -> Exception:
        status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        if status in (OUT_OF_MEMORY, -signal.SIGKILL, -signal.SIGABRT):
            return MemoryError("a process that reads rows has no memory left")
        return RuntimeError(f"a process that reads rows ended with code {status}")


@contextmanager
def _start_workers(reader: RowReader) -> Generator[list[_Worker]]:
    workers: list[_Worker] = []
    connections: list[Connection] = []
    try:
        for _ in range(WORKERS):
            connection, workers_end = Pipe()
            connections.append(connection)
            if (pid := os.fork()) == 0:
                for parents_end in connections:  # or a worker would not see that the parent has ended
                    parents_end.close()
                _work(workers_end, reader)
            workers_end.close()
            workers.append(_Worker(pid, connection))
        yield workers
    finally:
        for worker in workers:
            worker.stop()


def _work(connection: Connection, reader: RowReader) -> None:
    """Answer blocks until the parent closes the connection. Never returns."""
    status = 1
    try:
        # Blocks are taken out of the connection at once: the parent must never wait for a worker that waits for the parent.
        blocks = queue.SimpleQueue[bytes | None]()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        threading.Thread(target=_receive_blocks, args=(connection, blocks), daemon=True).start()
        while (block := blocks.get()) is not None:
            records = pickle.loads(block)  # noqa: S301  # from the parent
            results = [reader.read(Record(*record) if type(record) is tuple else record) for record in records]
            connection.send_bytes(_pack(results))
        status = 0
    except MemoryError:
        status = OUT_OF_MEMORY
    except BrokenPipeError:
        status = 0  # the parent has ended
    finally:  # without the ends of the blocks that the parent is in
        if status == 1:
            traceback.print_exc()
        os._exit(status)


def _receive_blocks(connection: Connection, blocks: "queue.SimpleQueue[bytes | None]") -> None:
    with suppress(EOFError, OSError):
        while True:
            blocks.put(connection.recv_bytes())
    blocks.put(None)


def _iter_blocks(records: Iterable[Record | RowProblem]) -> Iterator[Block]:
    block: Block = []
    size_bytes = 0
    for record in records:
        block.append(record)
        if isinstance(record, Record):
            size_bytes += len(record.content)
        if size_bytes >= BLOCK_BYTES or len(block) == BLOCK_RECORDS:
            yield block
            block, size_bytes = [], 0
    if block:
        yield block


def _pack(results: list[PlacedRow | RowProblem]) -> bytes:
    """The results of a block: what rows in sequence have in common is written once."""
    runs: list[RowProblem | tuple[tuple[object, ...], list[tuple[int, bytes, bytes, bytes]]]] = []
    common: tuple[object, ...] = ()
    rows: list[tuple[int, bytes, bytes, bytes]] = []
    for result in results:
        if isinstance(result, RowProblem):
            runs.append(result)
            common = ()
            continue
        row, line, part = result
        dataset_type, shape, canonical, digest, prompt_digest, *others = row
        if common != (found := (part, dataset_type, shape, *others)):
            common, rows = found, []
            runs.append((common, rows))
        rows.append((line, canonical, digest, prompt_digest))
    return pickle.dumps(runs, pickle.HIGHEST_PROTOCOL)


def _unpack(content: bytes) -> Iterator[PlacedRow | RowProblem]:
    for run in pickle.loads(content):  # noqa: S301  # from a worker
        if isinstance(run, RowProblem):
            yield run
            continue
        (part, dataset_type, shape, *others), rows = run
        for line, canonical, digest, prompt_digest in rows:
            yield PlacedRow(Row(dataset_type, shape, canonical, digest, prompt_digest, *others), line, part)

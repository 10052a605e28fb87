"""From files to a dataset: open, recognize, check every row, drop exact duplicates, split, write, report.

A file may have gigabytes: memory holds one row at a time, plus about 150 bytes for each earlier row. Nothing is dropped silently: a
column that no trainer would use is refused, and what is dropped is counted.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import orjson

from jobs.ingest.formats import OpenedInput, open_input
from jobs.ingest.mapping import SAMPLE_RECORDS, RowMapper, choose_mapper
from jobs.ingest.records import InvalidInput, Record
from jobs.ingest.rows.consistency import ConsistencyChecker
from jobs.ingest.rows.forms import EXPECTED_ROW, ValidatedRow, check_row
from jobs.ingest.rows.row import Row, make_row
from jobs.ingest.rows.size import check_text_size
from jobs.ingest.rows.values import InvalidValue, JsonObject, parse
from jobs.ingest.splitting import Splitter, SplitWriter
from schema.dataset import EVAL_SPLIT, TRAIN_SPLIT
from schema.ingestion import (
    MAX_REPORTED_PROBLEMS,
    DatasetReport,
    Detected,
    IngestedRows,
    IngestLimits,
    IngestOutcome,
    IngestProgress,
    IngestTask,
    RowProblem,
)

PROGRESS_ROWS = 20_000  # between two reports
SHOWN_ROWS = 3
SCRATCH = "rows.jsonl"

OnProgress = Callable[[IngestProgress], None]


def ingest(task: IngestTask, on_progress: OnProgress = lambda _: None) -> IngestOutcome:
    """Carry out the task. What is wrong with the files is part of the outcome. Raises OSError."""
    try:
        return _Ingestion(task, on_progress).run()
    except InvalidInput as error:
        return IngestOutcome(refused=error.problem)


class ProblemLog:
    """The problems of rows: the first ones as they are, all of them as counts."""

    def __init__(self) -> None:
        self.first: list[RowProblem] = []
        self.counts = Counter[str]()

    def add(self, problem: RowProblem) -> None:
        if len(self.first) < MAX_REPORTED_PROBLEMS:
            self.first.append(problem)
        self.counts[problem.code] += 1

    @property
    def total(self) -> int:
        """How many rows have a problem."""
        return self.counts.total()


class RowReader:
    """Turns records into checked rows."""

    def __init__(self, mapper: RowMapper, limits: IngestLimits) -> None:
        self.consistency = ConsistencyChecker()
        self._mapper = mapper
        self._limits = limits
        self._pixels = 0

    def read(self, record: Record) -> tuple[Row, ValidatedRow]:
        """The row of a record. Raises InvalidValue."""
        content = check_row(self._mapper.convert(parse_record(record)))
        row = make_row(content)
        if isinstance(record.content, dict) or len(record.content) > self._limits.max_row_bytes:
            check_text_size(row, content, self._limits)
        pixels = self._pixels + content.images.pixels
        if pixels > self._limits.max_pixels:
            reason = f"more than {self._limits.max_pixels:,} pixels in the images so far; scale them down, or split the file"
            raise InvalidValue("", reason, "too_many")
        self.consistency.add(record.line, content)
        self._pixels = pixels
        return row, content


class _Ingestion:
    """One run of the pipeline."""

    def __init__(self, task: IngestTask, on_progress: OnProgress) -> None:
        self._task = task
        self._on_progress = on_progress
        self._folder = Path(task.output)
        self._problems = ProblemLog()
        self._splitter = Splitter(task.options.eval_fraction, task.seed)
        self._rows_read = 0
        self._images = 0
        self._samples: list[dict[str, object]] = []

    def run(self) -> IngestOutcome:
        task = self._task
        opened = open_input(task.files, task.options, task.limits)
        sample = list(islice(_iter_parsed(opened.iter_records()), SAMPLE_RECORDS))
        mapper = choose_mapper(sample, task.options, opened.columns)
        reader = RowReader(mapper, task.limits)
        row, flags = None, {"has_tools": False, "has_weights": False}
        with (self._folder / SCRATCH).open("w+b") as scratch:
            for row in self._read_rows(opened, reader):
                flags = {name: flag or getattr(row, name) for name, flag in flags.items()}
                if self._splitter.add(row):
                    self._images += row.images
                    scratch.write(row.canonical + b"\n")
                    if len(self._samples) < SHOWN_ROWS:
                        self._samples.append(orjson.loads(row.canonical))
            is_refused = self._problems.total > 0 and task.options.on_invalid == "refuse"
            if not self._problems.total or (not is_refused and row):
                reader.consistency.check_labels()
            detected = _describe(opened, mapper, sample)
            rows = None if is_refused or row is None or task.check_only else self._write_rows(row, scratch, flags)
        (self._folder / SCRATCH).unlink()
        return IngestOutcome(
            detected=detected,
            rows_read=self._rows_read,
            problems=tuple(self._problems.first),
            problem_count=self._problems.total,
            problem_counts=dict(self._problems.counts),
            samples=tuple(self._samples),
            rows=rows,
            report=None if rows is None else self._report(rows),
        )

    def _read_rows(self, opened: OpenedInput, reader: RowReader) -> Iterator[Row]:
        """The valid rows; the problems of the others are logged."""
        bytes_read, total_bytes = 0, opened.total_bytes
        for record in opened.iter_records():
            self._rows_read += 1
            if self._rows_read > self._task.limits.max_rows:
                raise InvalidInput(f"more than {self._task.limits.max_rows:,} rows", "split the file into several datasets")
            if self._rows_read % PROGRESS_ROWS == 0:
                self._on_progress(IngestProgress(rows=self._rows_read, bytes_read=bytes_read, total_bytes=total_bytes))
            if isinstance(record, RowProblem):
                self._problems.add(record)
                continue
            bytes_read += len(record.content) if isinstance(record.content, bytes) else 0
            try:
                yield reader.read(record)[0]
            except InvalidValue as error:
                self._problems.add(RowProblem(part=record.part, line=record.line, field=error.field, reason=error.reason, code=error.code))

    def _write_rows(self, row: Row, scratch: BinaryIO, flags: dict[str, bool]) -> IngestedRows:
        """Write both splits, each in the order of the files."""
        scratch.seek(0)
        names = {TRAIN_SPLIT: f"{TRAIN_SPLIT}.jsonl", EVAL_SPLIT: f"{EVAL_SPLIT}.jsonl"}
        with (self._folder / names[TRAIN_SPLIT]).open("wb") as train, (self._folder / names[EVAL_SPLIT]).open("wb") as held_out:
            writers = {TRAIN_SPLIT: SplitWriter(train), EVAL_SPLIT: SplitWriter(held_out)}
            for split, line in zip(self._splitter.assign_splits(), scratch, strict=True):
                writers[split].write(line)
        return IngestedRows(
            dataset_type=row.dataset_type,
            splits={name: writer.describe(names[name]) for name, writer in writers.items() if writer.rows},
            duplicates_dropped=self._splitter.duplicates_dropped,
            images=self._images,
            columns=row.columns,
            prompt_form=row.prompt_form,
            **flags,
        )

    def _report(self, rows: IngestedRows) -> DatasetReport:
        dropped = {**self._problems.counts, "duplicate": self._splitter.duplicates_dropped}
        return DatasetReport(
            rows_read=self._rows_read,
            rows_kept=sum(split.rows for split in rows.splits.values()),
            dropped={name: count for name, count in dropped.items() if count},
            problems=tuple(self._problems.first),
        )


def parse_record(record: Record) -> JsonObject:
    """The columns of a record. Raises InvalidValue."""
    return record.content if isinstance(record.content, dict) else parse(record.content, EXPECTED_ROW)


def _iter_parsed(records: Iterator[Record | RowProblem]) -> Iterator[JsonObject]:
    for record in records:
        if isinstance(record, Record):
            try:
                yield parse_record(record)
            except InvalidValue:
                continue


def _describe(opened: OpenedInput, mapper: RowMapper, sample: Sequence[JsonObject]) -> Detected:
    return Detected(
        format=opened.format,
        shape=mapper.shape,
        dataset_type=mapper.dataset_type,
        mapping=mapper.mapping,
        columns=opened.columns or tuple(dict.fromkeys(name for record in sample for name in record)),
        unused_columns=mapper.unused_columns,
        reason=mapper.reason,
    )

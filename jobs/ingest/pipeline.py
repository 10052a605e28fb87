"""From files to a dataset: open, recognize, check every row, drop exact duplicates, split, write, report.

A file may have gigabytes: memory holds one row at a time, plus about 150 bytes for each earlier row. Nothing is dropped silently: a
column that no trainer would use is refused, and what is dropped is counted. A check does the same, and leaves no file.
"""

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Literal

from jobs.ingest.formats import OpenedInput, open_input
from jobs.ingest.mapping import SAMPLE_RECORDS, RowMapper, choose_mapper
from jobs.ingest.mapping.sample import make_printable
from jobs.ingest.reading import PlacedRow, RowReader, parse_record, read_rows, read_rows_concurrently
from jobs.ingest.records import InvalidInput
from jobs.ingest.reports.build import build_report
from jobs.ingest.rows.consistency import ConsistencyChecker
from jobs.ingest.rows.row import Row
from jobs.ingest.rows.values import InvalidValue, JsonObject, preview
from jobs.ingest.splitting import Splitter, SplitWriter
from schema.dataset import EVAL_SPLIT, TRAIN_SPLIT
from schema.ingestion import (
    MAX_FOUND_PROBLEMS,
    MAX_REPORTED_PROBLEMS,
    DatasetReport,
    Detected,
    IngestedRows,
    IngestOutcome,
    IngestProgress,
    IngestTask,
    RowProblem,
)
from schema.row_preview import shorten_images

MIN_WORKER_BYTES = 32 << 20  # of a file; smaller ones are read before workers would pay
PROGRESS_ROWS = 20_000  # between two reports
SHOWN_ROWS = 3
SAMPLED_BYTES = 8 << 20  # of the first records; in memory, a list of short values takes twenty times its bytes
MAX_SAMPLED_PROBLEMS = 1000  # lines that are not records, after which the sample ends
MAX_SHOWN_COLUMNS = 1000
MAX_SHOWN_NAME_CHARS = 200
SCRATCH = "rows.jsonl"

OnProgress = Callable[[IngestProgress], None]


def ingest(task: IngestTask, on_progress: OnProgress = lambda _: None) -> IngestOutcome:
    """Carry out the task. What is wrong with the files is part of the outcome. Raises OSError."""
    try:
        return _Ingestion(task, on_progress).run()
    except InvalidInput as error:
        return IngestOutcome(refused=error.problem)
    except MemoryError:
        limit = f"{task.limits.max_memory_bytes >> 20:,} MiB"
        error = InvalidInput(f"reading it takes more than the {limit} of memory that one file may use", "split it into several files")
        return IngestOutcome(refused=error.problem)


class ProblemLog:
    """The problems of rows: the first ones as they are, all of them as counts."""

    def __init__(self) -> None:
        self.first: list[RowProblem] = []
        self.counts = Counter[str]()
        self.total = 0

    def add(self, problem: RowProblem) -> None:
        """Add the problem of one row."""
        if self.total < MAX_REPORTED_PROBLEMS:
            self.first.append(problem)
        self.counts[problem.code] += 1
        self.total += 1


class _Ingestion:
    """One run of the pipeline."""

    def __init__(self, task: IngestTask, on_progress: OnProgress) -> None:
        self._task = task
        self._on_progress = on_progress
        self._folder = Path(task.output)
        self._problems = ProblemLog()
        self._splitter = Splitter(task.options.eval_fraction, task.seed)
        self._opened = open_input(task.files, task.options, task.limits)
        self._sample = _read_sample(self._opened)
        self._mapper = choose_mapper(self._sample, task.options, self._opened.columns)
        self._reader = RowReader(self._mapper, task.limits, self._opened.unit)
        self._consistency = ConsistencyChecker(task.limits.max_pixels, self._opened.unit)
        self._rows_read = 0
        self._images = 0
        self._has_tools = False
        self._has_weights = False
        self._samples: list[dict[str, object]] = []

    def run(self) -> IngestOutcome:
        """Read everything; then split and report, if the rows are valid, or those that are not are to be dropped."""
        task, opened = self._task, self._opened
        refused, rows, report = None, None, None
        try:
            with (self._folder / SCRATCH).open("w+b", buffering=1 << 20) as scratch:
                row = self._read_rows(scratch)
                if not self._is_refused and (row or not self._problems.total):
                    self._consistency.check_labels()
                    if row:
                        rows = self._write_rows(row, scratch)
                        report = self._report(rows)
        except InvalidInput as error:
            refused = error.problem
        finally:
            self._remove_files(keep_splits=rows is not None and not task.check_only)
        return IngestOutcome(
            refused=refused,
            detected=_describe(opened, self._mapper, self._sample),  # last: a mapper knows in the end which columns it did not use
            rows_read=self._rows_read,
            problems=tuple(self._problems.first),
            problem_count=self._problems.total,
            problem_counts=dict(self._problems.counts),
            stopped_early=self._has_too_many_problems,
            samples=tuple(self._samples),
            rows=rows,
            report=report,
        )

    @property
    def _is_refused(self) -> bool:
        """Whether the rows so far are not kept because some are not valid. A check shows what the others would become."""
        return self._problems.total > 0 and self._task.options.on_invalid == "refuse" and not self._task.check_only

    @property
    def _has_too_many_problems(self) -> bool:
        return self._problems.total >= MAX_FOUND_PROBLEMS and self._task.options.on_invalid == "refuse"

    def _read_rows(self, scratch: BinaryIO) -> Row | None:
        """Write all distinct valid rows to one file, log the problems of the others; returns a valid row, if there is one."""
        last_row, max_rows = None, self._task.limits.max_rows
        for result in self._iter_results():
            self._rows_read += 1
            if self._rows_read > max_rows:
                raise InvalidInput(f"more than {max_rows:,} rows", "split the file into several datasets")
            if self._rows_read % PROGRESS_ROWS == 0:
                self._report_progress("reading")
            if isinstance(result, PlacedRow):
                try:
                    self._add_row(result, scratch)
                    last_row = result.row
                    continue
                except InvalidValue as error:
                    result = self._reader.describe_problem(error, result.line, result.part)
            self._problems.add(result)
            if self._has_too_many_problems:
                break
        return last_row

    def _iter_results(self) -> Iterator[PlacedRow | RowProblem]:
        """All rows and problems. Workers take the lines of large files that are rows as they are; a mapping remembers what it saw."""
        opened = self._opened
        is_large = opened.format == "jsonl" and self._mapper.mapping is None and opened.total_bytes >= MIN_WORKER_BYTES
        if is_large and threading.active_count() == 1:  # with more, a fork could keep a lock forever
            return read_rows_concurrently(opened.iter_records(), self._reader)
        return read_rows(opened.iter_records(), self._reader)

    def _add_row(self, placed: PlacedRow, scratch: BinaryIO) -> None:
        """Write a row, unless it is a duplicate. Raises InvalidValue when it does not fit to those before it."""
        row = placed.row
        self._consistency.add(row, placed.line, placed.part)
        if (self._problems.total and self._is_refused) or not self._splitter.add(row):
            return
        scratch.write(row.canonical + b"\n")
        self._images += row.images
        if row.has_tools:
            self._has_tools = True
        if row.has_weights:
            self._has_weights = True
        if len(self._samples) < SHOWN_ROWS:
            self._samples.append(_shorten(row))

    def _write_rows(self, row: Row, scratch: BinaryIO) -> IngestedRows:
        """Write both splits, each in the order of the files."""
        self._report_progress("splitting")
        scratch.seek(0)
        train, held_out = (SplitWriter(self._folder, name) for name in (TRAIN_SPLIT, EVAL_SPLIT))
        for is_held_out, line in zip(self._splitter.choose_held_out(), scratch, strict=True):
            (held_out if is_held_out else train).write(line)
        train.close()
        held_out.close()
        return IngestedRows(
            dataset_type=row.dataset_type,
            splits={name: writer.describe() for name, writer in ((TRAIN_SPLIT, train), (EVAL_SPLIT, held_out)) if writer.rows},
            duplicates_dropped=self._splitter.duplicates_dropped,
            images=self._images,
            columns=row.columns,
            prompt_form=row.prompt_form,
            has_tools=self._has_tools,
            has_weights=self._has_weights,
        )

    def _report(self, rows: IngestedRows) -> DatasetReport:
        self._report_progress("reporting")
        task = self._task
        tokenizer_folder = Path(task.tokenizer_folder) if task.tokenizer_folder else None
        splits = {name: self._folder / split.file for name, split in rows.splits.items()}
        found = build_report(splits, rows, task.options, tokenizer_folder, lambda _: self._report_progress("reporting"))
        dropped = {**self._problems.counts, "duplicate": self._splitter.duplicates_dropped}
        changes = {
            "rows_read": self._rows_read,
            "rows_kept": sum(split.rows for split in rows.splits.values()),
            "dropped": {name: count for name, count in dropped.items() if count},
            "problems": tuple(self._problems.first),
        }
        return found.model_copy(update=changes)

    def _report_progress(self, phase: Literal["reading", "splitting", "reporting"]) -> None:
        opened = self._opened
        progress = IngestProgress(rows=self._rows_read, bytes_read=opened.bytes_read, total_bytes=opened.total_bytes, phase=phase)
        self._on_progress(progress)

    def _remove_files(self, *, keep_splits: bool) -> None:
        names = () if keep_splits else (f"{split}.{suffix}" for split in (TRAIN_SPLIT, EVAL_SPLIT) for suffix in ("jsonl", "index"))
        for name in (SCRATCH, *names):
            (self._folder / name).unlink(missing_ok=True)


def _read_sample(opened: OpenedInput) -> list[JsonObject]:
    """The first records, by which their form is recognized. Raises InvalidInput."""
    sample: list[JsonObject] = []
    size_bytes = 0
    for record in islice(opened.iter_records(), SAMPLE_RECORDS + MAX_SAMPLED_PROBLEMS):
        if isinstance(record, RowProblem):
            continue
        try:
            sample.append(parse_record(record))
        except InvalidValue:
            continue
        size_bytes += len(record.content) if isinstance(record.content, bytes) else 0
        if len(sample) == SAMPLE_RECORDS or size_bytes > SAMPLED_BYTES:
            break
    return sample


def _shorten(row: Row) -> dict[str, object]:
    columns: JsonObject = json.loads(row.canonical)
    return {name: shorten_images(value) for name, value in columns.items()}


def _describe(opened: OpenedInput, mapper: RowMapper, sample: Sequence[JsonObject]) -> Detected:
    return Detected(
        format=opened.format,
        container=opened.container,
        encoding=opened.encoding,
        delimiter=opened.delimiter,
        sheet=opened.sheet,
        parts=len(opened.parts),
        shape=mapper.shape,
        dataset_type=mapper.dataset_type,
        mapping=mapper.mapping,
        columns=opened.columns or tuple(islice(_iter_names(sample), MAX_SHOWN_COLUMNS)),
        unused_columns=mapper.unused_columns,
        reason="; ".join(filter(None, (mapper.reason, opened.note))),
    )


def _iter_names(sample: Sequence[JsonObject]) -> Iterator[str]:
    """The names of columns, once each, as they can be shown."""
    names = dict.fromkeys(name for record in sample for name in record)
    return (make_printable(name) if len(name) <= MAX_SHOWN_NAME_CHARS else preview(name) for name in names)

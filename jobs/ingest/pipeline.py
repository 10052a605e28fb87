"""From files to a dataset: open, recognize, check every row, drop exact duplicates, split, write, report.

A file may have gigabytes: memory holds one row at a time, plus about 150 bytes for each earlier row. Nothing is dropped silently: a
column that no trainer would use is refused, and what is dropped is counted. A check does the same, and leaves no file.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Literal

from jobs.ingest.formats import OpenedInput, open_input
from jobs.ingest.mapping import SAMPLE_RECORDS, RowMapper, choose_mapper
from jobs.ingest.records import InvalidInput, Record
from jobs.ingest.rows.consistency import ConsistencyChecker
from jobs.ingest.rows.forms import EXPECTED_ROW, ValidatedRow, check_row
from jobs.ingest.rows.row import Row, make_row
from jobs.ingest.rows.size import check_text_size
from jobs.ingest.rows.values import InvalidValue, JsonObject, is_json_safe, parse, preview
from jobs.ingest.splitting import Splitter, SplitWriter
from schema.dataset import EVAL_SPLIT, TRAIN_SPLIT
from schema.ingestion import (
    MAX_FOUND_PROBLEMS,
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
from schema.row_preview import shorten_images

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


class RowReader:
    """Turns records into checked rows."""

    def __init__(self, mapper: RowMapper, limits: IngestLimits, unit: Literal["line", "row"] = "line") -> None:
        self.consistency = ConsistencyChecker(unit)
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
        self.consistency.add(record, content)
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
        self._opened = open_input(task.files, task.options, task.limits)
        self._rows_read = 0
        self._images = 0
        self._has_tools = False
        self._has_weights = False
        self._samples: list[dict[str, object]] = []

    def run(self) -> IngestOutcome:
        """Read everything; then split and report, if the rows are valid, or those that are not are to be dropped."""
        task, opened = self._task, self._opened
        sample = _read_sample(opened)
        mapper = choose_mapper(sample, task.options, opened.columns)
        detected = _describe(opened, mapper, sample)
        reader = RowReader(mapper, task.limits, opened.unit)
        refused, rows, report = None, None, None
        try:
            with (self._folder / SCRATCH).open("w+b", buffering=1 << 20) as scratch:
                row = self._read_rows(reader, scratch)
                if not self._is_refused and (row or not self._problems.total):
                    reader.consistency.check_labels()
                    if row:
                        rows = self._write_rows(row, scratch)
                        report = self._report(rows)
        except InvalidInput as error:
            refused = error.problem
        finally:
            self._remove_files(keep_splits=rows is not None and not task.check_only)
        return IngestOutcome(
            refused=refused,
            detected=detected,
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

    def _read_rows(self, reader: RowReader, scratch: BinaryIO) -> Row | None:
        """Write all distinct valid rows to one file, log the problems of the others; returns a valid row, if there is one."""
        row, unit, max_rows = None, self._opened.unit, self._task.limits.max_rows
        for record in self._opened.iter_records():
            self._rows_read += 1
            if self._rows_read > max_rows:
                raise InvalidInput(f"more than {max_rows:,} rows", "split the file into several datasets")
            if self._rows_read % PROGRESS_ROWS == 0:
                self._report_progress("reading")
            try:
                if isinstance(record, Record):
                    row = reader.read(record)[0]
                    self._add_row(row, scratch)
                    continue
            except InvalidValue as error:
                place = {"part": record.part, "line": record.line}
                record = RowProblem(**place, unit=unit, field=error.field, reason=error.reason, code=error.code)
            self._problems.add(record)
            if self._has_too_many_problems:
                break
        return row

    def _add_row(self, row: Row, scratch: BinaryIO) -> None:
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
        dropped = {**self._problems.counts, "duplicate": self._splitter.duplicates_dropped}
        return DatasetReport(
            rows_read=self._rows_read,
            rows_kept=sum(split.rows for split in rows.splits.values()),
            dropped={name: count for name, count in dropped.items() if count},
            problems=tuple(self._problems.first),
        )

    def _report_progress(self, phase: Literal["reading", "splitting", "reporting"]) -> None:
        opened = self._opened
        progress = IngestProgress(rows=self._rows_read, bytes_read=opened.bytes_read, total_bytes=opened.total_bytes, phase=phase)
        self._on_progress(progress)

    def _remove_files(self, *, keep_splits: bool) -> None:
        names = () if keep_splits else (f"{split}.{suffix}" for split in (TRAIN_SPLIT, EVAL_SPLIT) for suffix in ("jsonl", "index"))
        for name in (SCRATCH, *names):
            (self._folder / name).unlink(missing_ok=True)


def parse_record(record: Record) -> JsonObject:
    """The columns of a record. Raises InvalidValue."""
    return record.content if isinstance(record.content, dict) else parse(record.content, EXPECTED_ROW)


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
        shape=mapper.shape,
        dataset_type=mapper.dataset_type,
        mapping=mapper.mapping,
        columns=opened.columns or tuple(islice(_iter_names(sample), MAX_SHOWN_COLUMNS)),
        unused_columns=mapper.unused_columns,
        reason=mapper.reason,
    )


def _iter_names(sample: Sequence[JsonObject]) -> Iterator[str]:
    """The names of columns, once each, as they can be shown."""
    names = dict.fromkeys(name for record in sample for name in record)
    return (name if len(name) <= MAX_SHOWN_NAME_CHARS and is_json_safe(name) else preview(name) for name in names)

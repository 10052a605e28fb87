"""Joins what is found in the rows that were kept, in one pass over each split beside the scan for secrets and personal data.

Secrets are looked for in every row, and tokens are counted in every row. Everything else is looked for in a sample: every row whose number
is a multiple of the same step, so the same file always gives the same report.
"""

from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import orjson

from jobs.ingest.reports.finding_scan import FindingScan
from jobs.ingest.reports.languages import LanguageCounter
from jobs.ingest.reports.near_duplicates import NearDuplicateFinder
from jobs.ingest.reports.row_texts import Row, read_texts
from jobs.ingest.reports.warnings import RowStatistics, list_warnings
from schema.dataset import EVAL_SPLIT, TRAIN_SPLIT
from schema.ingestion import REPORT_SAMPLE_ROWS, DatasetReport, IngestedRows, IngestOptions, IngestProgress, TokenLengths

if TYPE_CHECKING:
    from jobs.ingest.reports.token_lengths import TokenCounter, TokenTotals

PROGRESS_ROWS = 20_000  # between two reports
BATCH_ROWS = 256
BATCH_BYTES = 4 << 20  # a batch of long rows has fewer
MIN_ANSWER_CHARACTERS = 200  # a shorter answer may not tell its language; then prompt and answer do together
LIBRARIES = ("fasttext", "rensa", "phonenumbers", "stdnum")  # of the environment `data`

OnProgress = Callable[[IngestProgress], None]


def build_report(
    splits: Mapping[str, Path],
    rows: IngestedRows,
    options: IngestOptions,
    tokenizer_folder: Path | None = None,
    on_progress: OnProgress = lambda _: None,
) -> DatasetReport:
    """What is found in the rows of these splits. What was dropped before is for the caller to add. Raises OSError."""
    return _ReportBuilder(splits, rows, options, tokenizer_folder, on_progress).build()


class _Line(NamedTuple):
    """One stored row."""

    split: str
    number: int  # in its split, from 1
    content: bytes


class _ReportBuilder:
    """One run over the rows."""

    def __init__(
        self, splits: Mapping[str, Path], rows: IngestedRows, options: IngestOptions, tokenizer_folder: Path | None, on_progress: OnProgress
    ) -> None:
        # The held-out rows first: near-duplicates of them are looked for among the training rows.
        self._splits = {name: splits[name] for name in sorted(splits, key=lambda name: name != EVAL_SPLIT)}
        self._counts = {name: rows.splits[name].rows for name in self._splits}
        self._total_rows = sum(self._counts.values())
        self._total_bytes = sum(rows.splits[name].size_bytes for name in self._splits)
        self._options = options
        self._on_progress = on_progress
        self._step = self._choose_step(self._total_rows)
        self._held_out_step = self._choose_step(self._counts.get(EVAL_SPLIT, 0))
        self._sampled_bytes = 0
        self._statistics = RowStatistics()
        has_libraries = all(find_spec(name) for name in LIBRARIES)
        self._languages = LanguageCounter() if has_libraries else None
        self._near_duplicates = NearDuplicateFinder() if has_libraries and len(self._splits) > 1 else None
        self._findings = FindingScan(self._splits, self._step if has_libraries else None)
        self._token_problem = ""
        self._tokens = self._start_counting(tokenizer_folder)

    def build(self) -> DatasetReport:
        batch: list[Row] = []
        size, split = 0, ""
        for line in self._iter_lines():
            row = self._look_at(line)
            if self._tokens is None:
                continue
            if batch and (line.split != split or len(batch) == BATCH_ROWS or size >= BATCH_BYTES):
                self._count_tokens(split, batch)
                batch, size = [], 0
            batch.append(orjson.loads(line.content) if row is None else row)
            size, split = size + len(line.content), line.split
        if batch:
            self._count_tokens(split, batch)
        return self._describe()

    def _choose_step(self, rows: int) -> int:
        return 1 if self._options.full_report else max(1, -(-rows // REPORT_SAMPLE_ROWS))

    def _start_counting(self, tokenizer_folder: Path | None) -> "tuple[TokenCounter, TokenTotals] | None":
        if tokenizer_folder is None or self._options.base_model_id is None:
            return None
        from jobs.ingest.reports.token_lengths import TokenCounter, TokenTotals
        from jobs.ingest.reports.tokenizer_files import UnusableTokenizer

        try:
            return TokenCounter(self._splits, self._options.base_model_id, tokenizer_folder), TokenTotals()
        except UnusableTokenizer as error:
            self._token_problem = f"tokens were not counted: {error.problem.message}; {error.problem.hint}"
            return None

    def _count_tokens(self, split: str, rows: list[Row]) -> None:
        if self._tokens is not None:
            counter, totals = self._tokens
            totals.add(split, counter.count(rows))

    def _iter_lines(self) -> Iterator[_Line]:
        """The rows that something is looked for in: all of them while tokens are counted."""
        bytes_before, passed = 0, 0
        for split, path in self._splits.items():
            with path.open("rb") as lines:
                for number, content in enumerate(lines, 1):
                    if self._tokens is None and (number - 1) % self._step and not self._is_compared(split, number):
                        continue
                    passed += 1
                    if passed % PROGRESS_ROWS == 0:
                        read = IngestProgress(rows=passed, bytes_read=bytes_before, total_bytes=self._total_bytes, phase="reporting")
                        self._on_progress(read)
                    yield _Line(split, number, content)
            bytes_before += path.stat().st_size

    def _look_at(self, line: _Line) -> Row | None:
        """Look for everything in one row; the row, if it had to be parsed."""
        is_sampled, is_compared = self._is_sampled(line.number), self._is_compared(line.split, line.number)
        if not (is_sampled or is_compared):
            return None
        row: Row = orjson.loads(line.content)
        texts = read_texts(row)
        if is_compared and self._near_duplicates is not None:
            add = self._near_duplicates.add_training if line.split == TRAIN_SPLIT else self._near_duplicates.add_held_out
            add(line.number, texts.conversation)
        if is_sampled:
            self._sampled_bytes += len(line.content)
            self._statistics.add(texts)
            if self._languages is not None:
                self._languages.add(texts.answer if len(texts.answer) >= MIN_ANSWER_CHARACTERS else texts.conversation)
        return row

    def _is_sampled(self, number: int) -> bool:
        return (number - 1) % self._step == 0

    def _is_compared(self, split: str, number: int) -> bool:
        """Whether near-duplicates of the row are looked for: of the sampled ones, and of more that are held out."""
        if self._near_duplicates is None:
            return False
        return self._is_sampled(number) or (split == EVAL_SPLIT and (number - 1) % self._held_out_step == 0)

    def _describe(self) -> DatasetReport:
        statistics, findings = self._statistics, self._findings.finish()
        report = DatasetReport(
            rows_read=self._total_rows,
            rows_kept=self._total_rows,
            characters=self._estimate_characters(),
            sampled_rows=statistics.rows if self._languages is not None else 0,
            near_duplicates=self._near_duplicates.finish() if self._near_duplicates else None,
            languages=self._languages.shares() if self._languages else {},
            personal_data=findings.personal_data.findings(),
            secrets=findings.secrets.findings(),
            token_lengths=self._describe_tokens(),
        )
        warnings = list_warnings(self._counts, statistics, report)
        return report.model_copy(update={"warnings": (*filter(None, [self._token_problem]), *warnings)})

    def _estimate_characters(self) -> int:
        """Exact if all rows were sampled, otherwise by their share of the bytes."""
        if not self._sampled_bytes:
            return 0
        return round(self._statistics.characters * self._total_bytes / self._sampled_bytes)

    def _describe_tokens(self) -> TokenLengths | None:
        if self._tokens is None:
            return None
        counter, totals = self._tokens
        return counter.describe(totals, self._options.max_seq_length)

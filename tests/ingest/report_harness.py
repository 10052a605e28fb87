"""Reports about rows that a test writes, and rows that deserve no remark."""

import json
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from infra.stdlib_docstrings import generate_question_answer_pairs
from jobs.ingest.pipeline import ingest
from jobs.ingest.reports.build import build_report
from schema.dataset import EVAL_SPLIT, TRAIN_SPLIT
from schema.ingestion import DatasetReport, IngestedRows, IngestOptions, IngestTask, InputFile, WrittenSplit

CLEAN_ROWS = 400


@cache
def list_clean_pairs() -> tuple[tuple[str, str], ...]:
    """Questions and answers of docstrings."""
    pairs = sorted(generate_question_answer_pairs())
    return tuple(pairs[:: len(pairs) // CLEAN_ROWS][:CLEAN_ROWS])


def make_clean_rows(count: int = CLEAN_ROWS) -> list[dict[str, Any]]:
    return [{"prompt": question, "completion": answer} for question, answer in list_clean_pairs()[:count]]


def write_split(folder: Path, name: str, rows: Sequence[Any]) -> WrittenSplit:
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    (folder / f"{name}.jsonl").write_bytes(content)
    return WrittenSplit(file=f"{name}.jsonl", rows=len(rows), size_bytes=len(content), sha256="")


def report_on(rows: Sequence[Any], held_out: Sequence[Any] = (), **options: Any) -> DatasetReport:
    """The report about these rows, as if they had been split so."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given = {TRAIN_SPLIT: rows, EVAL_SPLIT: held_out}
        splits = {split: write_split(folder, split, each) for split, each in given.items() if each}
        ingested = IngestedRows(dataset_type="prompt_completion", splits=splits, prompt_form="strings")
        paths = {split: folder / written.file for split, written in splits.items()}
        return build_report(paths, ingested, IngestOptions(**options))


def report_on_answers(*answers: str) -> DatasetReport:
    """The report about clean rows, whose first ones have these answers."""
    rows = make_clean_rows()
    for row, answer in zip(rows, answers, strict=False):
        row["completion"] = answer
    return report_on(rows)


def ingest_rows(rows: Sequence[Any]) -> tuple[IngestedRows, DatasetReport]:
    """Ingest rows as an upload, and report on both splits."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "rows.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        output = folder / "output"
        output.mkdir()
        options = IngestOptions()
        outcome = ingest(IngestTask(files=(InputFile(path=str(source), name=source.name),), options=options, output=str(output)))
        assert outcome.rows is not None
        paths = {split: output / written.file for split, written in outcome.rows.splits.items()}
        return outcome.rows, build_report(paths, outcome.rows, options)

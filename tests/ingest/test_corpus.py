"""Every file of the corpus through the real pipeline, compared with what is expected of it.

Files that are generated because they are hostile or huge are read as the service reads an upload: by a process of its own with a limit of
memory.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs.ingest.pipeline import ingest
from schema.ingestion import IngestOutcome
from tests.data import FILES, FOLDER, Case, load_cases
from tests.data.make_corpus import FILES as GENERATED

CASES = load_cases()
KEPT = [case for case in CASES if not case.is_generated]
HOSTILE = [case for case in CASES if case.is_generated]
MEMORY_BYTES = 1536 << 20  # that infra/terraform gives to an ingestion
TIMEOUT_S = 60
MAX_CORPUS_BYTES = 2_000_000


@pytest.mark.parametrize("case", KEPT, ids=lambda case: case.name)
def test_file_is_reported_as_expected(case: Case, tmp_path: Path) -> None:
    check(case, ingest(case.make_task(tmp_path, tmp_path)), tmp_path)


@pytest.mark.parametrize("case", HOSTILE, ids=lambda case: case.name)
def test_hostile_file_is_reported_as_expected(case: Case, tmp_path: Path) -> None:
    GENERATED[case.file](tmp_path / case.file)
    check(case, ingest_in_a_process(case, tmp_path), tmp_path / "out")


@pytest.mark.parametrize("name", ["rows.feather", "decimals.parquet", "saved_dataset.zip", "merged_cells.xlsx"])
def test_library_of_a_format_starts_within_the_memory_of_the_service(name: str, tmp_path: Path) -> None:
    [case] = [case for case in KEPT if case.name == name]
    check(case, ingest_in_a_process(case, tmp_path), tmp_path / "out")


def ingest_in_a_process(case: Case, folder: Path) -> IngestOutcome:
    """What the service would get for the file, of a process with its limit of memory."""
    output = folder / "out"
    output.mkdir()
    task = case.make_task(output, folder)
    task = task.model_copy(update={"limits": task.limits.model_copy(update={"max_memory_bytes": MEMORY_BYTES})})
    (folder / "task.json").write_text(task.model_dump_json())
    done = subprocess.run(
        [sys.executable, "-m", "jobs.ingest", str(folder / "task.json")],
        env=dict(os.environ) | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return IngestOutcome.load((output / "outcome.json").read_bytes())


def check(case: Case, outcome: IngestOutcome, output: Path) -> None:
    """Compare an outcome with what is expected; what the case leaves out may be anything."""
    expect = case.expect
    if "refused" in expect:
        check_refusal(expect["refused"], outcome)
        return
    assert outcome.refused is None
    assert outcome.detected is not None
    detected = outcome.detected.model_dump(mode="json")
    for name, value in expect.get("detected", {}).items():
        assert (name, detected[name]) == (name, value)
    if "problems" in expect:
        check_problems(expect["problems"], outcome)
    else:
        check_rows(expect, outcome, output)


def check_refusal(expected: dict[str, Any], outcome: IngestOutcome) -> None:
    """The file as a whole is refused: by whom it can be helped, and in which words."""
    assert outcome.refused is not None, (outcome.problems, outcome.samples)
    assert outcome.rows is None
    assert outcome.refused.param == expected["param"]
    said = f"{outcome.refused.message}; {outcome.refused.hint}"
    assert [word for word in expected["words"] if word not in said] == [], said
    assert outcome.refused.hint or ";" in outcome.refused.message, said  # what would work


def check_problems(expected: list[dict[str, Any]], outcome: IngestOutcome) -> None:
    """Each row that is not valid is named, no other is, and nothing is kept."""
    found = [(problem.part, problem.line, problem.field, problem.code) for problem in outcome.problems]
    assert found == [(problem.get("part", ""), problem["line"], problem["field"], problem["code"]) for problem in expected], (
        outcome.problems
    )
    for problem, wanted in zip(outcome.problems, expected, strict=True):
        assert [word for word in wanted["words"] if word not in problem.reason] == [], problem.reason
    assert outcome.problem_count == len(expected)
    assert (outcome.rows, outcome.report) == (None, None)


def check_rows(expected: dict[str, Any], outcome: IngestOutcome, output: Path) -> None:
    """The rows that are kept, byte for byte where the case lists them, and what the report says about them."""
    assert outcome.rows is not None, outcome.problems
    assert outcome.report is not None
    report = outcome.report
    assert report.rows_kept == sum(split.rows for split in outcome.rows.splits.values()) == expected["kept"]
    assert report.dropped == expected.get("dropped", {})
    if "rows" in expected:
        assert [json.loads(line) for line in (output / "train.jsonl").read_bytes().split(b"\n") if line] == expected["rows"]
    for words in expected.get("warnings", []):
        assert any(words in warning for warning in report.warnings), report.warnings
    for name in ("secrets", "personal_data"):
        if name in expected:
            assert {finding.kind: finding.rows for finding in getattr(report, name)} == expected[name]
    if expected.get("near_duplicates"):
        assert report.near_duplicates is not None
        assert report.near_duplicates.held_out_rows_with_a_near_duplicate > 0


def test_every_file_has_a_case() -> None:
    assert {path.name for path in FILES.iterdir()} == {case.file for case in KEPT}
    assert set(GENERATED) == {case.file for case in HOSTILE}
    assert len({case.name for case in CASES}) == len(CASES)


def test_corpus_stays_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < MAX_CORPUS_BYTES

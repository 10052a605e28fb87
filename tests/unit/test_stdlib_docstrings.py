"""The demo's dataset: enough rows in one style, accepted by the service unchanged."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ingest.dataset_harness import parse_rows

SCRIPT = Path(__file__).resolve().parents[2] / "infra" / "stdlib_docstrings.py"


def run_script(target: Path, *options: str) -> bytes:
    subprocess.run([sys.executable, SCRIPT, target, *options], check=True, capture_output=True)
    return target.read_bytes()


@pytest.fixture(scope="module")
def generated_rows(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return run_script(tmp_path_factory.mktemp("docstrings") / "rows.jsonl")


@pytest.fixture(scope="module")
def all_rows(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """More rows than the standard library gives."""
    return run_script(tmp_path_factory.mktemp("docstrings") / "rows.jsonl", "--rows", "5000")


def test_service_accepts_every_row(generated_rows: bytes) -> None:
    rows = parse_rows(generated_rows)
    assert {row.dataset_type for row in rows} == {"messages"}
    assert len({row.digest for row in rows}) == 650


def test_questions_are_uniform_and_answers_unique(generated_rows: bytes) -> None:
    pairs = [[message["content"] for message in json.loads(line)["messages"]] for line in generated_rows.splitlines()]
    assert all(question.startswith("What does ") and question.endswith(" do?") for question, _ in pairs)
    assert all(40 <= len(answer) <= 160 and answer[0].isupper() and answer.isprintable() for _, answer in pairs)
    assert len({answer for _, answer in pairs}) == len({question for question, _ in pairs}) == len(pairs)


def test_functions_are_named_by_public_path(all_rows: bytes) -> None:
    text = all_rows.decode()
    assert "What does os.path.split do?" in text
    assert "posixpath" not in text
    assert "What does shutil.copyfile do?" in text


def test_rows_are_deterministic(tmp_path: Path, generated_rows: bytes) -> None:
    assert run_script(tmp_path / "rows.jsonl") == generated_rows


def test_smaller_output_is_a_prefix(all_rows: bytes, generated_rows: bytes) -> None:
    assert generated_rows.splitlines() == all_rows.splitlines()[:650]

"""The demo's data set: enough rows, in one style, that the service takes as they are."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from service.core.dataset_rows import RowLimits, read_rows

SCRIPT = Path(__file__).resolve().parents[2] / "infra" / "stdlib_docstrings.py"


def build(target: Path, *options: str) -> bytes:
    subprocess.run([sys.executable, SCRIPT, target, *options], check=True, capture_output=True)
    return target.read_bytes()


@pytest.fixture(scope="module")
def upload(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return build(tmp_path_factory.mktemp("docstrings") / "rows.jsonl")


def test_the_service_takes_every_row(upload: bytes) -> None:
    rows = list(read_rows(io.BytesIO(upload), RowLimits()))
    assert {row.dataset_type for row in rows} == {"messages"}
    assert len({row.digest for row in rows}) == 650


def test_questions_and_answers_have_one_style_and_no_answer_comes_twice(upload: bytes) -> None:
    pairs = [[message["content"] for message in json.loads(line)["messages"]] for line in upload.splitlines()]
    assert all(question.startswith("What does ") and question.endswith(" do?") for question, _ in pairs)
    assert all(40 <= len(answer) <= 160 and answer[0].isupper() and answer.isprintable() for _, answer in pairs)
    assert len({answer for _, answer in pairs}) == len({question for question, _ in pairs}) == len(pairs)


def test_a_well_known_function_is_asked_for_by_its_public_name(tmp_path: Path) -> None:
    everything = build(tmp_path / "rows.jsonl", "--rows", "5000").decode()
    assert "What does os.path.split do?" in everything
    assert "posixpath" not in everything
    assert "What does shutil.copyfile do?" in everything


def test_the_same_python_gives_the_same_rows(tmp_path: Path, upload: bytes) -> None:
    assert build(tmp_path / "rows.jsonl") == upload


def test_fewer_rows_are_the_first_of_more(tmp_path: Path, upload: bytes) -> None:
    assert build(tmp_path / "rows.jsonl", "--rows", "7").splitlines() == upload.splitlines()[:7]

"""Adding a format and a shape of rows: a file and a registry line each, in a copy of the tree."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.toys import copy_tree_with_toys

ROWS = "Who wrote Hamlet? = Shakespeare.\nWhat is ice? = Frozen water.\n"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tree")
    copy_tree_with_toys(folder)
    return folder


def ingest(tree: Path, folder: Path, content: str, name: str, **options: Any) -> dict[str, Any]:
    """The outcome for a file, by the code of the tree."""
    (folder / name).write_text(content)
    (folder / "out").mkdir()
    task = {
        "files": [{"path": str(folder / name), "name": name}],
        "output": str(folder / "out"),
        "options": {"eval_fraction": 0, **options},
    }
    (folder / "task.json").write_text(json.dumps(task))
    variables = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tree), "PYTHONUTF8": "1"}
    command = [sys.executable, "-m", "jobs.ingest", str(folder / "task.json")]
    done = subprocess.run(command, cwd=tree, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "out/outcome.json").read_text())


def test_added_format_and_shape_make_rows(tree: Path, tmp_path: Path) -> None:
    outcome = ingest(tree, tmp_path, ROWS, "rows.toy", format="toy")
    assert (outcome["detected"]["format"], outcome["detected"]["shape"], outcome["rows_read"]) == ("toy", "toy", 2)
    rows = [json.loads(line) for line in (tmp_path / "out/train.jsonl").read_text().splitlines()]
    assert rows[0] == {"prompt": "Who wrote Hamlet?", "completion": "Shakespeare."}


def test_problems_of_added_format_name_their_line(tree: Path, tmp_path: Path) -> None:
    outcome = ingest(tree, tmp_path, ROWS + "What is steam?\n", "rows.toy", format="toy")
    assert [(problem["line"], problem["code"]) for problem in outcome["problems"]] == [(3, "not_a_toy")]
    assert outcome["rows"] is None


def test_added_shape_applies_to_every_format(tree: Path, tmp_path: Path) -> None:
    outcome = ingest(tree, tmp_path, "call,reply\nWho wrote Hamlet?,Shakespeare.\n", "rows.csv")
    assert (outcome["detected"]["format"], outcome["detected"]["shape"]) == ("csv", "toy")

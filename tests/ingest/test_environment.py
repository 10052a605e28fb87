"""The environment `data` behind the wall between families: only the runtime and this family are there, as in its image."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.toys import SOURCE, copy_one_family


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    copy_one_family(SOURCE, folder, "ingest")
    return folder


def run(tree: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run a module in that tree."""
    variables = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tree), "HOME": str(tree), "PYTHONUTF8": "1"}
    return subprocess.run([sys.executable, "-m", *arguments], cwd=tree, env=variables, capture_output=True, text=True, check=False)


def test_probe_finds_one_family(tree: Path) -> None:
    done = run(tree, "jobs.runtime.probe", "data")
    assert done.returncode == 0, done.stderr
    manifest = json.loads(done.stdout)
    assert (manifest["environment"], list(manifest["families"])) == ("data", ["ingest"])
    assert "torch" not in manifest["packages"]


def test_ingestion_runs(tree: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "out").mkdir()
    task = {"files": [{"path": str(rows), "name": rows.name}], "output": str(tmp_path / "out"), "options": {"eval_fraction": 0}}
    (tmp_path / "task.json").write_text(json.dumps(task))
    done = run(tree, "jobs.ingest", str(tmp_path / "task.json"))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out/outcome.json").read_text())["rows"]["splits"]["train"]["rows"] == 2


def test_attempt_starts(tree: Path) -> None:
    """Without its variables, which it names: everything that an attempt imports first is there."""
    done = run(tree, "jobs.run")
    assert done.returncode != 0
    assert "ModuleNotFoundError" not in done.stderr
    assert "JOB_" in done.stderr or "SERVICE_URL" in done.stderr


def test_start_loads_no_optional_library(tree: Path) -> None:
    """The process starts for every upload, and most are JSON lines."""
    code = "import sys, jobs.ingest.__main__; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(tree)}, capture_output=True, text=True, check=True)
    optional = {"pyarrow", "python_calamine", "zstandard", "charset_normalizer", "transformers", "tokenizers", "numpy", "boto3", "google"}
    assert optional & {name.partition(".")[0] for name in done.stdout.split()} == set()

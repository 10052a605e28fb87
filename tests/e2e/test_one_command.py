"""`tunesmith train rows.jsonl` on a machine where no service runs yet."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.e2e.conftest import BASE, ROWS, TUNESMITH, Service, new_service


@pytest.fixture
def quiet_home(tmp_path: Path, tiny_gemma: Path) -> Iterator[Service]:
    """A home with a base in its store and without a service; whatever was started there is stopped."""
    service = new_service(tmp_path / "home", tiny_gemma)
    yield service
    file = service.home / "service.json"
    if file.exists():
        psutil.Process(json.loads(file.read_text())["pid"]).kill()
    service.http.close()


def test_rows_become_a_model_in_one_command(quiet_home: Service, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(row) for row in [*ROWS, ROWS[0]]))
    short_name = BASE.rpartition("/")[2]
    words = ["train", str(rows), "--base", short_name, "--max-steps", "2", "--batch-size", "2", "--lr", "1e-3", "--metadata", "team=search"]
    printed = quiet_home.run_cli(*words)
    job_id = printed.split()[0]
    assert "completed" in printed
    shown = json.loads(quiet_home.run_cli("show", "@last", "--json"))
    assert (shown["job_id"], shown["base_model_id"], shown["status"]) == (job_id, BASE, "completed")
    assert shown["metadata"] == {"team": "search"}
    assert "gguf-q8_0" in [artifact["name"] for artifact in shown["artifacts"]]
    assert json.loads(quiet_home.run_cli("show", job_id[-4:], "--json"))["job_id"] == job_id
    again = quiet_home.run_cli(*words, "--detach").strip()
    assert len(json.loads(quiet_home.run_cli("datasets", "list", "--json"))["datasets"]) == 1  # the rows were found again
    quiet_home.run_cli("cancel", again, "--wait")
    refusal = quiet_home.run_cli("train", str(rows), "--base", f"{short_name}x", "--hardware", "moon", "--detach", expect_failure=True)
    assert "error hardware (--hardware): " in refusal
    assert f"did you mean {BASE}?" in refusal
    ambiguous = quiet_home.run_cli("show", "rows", expect_failure=True)
    assert "'rows' means 2 jobs:" in ambiguous
    assert json.loads(quiet_home.run_cli("doctor", "--json"))["ok"]
    assert "stopped" in quiet_home.run_cli("stop")
    assert not (quiet_home.home / "service.json").exists()


def test_base_in_a_folder_is_imported_from_anywhere(service: Service, tiny_gemma: Path, tmp_path: Path) -> None:
    command = [str(TUNESMITH), "models", "import", str(tiny_gemma), "--name", "me/mine", "--json"]
    done = subprocess.run(command, env=service.environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown = json.loads(service.run_cli("models", "show", "mine", "--json"))
    assert (shown["name"], shown["source"], shown["available"]) == ("me/mine", "folder", True)

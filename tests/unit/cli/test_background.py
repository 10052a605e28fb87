"""The service in the background."""

import json
import subprocess
import sys
import threading
from collections.abc import Generator
from pathlib import Path

import httpx2
import pytest

from cli.errors import CliError
from tests.unit.cli.test_commands import run_command

COUNTS = httpx2.Response(200, json={"jobs": [], "counts": {"queued": 1, "training": 2, "completed": 9}})
# A process that is named like a service and ends on SIGINT.
SERVICE = [
    sys.executable,
    "-c",
    "import signal; signal.signal(signal.SIGINT, signal.SIG_DFL); print(flush=True); signal.pause()",
    "service",
]


@pytest.fixture
def running(tmp_path: Path) -> Generator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(SERVICE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    waiting = threading.Thread(target=process.wait)
    waiting.start()  # else it would stay as a zombie, which looks alive
    (tmp_path / "service.json").write_text(json.dumps({"url": "http://127.0.0.1:9", "pid": process.pid}))
    yield process
    process.kill()
    waiting.join()
    process.stdout.close()


def test_service_is_stopped_and_unfinished_jobs_are_told(tmp_path: Path, running: subprocess.Popen[bytes]) -> None:
    done, _ = run_command("stop", replies=[COUNTS], environment={"TUNESMITH_HOME": str(tmp_path)})
    assert (done.exit_code, done.stdout.strip()) == (0, "stopped; 3 unfinished jobs continue at its next start")
    assert running.wait() != 0


def test_stopping_without_a_service_names_the_home(tmp_path: Path) -> None:
    done, _ = run_command("stop", replies=[COUNTS], environment={"TUNESMITH_HOME": str(tmp_path)})
    assert isinstance(done.exception, CliError)
    assert str(tmp_path) in done.exception.message


def test_process_that_got_the_number_of_a_service_is_left_alone(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as other:
        (tmp_path / "service.json").write_text(json.dumps({"url": "http://127.0.0.1:9", "pid": other.pid}))
        done, _ = run_command("stop", replies=[COUNTS], environment={"TUNESMITH_HOME": str(tmp_path)})
        assert isinstance(done.exception, CliError)
        assert other.poll() is None
        other.kill()


def test_failed_start_shows_the_end_of_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path))
    monkeypatch.setenv("TUNESMITH_PORT", "many")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n')
    command = [sys.executable, "-m", "cli.main", "train", str(rows), "--base", "a/b"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3])
    assert done.returncode == 1
    assert "error the service did not start:" in done.stderr
    assert "TUNESMITH_PORT" in done.stderr or "port" in done.stderr
    assert f"hint: its log is {tmp_path / 'service.log'}" in done.stderr

"""What the shell offers to complete."""

import os
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

from cli.connection import Connection
from cli.http_client import Client
from tests.unit.cli.fake_service import FakeReply, FakeService

SOURCE = Path(__file__).parents[3]
JOBS = [
    {"job_id": "training_0123456789ab", "job_name": "tides", "status": "training", "base_model_id": "google/gemma-3-270m"},
    {"job_id": "training_ffffffffffff", "job_name": "tides", "status": "completed", "base_model_id": "google/gemma-3-270m"},
]


def complete(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str, reply: FakeReply) -> list[str]:
    """What bash is offered for the last of the words, by a service with this reply."""
    from cli.main import app

    service = FakeService(reply)

    def create_client(connection: Connection, timeout_s: float) -> Client:
        return service.client

    monkeypatch.setattr(Connection, "create_impatient_client", create_client)
    variables = {"_TUNESMITH_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(["tunesmith", *words]), "COMP_CWORD": str(len(words))}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        app(prog_name="tunesmith")
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out.split()


def test_jobs_are_completed_by_id_and_name(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    reply = httpx2.Response(200, json={"jobs": JOBS})
    assert complete(monkeypatch, capsys, "show", "t", reply=reply) == ["tides", "training_0123456789ab", "training_ffffffffffff"]
    assert complete(monkeypatch, capsys, "show", "@", reply=reply) == ["@last"]


def test_datasets_and_hardware_are_completed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    datasets = [{"processed_dataset_id": f"dataset_{letter}", "name": "faq.csv"} for letter in "ab"]
    reply = httpx2.Response(200, json={"datasets": datasets})
    assert complete(monkeypatch, capsys, "datasets", "show", "dataset_a", reply=reply) == ["dataset_a"]
    reply = httpx2.Response(200, json={"launchers": {"local": {"profiles": {"cpu": {}}}}})
    assert complete(monkeypatch, capsys, "train", "--hardware", "a", reply=reply) == ["auto"]


@pytest.mark.parametrize("reply", [httpx2.ConnectError("refused"), httpx2.Response(401, text="no"), httpx2.Response(200, text="<html>")])
def test_service_that_fails_completes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], reply: FakeReply
) -> None:
    assert complete(monkeypatch, capsys, "show", "t", reply=reply) == []


def test_commands_are_completed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert complete(monkeypatch, capsys, "c", reply=httpx2.ConnectError("unused")) == [
        *("cancel", "checkpoints", "clone", "chat", "capabilities"),
    ]


def test_completion_script_is_shown_for_a_shell() -> None:
    environment = os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    command = [sys.executable, "-m", "cli.main", "--show-completion", "bash"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=SOURCE, env=environment)
    assert "_TUNESMITH_COMPLETE=complete_bash" in done.stdout

"""`tunesmith models`: what it prints, and how it runs the trainer's environment."""

import json
from pathlib import Path
from typing import Any

import httpx2
import pytest

from cli.errors import CliError
from cli.http_client import Client
from cli.models import format_count, import_folder
from cli.settings import Settings
from tests.unit.cli.fake_service import FakeReply
from tests.unit.cli.test_commands import run_command

MODEL: dict[str, Any] = {
    "name": "google/gemma-3-270m",
    "family": "llm",
    "source": "package",
    "revision": "1.0.0",
    "precision": "bfloat16",
    "note": "dequantized from Q4_K_M",
    "parameters": 268_098_176,
    "size_bytes": 536_223_056,
    "license": "gemma",
    "architecture": "Gemma3ForCausalLM",
    "imported_at": "2026-11-30T15:00:00Z",
    "available": True,
    "hub": None,
    "hidden_size": 640,
    "images": "none",
}


def reply(body: object) -> FakeReply:
    return httpx2.Response(200, json=body)


def list_reply(store_url: str = "file:///home/me/objects") -> FakeReply:
    return reply({"models": [MODEL], "store_url": store_url})


class FakeTrainer:
    """The trainer's environment: a Python that answers with one document, and keeps what it was given."""

    def __init__(self, folder: Path, answer: object, exit_code: int = 0) -> None:
        self.venvs, self._folder = folder / "venvs", folder
        python = self.venvs / "llm/bin/python"
        python.parent.mkdir(parents=True)
        script = f"#!/bin/sh\nprintf '%s\\n' \"$@\" > {folder}/arguments\ncat > {folder}/input\ncat {folder}/answer\nexit {exit_code}\n"
        python.write_text(script)
        python.chmod(0o755)
        (folder / "answer").write_text(json.dumps(answer))

    @property
    def environment(self) -> dict[str, str]:
        return {"TUNESMITH_LOCAL_VENVS": str(self.venvs), "TUNESMITH_HOME": str(self._folder / "home")}

    @property
    def arguments(self) -> list[str]:
        return (self._folder / "arguments").read_text().splitlines()

    @property
    def input(self) -> str:
        return (self._folder / "input").read_text()


@pytest.fixture(autouse=True)
def _service_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cli.models.LOOPBACK", ("service",))


def test_list_and_show_name_what_a_user_chooses_by() -> None:
    done, [request] = run_command("models", "list", replies=[list_reply()])
    assert request.url.path == "/models"
    for text in ("google/gemma-3-270m", "llm", "package", "bfloat16", "268 M", "536 MB", "gemma", "yes"):
        assert text in done.output
    done, [request] = run_command("models", "show", "gemma-3-270m", replies=[reply(MODEL)])
    assert request.url.path == "/models/gemma-3-270m"
    assert "dequantized from Q4_K_M" in done.output
    done, _ = run_command("models", "list", "--json", replies=[list_reply()])
    assert json.loads(done.stdout)["models"] == [MODEL]


def test_show_says_how_to_get_a_gated_model() -> None:
    gated = MODEL | {"available": False, "hub": "gated", "source": "hub", "size_bytes": 0, "imported_at": None}
    done, _ = run_command("models", "show", "google/gemma-3-1b-pt", replies=[reply(gated)])
    assert "accept its license there and pass --hf-token" in done.output


def test_pull_gives_the_token_on_standard_input_only(tmp_path: Path) -> None:
    trainer = FakeTrainer(tmp_path, {"model": MODEL})
    words = ["models", "pull", "google/gemma-3-270m", "--revision", "main", "--hf-token", "hf_secret"]
    done, _ = run_command(*words, replies=[list_reply()], environment=trainer.environment)
    assert done.exit_code == 0, done.output
    assert trainer.input == "hf_secret\n"
    assert "hf_secret" not in trainer.arguments
    assert trainer.arguments[:4] == ["-m", "jobs.llm.bases", "pull", "google/gemma-3-270m"]
    assert {"--store", "file:///home/me/objects", "--revision", "main", "--token-on-stdin"} <= set(trainer.arguments)
    assert "268 M parameters, 536 MB, license gemma" in done.output


def test_failed_import_shows_the_reason_and_the_hint(tmp_path: Path) -> None:
    error = {"code": "invalid_config", "message": "pickled weights", "hint": "save it as safetensors"}
    trainer = FakeTrainer(tmp_path, {"error": error}, exit_code=1)
    words = ["models", "import", str(tmp_path), "--name", "me/mine"]
    done, _ = run_command(*words, replies=[list_reply()], environment=trainer.environment)
    assert isinstance(done.exception, CliError)
    assert (done.exception.message, done.exception.hint) == ("pickled weights", "save it as safetensors")


def test_import_folder_returns_the_name_for_a_job(tmp_path: Path) -> None:
    trainer = FakeTrainer(tmp_path, {"model": MODEL | {"name": "me/mine"}})
    client = Client(
        "http://service", transport=httpx2.MockTransport(lambda _: httpx2.Response(200, json={"models": [], "store_url": "gs://b"}))
    )
    assert import_folder(Settings(venvs=trainer.venvs), client, tmp_path, "me/mine") == "me/mine"
    assert trainer.arguments[2:] == ["import", "me/mine", "--folder", str(tmp_path), "--store", "gs://b"]


def test_a_store_in_a_folder_of_another_machine_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cli.models.LOOPBACK", ("127.0.0.1",))
    done, _ = run_command("models", "import", str(tmp_path), "--name", "me/mine", replies=[list_reply()])
    assert isinstance(done.exception, CliError)
    assert "a folder on the machine of http://service" in done.exception.message


def test_missing_trainer_environment_is_named(tmp_path: Path) -> None:
    words = ["models", "import", str(tmp_path), "--name", "me/mine"]
    done, _ = run_command(*words, replies=[list_reply()], environment={"TUNESMITH_LOCAL_VENVS": str(tmp_path / "none")})
    assert isinstance(done.exception, CliError)
    assert "trainer's environment is not installed" in done.exception.message


def test_remove_refuses_a_base_of_unfinished_jobs(tmp_path: Path) -> None:
    trainer = FakeTrainer(tmp_path, {"removed_bytes": 5})
    used = reply({"jobs": [{"job_id": "training_1", "base_model_id": MODEL["name"]}], "next_cursor": None})
    done, _ = run_command("models", "remove", "gemma-3-270m", "--yes", replies=[reply(MODEL), used], environment=trainer.environment)
    assert isinstance(done.exception, CliError)
    assert "training_1" in done.exception.message
    unused = [reply({"jobs": [], "next_cursor": None})]
    words = ["models", "remove", "gemma-3-270m"]
    done, _ = run_command(*words, replies=[reply(MODEL), *unused, list_reply()], environment=trainer.environment)
    assert isinstance(done.exception, CliError)
    assert "--yes" in done.exception.hint
    done, _ = run_command(*words, "--yes", replies=[reply(MODEL), *unused, list_reply()], environment=trainer.environment)
    assert done.exit_code == 0, done.output
    assert trainer.arguments[2:4] == ["remove", "google/gemma-3-270m"]


def test_counts_are_short() -> None:
    assert [format_count(count) for count in (None, 900, 268_098_176, 1_100_000_000, 27 * 10**9)] == ["", "900", "268 M", "1.1 B", "27.0 B"]

"""What `doctor` finds."""

import json
from pathlib import Path
from typing import Any

import httpx2
import pytest

from cli.doctor import Check, check_environments, check_gpu, check_home, check_hub, describe_health
from cli.http_client import Json
from cli.settings import Settings
from schema.version import VERSION
from tests.unit.cli.fake_service import FakeReply
from tests.unit.cli.test_commands import run_command

WHOAMI = {"subject": "local", "tenant_id": "default", "scopes": ["jobs:read"]}


def make_health(**changes: Any) -> Json:
    return {"version": VERSION, "checks": {"store": "ok"}, "launchers": {"local": "ok"}} | changes


def run_doctor(tmp_path: Path, *replies: FakeReply) -> tuple[int, Json]:
    """The exit code of `doctor --json` and what it printed."""
    environment = {"TUNESMITH_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done, _ = run_command("doctor", "--json", replies=[*replies], environment=environment)
    return done.exit_code, json.loads(done.stdout)


def find_states(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.state for check in checks}


def test_healthy_deployment_has_no_problem(tmp_path: Path) -> None:
    replies = [httpx2.Response(200, json=body) for body in (make_health(), WHOAMI, {"default_hardware": "local/cpu"})]
    exit_code, answer = run_doctor(tmp_path, *replies)
    states = {check["name"]: check["state"] for check in answer["checks"]}
    assert (exit_code, answer["ok"]) == (0, True)
    assert {states[name] for name in ("service", "store", "launcher", "identity", "hardware", "hub")} == {"ok"}


def test_missing_service_is_a_warning_that_says_what_starts_one(tmp_path: Path) -> None:
    exit_code, answer = run_doctor(tmp_path, httpx2.ConnectError("refused"))
    [service] = [check for check in answer["checks"] if check["name"] == "service"]
    assert (exit_code, service["state"]) == (0, "warning")
    assert "tunesmith serve" in service["advice"]


def test_refused_caller_is_a_problem(tmp_path: Path) -> None:
    refusal = httpx2.Response(401, json={"error": {"code": "unauthorized", "message": "no token", "hint": "set it"}})
    exit_code, answer = run_doctor(tmp_path, httpx2.Response(200, json=make_health()), refusal)
    assert (exit_code, answer["ok"]) == (1, False)
    assert answer["checks"][-1] == {"name": "identity", "state": "problem", "detail": "no token", "advice": "set it"}


def test_answer_of_something_else_is_not_a_service(tmp_path: Path) -> None:
    _, answer = run_doctor(tmp_path, httpx2.Response(200, text="<html>"))
    assert "is not a Tunesmith service" in answer["checks"][-1]["detail"]


def test_parts_and_versions_of_a_service_are_compared() -> None:
    health = make_health(version="9.9.9", checks={"store": "does not respond"}, launchers={"local": "nothing is installed"})
    checks = list(describe_health("http://service", health))
    assert [check.state for check in checks] == ["warning", "problem", "problem"]
    assert f"version 9.9.9; this command line is {VERSION}" in checks[0].detail


def test_folder_that_cannot_be_written_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert check_home(tmp_path / "file").state == "problem"
    assert "GB free" in check_home(tmp_path / "new" / "home").detail
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("manifest", "states"),
    [
        ({"packages": {"torch": "2"}, "families": {"llm": {"features": {"gguf": True}}}}, {"trainer": "ok", "llama.cpp": "ok"}),
        ({"packages": {}, "families": {"llm": {"features": {}}}}, {"trainer": "ok", "llama.cpp": "warning"}),
        (None, {"trainer": "warning"}),
    ],
)
def test_environment_is_described_by_its_manifest(tmp_path: Path, manifest: Json | None, states: dict[str, str]) -> None:
    environments, python = tmp_path / "environments/llm", tmp_path / "venvs/llm/bin/python"
    environments.mkdir(parents=True)
    assert find_states(list(check_environments(tmp_path / "venvs", environments.parent))) == {"trainer": "warning"}
    python.parent.mkdir(parents=True)
    python.touch()
    if manifest is not None:
        (environments / "capabilities.json").write_text(json.dumps(manifest))
    assert find_states(list(check_environments(tmp_path / "venvs", environments.parent))) == states


def test_machine_without_gpu_is_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check_gpu() == Check("gpu", "ok", "no NVIDIA GPU; jobs on this machine train on the CPU")
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA L4, 23034 MiB'\n")
    tool.chmod(0o755)
    assert check_gpu() == Check("gpu", "ok", "NVIDIA L4, 23034 MiB")
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert check_gpu().state == "warning"


def test_hub_that_cannot_be_reached_is_a_warning() -> None:
    check = check_hub(Settings.from_environment({"HF_ENDPOINT": "http://127.0.0.1:9/"}))
    assert check.state == "warning"
    assert "http://127.0.0.1:9 does not answer" in check.detail
    assert check_hub(Settings.from_environment({"HF_HUB_OFFLINE": "1"})).state == "ok"

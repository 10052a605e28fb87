"""The settings of the command line: same variables and defaults as the service, and where it finds a running service."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from cli.connection import Connection
from cli.settings import DEFAULT_URL, Settings
from service.adapters.launchers.local.settings import LocalSettings
from service.settings import Settings as ServiceSettings


def test_defaults_match_service_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TUNESMITH_HOME", "TUNESMITH_HOST", "TUNESMITH_PORT", "PORT", "TUNESMITH_PUBLIC_URL", "TUNESMITH_LOCAL_VENVS"):
        monkeypatch.delenv(name, raising=False)
    settings, service_settings = Settings.from_environment({}), ServiceSettings()  # type: ignore[call-arg]
    expected = (service_settings.home_folder, LocalSettings().venvs, service_settings.url)  # type: ignore[call-arg]
    assert (settings.home_folder, settings.venvs, DEFAULT_URL) == expected


def test_variables_match_service_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"TUNESMITH_HOME": "~/elsewhere", "TUNESMITH_LOCAL_VENVS": "/opt/venvs"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    settings, service_settings = Settings.from_environment(variables), ServiceSettings()  # type: ignore[call-arg]
    assert (settings.home_folder, settings.venvs) == (service_settings.home_folder, LocalSettings().venvs)  # type: ignore[call-arg]
    assert settings.trainer_python == Path("/opt/venvs/llm/bin/python")


def test_running_service_is_found_through_its_home(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    assert settings.service_url == DEFAULT_URL
    (tmp_path / "service.json").write_text(json.dumps({"url": "http://127.0.0.1:41000", "pid": 1}))
    assert settings.service_url == "http://127.0.0.1:41000"


@pytest.mark.parametrize("content", ["", "{", "{}"])
def test_unreadable_service_file_is_ignored(tmp_path: Path, content: str) -> None:
    (tmp_path / "service.json").write_text(content)
    assert Settings(home=tmp_path).service_url == DEFAULT_URL


def test_token_of_the_home_folder_is_for_its_running_service(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    (tmp_path / "token").write_text("tsk_x\n")
    assert settings.local_token is None
    (tmp_path / "service.json").write_text(json.dumps({"url": "http://127.0.0.1:41000", "pid": os.getpid()}))
    assert settings.local_token == "tsk_x"
    ended = subprocess.Popen(["true"])
    ended.wait()
    (tmp_path / "service.json").write_text(json.dumps({"url": "http://127.0.0.1:41000", "pid": ended.pid}))
    assert settings.local_token is None


def test_nobody_waits_for_a_service_that_nobody_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path))
    assert Connection.choose(None, None, None).may_start_soon is False
    assert Connection.choose("http://127.0.0.1:41000", None, None).may_start_soon is True
    (tmp_path / "service.json").write_text(json.dumps({"url": "http://127.0.0.1:41000", "pid": os.getpid()}))
    assert Connection.choose(None, None, None).may_start_soon is True

"""Start errors of `python -m service`: one line, a hint, exit code 1."""

import fcntl
import json
import socket
from pathlib import Path

import pytest

from service.__main__ import main


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path))
    return tmp_path


def start_and_fail(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Standard error of a start that fails."""
    with pytest.raises(SystemExit) as excinfo:
        main(["--port", "0", *arguments])
    assert excinfo.value.code == 1
    printed = capsys.readouterr()
    assert printed.out == ""  # the URL is printed only by a service that starts
    assert len(printed.err.splitlines()) == 2
    return printed.err


def test_second_service_in_same_home_names_the_first(capsys: pytest.CaptureFixture[str], home: Path) -> None:
    (home / "service.json").write_text(json.dumps({"url": "http://127.0.0.1:41000", "pid": 1}))
    with (home / "service.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        printed = start_and_fail(capsys)
    assert f"already uses {home}: http://127.0.0.1:41000" in printed
    assert "TUNESMITH_HOME" in printed


def test_occupied_port_is_an_error_with_hint(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        printed = start_and_fail(capsys, "--port", str(other.getsockname()[1]))
    assert "cannot listen on 127.0.0.1:" in printed
    assert "--port" in printed


def test_invalid_setting_is_an_error_with_hint(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_LOCAL_MAX_CONCURRENT_JOBS", "none")
    assert "max_concurrent_jobs" in start_and_fail(capsys)


def test_setting_of_an_earlier_version_is_an_error_with_its_new_name(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNESMITH_LAUNCHER", "cloud-run")
    assert "TUNESMITH_LAUNCHER is now called TUNESMITH_LAUNCHERS" in start_and_fail(capsys)


def test_unknown_adapter_is_an_error_with_hint(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_JOB_STORE", "moon")
    assert "no job store 'moon'" in start_and_fail(capsys)


def test_listening_for_everybody_needs_identities(capsys: pytest.CaptureFixture[str]) -> None:
    assert "TUNESMITH_IDENTITY" in start_and_fail(capsys, "--host", "0.0.0.0")


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "x"])
def test_idle_time_must_be_a_positive_number(capsys: pytest.CaptureFixture[str], seconds: str) -> None:
    with pytest.raises(SystemExit) as excinfo:
        main(["--exit-when-idle", seconds])
    assert excinfo.value.code == 2
    assert "--exit-when-idle" in capsys.readouterr().err


def test_signing_key_is_replaced(capsys: pytest.CaptureFixture[str], home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main(["--rotate-signing-key"])
    first = (home / "signing-key").read_bytes()
    main(["--rotate-signing-key"])
    assert (home / "signing-key").read_bytes() != first
    assert capsys.readouterr().out.count("is replaced") == 2
    monkeypatch.setenv("TUNESMITH_SIGNING_KEY", "k" * 32)
    with pytest.raises(SystemExit):
        main(["--rotate-signing-key"])
    assert "TUNESMITH_SIGNING_KEY_PREVIOUS" in capsys.readouterr().err

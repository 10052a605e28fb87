"""The entry point: what it imports, its version, and its errors as text and as JSON."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cli.main import COMMANDS, main

SOURCE = Path(__file__).parents[3]
LIST_MODULES = "import sys, atexit; atexit.register(lambda: print('\\n'.join(sys.modules))); from cli.main import main; main()"


def find_imported_modules(*words: str) -> set[str]:
    """The modules that a fresh interpreter has loaded when the command ends."""
    done = subprocess.run([sys.executable, "-c", LIST_MODULES, *words], capture_output=True, text=True, check=False, cwd=SOURCE)
    return set(done.stdout.split())


def run_main(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The exit code of `tunesmith` with these words."""
    monkeypatch.setattr(sys, "argv", ["tunesmith", *words])
    with pytest.raises(SystemExit) as excinfo:
        main()
    assert isinstance(excinfo.value.code, int)
    return excinfo.value.code


def test_version_is_printed_without_loading_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == "tunesmith 0.1.0\n"
    loaded = find_imported_modules("--version")
    assert {name for name in loaded if name.startswith("cli.")} == {"cli.main", "cli.errors"}
    assert not loaded & {"rich", "yaml", "httpx2", "pydantic"}


def test_listing_jobs_loads_no_other_command() -> None:
    loaded = find_imported_modules("--url", "http://[::", "jobs")
    assert "cli.jobs" in loaded
    assert not loaded & {"cli.watch", "cli.submit", "cli.datasets", "cli.local", "yaml"}
    assert {name for name in loaded if name.startswith("schema")} == {"schema", "schema.version"}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(monkeypatch, name, "--help") == 0
    assert f"Usage: tunesmith {name}" in capsys.readouterr().out


def test_misspelled_command_is_suggested(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(monkeypatch, "jbos") == 2
    assert "No such command 'jbos'. Did you mean 'jobs'?" in capsys.readouterr().err


def test_misspelled_option_is_suggested(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(monkeypatch, "jobs", "--statsu", "failed") == 2
    printed = capsys.readouterr()
    assert "--status" in printed.err
    assert "hint: tunesmith jobs --help" in printed.err


def test_usage_error_with_json_is_one_document(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(monkeypatch, "jobs", "--limit", "many", "--json") == 2
    printed = capsys.readouterr()
    error = json.loads(printed.out)["error"]
    assert (error["code"], error["hint"], printed.err) == ("invalid_command", "tunesmith jobs --help", "")
    assert error["errors"] == [{name: error[name] for name in ("message", "hint", "param")}]


def test_invalid_url_is_an_error_with_a_hint(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(monkeypatch, "--url", "http://[::", "jobs") == 1
    assert "http://[:: is not a URL" in capsys.readouterr().err

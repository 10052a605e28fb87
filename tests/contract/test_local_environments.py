"""Probes of the environments on this machine: a slow or failing one must not keep requests waiting."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from service.adapters.launchers.local.environments import LocalEnvironments
from service.core.errors import Unavailable
from tests.contract.test_launcher import make_attempt_environment
from tests.waiting import wait_until


def make_environments(folder: Path, probe: str, wait_s: float) -> LocalEnvironments:
    """One installed environment without a manifest. `probe` runs before what the probe does otherwise."""
    make_attempt_environment(folder)
    script = folder / "source/jobs/runtime/probe.py"
    script.write_text(probe + script.read_text())
    variables = {"MARKERS_FOLDER": str(folder / "markers"), "PATH": os.environ["PATH"]}
    return LocalEnvironments(
        environments=folder / "environments", venvs=folder / "venvs", source=folder / "source", variables=variables, wait_s=wait_s
    )


def test_failed_probe_is_not_repeated_for_each_request(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    environments = make_environments(tmp_path, f"open({str(runs)!r}, 'a').write('x')\nraise SystemExit('broken')\n", wait_s=30)
    for _ in range(3):
        with pytest.raises(Unavailable, match="does not work"):
            environments.list_installed()
    assert runs.read_text() == "x"


def test_package_that_was_installed_since_ends_a_failure(tmp_path: Path) -> None:
    fixed = tmp_path / "fixed"
    environments = make_environments(tmp_path, f"import os\nif not os.path.exists({str(fixed)!r}): raise SystemExit(1)\n", wait_s=30)
    with pytest.raises(Unavailable, match="does not work"):
        environments.list_installed()
    fixed.touch()
    os.utime(tmp_path / "venvs/llm/lib/python3.11/site-packages", (1, 1))
    assert set(environments.list_installed()) == {"llm"}


def test_slow_probe_keeps_no_request_waiting(tmp_path: Path) -> None:
    release = tmp_path / "release"
    probe = f"import os, time\nwhile not os.path.exists({str(release)!r}): time.sleep(0.02)\n"
    environments = make_environments(tmp_path, probe, wait_s=0.05)

    def list_installed() -> bool:
        with suppress(Unavailable):
            return bool(environments.list_installed())
        return False

    begun = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        assert not any(pool.map(lambda _: list_installed(), range(80)))
    assert time.monotonic() - begun < 5
    with pytest.raises(Unavailable, match="being examined"):
        environments.list_installed()
    release.touch()
    wait_until(list_installed)

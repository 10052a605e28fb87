"""The environments that are installed on this machine, and what each of them can run."""

import logging
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path

from schema.capabilities import MANIFEST_FILE, EnvironmentManifest
from service.adapters.launchers.manifests import read_manifest
from service.core.errors import Unavailable

log = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 120  # a probe reads metadata; one that imports a library from a cold disk takes longer
PROBE_WAIT_S = 0.5  # that a request waits for a probe; `GET /health` answers within a second
FAILURE_TTL_S = 15.0  # a probe that fails may take a core for as long as it is allowed to


class LocalEnvironments:
    """The virtual environments below `venvs` that have a folder of the same name below `environments`.

    `make setup-<name>` writes a manifest at the end. Where a package was installed since, or no manifest is there, the environment is
    probed again, in a process of its own. No caller waits for that longer than `wait_s`; a failure is repeated to callers for a while.
    """

    def __init__(
        self, *, environments: Path, venvs: Path, source: Path, variables: Mapping[str, str], wait_s: float = PROBE_WAIT_S
    ) -> None:
        self._environments = environments
        self._venvs = venvs
        self._source = source
        self._variables = dict(variables)
        self._wait_s = wait_s
        self._lock = threading.Lock()  # concurrent requests probe an environment only once; never held while a probe runs
        self._probes: dict[str, _Probe] = {}

    def python_of(self, environment: str) -> Path:
        """The interpreter of an environment, which may not be installed."""
        return self._venvs / environment / "bin/python"

    def list_installed(self) -> dict[str, EnvironmentManifest]:
        """The manifests by environment. Raises Unavailable when no environment is installed, or none of them works yet."""
        names = sorted(folder.name for folder in self._environments.iterdir()) if self._environments.is_dir() else []
        installed = [name for name in names if self.python_of(name).exists()]
        if not installed:
            raise Unavailable("no trainer environment is installed on this machine, so nothing can be trained", hint="run `make setup`")
        found: dict[str, EnvironmentManifest | Future[EnvironmentManifest | None]] = {name: self._read_or_probe(name) for name in installed}
        probes = [probe for probe in found.values() if isinstance(probe, Future)]
        unfinished = wait(probes, self._wait_s).not_done if probes else ()
        manifests: dict[str, EnvironmentManifest] = {}
        for name, result in found.items():
            manifest = (result.result() if result.done() else None) if isinstance(result, Future) else result
            if manifest is not None:
                manifests[name] = manifest
        if manifests:
            return manifests
        if unfinished:
            raise Unavailable("the trainer's environment is being examined", hint="try again in a few seconds")
        raise Unavailable("the trainer's environment does not work, so nothing can be trained", hint="run `make setup`")

    def _read_or_probe(self, environment: str) -> "EnvironmentManifest | Future[EnvironmentManifest | None]":
        path = self._environments / environment / MANIFEST_FILE
        manifest, installed_at = read_manifest(path), self._installed_at(environment)
        if manifest and path.stat().st_mtime >= installed_at:
            return manifest
        with self._lock:
            probe = self._probes.get(environment)
            if probe is None or probe.installed_at != installed_at or probe.has_expired():
                probe = self._probes[environment] = _Probe(partial(self._probe, environment, path), installed_at)
        return probe.result

    def _installed_at(self, environment: str) -> float:
        """When a package was last installed or removed."""
        folders = (self._venvs / environment).glob("lib/python*/site-packages")
        return max((folder.stat().st_mtime for folder in folders), default=0.0)

    def _probe(self, environment: str, path: Path) -> EnvironmentManifest | None:
        python = self.python_of(environment)
        try:
            subprocess.run(
                [python, "-m", "jobs.runtime.probe", environment, "--output", path],
                cwd=self._source,
                env={**self._variables, "PYTHONPATH": str(self._source)},
                capture_output=True,
                timeout=PROBE_TIMEOUT_S,
                check=True,
            )
        except (OSError, subprocess.SubprocessError) as error:
            output = error.stderr.decode(errors="replace")[-500:] if isinstance(error, subprocess.CalledProcessError) else ""
            log.error("probing an environment failed", extra={"python": str(python), "error": str(error), "output": output})
            return None
        return read_manifest(path)


class _Probe:
    """A probe in a thread of its own, and its result."""

    def __init__(self, run: Callable[[], EnvironmentManifest | None], installed_at: float) -> None:
        self.result: Future[EnvironmentManifest | None] = Future()
        self.installed_at = installed_at  # of the packages that it examines
        self._run = run
        self._ended = 0.0
        threading.Thread(target=self._set_result, name="probe", daemon=True).start()  # must not delay the end of the service

    def has_expired(self) -> bool:
        """Whether it is time to try again after a failure."""
        return self.result.done() and self.result.result() is None and time.monotonic() - self._ended > FAILURE_TTL_S

    def _set_result(self) -> None:
        manifest = self._run()
        self._ended = time.monotonic()
        self.result.set_result(manifest)

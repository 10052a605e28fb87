"""The environments that are installed on this machine, and what each of them can run."""

import logging
import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path

from schema.capabilities import MANIFEST_FILE, EnvironmentManifest
from service.adapters.launchers.manifests import read_manifest
from service.core.errors import Unavailable

log = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 120  # a probe reads metadata; one that imports a library from a cold disk takes longer


class LocalEnvironments:
    """The virtual environments below `venvs` that have a folder of the same name below `environments`.

    `make setup-<name>` writes a manifest at the end. Where a package was installed since, or no manifest is there, the environment is
    probed again, in a process of its own.
    """

    def __init__(self, *, environments: Path, venvs: Path, source: Path, variables: Mapping[str, str]) -> None:
        self._environments = environments
        self._venvs = venvs
        self._source = source
        self._variables = dict(variables)
        self._lock = threading.Lock()  # concurrent requests probe an environment only once

    def python_of(self, environment: str) -> Path:
        """The interpreter of an environment, which may not be installed."""
        return self._venvs / environment / "bin/python"

    def list_installed(self) -> dict[str, EnvironmentManifest]:
        """The manifests by environment. Raises Unavailable when no environment is installed, or none of them works."""
        names = sorted(folder.name for folder in self._environments.iterdir()) if self._environments.is_dir() else []
        installed = [name for name in names if self.python_of(name).exists()]
        if not installed:
            raise Unavailable("no trainer environment is installed on this machine, so nothing can be trained", hint="run `make setup`")
        with self._lock:
            manifests = {name: manifest for name in installed if (manifest := self._read_or_probe(name))}
        if not manifests:
            raise Unavailable("the trainer's environment does not work, so nothing can be trained", hint="run `make setup`")
        return manifests

    def _read_or_probe(self, environment: str) -> EnvironmentManifest | None:
        path = self._environments / environment / MANIFEST_FILE
        manifest = read_manifest(path)
        if manifest and path.stat().st_mtime >= self._installed_at(environment):
            return manifest
        return self._probe(environment, path)

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

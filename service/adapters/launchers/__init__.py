"""Launchers: where attempts run.

Adapters of the Launcher port belong here, each with its own settings. When to launch, retry or cancel is the core's decision.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Protocol

from pydantic import ValidationError

from service.core.ports import Launcher

# One line adds a launcher: name → "module:Class". The class has `from_environment`, which reads the launcher's own settings.
LAUNCHERS = {
    "local": "service.adapters.launchers.local.launcher:LocalLauncher",
    "cloud-run": "service.adapters.launchers.cloud_run.launcher:CloudRunLauncher",
}


@dataclass(frozen=True)
class LauncherDeployment:
    """What every launcher learns of the deployment that it belongs to."""

    home: Path
    service_url: str  # at which attempts on this machine reach the service
    public_url: str | None  # at which attempts elsewhere reach it, if they do
    service_audience: str | None  # of the identity token that the service requires, if it does
    variables: Mapping[str, str]  # of the service's environment, those that an attempt on the same machine may see


class LauncherClass(Protocol):
    """The class of a launcher."""

    def from_environment(self, deployment: LauncherDeployment) -> Launcher:
        """A launcher with the settings in the environment. Raises ValueError for settings that are missing or not valid."""
        ...


def create_launchers(names: Sequence[str], deployment: LauncherDeployment) -> list[Launcher]:
    """The launchers of those names, in order. Raises ValueError for an unknown name, and for settings that are not valid."""
    unknown = [name for name in names if name not in LAUNCHERS]
    if unknown:
        raise ValueError(f"no launcher {unknown[0]!r}; known: {', '.join(sorted(LAUNCHERS))}")
    return [create_launcher(name, deployment) for name in names]


def create_launcher(name: str, deployment: LauncherDeployment) -> Launcher:
    """The launcher of that name. Raises KeyError for an unknown name, ValueError for settings that are not valid."""
    launcher_class: LauncherClass = resolve_name(LAUNCHERS[name])
    try:
        return launcher_class.from_environment(deployment)
    except ValidationError as error:
        first = error.errors()[0]
        setting = f"{first['loc'][0]}: " if first["loc"] else ""
        raise ValueError(f"launcher {name}: {setting}{first['msg'].removeprefix('Value error, ')}") from error

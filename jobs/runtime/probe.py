"""`python -m jobs.runtime.probe ENVIRONMENT [--output FILE]`: writes the manifest of the environment that it runs in.

It calls the `probe` function of every family that uses the environment. Exit code 1, with one line on standard error, if there is none or
one of them fails.
"""

import argparse
import os
import platform
import sys
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name

from schema.capabilities import EnvironmentManifest, FamilyCapabilities
from schema.training import JOB_TYPES

TRACKER_MODULES = {"wandb": "wandb", "mlflow": "mlflow", "tensorboard": "tensorboardX", "trackio": "trackio"}


def main(arguments: list[str] | None = None) -> int:
    """Write the manifest to a file, or print it; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m jobs.runtime.probe", description="Write the manifest of an environment.")
    parser.add_argument("environment", help="the name of the environment that this Python belongs to")
    parser.add_argument("--output", type=Path, help="the file to write; default: standard output")
    options = parser.parse_args(arguments)
    try:
        manifest = probe_environment(options.environment)
    except Exception as error:  # noqa: BLE001  # a package that does not work can raise anything when it is imported
        print(f"environment {options.environment!r} does not work: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    text = manifest.model_dump_json(indent=1) + "\n"
    if options.output is None:
        print(text, end="")
    else:
        _write_atomically(options.output, text)
    return 0


def probe_environment(environment: str) -> EnvironmentManifest:
    """The manifest of the environment. Raises ValueError for one that no family uses, and what a family's probe raises."""
    probes = {config.family: config.probe for config in JOB_TYPES.values() if config.environment == environment}
    if not probes:
        known = sorted({config.environment for config in JOB_TYPES.values()})
        raise ValueError(f"no family uses it; known: {', '.join(known)}")
    families: dict[str, FamilyCapabilities] = {family: resolve_name(probe)() for family, probe in probes.items()}
    return EnvironmentManifest(
        environment=environment,
        python=platform.python_version(),
        packages=installed_packages(),
        trackers=installed_trackers(),
        families=families,
    )


def installed_trackers() -> tuple[str, ...]:
    """The trackers whose packages this environment has."""
    return tuple(tracker for tracker, module in TRACKER_MODULES.items() if find_spec(module) is not None)


def installed_packages() -> dict[str, str]:
    """The version of every package in this environment, by its name in lower case with hyphens."""
    versions = {distribution.name.lower().replace("_", "-"): distribution.version for distribution in distributions() if distribution.name}
    return dict(sorted(versions.items()))


def _write_atomically(path: Path, text: str) -> None:
    """Write a file that a reader sees whole or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(text)
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(main())

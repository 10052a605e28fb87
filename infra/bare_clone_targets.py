"""Tries every target of the Makefile alone, each in a new clone with nothing installed: `python infra/bare_clone_targets.py [TARGET…]`.

A target that works only because another one ran before it (an environment, a package, a generated file) fails here. The setup of
each target runs in full. A target that takes long or needs a person does something short instead: it collects its tests, prints its
help, or refuses missing arguments. pip's cache is shared, so packages are downloaded once.

Exits with 1 if a target failed, or if the Makefile has a target that is not listed here.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent
TIMEOUT_S = 3600
OUTPUT_LINES = 30  # of a failed target


@dataclass(frozen=True)
class Smoke:
    """How to run a target, and its expected result."""

    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    output_has: str = ""
    succeeds: bool = True


HELP = Smoke(("ARGS=--help",), output_has="usage")
COLLECT_TESTS = Smoke(environment={"PYTEST_ADDOPTS": "--collect-only -q"}, output_has="test_")
SMOKES: dict[str, Smoke] = {
    "help": Smoke(output_has="test-fast"),
    "setup": Smoke(),
    "setup-service": Smoke(),
    "setup-llm": Smoke(),
    "setup-dev": Smoke(),
    "setup-infra": Smoke(),
    "dev": Smoke(("ARGS=--help",), output_has="--port"),
    "demo": HELP,
    "cloud-local": HELP,
    "demo-cloud-local": HELP,
    "deploy": Smoke(output_has="PROJECT_ID is missing", succeeds=False),
    "destroy": Smoke(output_has="PROJECT_ID is missing", succeeds=False),
    "check": Smoke(),
    "format": Smoke(),
    "lock": Smoke(("ARGS=--dry-run",)),
    "test-fast": COLLECT_TESTS,
    "test-ingest": COLLECT_TESTS,
    "test-cloud": COLLECT_TESTS,
    "test-infra": COLLECT_TESTS,
    "test-llm": COLLECT_TESTS,
    "test-chaos": COLLECT_TESTS,
    "test-attack": COLLECT_TESTS,
    "test-e2e": COLLECT_TESTS,
    "coverage-report": Smoke(output_has="Couldn't combine", succeeds=False),  # there is none before `make test`
    "attack": Smoke(("ARGS=ssrf --short",), output_has="all passed"),
    "chaos": Smoke(("ARGS=out_of_memory --short",), output_has="all passed"),  # this row runs in the trainer's environment
    "test-nightly": Smoke(("ARGS=--help",), COLLECT_TESTS.environment, output_has="usage"),
    "bench": HELP,
    "clean": Smoke(),
}
# Targets that only run targets above, or this script.
AGGREGATES = {"test", "nightly", "test-bare-clone"}


def main() -> int:
    """Try the targets and print one line for each."""
    parser = argparse.ArgumentParser(description="Try each target of the Makefile in a bare clone of its own.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="try only these targets")
    targets = parser.parse_args().targets
    if unknown := sorted(set(targets) - SMOKES.keys()):
        parser.error(f"no target {', '.join(unknown)}; known: {', '.join(SMOKES)}")
    failed = [f"{target}: add it to infra/bare_clone_targets.py" for target in sorted(find_untried_targets(SOURCE))]
    for target in targets or SMOKES:
        started_at = time.monotonic()
        problem = try_target(SOURCE, target, SMOKES[target])
        print(f"{'failed' if problem else 'ok':6} make {target} ({time.monotonic() - started_at:.0f} s)", flush=True)
        if problem:
            failed.append(f"{target}: {problem}")
    print(*failed, sep="\n\n")
    return 1 if failed else 0


def find_untried_targets(source: Path) -> set[str]:
    """Targets of the Makefile that are neither tried nor aggregates."""
    declared = set(re.findall(r"^([a-z0-9-]+):", (source / "Makefile").read_text(), re.MULTILINE))
    return declared - SMOKES.keys() - AGGREGATES


def try_target(source: Path, target: str, smoke: Smoke) -> str | None:
    """Run the target in a new clone of the last commit of `source`; returns the problem, or None."""
    with tempfile.TemporaryDirectory(prefix=f"clone-{target}-") as folder:
        clone = Path(folder, "clone")
        _run(["git", "clone", "--quiet", "--no-hardlinks", str(source), str(clone)], source, os.environ, check=True)
        done = _run(["make", target, *smoke.arguments], clone, {**_environment(), **smoke.environment})
    output = done.stdout.strip()
    tail = "\n".join(output.splitlines()[-OUTPUT_LINES:])
    if (done.returncode == 0) != smoke.succeeds:
        return f"exit code {done.returncode}\n{tail}"
    if smoke.output_has not in output:
        return f"the output does not contain {smoke.output_has!r}\n{tail}"
    return None


def _environment() -> dict[str, str]:
    """This process's variables, except those through which an outer `make` or Python environment would affect the target."""
    removed = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES", "ARGS", "PYTHONPATH", "VIRTUAL_ENV", "PYTEST_ADDOPTS"}
    return {name: value for name, value in os.environ.items() if name not in removed}


def _run(command: Sequence[str], folder: Path, environment: Mapping[str, str], check: bool = False) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command,
        cwd=folder,
        env=environment,
        check=check,
        timeout=TIMEOUT_S,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


if __name__ == "__main__":
    sys.exit(main())

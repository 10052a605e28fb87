"""`python -m bench [NAME…] [--json FILE] [--no-peers]`."""

import argparse
import shutil
import signal
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import uvloop
from rich.console import Console

from bench.figures import Figure, exactly, print_table, write_json
from bench.scene import Scene
from bench.servers import ServerDown

BENCHMARKS = (
    "submit",
    "listing",
    "footprint",
    "launch",
    "reports",
    "streams",
    "overhead",
    "interruptions",
    "quantizations",
    "firestore",
    "transfers",
    "training",
    "exports",
)
# What servers and attempts do when they do not do what was asked; the other benchmarks are worth having all the same.
FAILURES = (ServerDown, OSError, EOFError, ValueError, RuntimeError, subprocess.SubprocessError, ExceptionGroup)


def main() -> int:
    """Measure, print, write. 1 when a goal was missed."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measures the service against its goals, and beside its peers.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which ones: {', '.join(BENCHMARKS)}; all when left out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON, too")
    parser.add_argument("--no-peers", action="store_true", help="leave MLflow, Prefect and dstack out")
    chosen = parser.parse_args()
    if unknown := sorted(set(chosen.names) - set(BENCHMARKS)):
        parser.error(f"no benchmark {', '.join(unknown)}; known: {', '.join(BENCHMARKS)}")
    _end_tidily_when_told_to()
    figures: list[Figure] = []
    for name in chosen.names or BENCHMARKS:
        found = _measure(name, not chosen.no_peers)
        print_table(found)
        figures += found
        if chosen.json:  # after each, so that a run that is stopped leaves what it had
            write_json(figures, chosen.json)
    missed = [f"{figure.benchmark}: {figure.name}" for figure in figures if figure.met is False]
    Console().print(f"missed: {'; '.join(missed)}" if missed else "every goal was met")
    return 1 if missed else 0


def _end_tidily_when_told_to() -> None:
    """SIGTERM does what Ctrl-C does: asyncio unwinds, so that servers are stopped and folders removed."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell makes its background jobs deaf to it
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))


def _measure(name: str, with_peers: bool) -> list[Figure]:
    Console(stderr=True).print(f"measuring {name} …")
    folder = Path(tempfile.mkdtemp(prefix=f"bench-{name}-"))
    try:
        return uvloop.run(import_module(f"bench.{name}").measure(Scene(folder, with_peers)))
    except FAILURES as error:
        return [Figure(name, "could not be measured", 1, "times", exactly(0), f"{type(error).__name__}: {error}")]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())

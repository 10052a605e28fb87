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

from bench.figures import Measurement, exactly, print_table, write_json
from bench.scene import BenchmarkContext
from bench.servers import ServerUnavailable

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
RECOVERABLE_ERRORS = (ServerUnavailable, OSError, EOFError, ValueError, RuntimeError, subprocess.SubprocessError, ExceptionGroup)


def main() -> int:
    """Measure, print, write. 1 when a goal was missed."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measures the service against its goals, and beside its peers.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which ones: {', '.join(BENCHMARKS)}; all when left out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON, too")
    parser.add_argument("--no-peers", action="store_true", help="leave MLflow, Prefect and dstack out")
    chosen = parser.parse_args()
    if unknown := sorted(set(chosen.names) - set(BENCHMARKS)):
        parser.error(f"no benchmark {', '.join(unknown)}; known: {', '.join(BENCHMARKS)}")
    _treat_sigterm_as_interrupt()
    figures: list[Measurement] = []
    for name in chosen.names or BENCHMARKS:
        found = _measure(name, not chosen.no_peers)
        print_table(found)
        figures += found
        if chosen.json:  # after each, so that a run that is stopped leaves what it had
            write_json(figures, chosen.json)
    missed = [f"{figure.benchmark}: {figure.name}" for figure in figures if figure.is_goal_met is False]
    Console().print(f"missed: {'; '.join(missed)}" if missed else "every goal was met")
    return 1 if missed else 0


def _treat_sigterm_as_interrupt() -> None:
    """SIGTERM does what Ctrl-C does: asyncio unwinds, so that servers are stopped and folders removed."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell makes its background jobs deaf to it
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))


def _measure(name: str, with_peers: bool) -> list[Measurement]:
    Console(stderr=True).print(f"measuring {name} …")
    folder = Path(tempfile.mkdtemp(prefix=f"bench-{name}-"))
    try:
        return uvloop.run(import_module(f"bench.{name}").measure(BenchmarkContext(folder, with_peers)))
    except RECOVERABLE_ERRORS as error:
        return [Measurement(name, "could not be measured", 1, "times", exactly(0), f"{type(error).__name__}: {error}")]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())

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

from bench.context import BenchmarkContext
from bench.figures import Measurement, exactly, print_table, write_json
from bench.servers import ServerUnavailable

BENCHMARKS = (
    "submit",
    "dry_run",
    "listing",
    "footprint",
    "launch",
    "waiting",
    "reports",
    "streams",
    "overhead",
    "interruptions",
    "quantizations",
    "firestore",
    "transfers",
    "training",
    "exports",
    "ingestion",
    "dataset_reports",
    "dataset_pages",
)
# How servers and attempts fail. One failed benchmark must not stop the others.
RECOVERABLE_ERRORS = (ServerUnavailable, OSError, EOFError, ValueError, RuntimeError, subprocess.SubprocessError, ExceptionGroup)


def main() -> int:
    """Run the benchmarks and print the results. Returns 1 if a goal was missed."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Measures the service against its goals and compares it with its peers."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"the benchmarks to run: {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the measurements as JSON")
    parser.add_argument("--no-peers", action="store_true", help="skip MLflow, Prefect and dstack")
    args = parser.parse_args()
    if unknown := sorted(set(args.names) - set(BENCHMARKS)):
        parser.error(f"no benchmark {', '.join(unknown)}; known: {', '.join(BENCHMARKS)}")
    _treat_sigterm_as_interrupt()
    figures: list[Measurement] = []
    for name in args.names or BENCHMARKS:
        measurements = _measure(name, not args.no_peers)
        print_table(measurements)
        figures += measurements
        if args.json:  # after each benchmark, so that an interrupted run keeps its results
            write_json(figures, args.json)
    missed = [f"{figure.benchmark}: {figure.name}" for figure in figures if figure.is_goal_met is False]
    Console().print(f"missed: {'; '.join(missed)}" if missed else "every goal was met")
    return 1 if missed else 0


def _treat_sigterm_as_interrupt() -> None:
    """Make SIGTERM act like Ctrl-C: asyncio unwinds, so that servers are stopped and folders removed."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores SIGINT for its background jobs
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

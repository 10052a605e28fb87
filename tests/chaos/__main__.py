"""`python -m tests.chaos [NAME…] [--short] [--write FILE]` runs rows and prints the table; exits with 1 when a row fails.

Several rows run two at a time, each in its own process: while one waits, the other uses the machine.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from tests.chaos.campaign import ROWS, Row, Size, by_duration, run_row
from tests.chaos.table import render_table, replace_between_markers

CONCURRENCY = 2


def main() -> int:
    """Run the rows, print the table and write it to a page if requested."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description="Inject faults and count what is lost.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"the rows to run: {', '.join(ROWS)}; default: all")
    parser.add_argument("--short", action="store_true", help="inject fewer faults of each kind: seconds instead of minutes")
    parser.add_argument("--write", type=Path, metavar="FILE", help="also write the table between the two markers of this page")
    parser.add_argument("--json", action="store_true", help="print one row as JSON instead of the table")
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - set(ROWS)):
        parser.error(f"no row {', '.join(unknown)}; known: {', '.join(ROWS)}")
    if options.write and (options.names or options.short):
        parser.error("--write needs all rows in full size")
    handle_sigterm_as_interrupt()
    size: Size = "short" if options.short else "full"
    if options.json:
        print(json.dumps(asdict(run_row(options.names[0], size))))
        return 0
    began = time.monotonic()
    rows = _run_rows(options.names or list(ROWS), size)
    Console().print(render_table(rows))
    if options.write:
        options.write.write_text(replace_between_markers(options.write.read_text(), rows))
    failed = [row.fault for row in rows if not row.passed]
    minutes = (time.monotonic() - began) / 60
    Console().print(f"{len(rows)} rows in {minutes:.1f} minutes; " + (f"failed: {'; '.join(failed)}" if failed else "all passed"))
    return 1 if failed else 0


def _run_rows(names: list[str], size: Size) -> list[Row]:
    """Run the rows, the longest first; return them in the order of `names`."""
    running: list[subprocess.Popen[str]] = []
    by_start = by_duration(names)
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        try:
            rows = dict(zip(by_start, pool.map(lambda name: _run_in_subprocess(name, size, running), by_start), strict=True))
        except BaseException:  # interrupted: leave no process running
            pool.shutdown(wait=False, cancel_futures=True)
            for process in running:
                process.terminate()
            raise
    return [rows[name] for name in names]


def _run_in_subprocess(name: str, size: Size, running: list[subprocess.Popen[str]]) -> Row:
    """Run one row in its own process."""
    command = [sys.executable, "-m", "tests.chaos", name, "--json", *(["--short"] if size == "short" else [])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    running.append(process)
    output, _ = process.communicate()
    lines = output.splitlines()
    row = Row(**json.loads(lines[-1])) if process.returncode == 0 and lines else Row(name, "", "", "its process failed", passed=False)
    Console(stderr=True).print(f"{name}: {'passed' if row.passed else 'FAILED'} after {row.seconds:.0f} s: {row.observed}")
    return row


def handle_sigterm_as_interrupt() -> None:
    """Make SIGTERM behave like Ctrl-C, so that processes are ended and folders are removed."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell makes its background jobs ignore SIGINT
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))


if __name__ == "__main__":
    sys.exit(main())

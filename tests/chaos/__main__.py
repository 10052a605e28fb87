"""`python -m tests.chaos [NAME…] [--short] [--write FILE]`: run the rows, print the table; 1 when one of them failed."""

import argparse
import signal
import sys
from pathlib import Path

from rich.console import Console

from tests.chaos.campaign import ROWS, Row, Size, run_row
from tests.chaos.table import put_between_marks, shown


def main() -> int:
    """Run, print, write."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description="Breaks things, and counts what is lost.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which rows: {', '.join(ROWS)}; all when left out")
    parser.add_argument("--short", action="store_true", help="the same faults, fewer of them: seconds instead of minutes")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table between the two marks of that page as well")
    chosen = parser.parse_args()
    if unknown := sorted(set(chosen.names) - set(ROWS)):
        parser.error(f"no row {', '.join(unknown)}; known: {', '.join(ROWS)}")
    if chosen.write and (chosen.names or chosen.short):
        parser.error("a page is written from all rows, in full")
    _end_tidily_when_told_to()
    rows = _run(chosen.names or ROWS, "short" if chosen.short else "full")
    Console().print(shown(rows))
    if chosen.write:
        chosen.write.write_text(put_between_marks(chosen.write.read_text(), rows))
    failed = [row.fault for row in rows if not row.passed]
    minutes = sum(row.seconds for row in rows) / 60
    Console().print(f"{len(rows)} rows in {minutes:.1f} minutes; " + (f"failed: {'; '.join(failed)}" if failed else "all passed"))
    return 1 if failed else 0


def _run(names: list[str] | tuple[str, ...], size: Size) -> list[Row]:
    rows: list[Row] = []
    for name in names:
        Console(stderr=True).print(f"{name} …", end=" ")
        rows.append(run_row(name, size))
        Console(stderr=True).print(f"{'passed' if rows[-1].passed else 'FAILED'} after {rows[-1].seconds:.0f} s: {rows[-1].found}")
    return rows


def _end_tidily_when_told_to() -> None:
    """SIGTERM does what Ctrl-C does: processes are ended and folders removed on the way out."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell makes its background jobs deaf to it
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))


if __name__ == "__main__":
    sys.exit(main())

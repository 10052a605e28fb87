"""The table of the rows, for a terminal and for docs/security.md."""

from collections.abc import Sequence

from rich.table import Table

from tests.attack.campaign import Row

BEGIN = "<!-- the table of `make attack`: begin -->"
END = "<!-- the table of `make attack`: end -->"
TITLES = ("attack", "figure", "measured", "ok", "took")


def render_table(rows: Sequence[Row]) -> Table:
    """The table for a terminal."""
    table = Table(*TITLES, show_lines=True)
    for row in rows:
        table.add_row(*_cells(row), style="" if row.passed else "red")
    return table


def render_markdown(rows: Sequence[Row]) -> str:
    """The table for a page."""
    lines = [TITLES, tuple("---" for _ in TITLES), *(_cells(row) for row in rows)]
    return "\n".join(f"| {' | '.join(cell.replace('|', '∣') for cell in line)} |" for line in lines)


def replace_between_markers(page: str, rows: Sequence[Row]) -> str:
    """Replace the text between the page's markers with the table. Raises ValueError when a marker is missing."""
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"the page needs the lines {BEGIN} and {END}, once each")
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n\n{render_markdown(rows)}\n\n{END}{after}"


def _cells(row: Row) -> tuple[str, ...]:
    return row.attack, row.figure, row.measured, "yes" if row.passed else "**no**", f"{row.seconds:.0f} s"

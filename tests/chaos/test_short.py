"""The whole campaign with fewer of each fault, so that every row is known to run, and to find nothing, before it is run in full."""

import pytest

from tests.chaos.campaign import ROWS, Row, run_row
from tests.chaos.table import BEGIN, END, put_between_marks

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning:google", "ignore::DeprecationWarning:google")


@pytest.mark.parametrize("name", ROWS)
def test_nothing_is_lost(name: str) -> None:
    row = run_row(name, "short")
    assert row.passed, f"{row.fault}: wanted {row.wanted}; {row.found}"


def test_the_table_replaces_what_stood_between_the_marks() -> None:
    row = Row("fault", "twice", "nothing", "nothing | at all", passed=True, seconds=1.4)
    page = put_between_marks(f"before\n{BEGIN}\nold\n{END}\nafter\n", [row])
    assert page.startswith("before\n")
    assert page.endswith("\nafter\n")
    assert "old" not in page
    assert "| fault | twice | nothing | nothing ∣ at all | yes | 1 s |" in page
    assert put_between_marks(page, [row]) == page


def test_a_page_without_marks_is_not_written_over() -> None:
    with pytest.raises(ValueError, match="needs the lines"):
        put_between_marks("a page of somebody else's", [])

"""The whole campaign with fewer faults of each kind."""

import pytest

from tests.chaos.campaign import ROWS, Row, by_duration, run_row
from tests.chaos.table import BEGIN, END, replace_between_markers

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning:google", "ignore::DeprecationWarning:google")


@pytest.mark.parametrize("name", by_duration(ROWS))
def test_campaign_row_passes(name: str) -> None:
    row = run_row(name, "short")
    assert row.passed, f"{row.fault}: expected {row.expected}; observed {row.observed}"


def test_table_replaces_content_between_markers() -> None:
    row = Row("fault", "twice", "nothing", "nothing | at all", passed=True, seconds=1.4)
    page = replace_between_markers(f"before\n{BEGIN}\nold\n{END}\nafter\n", [row])
    assert page.startswith("before\n")
    assert page.endswith("\nafter\n")
    assert "old" not in page
    assert "| fault | twice | nothing | nothing ∣ at all | yes | 1 s |" in page
    assert replace_between_markers(page, [row]) == page


def test_page_without_markers_is_rejected() -> None:
    with pytest.raises(ValueError, match="needs the lines"):
        replace_between_markers("a page without markers", [])

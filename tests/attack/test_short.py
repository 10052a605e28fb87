"""The attack suite in its short form, and what it needs of the routes and of itself."""

import base64

import pytest

from service.main import ROUTERS
from tests.attack.campaign import ROWS, Row, by_duration, make_row, run_row
from tests.attack.canaries import Canaries
from tests.attack.fixtures import FIXTURES, UNLISTED_FIXTURES
from tests.attack.table import BEGIN, END, replace_between_markers


@pytest.mark.filterwarnings("ignore")  # schemathesis and the browser's driver warn about themselves
@pytest.mark.parametrize("name", by_duration(ROWS))
def test_attack_fails(name: str) -> None:
    row = run_row(name, "short")
    assert row.passed, f"{row.attack}: expected {row.figure}; measured {row.measured}"


def test_every_route_has_a_fixture() -> None:
    routes = {(route.name, route.include_in_schema) for router in ROUTERS for route in router.routes}  # type: ignore[attr-defined]
    listed = {name for name, is_listed in routes if is_listed}
    unlisted = {name for name, is_listed in routes if not is_listed}
    missing = (listed - FIXTURES.keys()) | (unlisted - UNLISTED_FIXTURES.keys())
    assert not missing, f"add a valid request for {', '.join(sorted(missing))} to tests/attack/fixtures.py"
    assert not (FIXTURES.keys() - listed) | (UNLISTED_FIXTURES.keys() - unlisted), "a fixture is for a route that does not exist"


def test_secret_is_found_in_every_form_that_encoders_write() -> None:
    canaries = Canaries(api_key="tsk_secret/0123456789")
    for content in (b'{"a": "tsk_secret/0123456789"}', b"tsk_secret%2F0123456789", b"tsk_secret/0123456789".hex().encode()):
        assert canaries.find_in(content) == ["api_key"]
    for offset in range(3):
        assert canaries.find_in(base64.b64encode(b"y" * offset + b"tsk_secret/0123456789 and more")) == ["api_key"]
    assert canaries.find_in(b"tsk_secret and others") == []


def test_row_names_its_first_problems(capsys: pytest.CaptureFixture[str]) -> None:
    row = make_row("attack", "nothing", "10 tried", [f"problem {n}" for n in range(9)])
    assert (row.passed, row.measured) == (False, "10 tried; problem 0; problem 1; problem 2; problem 3")
    assert "problem 8" in capsys.readouterr().err
    assert make_row("attack", "nothing", "10 tried", []).passed


def test_table_replaces_content_between_markers() -> None:
    row = Row("an attack", "0 | 1", "0", passed=False, seconds=1.4)
    page = replace_between_markers(f"before\n{BEGIN}\nold\n{END}\nafter\n", [row])
    assert page.startswith("before\n")
    assert page.endswith("\nafter\n")
    assert "| an attack | 0 ∣ 1 | 0 | **no** | 1 s |" in page
    with pytest.raises(ValueError, match="needs the lines"):
        replace_between_markers("a page without markers", [])

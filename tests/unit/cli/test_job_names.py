"""Which job the words of a command mean."""

from datetime import UTC, datetime, timedelta
from typing import Any

import httpx2
import pytest

from cli.errors import CliError
from cli.http_client import Json
from cli.job_names import find_job_id, format_age
from tests.unit.cli.fake_service import JOB_ID, FakeService

NOW = datetime(2026, 11, 30, 12, tzinfo=UTC)


def make_row(job_id: str = JOB_ID, job_name: str = "tides", **changes: Any) -> Json:
    return {"job_id": job_id, "job_name": job_name, "status": "completed", "created_at": NOW.isoformat()} | changes


def make_page(*rows: Json) -> httpx2.Response:
    return httpx2.Response(200, json={"jobs": [*rows], "next_cursor": None})


def test_full_id_costs_no_request() -> None:
    service = FakeService(make_page())
    assert find_job_id(service.client, "training_rows_gemma-3-270m_0123456789ab") == "training_rows_gemma-3-270m_0123456789ab"
    assert service.requests == []


@pytest.mark.parametrize("job", ["89ab", "…89ab", "...89ab", "tides", "Tides"])
def test_end_of_an_id_and_a_name_are_found(job: str) -> None:
    service = FakeService(make_page(make_row(), make_row("training_ffffffffffff", "tides of March")))
    assert find_job_id(service.client, job) == JOB_ID
    [request] = service.requests
    assert dict(request.url.params) == {"search": job.lstrip("….").strip(), "limit": "200"}


def test_last_is_the_newest_job_of_the_caller() -> None:
    service = FakeService(make_page(make_row()))
    assert find_job_id(service.client, "@last") == JOB_ID
    assert dict(service.requests[0].url.params) == {"created_by": "me", "limit": "1"}
    with pytest.raises(CliError, match="there is no last job"):
        find_job_id(FakeService(make_page()).client, "@last")


def test_several_matches_are_listed_apart() -> None:
    service = FakeService(make_page(make_row(), make_row("training_00000a5589ab", status="failed")))
    with pytest.raises(CliError) as excinfo:
        find_job_id(service.client, "tides")
    assert excinfo.value.exit_code == 2
    assert "'tides' means 2 jobs:" in excinfo.value.message
    assert "…789ab  tides  completed, " in excinfo.value.message
    assert "…589ab  tides  failed, " in excinfo.value.message


def test_list_of_many_matches_is_cut() -> None:
    rows = [make_row(f"training_{number:012x}") for number in range(30)]
    with pytest.raises(CliError, match="means 30 jobs") as excinfo:
        find_job_id(FakeService(make_page(*rows)).client, "tides")
    assert len(excinfo.value.message.splitlines()) == 22
    assert excinfo.value.message.endswith("  and 10 older ones")


def test_part_of_a_name_is_only_suggested() -> None:
    with pytest.raises(CliError, match="there is no job 'tide'") as excinfo:
        find_job_id(FakeService(make_page(make_row())).client, "tide")
    assert excinfo.value.hint == "did you mean 'tides'?"


def test_misspelled_name_gets_near_names() -> None:
    service = FakeService(make_page(), make_page(make_row(), make_row("training_ffffffffffff", "poems")))
    with pytest.raises(CliError) as excinfo:
        find_job_id(service.client, "tidse")
    assert excinfo.value.hint == "did you mean 'tides'?"


@pytest.mark.parametrize("job", ["", "…"])
def test_empty_word_is_refused_before_a_request(job: str) -> None:
    service = FakeService(make_page(make_row()))
    with pytest.raises(CliError, match="empty"):
        find_job_id(service.client, job)
    assert service.requests == []


@pytest.mark.parametrize(("age_s", "text"), [(-5, "0 s"), (59, "59 s"), (60, "1 min"), (7_199, "1 h"), (200_000, "2 d")])
def test_age_is_told_in_its_largest_unit(age_s: int, text: str) -> None:
    assert format_age((NOW - timedelta(seconds=age_s)).isoformat(), NOW) == text

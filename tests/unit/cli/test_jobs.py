"""The commands that list, show, delete and control jobs: what they request and print."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx2
import pytest

from cli.errors import ApiError, CliError
from cli.jobs import describe_loss, parse_since
from tests.unit.cli.api_json import START, make_artifact_json, make_event_json, make_job_json, make_job_row_json
from tests.unit.cli.fake_service import JOB_ID, FakeReply
from tests.unit.cli.test_commands import run_command

OTHER_ID = "training_ba9876543210"


def reply(http_status: int = 200, /, **body: object) -> httpx2.Response:
    return httpx2.Response(http_status, json=body)


def reply_with_job(**changes: object) -> httpx2.Response:
    return reply(**make_job_json(**changes))


def reply_with_error(http_status: int, message: str, **fields: object) -> httpx2.Response:
    return reply(http_status, error={"code": "conflict", "message": message, "hint": "h", "param": None} | fields)


# --- jobs ------------------------------------------------------------------------------------------------------------


def test_filters_become_query_parameters() -> None:
    words = ["--status", "queued", "--status", "training", "--search", "2d21", "--trainer", "sft", "--project", "p", "--mine", "--counts"]
    words += ["--metadata", "team=docs", "--metadata", "try=2", "--limit", "7", "--since", "2026-01-31T00:00:00+00:00"]
    page = reply(jobs=[make_job_row_json()], next_cursor=None, counts={"queued": 3, "training": 0})
    done, [request] = run_command("jobs", *words, replies=[page])
    assert done.exit_code == 0, done.output
    assert sorted(request.url.params.multi_items()) == [
        ("counts", "true"),
        ("created_after", "2026-01-31T00:00:00+00:00"),
        ("created_by", "me"),
        ("limit", "7"),
        ("metadata", "team=docs"),
        ("metadata", "try=2"),
        ("project_id", "p"),
        ("search", "2d21"),
        ("status", "queued"),
        ("status", "training"),
        ("trainer_type", "sft"),
    ]
    assert "3 queued" in done.output.splitlines()


def test_all_pages_are_one_list() -> None:
    first = reply(jobs=[make_job_row_json(1)], next_cursor="c")
    last = reply(jobs=[make_job_row_json(2)], next_cursor=None)
    done, [_, second] = run_command("jobs", "--all-pages", "--json", replies=[first, last])
    assert second.url.params["cursor"] == "c"
    assert json.loads(done.output) == {"jobs": [make_job_row_json(1), make_job_row_json(2)], "next_cursor": None}


def test_next_page_is_announced() -> None:
    done, _ = run_command("jobs", replies=[reply(jobs=[make_job_row_json()], next_cursor="c")])
    assert "more: --cursor c" in done.stderr
    assert "cursor" not in done.stdout


@pytest.mark.parametrize(("text", "span"), [("30m", timedelta(minutes=30)), ("12h", timedelta(hours=12)), ("2w", timedelta(weeks=2))])
def test_since_is_a_time_span(text: str, span: timedelta) -> None:
    assert parse_since(text, START) == START - span


def test_since_is_a_date() -> None:
    assert parse_since("2026-01-31", START).date() == datetime(2026, 1, 31, tzinfo=UTC).date()
    assert parse_since("2026-01-31T10:00:00Z", START) == datetime(2026, 1, 31, 10, tzinfo=UTC)


@pytest.mark.parametrize("text", ["yesterday", "7", "d", "-1d", "999999w", ""])
def test_since_that_means_nothing_is_refused(text: str) -> None:
    with pytest.raises(CliError) as excinfo:
        parse_since(text, START)
    assert excinfo.value.exit_code == 2
    assert "7d" in excinfo.value.hint


# --- show ------------------------------------------------------------------------------------------------------------


def test_show_reads_the_datasets() -> None:
    dataset = reply(name="rows.jsonl", rows=3, splits={"train": 3})
    done, [_, request] = run_command("show", JOB_ID, replies=[reply_with_job(), dataset])
    assert request.url.path == "/datasets/dataset_a"
    assert "rows.jsonl, 3 rows (3 train), dataset_a" in done.output


def test_show_names_a_deleted_dataset_by_its_id() -> None:
    done, _ = run_command("show", JOB_ID, replies=[reply_with_job(), reply_with_error(404, "no dataset")])
    assert done.exit_code == 0
    assert "dataset     dataset_a\n" in done.output


def test_show_lists_decisions_on_request() -> None:
    decision = {"type": "decision", "setting": "batch_size", "value": "4", "reason": "it fits"}
    events = [make_event_json(1, type="status", status="training", attempt=1, reason=""), make_event_json(2, **decision)]
    pages: list[FakeReply] = [reply(events=events, next_after=3), reply(events=[], next_after=3)]
    dataset = reply_with_error(404, "no dataset")
    done, requests = run_command("show", JOB_ID, "--decisions", replies=[reply_with_job(), *pages, dataset])
    assert "decided     batch_size = 4 (it fits)" in done.output
    assert requests[2].url.params["after"] == "3"
    done, _ = run_command("show", JOB_ID, "--decisions", "--json", replies=[reply_with_job(), *pages])
    assert json.loads(done.output)["decisions"] == [decision]


def test_show_as_json_is_the_job() -> None:
    done, [_] = run_command("show", JOB_ID, "--json", replies=[reply_with_job()])
    assert json.loads(done.output) == make_job_json()


# --- delete ----------------------------------------------------------------------------------------------------------

DELETED = reply(deleted=True, message="Deleted.", job_id=JOB_ID, deleted_resources=["artifacts: 3 files", "[log]"])


@pytest.mark.parametrize(
    ("changes", "loss"),
    [
        ({"status": "failed"}, ""),
        ({"status": "training"}, f"{JOB_ID} is training"),
        ({"status": "completed", "artifacts": [make_artifact_json()]}, f"{JOB_ID} has adapter (12.0 MB)"),
    ],
)
def test_delete_asks_where_something_would_be_lost(changes: dict[str, object], loss: str) -> None:
    assert describe_loss(make_job_json(**changes)) == loss
    done, requests = run_command("delete", JOB_ID, replies=[reply_with_job(**changes), DELETED])
    assert [request.method for request in requests] == (["GET"] if loss else ["GET", "DELETE"])
    if loss:
        assert isinstance(done.exception, CliError)
        assert loss in done.exception.message
        assert "--yes" in done.exception.hint
        assert done.exception.exit_code == 2


def test_delete_says_what_was_deleted_and_removes_local_copies(tmp_path: Path) -> None:
    copy = tmp_path / "downloads" / JOB_ID / "model.gguf"
    copy.parent.mkdir(parents=True)
    copy.write_bytes(b"x" * 1_500_000)
    done, _ = run_command("delete", JOB_ID, "--yes", replies=[DELETED], environment={"TUNESMITH_HOME": str(tmp_path)})
    assert done.output.splitlines() == ["Deleted.", "  artifacts: 3 files", "  [log]", "  copies on this machine, 1.5 MB"]
    assert not copy.parent.exists()


def test_several_jobs_are_deleted(tmp_path: Path) -> None:
    words = ["delete", JOB_ID, OTHER_ID, "--yes", "--json"]
    done, requests = run_command(*words, replies=[DELETED], environment={"TUNESMITH_HOME": str(tmp_path)})
    assert [request.url.path for request in requests] == [f"/jobs/{JOB_ID}", f"/jobs/{OTHER_ID}"]
    assert [job["deleted"] for job in json.loads(done.output)["jobs"]] == [True, True]


# --- pause, resume, retry, cancel ------------------------------------------------------------------------------------


def test_controlled_job_prints_its_status_and_says_what_happens_next() -> None:
    done, [request] = run_command("pause", JOB_ID, replies=[reply_with_job(status="pausing")])
    assert request.url.path == f"/jobs/{JOB_ID}/pause"
    assert done.stdout == "pausing\n"
    assert f"tunesmith resume {JOB_ID} continues it" in done.stderr


def test_several_jobs_are_controlled_and_each_failure_is_told() -> None:
    replies: list[FakeReply] = [reply_with_error(409, "it is completed"), reply_with_job(job_id=OTHER_ID, status="cancelled")]
    done, requests = run_command("cancel", JOB_ID, OTHER_ID, replies=replies)
    assert len(requests) == 2
    assert done.stdout == f"{OTHER_ID} cancelled\n"
    assert isinstance(done.exception, ApiError)
    assert done.exception.message == "it is completed"


def test_several_controlled_jobs_are_one_json_document() -> None:
    replies: list[FakeReply] = [reply_with_error(409, "it is completed"), reply_with_job(job_id=OTHER_ID, status="cancelled")]
    done, _ = run_command("cancel", JOB_ID, OTHER_ID, "--json", replies=replies)
    answer = json.loads(done.stdout)
    assert [job["job_id"] for job in answer["jobs"]] == [OTHER_ID]
    assert answer["errors"] == [{"message": "it is completed", "hint": "h", "param": None}]
    assert done.exit_code == 1


def test_one_controlled_job_is_the_response_as_json() -> None:
    done, _ = run_command("resume", JOB_ID, "--json", replies=[reply_with_job(status="queued")])
    assert json.loads(done.stdout) == make_job_json(status="queued")


def test_waiting_for_a_pause_fails_if_the_job_completes() -> None:
    done, _ = run_command("pause", JOB_ID, "--wait", replies=[reply_with_job(status="completed")])
    assert (done.exit_code, done.stdout) == (1, "completed\n")
    done, _ = run_command("pause", JOB_ID, "--wait", replies=[reply_with_job(status="paused")])
    assert done.exit_code == 0

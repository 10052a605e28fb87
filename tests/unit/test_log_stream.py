"""The output of attempts as server-sent events: positions are bytes, chunks whole lines, and a client continues where it was."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from service.adapters.launchers.local.launcher import LocalLauncher
from tests.unit.api_harness import attempt_headers, get_error, get_services, make_result_body, start_attempt, submit_job

SSE = {"Accept": "text/event-stream"}
WriteLog = Callable[[bytes], str]


@pytest.fixture
def write_log(client: TestClient, dataset_id: str) -> WriteLog:
    """Makes a job that has ended, with this output of its attempt."""

    def write(content: bytes) -> str:
        job_id = start_attempt(client, dataset_id)
        log = get_services(client).settings.home_folder / f"attempts/{job_id}.1.log"
        log.parent.mkdir(exist_ok=True)
        log.write_bytes(content)
        body = make_result_body(job_id, "failed", failure={"code": "internal", "message": "m"})
        client.post(f"/internal/jobs/{job_id}/attempts/1/result", json=body, headers=attempt_headers(client, job_id))
        return job_id

    return write


def read_events(client: TestClient, job_id: str, query: str = "", last_event_id: str | None = None) -> list[dict[str, Any]]:
    """The events of a whole stream, with `id` and `data`."""
    headers = SSE | ({"Last-Event-ID": last_event_id} if last_event_id else {})
    response = client.get(f"/jobs/{job_id}/logs{query}", headers=headers)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done = [dict(line.split(": ", 1) for line in event.splitlines()) for event in response.text.strip().split("\n\n")]
    assert done == {"event": "done", "data": "{}"}
    return [{"id": event["id"], **orjson.loads(event["data"])} for event in events]


def test_each_event_says_where_the_next_one_begins(client: TestClient, write_log: WriteLog) -> None:
    lines = b"".join(b"%05d \xc3\xa9\n" % number for number in range(20_000))
    job_id = write_log(lines)
    events = read_events(client, job_id)
    assert len(events) > 1
    assert "".join(event["text"] for event in events).encode() == lines
    assert all(event["text"].endswith("\n") and event["attempt"] == 1 for event in events)
    assert [event["id"] for event in events] == [f"1:{event['offset']}" for event in events]
    for index, event in enumerate(events):
        assert read_events(client, job_id, last_event_id=event["id"]) == events[index + 1 :]


def test_line_without_an_end_is_sent(client: TestClient, write_log: WriteLog) -> None:
    events = read_events(client, write_log(b"one\ntwo"))
    assert [event["text"] for event in events] == ["one\n", "two"]


@pytest.mark.parametrize(("tail", "text"), [(0, ""), (1, "c\n"), (2, "bé\nc\n"), (3, "a\nbé\nc\n"), (50, "a\nbé\nc\n")])
def test_tail_begins_lines_before_the_end(client: TestClient, write_log: WriteLog, tail: int, text: str) -> None:
    job_id = write_log("a\nbé\nc\n".encode())
    assert "".join(event["text"] for event in read_events(client, job_id, f"?tail={tail}")) == text
    assert client.get(f"/jobs/{job_id}/logs?tail={tail}").json() == {"attempt": 1, "text": text, "next_offset": 8}
    assert client.get(f"/jobs/{job_id}/logs?tail={tail}&follow=true").text == text


def test_job_without_an_attempt_has_no_output(client: TestClient, dataset_id: str) -> None:
    job_id = submit_job(client, dataset_id)
    assert client.get(f"/jobs/{job_id}/logs?tail=3").json() == {"attempt": 0, "text": "", "next_offset": 0}
    client.post(f"/jobs/{job_id}/cancel")
    assert read_events(client, job_id) == []


@pytest.mark.parametrize("event_id", ["x", "1", "1:", ":1", "0:1", "1:-1", "1:99999999999999", "99999:1", "1:1:1", "1:²"])
def test_malformed_position_is_refused(client: TestClient, write_log: WriteLog, event_id: str) -> None:
    headers = SSE | {"Last-Event-ID": event_id.encode()}
    error = get_error(client.get(f"/jobs/{write_log(b'one')}/logs", headers=headers), 400)  # type: ignore[arg-type]
    assert error["param"] == "Last-Event-ID"


def test_tail_excludes_an_offset(client: TestClient, write_log: WriteLog) -> None:
    assert get_error(client.get(f"/jobs/{write_log(b'one')}/logs?tail=1&offset=1"), 400)["param"] == "tail"


def test_unknown_attempt_of_a_position_is_not_found(client: TestClient, write_log: WriteLog) -> None:
    get_error(client.get(f"/jobs/{write_log(b'one')}/logs", headers=SSE | {"Last-Event-ID": "7:0"}), 404)


@given(
    lines=st.lists(st.text(alphabet="aé漢😀", max_size=30), max_size=30),
    ends_line=st.booleans(),
    tail=st.integers(0, 40),
    max_bytes=st.integers(8, 400),
    page_bytes=st.integers(4, 200),
)
def test_tail_and_pages_are_whole_lines_and_whole_characters(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], ends_line: bool, tail: int, max_bytes: int, page_bytes: int
) -> None:
    launcher = make_launcher(tmp_path_factory.mktemp("home"))
    text = "\n".join(lines) + ("\n" if ends_line else "")
    log = launcher._log_path("j.1")  # pyright: ignore[reportPrivateUsage]
    log.parent.mkdir(parents=True)
    log.write_text(text)
    content = text.encode()
    start = launcher.find_log_tail("j.1", tail, max_bytes)
    assert start is not None
    wanted = "".join(text.splitlines(keepends=True)[-tail:]) if tail else ""
    shown = content[start:].decode()  # begins with a whole character
    assert shown == wanted or (len(wanted.encode()) > max_bytes - 4 and wanted.endswith(shown))
    pages, offset = "", 0
    while offset < len(content):
        page = launcher.read_log("j.1", offset, page_bytes, whole_lines=True)
        assert page is not None
        assert page.next_offset > offset
        assert "\n" not in page.text or page.text.endswith("\n")
        pages, offset = pages + page.text, page.next_offset
    assert pages == text


def make_launcher(home: Path) -> LocalLauncher:
    from service.adapters.launchers.local.environments import LocalEnvironments

    environments = LocalEnvironments(environments=home, venvs=home, source=home, variables={})
    return LocalLauncher(
        home=home, environments=environments, source=home, service_url="http://127.0.0.1:1", max_concurrent_jobs=1, variables={}
    )

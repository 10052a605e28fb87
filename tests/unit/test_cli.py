"""The command line's side of HTTP: what is tried again, under which key, and how answers look."""

import io
import json
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from rich.console import Console

from service.cli import show
from service.cli.client import TRIES, ApiError, Client

Json = dict[str, Any]
Said = httpx2.Response | httpx2.TransportError

BROKEN = httpx2.ReadError("the answer was lost")
MADE = httpx2.Response(201, json={"job_id": "training_1"})
BUSY = httpx2.Response(429, text="Rate exceeded.")
AWAY = httpx2.Response(503, json={"error": {"code": "unavailable", "message": "away", "hint": ""}}, headers={"Retry-After": "2"})
JOB = httpx2.Response(200, json={"job_id": "training_1"})
DONE = "event: done\ndata: {}\n\n"


class FakeService:
    """Answers in the given order, the last one for ever, and remembers what it was asked."""

    def __init__(self, *answers: Said) -> None:
        self.answers = list(answers)
        self.asked: list[httpx2.Request] = []
        self.pauses: list[float] = []
        self.client = Client("http://service", transport=httpx2.MockTransport(self._answer), sleep=self.pauses.append)

    @property
    def keys(self) -> list[str]:
        return [request.headers["Idempotency-Key"] for request in self.asked]

    def _answer(self, request: httpx2.Request) -> httpx2.Response:
        self.asked.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, httpx2.TransportError):
            raise answer
        return httpx2.Response(answer.status_code, content=answer.content, headers=answer.headers)  # one can be read only once


def stream(*cursors: int, end: str = "") -> httpx2.Response:
    rows = "".join(f"id: {cursor}\ndata: {json.dumps({'id': cursor})}\n\n" for cursor in cursors)
    return httpx2.Response(200, text=rows + end, headers={"Content-Type": "text/event-stream"})


MAKES: list[Callable[[Client], str]] = [
    lambda client: client.train({"processed_dataset_id": "dataset_1"}),
    lambda client: client.export("training_0", 40, {}),
]


@pytest.mark.parametrize("make", MAKES)
def test_what_makes_a_job_is_tried_again_under_one_key(make: Callable[[Client], str]) -> None:
    service = FakeService(AWAY, BROKEN, BUSY, MADE)
    assert make(service.client) == "training_1"
    assert len(service.asked) == 4
    assert len(set(service.keys)) == 1


@pytest.mark.parametrize("make", MAKES)
def test_two_jobs_have_two_keys(make: Callable[[Client], str]) -> None:
    service = FakeService(MADE)
    make(service.client)
    make(service.client)
    assert len(set(service.keys)) == 2


@pytest.mark.parametrize(("answer", "status"), [(AWAY, 503), (BUSY, 429)])
def test_a_service_that_stays_busy_is_given_up_and_quoted(answer: httpx2.Response, status: int) -> None:
    service = FakeService(answer)
    with pytest.raises(ApiError) as caught:
        service.client.post("/jobs/training_1/pause")
    assert caught.value.status == status
    assert len(service.asked) == TRIES


def test_a_service_that_is_not_there_is_given_up_with_what_to_do() -> None:
    service = FakeService(httpx2.ConnectError("refused"))
    with pytest.raises(ApiError, match="no service answers at http://service") as caught:
        service.client.get("/jobs")
    assert "tunesmith serve" in caught.value.hint
    assert len(service.asked) == TRIES


def test_the_service_says_how_long_to_wait_within_reason() -> None:
    tomorrow = httpx2.Response(503, json={}, headers={"Retry-After": "86400"})
    dated = httpx2.Response(503, json={}, headers={"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"})
    service = FakeService(AWAY, tomorrow, dated, MADE)
    service.client.train({})
    first, second, third = service.pauses
    assert first == 2
    assert second == 30
    assert 0 < third <= 3


def test_a_wrong_request_is_sent_once_and_its_field_is_known() -> None:
    error = {"code": "invalid_request", "message": "hf_token is needed again", "hint": "", "param": "hf_token"}
    service = FakeService(httpx2.Response(400, json={"error": error}))
    with pytest.raises(ApiError) as caught:
        service.client.post("/jobs/training_1/retry", {})
    assert (caught.value.param, len(service.asked)) == ("hf_token", 1)


def test_a_deletion_that_is_not_complete_says_what_is_left() -> None:
    left = {
        "job_id": "training_1",
        "deleted": False,
        "message": "Not everything could be deleted; repeat the call. x",
        "deleted_resources": [],
    }
    service = FakeService(httpx2.Response(503, json=left))
    with pytest.raises(ApiError, match="Not everything could be deleted") as caught:
        service.client.delete("/jobs/training_1")
    assert caught.value.status == 503
    assert len(service.asked) == 1


def test_an_upload_is_sent_once() -> None:
    service = FakeService(AWAY, MADE)
    with pytest.raises(ApiError):
        service.client.upload(io.BytesIO(b"{}"), "rows.jsonl", {})
    assert len(service.asked) == 1


def test_events_go_on_behind_the_last_one_over_everything_that_can_interrupt_them() -> None:
    service = FakeService(JOB, stream(1, 2), JOB, AWAY, AWAY, JOB, BROKEN, BROKEN, JOB, stream(3, end=DONE))
    assert [row["id"] for row in service.client.events("training_1")] == [1, 2, 3]
    places = [request.headers["Last-Event-ID"] for request in service.asked if request.url.path.endswith("/events")]
    assert places == ["0", "2", "2", "2"]


def test_events_of_a_service_that_is_not_there_are_told_so_soon() -> None:
    service = FakeService(httpx2.ConnectError("refused"))
    with pytest.raises(ApiError):
        next(service.client.events("training_1"))
    assert len(service.asked) == TRIES


# --- how answers look ------------------------------------------------------------------------------------------------


def an_attempt(number: int, **changes: Any) -> Json:
    facts: Json = {
        "number": number,
        "claimed_at": "x",
        "ended_at": None,
        "outcome": None,
        "resumed_step": None,
        "saved_step": None,
        "delay": None,
    }
    return facts | changes


def a_job(**changes: Any) -> Json:
    nothing = ("failure", "progress", "checkpoint", "export_of", "metrics", "base_metrics", "wandb_url")
    facts: Json = {"job_id": "training_1", "status": "training", "job_name": "mine", "attempts": [], "artifacts": []}
    return facts | dict.fromkeys(nothing) | changes


def seen(*lines: Any) -> str:
    console = Console(file=io.StringIO(), width=200)
    for line in lines:
        console.print(line)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def summary(**changes: Any) -> str:
    console = Console(file=io.StringIO(), width=200)
    show.job_summary(console, a_job(**changes))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def line(**event: Any) -> str:
    text = show.event_line({"event": event})
    assert text is not None
    return seen(text).strip()


@pytest.mark.parametrize(
    ("status", "attempt", "reason", "told"),
    [
        ("preparing", 1, "", "preparing"),
        ("preparing", 3, "", "preparing, attempt 3"),
        ("queued", 1, "preempted", "queued (its compute was taken away)"),
        ("queued", 1, "yielded", "queued (its time was up)"),
        ("completed", 2, "completed", "completed"),
        ("failed", 2, "lost", "failed (its process vanished)"),
    ],
)
def test_a_change_of_status_says_why_in_words(status: str, attempt: int, reason: str, told: str) -> None:
    assert line(type="status", status=status, attempt=attempt, reason=reason) == told


def test_checkpoints_are_told() -> None:
    assert "saved step 40 (1.2 MB, time slice)" in line(type="checkpoint", step=40, size_bytes=1_200_000, reason="time_slice")
    assert line(type="resumed", step=40, from_attempt=1) == "goes on from step 40, saved by attempt 1"
    skipped = line(type="checkpoint_skipped", step=40, attempt=1, why="[a/b] is not what its manifest says")
    assert skipped == "skipped the checkpoint of attempt 1 at step 40: [a/b] is not what its manifest says"


def test_the_summary_tells_every_attempt_and_how_to_go_on() -> None:
    attempts = [
        an_attempt(1, ended_at="x", outcome="yielded", saved_step=40),
        an_attempt(2, ended_at="x", outcome="lost", resumed_step=40),
        an_attempt(3, resumed_step=40, saved_step=60),
    ]
    told = summary(status="paused", attempts=attempts, checkpoint={"step": 60, "attempt": 3, "at": "2026-01-02T03:04:05Z"})
    assert "from the start, saved step 40, its time was up" in told
    assert "from step 40, its process vanished" in told
    assert "checkpoint  step 60, 2026-01-02 03:04" in told
    assert "to go on: tunesmith resume training_1" in told


def test_the_summary_of_a_single_attempt_is_short() -> None:
    assert "attempt" not in summary(attempts=[an_attempt(1)])
    assert "to go on" not in summary(status="failed")  # there is nothing to go on from


def test_the_summary_of_many_slices_shows_the_latest() -> None:
    told = summary(attempts=[an_attempt(number, ended_at="x", outcome="yielded") for number in range(1, 41)])
    assert "35 earlier attempts" in told
    assert "attempt 35 " not in told
    assert "attempt 36 " in told


def test_the_summary_says_why_a_launch_waits() -> None:
    assert "waiting: no quota for [l4]" in summary(attempts=[an_attempt(1, delay="no quota for [l4]")])


def test_what_a_person_wrote_is_no_markup() -> None:
    assert "[/] [red]sale[/red]" in summary(job_name="[/] [red]sale[/red]")
    assert "[/tmp/x]" in line(type="warning", message="no space below [/tmp/x]")


def test_the_best_checkpoint_is_marked() -> None:
    one: Json = {"step": 40, "total_steps": 80, "epoch": 1.0, "attempt": 1, "reason": "interval", "eval_loss": 2.5, "is_best": True}
    one |= {"size_bytes": 5_000_000, "created_at": "2026-01-02T03:04:05Z"}
    other = one | {"step": 80, "reason": "time_slice", "eval_loss": None, "is_best": False}
    first, second = seen(show.checkpoint_table([one, other])).splitlines()[1:]
    assert first.split() == ["40/80", "1.00", "1", "interval", "2.500", "best", "5.0", "MB", "2026-01-02", "03:04"]
    assert second.split() == ["80/80", "1.00", "1", "time", "slice", "5.0", "MB", "2026-01-02", "03:04"]

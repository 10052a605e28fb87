"""The command line's side of HTTP: what is tried again, under which key, and how answers look."""

import io
import json
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from click.testing import Result
from rich.console import Console
from typer.testing import CliRunner

from service.cli import app as app_module
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
    lambda client: client.export("training_0", None, {}),
    lambda client: client.clone("training_0", {}),
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
    nothing = ("failure", "progress", "checkpoint", "export_of", "cloned_from", "metrics", "base_metrics", "gate", "passed")
    facts: Json = {"job_id": "training_1", "status": "training", "job_name": "mine", "attempts": [], "artifacts": [], "trackers": {}}
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


def numbers(**changes: Any) -> Json:
    return {"eval_loss": None, "perplexity": None, "accuracy": None, "values": {}} | changes


def test_every_number_that_was_measured_is_told_before_and_after() -> None:
    before = numbers(eval_loss=2.0, values={"rewards/accuracies": 0.5})
    after = numbers(eval_loss=1.0, values={"rewards/accuracies": 0.75, "exact_match": 0.1, "bleu": None})
    told = summary(status="completed", metrics=after, base_metrics=before)
    assert "eval loss   2.000 → 1.000" in told
    assert "rewards/accuracies 0.500 → 0.750" in told
    assert "exact_match 0.100" in told
    assert "bleu" not in told
    assert line(type="evaluation", when="after", metrics=after) == (
        "evaluated after training: loss 1.000, exact_match 0.100, rewards/accuracies 0.750"
    )
    assert show.event_line({"event": {"type": "evaluation", "when": "after", "metrics": numbers()}}) is None


GATE: Json = {
    "passed": False,
    "checks": [
        {"metric": "perplexity", "at_least": None, "at_most": 9.0, "passed": False, "why": "12.5 is above 9, 0.9 of the base's 10"},
        {"metric": "accuracy", "at_least": 0.5, "at_most": None, "passed": True, "why": ""},
    ],
}


def test_what_the_gate_held_back_is_told_with_the_way_out() -> None:
    told = summary(status="completed", gate=GATE, passed=False)
    assert "gate        perplexity at most 9: not passed: 12.5 is above 9, 0.9 of the base's 10" in told
    assert "gate        accuracy at least 0.5: passed" in told
    assert "tunesmith export training_1" in told
    assert line(type="gate", gate=GATE).endswith("not published")
    assert line(type="gate", gate={"passed": True, "checks": []}) == "the gate is passed"


def test_samples_are_told_in_a_line_each() -> None:
    told = line(type="samples", when="during", samples=[{"prompt": "2 [+] 2\n?", "text": "it is\n[4]"}])
    assert told == "sample, during training: 2 [+] 2 ? → it is [4]"


def test_an_artifact_tells_how_it_speaks_and_where_else_it_is() -> None:
    found: Json = {"argmax_agreement": 0.97, "mean_kl_to_merged": 0.02, "erased_tuning": True, "advice": "use q8_0 [or f16]"}
    found |= {"perplexity": 9.5, "perplexity_merged": 9.0, "perplexity_base": None}
    hub = {"url": "https://hub/ada/tuned/tree/a"}
    gguf: Json = {"name": "gguf-q2_k", "size_bytes": 1_000_000, "uri": "file:///g", "fidelity": found, "hub": hub}
    told = summary(status="completed", artifacts=[gguf, gguf | {"name": "adapter", "fidelity": None}], trackers={"mlflow": "https://m"})
    assert "agrees 97.0%, KL 0.0200, perplexity 9.50 of the file / 9.00 trained  erased the tuning" in told
    assert "advice: use q8_0 [or f16]" in told
    assert told.count("https://hub/ada/tuned/tree/a") == 1
    assert "mlflow: https://m" in told


# --- commands --------------------------------------------------------------------------------------------------------


class Commands:
    """Runs commands against a fake service."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch

    def run(self, *words: str, answers: list[Said], environment: dict[str, str] | None = None) -> tuple[Result, list[httpx2.Request]]:
        service = FakeService(*answers)
        self.monkeypatch.setattr(app_module, "_client", lambda: service.client)
        done = CliRunner().invoke(app_module.app, [*words], env=environment or {}, catch_exceptions=True)
        return done, service.asked


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Commands:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    return Commands(monkeypatch)


def test_a_clone_sends_the_changes_and_the_secrets_that_are_asked_for(commands: Commands) -> None:
    error = {"code": "invalid_request", "message": "needed again", "hint": "", "param": "hf_token"}
    needs = httpx2.Response(400, json={"error": error})
    words = [
        "clone",
        "training_0",
        "--set",
        "hyperparameters.learning_rate=1e-4",
        "--set",
        "wandb_config=null",
        "--secret",
        "a_api_key=k=1",
    ]
    done, asked = commands.run(*words, answers=[needs, MADE], environment={"HF_TOKEN": "hf_x"})
    assert (done.exit_code, done.output.strip()) == (0, "training_1")
    first, second = (json.loads(request.content) for request in asked)
    assert first == {
        "training_config": {"hyperparameters": {"learning_rate": 1e-4}, "wandb_config": None},
        "secrets": {"a_api_key": "k=1"},
    }
    assert second == first | {"hf_token": "hf_x"}
    assert {request.url.path for request in asked} == {"/jobs/training_0/clone"}


def test_a_secret_that_nobody_gave_is_asked_for_by_option(commands: Commands) -> None:
    error = {"code": "invalid_request", "message": "needed again", "hint": "h", "param": "secrets.judge_api_key"}
    done, asked = commands.run("clone", "training_0", answers=[httpx2.Response(400, json={"error": error})])
    assert isinstance(done.exception, ApiError)
    assert done.exception.hint == "--secret judge_api_key=…; h"
    assert len(asked) == 1


def test_an_export_without_a_step_is_of_what_was_published(commands: Commands) -> None:
    words = ["export", "training_0", "--format", "merged", "--gguf", "q8_0", "--lora-gguf", "--to-hub", "ada/tuned"]
    done, [asked] = commands.run(*words, answers=[MADE])
    assert done.exit_code == 0, done.output
    assert asked.url.path == "/jobs/training_0/export"
    assert json.loads(asked.content)["export_config"] == {
        "format": ["merged"],
        "include_gguf": True,
        "gguf_quantization": ["q8_0"],
        "include_lora_gguf": True,
        "destination": "hfhub",
        "hf_repo_id": "ada/tuned",
    }
    _, [asked] = commands.run("export", "training_0", "40", answers=[MADE])
    assert asked.url.path == "/jobs/training_0/checkpoints/40/export"


def test_a_deletion_touches_the_hub_only_when_told_to(commands: Commands) -> None:
    gone = httpx2.Response(200, json={"deleted": True, "message": "gone", "job_id": "j", "deleted_resources": []})
    _, [asked] = commands.run("delete", "training_0", answers=[gone], environment={"HF_TOKEN": "hf_x"})
    assert ("X-HF-Token" in asked.headers, asked.url.query) == (False, b"")
    _, [asked] = commands.run("delete", "training_0", "--hub", answers=[gone], environment={"HF_TOKEN": "hf_x"})
    assert (asked.headers["X-HF-Token"], asked.url.query) == ("hf_x", b"delete_hub=true")
    done, asked = commands.run("delete", "training_0", "--hub", answers=[gone])
    assert isinstance(done.exception, ApiError)
    assert asked == []

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

from cli import app as app_module
from cli import render as show
from cli.http_client import MAX_TRIES, ApiError, Client

Json = dict[str, Any]
FakeReply = httpx2.Response | httpx2.TransportError

CONNECTION_LOST = httpx2.ReadError("the answer was lost")
JOB_CREATED = httpx2.Response(201, json={"job_id": "training_1"})
BUSY = httpx2.Response(429, text="Rate exceeded.")
UNAVAILABLE = httpx2.Response(503, json={"error": {"code": "unavailable", "message": "away", "hint": ""}}, headers={"Retry-After": "2"})
JOB = httpx2.Response(200, json={"job_id": "training_1"})
DONE = "event: done\ndata: {}\n\n"


class FakeService:
    """Answers in the given order, the last one for ever, and remembers what it was asked."""

    def __init__(self, *answers: FakeReply) -> None:
        self.answers = list(answers)
        self.requests: list[httpx2.Request] = []
        self.sleeps_s: list[float] = []
        self.client = Client("http://service", transport=httpx2.MockTransport(self._answer), sleep=self.sleeps_s.append)

    @property
    def idempotency_keys(self) -> list[str]:
        return [request.headers["Idempotency-Key"] for request in self.requests]

    def _answer(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, httpx2.TransportError):
            raise answer
        return httpx2.Response(answer.status_code, content=answer.content, headers=answer.headers)  # one can be read only once


def make_event_stream(*cursors: int, end: str = "") -> httpx2.Response:
    rows = "".join(f"id: {cursor}\ndata: {json.dumps({'id': cursor})}\n\n" for cursor in cursors)
    return httpx2.Response(200, text=rows + end, headers={"Content-Type": "text/event-stream"})


JOB_CREATING_CALLS: list[Callable[[Client], str]] = [
    lambda client: client.train({"processed_dataset_id": "dataset_1"}),
    lambda client: client.export("training_0", 40, {}),
    lambda client: client.export("training_0", None, {}),
    lambda client: client.clone("training_0", {}),
]


@pytest.mark.parametrize("make", JOB_CREATING_CALLS)
def test_job_creation_is_retried_with_same_key(make: Callable[[Client], str]) -> None:
    service = FakeService(UNAVAILABLE, CONNECTION_LOST, BUSY, JOB_CREATED)
    assert make(service.client) == "training_1"
    assert len(service.requests) == 4
    assert len(set(service.idempotency_keys)) == 1


@pytest.mark.parametrize("make", JOB_CREATING_CALLS)
def test_each_job_gets_its_own_key(make: Callable[[Client], str]) -> None:
    service = FakeService(JOB_CREATED)
    make(service.client)
    make(service.client)
    assert len(set(service.idempotency_keys)) == 2


@pytest.mark.parametrize(("answer", "status"), [(UNAVAILABLE, 503), (BUSY, 429)])
def test_persistent_error_is_raised_with_message(answer: httpx2.Response, status: int) -> None:
    service = FakeService(answer)
    with pytest.raises(ApiError) as caught:
        service.client.post("/jobs/training_1/pause")
    assert caught.value.status == status
    assert len(service.requests) == MAX_TRIES


def test_unreachable_service_error_has_hint() -> None:
    service = FakeService(httpx2.ConnectError("refused"))
    with pytest.raises(ApiError, match="no service answers at http://service") as caught:
        service.client.get("/jobs")
    assert "tunesmith serve" in caught.value.hint
    assert len(service.requests) == MAX_TRIES


def test_retry_after_is_respected_up_to_a_limit() -> None:
    tomorrow = httpx2.Response(503, json={}, headers={"Retry-After": "86400"})
    dated = httpx2.Response(503, json={}, headers={"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"})
    service = FakeService(UNAVAILABLE, tomorrow, dated, JOB_CREATED)
    service.client.train({})
    first, second, third = service.sleeps_s
    assert first == 2
    assert second == 30
    assert 0 < third <= 3


def test_invalid_request_is_not_retried_and_names_field() -> None:
    error = {"code": "invalid_request", "message": "hf_token is needed again", "hint": "", "param": "hf_token"}
    service = FakeService(httpx2.Response(400, json={"error": error}))
    with pytest.raises(ApiError) as caught:
        service.client.post("/jobs/training_1/retry", {})
    assert (caught.value.param, len(service.requests)) == ("hf_token", 1)


def test_incomplete_deletion_raises_with_message() -> None:
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
    assert len(service.requests) == 1


def test_upload_is_not_retried() -> None:
    service = FakeService(UNAVAILABLE, JOB_CREATED)
    with pytest.raises(ApiError):
        service.client.upload(io.BytesIO(b"{}"), "rows.jsonl", {})
    assert len(service.requests) == 1


def test_event_stream_resumes_after_interruptions() -> None:
    service = FakeService(
        JOB,
        make_event_stream(1, 2),
        JOB,
        UNAVAILABLE,
        UNAVAILABLE,
        JOB,
        CONNECTION_LOST,
        CONNECTION_LOST,
        JOB,
        make_event_stream(3, end=DONE),
    )
    assert [row["id"] for row in service.client.stream_events("training_1")] == [1, 2, 3]
    places = [request.headers["Last-Event-ID"] for request in service.requests if request.url.path.endswith("/events")]
    assert places == ["0", "2", "2", "2"]


def test_event_stream_of_unreachable_service_fails_quickly() -> None:
    service = FakeService(httpx2.ConnectError("refused"))
    with pytest.raises(ApiError):
        next(service.client.stream_events("training_1"))
    assert len(service.requests) == MAX_TRIES


# --- how answers look ------------------------------------------------------------------------------------------------


def make_attempt_json(number: int, **changes: Any) -> Json:
    facts: Json = {
        "number": number,
        "claimed_at": "x",
        "ended_at": None,
        "outcome": None,
        "resumed_step": None,
        "last_checkpoint_step": None,
        "pending_reason": None,
    }
    return facts | changes


def make_job_json(**changes: Any) -> Json:
    nothing = ("failure", "progress", "checkpoint", "export_of", "cloned_from", "metrics", "base_metrics", "gate", "gate_passed")
    facts: Json = {"job_id": "training_1", "status": "training", "job_name": "mine", "attempts": [], "artifacts": [], "tracker_urls": {}}
    return facts | dict.fromkeys(nothing) | changes


def render_text(*lines: Any) -> str:
    console = Console(file=io.StringIO(), width=200)
    for line in lines:
        console.print(line)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def render_summary(**changes: Any) -> str:
    console = Console(file=io.StringIO(), width=200)
    show.print_job(console, make_job_json(**changes))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def render_event_line(**event: Any) -> str:
    text = show.event_line({"event": event})
    assert text is not None
    return render_text(text).strip()


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
def test_status_line_shows_reason(status: str, attempt: int, reason: str, told: str) -> None:
    assert render_event_line(type="status", status=status, attempt=attempt, reason=reason) == told


def test_checkpoint_lines() -> None:
    assert "saved step 40 (1.2 MB, time slice)" in render_event_line(
        type="checkpoint_saved", step=40, size_bytes=1_200_000, reason="time_slice"
    )
    assert render_event_line(type="checkpoint_restored", step=40, from_attempt=1) == "goes on from step 40, saved by attempt 1"
    skipped = render_event_line(type="checkpoint_skipped", step=40, attempt=1, reason="[a/b] is not what its manifest says")
    assert skipped == "skipped the checkpoint of attempt 1 at step 40: [a/b] is not what its manifest says"


def test_summary_lists_attempts_and_next_step() -> None:
    attempts = [
        make_attempt_json(1, ended_at="x", outcome="yielded", last_checkpoint_step=40),
        make_attempt_json(2, ended_at="x", outcome="lost", resumed_step=40),
        make_attempt_json(3, resumed_step=40, last_checkpoint_step=60),
    ]
    told = render_summary(status="paused", attempts=attempts, checkpoint={"step": 60, "attempt": 3, "at": "2026-01-02T03:04:05Z"})
    assert "from the start, saved step 40, its time was up" in told
    assert "from step 40, its process vanished" in told
    assert "checkpoint  step 60, 2026-01-02 03:04" in told
    assert "to go on: tunesmith resume training_1" in told


def test_the_summary_of_a_single_attempt_is_short() -> None:
    assert "attempt" not in render_summary(attempts=[make_attempt_json(1)])
    assert "to go on" not in render_summary(status="failed")  # there is nothing to go on from


def test_summary_of_many_attempts_shows_latest() -> None:
    told = render_summary(attempts=[make_attempt_json(number, ended_at="x", outcome="yielded") for number in range(1, 41)])
    assert "35 earlier attempts" in told
    assert "attempt 35 " not in told
    assert "attempt 36 " in told


def test_summary_shows_pending_reason() -> None:
    assert "waiting: no quota for [l4]" in render_summary(attempts=[make_attempt_json(1, pending_reason="no quota for [l4]")])


def test_user_text_is_not_interpreted_as_markup() -> None:
    assert "[/] [red]sale[/red]" in render_summary(job_name="[/] [red]sale[/red]")
    assert "[/tmp/x]" in render_event_line(type="warning", message="no space below [/tmp/x]")


def test_the_best_checkpoint_is_marked() -> None:
    one: Json = {"step": 40, "total_steps": 80, "epoch": 1.0, "attempt": 1, "reason": "interval", "eval_loss": 2.5, "is_best": True}
    one |= {"size_bytes": 5_000_000, "created_at": "2026-01-02T03:04:05Z"}
    other = one | {"step": 80, "reason": "time_slice", "eval_loss": None, "is_best": False}
    first, second = render_text(show.checkpoint_table([one, other])).splitlines()[1:]
    assert first.split() == ["40/80", "1.00", "1", "interval", "2.500", "best", "5.0", "MB", "2026-01-02", "03:04"]
    assert second.split() == ["80/80", "1.00", "1", "time", "slice", "5.0", "MB", "2026-01-02", "03:04"]


def make_metrics_json(**changes: Any) -> Json:
    return {"eval_loss": None, "perplexity": None, "accuracy": None, "values": {}} | changes


def test_metrics_are_shown_before_and_after_training() -> None:
    before = make_metrics_json(eval_loss=2.0, values={"rewards/accuracies": 0.5})
    after = make_metrics_json(eval_loss=1.0, values={"rewards/accuracies": 0.75, "exact_match": 0.1, "bleu": None})
    told = render_summary(status="completed", metrics=after, base_metrics=before)
    assert "eval loss   2.000 → 1.000" in told
    assert "rewards/accuracies 0.500 → 0.750" in told
    assert "exact_match 0.100" in told
    assert "bleu" not in told
    assert render_event_line(type="evaluation", when="after", metrics=after) == (
        "evaluated after training: loss 1.000, exact_match 0.100, rewards/accuracies 0.750"
    )
    assert show.event_line({"event": {"type": "evaluation", "when": "after", "metrics": make_metrics_json()}}) is None


GATE: Json = {
    "passed": False,
    "checks": [
        {"metric": "perplexity", "at_least": None, "at_most": 9.0, "passed": False, "reason": "12.5 is above 9, 0.9 of the base's 10"},
        {"metric": "accuracy", "at_least": 0.5, "at_most": None, "passed": True, "reason": ""},
    ],
}


def test_failed_gate_is_shown_with_export_command() -> None:
    told = render_summary(status="completed", gate=GATE, gate_passed=False)
    assert "gate        perplexity at most 9: not passed: 12.5 is above 9, 0.9 of the base's 10" in told
    assert "gate        accuracy at least 0.5: passed" in told
    assert "tunesmith export training_1" in told
    assert render_event_line(type="gate", gate=GATE).endswith("not published")
    assert render_event_line(type="gate", gate={"passed": True, "checks": []}) == "the gate is passed"


def test_samples_are_shown_on_one_line() -> None:
    told = render_event_line(type="samples", when="during", samples=[{"prompt": "2 [+] 2\n?", "text": "it is\n[4]"}])
    assert told == "sample, during training: 2 [+] 2 ? → it is [4]"


def test_artifact_shows_fidelity_and_hub_url() -> None:
    found: Json = {"argmax_agreement": 0.97, "mean_kl_to_merged": 0.02, "closer_to_base": True, "advice": "use q8_0 [or f16]"}
    found |= {"perplexity": 9.5, "perplexity_merged": 9.0, "perplexity_base": None}
    hub = {"url": "https://hub/ada/tuned/tree/a"}
    gguf: Json = {"name": "gguf-q2_k", "size_bytes": 1_000_000, "uri": "file:///g", "fidelity": found, "hub": hub}
    told = render_summary(
        status="completed", artifacts=[gguf, gguf | {"name": "adapter", "fidelity": None}], tracker_urls={"mlflow": "https://m"}
    )
    assert "agrees 97.0%, KL 0.0200, perplexity 9.50 of the file / 9.00 trained  erased the tuning" in told
    assert "advice: use q8_0 [or f16]" in told
    assert told.count("https://hub/ada/tuned/tree/a") == 1
    assert "mlflow: https://m" in told


# --- commands --------------------------------------------------------------------------------------------------------


class CommandRunner:
    """Runs commands against a fake service."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch

    def run(self, *words: str, answers: list[FakeReply], environment: dict[str, str] | None = None) -> tuple[Result, list[httpx2.Request]]:
        service = FakeService(*answers)
        self.monkeypatch.setattr(app_module, "_create_client", lambda: service.client)
        done = CliRunner().invoke(app_module.app, [*words], env=environment or {}, catch_exceptions=True)
        return done, service.requests


@pytest.fixture
def command_runner(monkeypatch: pytest.MonkeyPatch) -> CommandRunner:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    return CommandRunner(monkeypatch)


def test_clone_sends_changes_and_required_secrets(command_runner: CommandRunner) -> None:
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
    done, asked = command_runner.run(*words, answers=[needs, JOB_CREATED], environment={"HF_TOKEN": "hf_x"})
    assert (done.exit_code, done.output.strip()) == (0, "training_1")
    first, second = (json.loads(request.content) for request in asked)
    assert first == {
        "training_config": {"hyperparameters": {"learning_rate": 1e-4}, "wandb_config": None},
        "secrets": {"a_api_key": "k=1"},
    }
    assert second == first | {"hf_token": "hf_x"}
    assert {request.url.path for request in asked} == {"/jobs/training_0/clone"}


def test_missing_secret_error_names_option(command_runner: CommandRunner) -> None:
    error = {"code": "invalid_request", "message": "needed again", "hint": "h", "param": "secrets.judge_api_key"}
    done, asked = command_runner.run("clone", "training_0", answers=[httpx2.Response(400, json={"error": error})])
    assert isinstance(done.exception, ApiError)
    assert done.exception.hint == "--secret judge_api_key=…; h"
    assert len(asked) == 1


def test_export_without_step_uses_published_model(command_runner: CommandRunner) -> None:
    words = ["export", "training_0", "--format", "merged", "--gguf", "q8_0", "--lora-gguf", "--to-hub", "ada/tuned"]
    done, [asked] = command_runner.run(*words, answers=[JOB_CREATED])
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
    _, [asked] = command_runner.run("export", "training_0", "40", answers=[JOB_CREATED])
    assert asked.url.path == "/jobs/training_0/checkpoints/40/export"


def test_delete_affects_hub_only_with_option(command_runner: CommandRunner) -> None:
    gone = httpx2.Response(200, json={"deleted": True, "message": "gone", "job_id": "j", "deleted_resources": []})
    _, [asked] = command_runner.run("delete", "training_0", answers=[gone], environment={"HF_TOKEN": "hf_x"})
    assert ("X-HF-Token" in asked.headers, asked.url.query) == (False, b"")
    _, [asked] = command_runner.run("delete", "training_0", "--hub", answers=[gone], environment={"HF_TOKEN": "hf_x"})
    assert (asked.headers["X-HF-Token"], asked.url.query) == ("hf_x", b"delete_hub=true")
    done, asked = command_runner.run("delete", "training_0", "--hub", answers=[gone])
    assert isinstance(done.exception, ApiError)
    assert asked == []

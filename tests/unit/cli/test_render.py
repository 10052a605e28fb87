"""The rendering of API responses."""

import io
from typing import Any

import pytest
from rich.console import Console

from cli.http_client import Json
from cli.render.events import event_line
from cli.render.formats import format_cost, format_fidelity, format_rows
from cli.render.job import print_job
from cli.render.tables import checkpoint_table


def make_attempt_json(number: int, **changes: Any) -> Json:
    fields: Json = {
        "number": number,
        "claimed_at": "x",
        "ended_at": None,
        "outcome": None,
        "resumed_step": None,
        "last_checkpoint_step": None,
        "pending_reason": None,
    }
    return fields | changes


def make_cost_json(**changes: Any) -> Json:
    fields: Json = dict.fromkeys(("usd", "usd_per_hour", "max_gpu_seconds", "max_cost_usd"))
    return {"gpu_seconds": 0.0, "source": "", "as_of": ""} | fields | changes


def make_job_json(**changes: Any) -> Json:
    nothing = ("failure", "progress", "checkpoint", "export_of", "cloned_from", "metrics", "base_metrics", "gate", "gate_passed")
    fields: Json = {"job_id": "training_1", "status": "training", "job_name": "mine", "attempts": [], "artifacts": [], "tracker_urls": {}}
    fields |= {"pending_reason": None, "pause_reason": None, "cost": make_cost_json()}
    return fields | dict.fromkeys(nothing) | changes


def render_text(*lines: Any) -> str:
    console = Console(file=io.StringIO(), width=200)
    for line in lines:
        console.print(line)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def render_summary(**changes: Any) -> str:
    console = Console(file=io.StringIO(), width=200)
    print_job(console, make_job_json(**changes))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_summary_names_what_the_training_starts_from() -> None:
    datasets = [{"processed_dataset_id": "dataset_a", "weight": 0.7}, {"processed_dataset_id": "dataset_b", "weight": 3.0}]
    text = render_summary(earlier_model={"kind": "adapter", "job_id": "training_0"}, datasets=datasets)
    assert "starts from the adapter of training_0" in text
    assert "mixes       dataset_a (weight 0.7), dataset_b (weight 3)" in text
    assert "mixes" not in render_summary(datasets=datasets[:1])


def render_event_line(**event: Any) -> str:
    text = event_line({"event": event})
    assert text is not None
    return render_text(text).strip()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "messages"),
        ({"has_tools": True}, "messages with tools"),
        ({"images": 3}, "messages with images"),
        ({"has_tools": True, "has_weights": True}, "messages with tools and weights"),
    ],
)
def test_rows_of_a_dataset_are_described(changes: Json, text: str) -> None:
    assert format_rows({"dataset_type": "messages", "images": 0, "has_tools": False, "has_weights": False} | changes) == text


@pytest.mark.parametrize(
    ("status", "attempt", "reason", "text"),
    [
        ("preparing", 1, "", "preparing"),
        ("preparing", 3, "", "preparing, attempt 3"),
        ("queued", 1, "preempted", "queued (compute preempted)"),
        ("queued", 1, "yielded", "queued (time limit reached)"),
        ("completed", 2, "completed", "completed"),
        ("failed", 2, "lost", "failed (process disappeared)"),
        ("paused", 1, "cost_cap", "paused (its max_cost_usd is reached)"),
    ],
)
def test_status_line_shows_reason(status: str, attempt: int, reason: str, text: str) -> None:
    assert render_event_line(type="status", status=status, attempt=attempt, reason=reason) == text


def test_checkpoint_lines() -> None:
    assert "saved step 40 (1.2 MB, time slice)" in render_event_line(
        type="checkpoint_saved", step=40, size_bytes=1_200_000, reason="time_slice"
    )
    assert render_event_line(type="checkpoint_restored", step=40, from_attempt=1) == "continues from step 40, saved by attempt 1"
    skipped = render_event_line(type="checkpoint_skipped", step=40, attempt=1, reason="[a/b] is not what its manifest says")
    assert skipped == "skipped the checkpoint of attempt 1 at step 40: [a/b] is not what its manifest says"


def test_summary_lists_attempts_and_next_step() -> None:
    attempts = [
        make_attempt_json(1, ended_at="x", outcome="yielded", last_checkpoint_step=40),
        make_attempt_json(2, ended_at="x", outcome="lost", resumed_step=40),
        make_attempt_json(3, resumed_step=40, last_checkpoint_step=60),
    ]
    text = render_summary(status="paused", attempts=attempts, checkpoint={"step": 60, "attempt": 3, "at": "2026-01-02T03:04:05Z"})
    assert "from the start, saved step 40, time limit reached" in text
    assert "from step 40, process disappeared" in text
    assert "checkpoint  step 60, 2026-01-02 03:04" in text
    assert "next step: tunesmith resume training_1" in text


def test_summary_of_single_attempt_is_short() -> None:
    assert "attempt" not in render_summary(attempts=[make_attempt_json(1)])
    assert "next step" not in render_summary(status="failed")  # no checkpoint to continue from


def test_summary_of_many_attempts_shows_latest() -> None:
    text = render_summary(attempts=[make_attempt_json(number, ended_at="x", outcome="yielded") for number in range(1, 41)])
    assert "35 earlier attempts" in text
    assert "attempt 35 " not in text
    assert "attempt 36 " in text


def test_summary_shows_pending_reason() -> None:
    assert "waiting: no quota for [l4]" in render_summary(pending_reason="no quota for [l4]")


def test_user_text_is_not_interpreted_as_markup() -> None:
    assert "[/] [red]sale[/red]" in render_summary(job_name="[/] [red]sale[/red]")
    assert "[/tmp/x]" in render_event_line(type="warning", message="no space below [/tmp/x]")


def test_best_checkpoint_is_marked() -> None:
    best: Json = {"step": 40, "total_steps": 80, "epoch": 1.0, "attempt": 1, "reason": "interval", "eval_loss": 2.5, "is_best": True}
    best |= {"size_bytes": 5_000_000, "created_at": "2026-01-02T03:04:05Z"}
    other = best | {"step": 80, "reason": "time_slice", "eval_loss": None, "is_best": False}
    first, second = render_text(checkpoint_table([best, other])).splitlines()[1:]
    assert first.split() == ["40/80", "1.00", "1", "interval", "2.500", "best", "5.0", "MB", "2026-01-02", "03:04"]
    assert second.split() == ["80/80", "1.00", "1", "time", "slice", "5.0", "MB", "2026-01-02", "03:04"]


def make_metrics_json(**changes: Any) -> Json:
    return {"eval_loss": None, "perplexity": None, "accuracy": None, "values": {}} | changes


def test_metrics_are_shown_before_and_after_training() -> None:
    before = make_metrics_json(eval_loss=2.0, content_perplexity=4.0, values={"rewards/accuracies": 0.5})
    after = make_metrics_json(eval_loss=1.0, content_perplexity=2.5, values={"rewards/accuracies": 0.75, "exact_match": 0.1, "bleu": None})
    text = render_summary(status="completed", metrics=after, base_metrics=before)
    assert "eval loss   2.000 → 1.000" in text
    assert "content perplexity 4.000 → 2.500" in text
    assert "rewards/accuracies 0.500 → 0.750" in text
    assert "exact_match 0.100" in text
    assert "bleu" not in text
    assert render_event_line(type="evaluation", when="after", metrics=after) == (
        "evaluated after training: loss 1.000, content perplexity 2.500, exact_match 0.100, rewards/accuracies 0.750"
    )
    assert event_line({"event": {"type": "evaluation", "when": "after", "metrics": make_metrics_json()}}) is None


GATE: Json = {
    "passed": False,
    "checks": [
        {"metric": "perplexity", "at_least": None, "at_most": 9.0, "passed": False, "reason": "12.5 is above 9, 0.9 of the base's 10"},
        {"metric": "accuracy", "at_least": 0.5, "at_most": None, "passed": True, "reason": ""},
    ],
}


def test_failed_gate_is_shown_with_export_command() -> None:
    text = render_summary(status="completed", gate=GATE, gate_passed=False)
    assert "gate        perplexity at most 9: not passed: 12.5 is above 9, 0.9 of the base's 10" in text
    assert "gate        accuracy at least 0.5: passed" in text
    assert "tunesmith export training_1" in text
    assert render_event_line(type="gate", gate=GATE).endswith("not published")
    assert render_event_line(type="gate", gate={"passed": True, "checks": []}) == "gate passed"


def test_samples_are_shown_on_one_line() -> None:
    text = render_event_line(type="samples", when="during", samples=[{"prompt": "2 [+] 2\n?", "text": "it is\n[4]"}])
    assert text == "sample, during training: 2 [+] 2 ? → it is [4]"


def test_artifact_shows_fidelity_and_hub_url() -> None:
    fidelity: Json = {"argmax_agreement": 0.97, "mean_kl_to_merged": 0.02, "closer_to_base": True, "advice": "use q8_0 [or f16]"}
    fidelity |= {"perplexity": 9.5, "perplexity_merged": 9.0, "perplexity_base": None}
    hub = {"url": "https://hub/ada/tuned/tree/a"}
    gguf: Json = {"name": "gguf-q2_k", "size_bytes": 1_000_000, "uri": "file:///g", "fidelity": fidelity, "hub": hub}
    text = render_summary(
        status="completed", artifacts=[gguf, gguf | {"name": "adapter", "fidelity": None}], tracker_urls={"mlflow": "https://m"}
    )
    assert "agreement 97.0%, KL 0.0200, perplexity 9.50 (this file) / 9.00 (tuned)  closer to the base model than to the tuned one" in text
    assert "advice: use q8_0 [or f16]" in text
    assert text.count("https://hub/ada/tuned/tree/a") == 1
    assert "mlflow: https://m" in text


def test_fidelity_of_another_family_is_left_out() -> None:
    assert format_fidelity({"fidelity": {"mean_average_precision": 0.5}}) == ""


@pytest.mark.parametrize(
    ("cost", "text"),
    [
        (make_cost_json(), ""),
        (make_cost_json(gpu_seconds=61.4), "61 GPU seconds"),
        (make_cost_json(usd=0.4512, usd_per_hour=1.4188, gpu_seconds=1145.0), "$0.45 at $1.42 an hour, 1145 GPU seconds"),
        (make_cost_json(usd=0.0, usd_per_hour=0.75, max_cost_usd=2.0), "$0.00 of at most $2.00 at $0.75 an hour"),
        (make_cost_json(gpu_seconds=900.0, max_gpu_seconds=36000.0), "900 of at most 36000 GPU seconds"),
    ],
)
def test_cost_is_shown_with_caps(cost: Json, text: str) -> None:
    assert format_cost(cost) == text
    assert ("cost  " in render_summary(cost=cost)) == bool(text)


def test_job_paused_at_a_cap_says_so_and_how_to_continue() -> None:
    text = render_summary(status="paused", pause_reason="cost_cap", cost=make_cost_json(usd=2.0, max_cost_usd=2.0))
    assert "paused: its max_cost_usd is reached" in text
    assert "next step: tunesmith resume training_1 --max-cost-usd MORE" in text
    assert "paused:" not in render_summary(status="paused", pause_reason="requested")

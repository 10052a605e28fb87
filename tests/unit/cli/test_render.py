"""The rendering of API responses."""

import re
from datetime import timedelta
from typing import Any

import pytest

from cli.http_client import Json
from cli.render.control import describe_next
from cli.render.events import event_line
from cli.render.formats import (
    format_cost,
    format_duration,
    format_fidelity,
    format_loss,
    format_rows,
    format_size,
    format_time_left,
    shorten_ids,
)
from cli.render.job import print_job
from cli.render.tables import checkpoint_table, count_line, job_table
from tests.unit.cli.api_json import (
    START,
    make_artifact_json,
    make_attempt_json,
    make_console,
    make_cost_json,
    make_job_json,
    make_job_row_json,
    make_metrics_json,
    make_progress_json,
    read_console,
    render_text,
)
from tests.unit.cli.fake_service import JOB_ID


def render_summary(**changes: Any) -> str:
    console = make_console()
    print_job(console, make_job_json(**changes))
    return read_console(console)


def test_summary_names_what_the_training_starts_from() -> None:
    datasets = [{"processed_dataset_id": "dataset_a", "weight": 0.7}, {"processed_dataset_id": "dataset_b", "weight": 3.0}]
    text = render_summary(earlier_model={"kind": "adapter", "job_id": "training_0"}, datasets=datasets)
    assert "starts from the adapter of training_0" in text
    assert "dataset     dataset_a, weight 0.7\n              dataset_b, weight 3\n" in text
    assert "weight" not in render_summary(datasets=datasets[:1])


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
    assert f"next step: tunesmith resume {JOB_ID}\n" in text


def test_summary_of_single_attempt_is_short() -> None:
    assert "attempt" not in render_summary(attempts=[make_attempt_json(1)])
    assert "next step" not in render_summary(status="failed")  # no checkpoint to continue from, and no log


def test_summary_of_many_attempts_shows_latest() -> None:
    text = render_summary(attempts=[make_attempt_json(number, ended_at="x", outcome="yielded") for number in range(1, 41)])
    assert "35 earlier attempts" in text
    assert "attempt 35 " not in text
    assert "attempt 36 " in text


def test_summary_shows_pending_reason() -> None:
    assert "waiting:    no quota for [l4]" in render_summary(pending_reason="no quota for [l4]")


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


def test_metrics_are_shown_before_and_after_training() -> None:
    before = make_metrics_json(eval_loss=2.0, content_perplexity=4.0, values={"rewards/accuracies": 0.5})
    after = make_metrics_json(eval_loss=1.0, content_perplexity=2.5, values={"rewards/accuracies": 0.75, "exact_match": 0.1, "bleu": None})
    text = render_summary(status="completed", metrics=after, base_metrics=before)
    assert "eval loss   2.000 → 1.000" in text
    assert "content perplexity 4.000 → 2.500  (base → tuned)" in text
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
    assert f"tunesmith export {JOB_ID}  (publishes it anyway)" in text
    assert render_event_line(type="gate", gate=GATE).endswith("not published")
    assert render_event_line(type="gate", gate={"passed": True, "checks": []}) == "gate passed"


def test_artifact_shows_fidelity_and_hub_url() -> None:
    fidelity: Json = {"argmax_agreement": 0.97, "mean_kl_to_merged": 0.02, "closer_to_base": True, "advice": "use q8_0 [or f16]"}
    fidelity |= {"perplexity": 9.5, "perplexity_merged": 9.0, "perplexity_base": None}
    hub = {"url": "https://hub/ada/tuned/tree/a"}
    gguf = make_artifact_json("gguf-q2_k", fidelity=fidelity, hub=hub)
    text = render_summary(
        status="completed", artifacts=[gguf, gguf | {"name": "adapter", "fidelity": None}], tracker_urls={"mlflow": "https://m"}
    )
    assert "agreement 97.0%, KL 0.0200, perplexity 9.50 (this file) / 9.00 (tuned)  closer to the base model than to the tuned one" in text
    assert "advice: use q8_0 [or f16]" in text
    assert text.count("https://hub/ada/tuned/tree/a") == 1
    assert "mlflow: https://m\n" in text
    assert f"tunesmith download {JOB_ID} --artifact NAME" in text


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
    assert "paused:     its max_cost_usd is reached" in text
    assert f"next step: tunesmith resume {JOB_ID} --max-cost-usd MORE" in text
    assert "paused:" not in render_summary(status="paused", pause_reason="requested")


def test_job_that_makes_a_dataset_has_neither_method_nor_rows() -> None:
    console = make_console()
    dataset: Json = {"name": "faq.csv", "status": "processing", "rows": 0, "splits": {}}
    print_job(console, make_job_json(trainer_type="ingest", method=""), datasets={"dataset_a": dataset})
    assert "  dataset     faq.csv, processing, dataset_a\n  trainer     ingest\n" in read_console(console)


def test_show_describes_a_finished_job_as_text() -> None:
    base, tuned = (make_metrics_json(eval_loss=loss, perplexity=loss * 2, eval_rows=39) for loss in (2.9, 0.6))
    job = make_job_json(
        status="completed",
        metadata={"team": "docs"},
        created_by="ada",
        project_id="tutor",
        started_at="2026-01-02T03:04:07Z",
        finished_at="2026-01-02T03:06:12Z",
        duration_s=125.0,
        progress=make_progress_json(80, loss=0.41),
        train_loss=0.41,
        base_metrics=base,
        metrics=tuned,
        artifacts=[make_artifact_json("gguf-q8_0", size_bytes=291_000_000), make_artifact_json("adapter")],
    )
    dataset: Json = {"name": "rows.jsonl", "rows": 100, "splits": {"train": 95, "eval": 5}}
    decision: Json = {"setting": "batch_size", "value": "4", "reason": "it [fits]"}
    console = make_console()
    print_job(console, job, datasets={"dataset_a": dataset}, decisions=[decision])
    assert (
        read_console(console)
        == f"""\
{JOB_ID}  completed  mine
  base        google/gemma-3-270m
  dataset     rows.jsonl, 100 rows (95 train, 5 eval), dataset_a
  trainer     sft, LoRA
  hardware    local/cpu
  project     tutor
  metadata    team=docs
  created     2026-01-02 03:04 by ada
  started     2026-01-02 03:04, took 2 min 5 s
  progress    step 80/80, epoch 8.00/8
  train loss  0.410 (at step 80)
  eval loss   2.900 → 0.600  (base → tuned, on the same 39 held-out rows)
  perplexity  5.800 → 1.200  (base → tuned)
  decided     batch_size = 4 (it [fits])
  gguf-q8_0  291.0 MB
            file:///gguf-q8_0
  adapter     12.0 MB
            file:///adapter
  to get one: tunesmith download {JOB_ID} --artifact NAME
  next step: tunesmith chat {JOB_ID}
             tunesmith download {JOB_ID}
"""
    )


def test_metrics_of_the_base_alone_say_so() -> None:
    text = render_summary(base_metrics=make_metrics_json(eval_loss=2.0, eval_rows=5))
    assert "eval loss   2.000  (base, on 5 held-out rows)" in text


def test_job_of_an_earlier_service_is_shown() -> None:
    job = make_job_json(
        progress={"step": 1, "total_steps": 2, "epoch": 0.5, "total_epochs": 1.0, "eta_s": 3.0}, started_at="2026-01-02T03:04:07Z"
    )
    for name in ("metadata", "created_by", "earlier_model", "phase"):
        del job[name]
    console = make_console()
    print_job(console, job)
    assert "progress    step 1/2, epoch 0.50/1\n" in read_console(console)


def test_running_job_shows_its_phase_and_time_left() -> None:
    text = render_summary(phase="merging", progress=make_progress_json(80, remaining_s=42.0))
    assert "progress    step 80/80, epoch 8.00/8, merging, about 50 s left" in text
    assert f"next step: tunesmith watch {JOB_ID}" in text


def test_failure_advises_with_commands() -> None:
    failure = {"code": "invalid_config", "message": "[x] is wrong", "hint": "GET /capabilities lists what works"}
    text = render_summary(status="failed", failure=failure, attempts=[make_attempt_json(1)])
    assert "invalid_config: [x] is wrong" in text
    assert "hint: `tunesmith capabilities` lists what works" in text
    assert f"next step: tunesmith logs {JOB_ID}" in text


@pytest.mark.parametrize("width", [60, 80, 120])
def test_long_values_continue_below_their_beginning_on_a_terminal(width: int) -> None:
    console = make_console(width, is_terminal=True)
    print_job(console, make_job_json(pending_reason="no quota for l4 " * 12))
    lines = read_console(console).splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("  waiting:"))
    assert re.match(r" {14}[nqfl]", lines[start + 1])
    assert max(map(len, lines)) <= width


def test_commands_name_the_job_shortly_on_a_terminal() -> None:
    console = make_console(is_terminal=True)
    print_job(console, make_job_json())
    assert "tunesmith watch …89ab" in read_console(console)


JOBS = [
    make_job_row_json(1, phase="merging", status="training", progress=make_progress_json(80, loss=0.512), base_eval_loss=2.9),
    make_job_row_json(2, job_name="a name that is far too long for a narrow terminal", cost_usd=0.5),
]


def test_jobs_are_listed_by_short_id_on_a_terminal() -> None:
    now = START + timedelta(hours=3)
    lines = render_text(job_table(JOBS, now=now, width=120, with_short_ids=True), width=120, is_terminal=True).splitlines()
    assert [line.rstrip() for line in lines] == [
        "job    name                                    trainer  base                 status   done   loss  eval loss  age   cost",
        "…0001  job-1                                   sft      google/gemma-3-270m  merging  100%  0.512  2.900      3 h",
        "…0002  a name that is far too long for a nar…  sft      google/gemma-3-270m  queued                           3 h  $0.50",
    ]
    narrow = render_text(job_table(JOBS, now=now, width=60, with_short_ids=True), width=60, is_terminal=True)
    assert narrow.splitlines()[2] == "…0002  a name that is far too lo…  queued                3 h"


@pytest.mark.parametrize("width", [60, 80, 120])
def test_listed_jobs_take_one_line_each(width: int) -> None:
    text = render_text(job_table(JOBS, now=START, width=width, with_short_ids=True), width=width, is_terminal=True)
    assert [len(line) <= width for line in text.splitlines()] == [True] * 3


def test_piped_jobs_have_whole_ids_and_names() -> None:
    text = render_text(job_table(JOBS, now=START, width=10_000, with_short_ids=False), width=10_000)
    assert [line.split()[0] for line in text.splitlines()] == ["job", "training_a_000000000001", "training_a_000000000002"]
    assert "a name that is far too long for a narrow terminal" in text


def test_row_of_an_earlier_service_is_listed() -> None:
    row = {name: value for name, value in make_job_row_json().items() if name not in ("phase", "progress", "eval_loss", "base_eval_loss")}
    assert "job-1" in render_text(job_table([row], now=START, width=120, with_short_ids=True), width=120)


def test_no_jobs_make_an_empty_table() -> None:
    assert render_text(job_table([], now=START, width=80, with_short_ids=True), width=80).split()[:2] == ["job", "name"]


def test_counts_are_one_line() -> None:
    assert render_text(count_line({"training": 2, "queued": 0, "completed": 40})) == "2 training, 40 completed\n"
    assert count_line({}) == "no jobs"


def test_short_ids_are_as_long_as_it_takes_to_differ() -> None:
    assert shorten_ids(["training_a_0a2d21", "training_b_1b2d21"]) == {"training_a_0a2d21": "…a2d21", "training_b_1b2d21": "…b2d21"}
    assert shorten_ids(["xxxx", "axxxx"]) == {"xxxx": "xxxx", "axxxx": "axxxx"}
    assert shorten_ids([]) == {}


@pytest.mark.parametrize(
    ("remaining_s", "elapsed_s", "text"),
    [
        (None, 0.0, ""),
        (0.0, 0.0, "a few seconds left"),
        (30.0, 300.0, "a few seconds left"),
        (9.9, 0.0, "a few seconds left"),
        (41.0, 0.0, "about 50 s left"),
        (60.0, 20.0, "about 40 s left"),
        (59.0, 0.0, "about 1 min left"),
        (125.0, 0.0, "about 2 min left"),
        (7800.0, 0.0, "about 2 h 10 min left"),
    ],
)
def test_time_left_is_coarse_and_never_zero(remaining_s: float | None, elapsed_s: float, text: str) -> None:
    assert format_time_left({"remaining_s": remaining_s}, elapsed_s) == text


def test_time_left_of_an_earlier_attempt_is_not_guessed() -> None:
    assert (format_time_left(None), format_time_left({"eta_s": 0.0})) == ("", "")


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")])
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(("loss", "text"), [(None, "–"), (0.0, "0.000"), (1.23456, "1.235"), (2e-7, "2.00e-07"), (-0.5, "-0.500")])
def test_losses(loss: float | None, text: str) -> None:
    assert format_loss(loss) == text


def test_sizes() -> None:
    assert [format_size(size) for size in (900, 1_200_000, 3_200_000_000)] == ["0.9 kB", "1.2 MB", "3.2 GB"]


@pytest.mark.parametrize(
    ("status", "checkpoint", "text"),
    [
        ("pausing", None, "it finishes the current step and saves a checkpoint; tunesmith resume …1 continues it"),
        ("paused", {"step": 40}, "no compute is held; tunesmith resume …1 continues it from step 40"),
        ("cancelling", None, "it stops; its checkpoints are kept, and tunesmith retry …1 continues it"),
        ("cancelled", {"step": 40}, "its checkpoints are kept; tunesmith retry …1 continues it from step 40"),
        ("cancelled", None, "it has no checkpoint; tunesmith retry …1 starts it over"),
        ("queued", None, "it starts as soon as compute is free; tunesmith watch …1 follows it"),
        ("queued", {"step": 40}, "it continues from step 40 as soon as compute is free; tunesmith watch …1 follows it"),
        ("completed", None, "it had finished before; tunesmith show …1 has what it made"),
        ("failed", None, ""),
    ],
)
def test_controlled_job_says_what_happens_next(status: str, checkpoint: Json | None, text: str) -> None:
    assert describe_next({"status": status, "checkpoint": checkpoint}, "…1") == text

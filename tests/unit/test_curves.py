"""Curves of metrics: no spike is lost, repeated steps count once, and only new events are read."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from schema.events import CheckpointRestored, EvaluationCompleted, Event, MetricsLogged, PhaseChanged
from schema.job import EvalMetrics
from service.core.errors import NotFound, Unavailable
from service.core.event_store import StoredEvent
from service.core.jobs.curves import Curves, CurveView, Selection
from service.core.jobs.metrics import JobMetrics
from storage.deadline import deadline
from tests.factories import START
from tests.unit.api_harness import attempt_headers, get_error, start_attempt, submit_job
from tests.unit.jobs_harness import OTHER_PRINCIPAL, PRINCIPAL, JobsHarness, make_batch

Report = tuple[int, Event]  # the attempt, and what it reports


def log(step: int, **values: float | None) -> MetricsLogged:
    return MetricsLogged(step=step, epoch=step / 100, values=values)


def evaluate(step: int, loss: float) -> EvaluationCompleted:
    return EvaluationCompleted(when="during", step=step, metrics=EvalMetrics(eval_loss=loss))


def view(reports: Sequence[Report], **selection: Any) -> CurveView:
    curves = Curves()
    for cursor, (attempt, event) in enumerate(reports, start=1):
        curves.add(StoredEvent(cursor, attempt, cursor, START + timedelta(seconds=cursor), event))
    return curves.view(Selection(**selection))


LOSSES = st.dictionaries(st.integers(0, 300), st.none() | st.floats(-1e9, 1e9), max_size=120)


@given(LOSSES, st.integers(1, 40), st.integers(0, 300), st.integers(0, 300))
def test_buckets_keep_order_extremes_and_last_values(losses: dict[int, float | None], points: int, begin: int, end: int) -> None:
    begin, end = sorted((begin, end))
    shown = view([(1, log(step, loss=loss)) for step, loss in losses.items()], points=points, from_step=begin, to_step=end)
    selected = sorted(step for step in losses if begin <= step <= end)
    assert shown.steps == len(selected)
    assert len(shown.step) == min(points, len(selected))
    assert shown.step == sorted(set(shown.step))
    assert shown.step[-1:] == selected[-1:]
    assert shown.epoch == [step / 100 for step in shown.step]
    buckets, sizes = shown.metrics.get("loss"), list[int]()
    for index, last_step in enumerate(shown.step):
        first = shown.step[index - 1] + 1 if index else begin
        steps = [step for step in selected if first <= step <= last_step]
        values = [loss for step in steps if (loss := losses[step]) is not None]
        sizes.append(len(steps))
        if buckets:
            expected = (min(values), max(values), values[-1]) if values else (None, None, None)
            assert (buckets.min[index], buckets.max[index], buckets.last[index]) == expected
    assert sum(sizes) == len(selected)
    assert max(sizes, default=0) - min(sizes, default=0) <= 1
    assert (buckets is None) == all(loss is None for loss in losses.values())


@given(st.lists(st.tuples(st.integers(1, 30), st.lists(st.floats(-10, 10), min_size=1, max_size=30)), min_size=1, max_size=6))
def test_repeated_steps_count_once_and_the_newest_wins(attempts: list[tuple[int, list[float]]]) -> None:
    expected: dict[int, tuple[int, float]] = {}
    reports: list[Report] = []
    for attempt, (begin, losses) in enumerate(attempts, start=1):
        expected = {step: row for step, row in expected.items() if step < begin}
        for step, loss in enumerate(losses, start=begin):
            expected[step] = (attempt, loss)
            reports.append((attempt, log(step, loss=loss)))
    shown = view(reports)
    assert shown.step == list(expected)
    assert shown.attempt == [attempt for attempt, _ in expected.values()]
    assert shown.metrics["loss"].last == [loss for _, loss in expected.values()]


def test_steps_that_a_retry_did_not_reach_yet_are_kept() -> None:
    first: list[Report] = [(1, log(step, loss=float(step))) for step in (10, 20, 30, 40)]
    shown = view([*first, (2, CheckpointRestored(step=20, from_attempt=1)), (2, PhaseChanged(phase="training"))])
    assert shown.step == [10, 20, 30, 40]
    assert shown.attempts == {1: 0, 2: 20}
    assert view([*first, (2, log(25, loss=0.0))]).step == [10, 20, 25]


def test_values_of_one_step_are_merged_also_when_late() -> None:
    shown = view([(1, log(1, a=1.0)), (1, log(2, a=2.0)), (1, log(1, b=5.0)), (1, log(2, a=3.0))])
    assert shown.step == [1, 2]
    assert (shown.metrics["a"].last, shown.metrics["b"].last) == ([1.0, 3.0], [5.0, None])


def test_value_that_could_not_be_computed_is_null_with_the_reason() -> None:
    missing = MetricsLogged(step=2, values={"loss": None}, notes={"loss": "it is not finite"})
    shown = view([(1, log(1, loss=1.0)), (1, missing)])
    assert shown.metrics["loss"].last == [1.0, None]
    assert shown.epoch == [0.01, None]
    assert shown.notes == {"loss": "it is not finite"}
    assert view([(1, missing), (1, log(3, loss=1.0))]).notes == {}


def test_newest_evaluation_of_a_step_is_shown() -> None:
    reports: list[Report] = [(1, evaluate(10, 3.0)), (1, evaluate(20, 2.0)), (1, log(21, loss=1.0)), (2, log(15, loss=1.0))]
    assert [(each.attempt, each.cursor) for each in view(reports).evaluations] == [(1, 1)]
    again = view([*reports, (2, evaluate(20, 1.5)), (2, evaluate(20, 1.4))])
    assert [each.cursor for each in again.evaluations] == [1, 6]
    assert [each.cursor for each in view([*reports, (2, evaluate(20, 1.4))], from_step=11).evaluations] == [5]


def test_metrics_beyond_the_limit_of_an_answer_are_left_out_and_can_be_asked_for() -> None:
    reports: list[Report] = [(1, MetricsLogged(step=step, values={f"m{n:02}": 1.0 for n in range(20)})) for step in range(10)]
    shown = view(reports, max_cells=50)
    assert (list(shown.metrics), shown.names_left_out) == ([f"m{n:02}" for n in range(5)], 15)
    asked = view(reports, names=("m19", "none"), max_cells=50)
    assert (asked.metrics["m19"].last, asked.metrics["none"].last) == ([1.0] * 10, [None] * 10)


def report_steps(harness: JobsHarness, job: Any, first: int, count: int) -> None:
    harness.report(job, 1, make_batch(*(log(step, loss=1.0) for step in range(first, first + count)), first_seq=first))


def test_only_new_events_are_read(harness: JobsHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    job = harness.start_training()
    report_steps(harness, job, 1, 30)
    assert harness.jobs.metrics.read(PRINCIPAL, job.job_id, Selection()).steps == 30
    report_steps(harness, job, 31, 5)
    reads: list[int] = []
    list_events = harness.store.list_events

    def count(job_id: str, after: int = 0, *options: Any) -> Any:
        rows = list_events(job_id, after, *options)
        reads.append(len(rows))
        return rows

    monkeypatch.setattr(harness.store, "list_events", count)
    assert harness.jobs.metrics.read(PRINCIPAL, job.job_id, Selection()).steps == 35
    assert reads == [5, 0]


def test_foreign_and_deleted_jobs_are_not_found_in_the_cache(harness: JobsHarness) -> None:
    job = harness.start_training()
    harness.jobs.metrics.read(PRINCIPAL, job.job_id, Selection())
    with pytest.raises(NotFound):
        harness.jobs.metrics.read(OTHER_PRINCIPAL, job.job_id, Selection())
    harness.store.delete_job(job.job_id)
    with pytest.raises(NotFound):
        harness.jobs.metrics.read(PRINCIPAL, job.job_id, Selection())


def test_interrupted_reading_continues_where_it_ended(harness: JobsHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    job = harness.start_training()
    for first in range(1, 2001, 500):
        report_steps(harness, job, first, 500)
    tries = 0
    monkeypatch.setattr("service.core.jobs.metrics.PAGE_EVENTS", 100)
    while True:
        tries += 1
        try:
            with deadline(0.5):  # less than is kept for the answer, so that each try reads one page
                shown = harness.jobs.metrics.read(PRINCIPAL, job.job_id, Selection())
        except Unavailable as error:
            assert "repeat the call" in error.hint
            continue
        break
    assert shown.steps == 2000
    assert tries > 20


def test_cache_forgets_the_jobs_that_were_used_longest_ago(harness: JobsHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [harness.start_training() for _ in range(3)]
    for job in jobs:
        report_steps(harness, job, 1, 100)
    metrics = JobMetrics(harness.jobs.repository, max_cache_bytes=12_000)  # of two jobs
    reads: list[tuple[str, int]] = []
    list_events = harness.store.list_events

    def count(job_id: str, after: int = 0, *options: Any) -> Any:
        reads.append((job_id, after))
        return list_events(job_id, after, *options)

    monkeypatch.setattr(harness.store, "list_events", count)
    for job in (*jobs, jobs[2], jobs[0]):
        assert metrics.read(PRINCIPAL, job.job_id, Selection()).steps == 100
    whole = [job_id for job_id, after in reads if after == 0]
    assert whole == [job.job_id for job in (*jobs, jobs[0])]


def test_metrics_are_served_as_columns(client: TestClient, dataset_id: str) -> None:
    job_id = start_attempt(client, dataset_id)
    events = [{"at": START.isoformat(), "event": log(step, loss=loss).model_dump()} for step, loss in ((1, 3.0), (2, 9.0), (3, 1.0))]
    events.append({"at": START.isoformat(), "event": evaluate(3, 1.5).model_dump(mode="json")})
    path, headers = f"/internal/jobs/{job_id}/attempts/1/events", attempt_headers(client, job_id)
    assert client.post(path, json={"first_seq": 0, "events": events}, headers=headers).status_code == 200
    body = client.get(f"/jobs/{job_id}/metrics?points=2&names=loss").json()
    evaluation = body.pop("evaluations")[0]
    at = START.isoformat()
    assert body == {
        "steps": 3,
        "buckets": 2,
        "step": [1, 3],
        "epoch": [0.01, 0.03],
        "at": [at, at],
        "attempt": [1, 1],
        "metrics": {"loss": {"min": [3.0, 1.0], "max": [3.0, 9.0], "last": [3.0, 1.0]}},
        "notes": {},
        "names_left_out": 0,
        "attempts": [{"attempt": 1, "from_step": 0}],
    }
    assert (evaluation["step"], evaluation["when"], evaluation["metrics"]["eval_loss"]) == (3, "during", 1.5)
    assert client.get(f"/jobs/{job_id}/metrics?from=2&to=2").json()["step"] == [2]


def test_job_without_metrics_has_empty_columns(readonly_client: TestClient, readonly_dataset_id: str) -> None:
    body = readonly_client.get(f"/jobs/{submit_job(readonly_client, readonly_dataset_id)}/metrics").json()
    assert (body["steps"], body["buckets"], body["step"], body["metrics"], body["evaluations"]) == (0, 0, [], {}, [])


@pytest.mark.parametrize("query", ["points=0", "points=5001", "from=-1", "to=x", "from=9007199254740993"])
def test_query_out_of_range_is_refused(readonly_client: TestClient, readonly_dataset_id: str, query: str) -> None:
    job_id = submit_job(readonly_client, readonly_dataset_id)
    assert get_error(readonly_client.get(f"/jobs/{job_id}/metrics?{query}"), 422)["param"] == query.partition("=")[0]


def test_from_after_to_is_refused(readonly_client: TestClient, readonly_dataset_id: str) -> None:
    job_id = submit_job(readonly_client, readonly_dataset_id)
    assert get_error(readonly_client.get(f"/jobs/{job_id}/metrics?from=5&to=4"), 400)["param"] == "from"
    get_error(readonly_client.get("/jobs/none/metrics"), 404)

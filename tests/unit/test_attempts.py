"""The calls of an attempt: claim, report, finish."""

import pytest

from schema.job import Status
from schema.spec import attempt_name, manifest_key
from service.core.errors import Fenced
from tests.unit.jobs_harness import PRINCIPAL, JobsHarness, make_artifact, make_batch


def test_first_claim_receives_secrets_and_second_is_fenced(harness: JobsHarness) -> None:
    job = harness.submit(hf_token="hf_x")
    harness.reconcile()
    assert harness.claim(job, 1, "p").secrets == {"hf_token": "hf_x"}
    with pytest.raises(Fenced):
        harness.claim(job, 1, "another")


def test_reports_update_job_and_return_directive(harness: JobsHarness) -> None:
    job = harness.start_training()
    assert job.status is Status.TRAINING
    assert harness.report(job, 1, make_batch(first_seq=1)).directive == "continue"
    harness.jobs.control.cancel(PRINCIPAL, job.job_id)
    assert harness.report(job, 1, make_batch(first_seq=1)).directive == "cancel"


def test_heartbeats_do_not_change_job_record(harness: JobsHarness) -> None:
    job = harness.start_training()
    for n in range(5):
        harness.report(job, 1, make_batch({"type": "metrics", "step": n, "values": {"loss": 1.0}}, first_seq=1 + n))
    assert harness.find_job(job).revision == job.revision


def test_report_of_finished_attempt_is_fenced(harness: JobsHarness) -> None:
    job = harness.start_training()
    harness.finish(harness.write_result(job))
    with pytest.raises(Fenced):
        harness.report(job, 1, make_batch())


def test_events_contain_each_status_once(harness: JobsHarness) -> None:
    job = harness.start_training()
    harness.finish(harness.write_result(job))
    harness.finish(harness.write_result(job))
    events = [stored.event for stored in harness.jobs.queries.list_events(PRINCIPAL, job.job_id, 0, 100)]
    assert [event.status for event in events if event.type == "status"] == ["preparing", "training", "completed"]


def test_lost_attempt_publishes_nothing(harness: JobsHarness) -> None:
    job = harness.start_training()
    harness.launcher.states[f"handle of {attempt_name(job.job_id, 1)}"] = "ended"
    harness.reconcile()
    late_result = harness.write_result(job, artifacts=[make_artifact(job)])
    harness.finish(late_result)
    assert harness.find_job(job).artifacts == ()
    assert harness.objects.stat(manifest_key(job.job_id)) is None

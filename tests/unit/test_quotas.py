"""Quotas of tenants: at submission, at upload, in the queue and while jobs run."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError

from schema.events import PhaseChanged
from schema.ingestion import IngestOptions
from schema.job import Job, Status
from schema.requests import ExportRequest, ResumeRequest
from service.core.datasets.ingestion import Upload
from service.core.errors import QuotaExceeded
from service.core.principals import LOCAL_PRINCIPAL
from service.core.quotas import Quotas
from service.settings import Settings
from tests.factories import make_dataset, make_profile, make_train_request
from tests.fakes import FakeLauncher
from tests.unit.api_harness import ROWS, get_error, make_request_body, run_test_service, upload
from tests.unit.dataset_records import make_datasets
from tests.unit.jobs_harness import PRINCIPAL, JobsHarness, make_artifact, make_batch
from tests.unit.test_budget import USD_PER_HOUR, make_gpu_launcher

NO_SPLIT = IngestOptions(eval_fraction=0)  # type: ignore[call-arg]
OTHER_TENANT = replace(LOCAL_PRINCIPAL, tenant_id="other", subject="other")


def make_quotas(**default: object) -> Quotas:
    return Quotas.model_validate({"default": default})


def make_harness(folder: Path, *launchers: FakeLauncher, **default: object) -> JobsHarness:
    harness = JobsHarness(folder, launchers=launchers or [make_gpu_launcher()], quotas=make_quotas(**default))
    harness.store.create_dataset(make_dataset("foreign", tenant_id="other"))
    return harness


def submit_as_other(harness: JobsHarness) -> Job:
    return harness.jobs.submission.submit(OTHER_TENANT, make_train_request(processed_dataset_id="foreign"))


def start(harness: JobsHarness, **changes: object) -> Job:
    job = harness.submit(**changes)
    harness.reconcile()
    harness.claim(job, 1, "p")
    harness.report(job, 1, make_batch(PhaseChanged(phase="training")))
    return job


def test_tenant_overrides_single_quotas() -> None:
    quotas = Quotas.model_validate(
        {"default": {"max_queued_jobs": 5, "max_running_jobs": 2}, "tenants": {"team-a": {"max_running_jobs": 9, "max_queued_jobs": None}}}
    )
    assert (quotas.of("team-a").max_running_jobs, quotas.of("team-a").max_queued_jobs) == (9, None)
    assert (quotas.of("anyone").max_running_jobs, quotas.of("anyone").max_queued_jobs) == (2, 5)


@pytest.mark.parametrize(
    "value",
    ['{"default": {"max_jobs": 5}}', '{"default": {"max_queued_jobs": -1}}', '{"default": {"max_queued_jobs": "many"}}', '{"a": {}}'],
)
def test_invalid_quotas_are_refused_at_start(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_QUOTAS", value)
    with pytest.raises(ValidationError, match="quotas"):
        Settings()  # type: ignore[call-arg]


def test_quotas_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_QUOTAS", '{"default": {"max_gpu_hours_per_month": 100}}')
    assert Settings().quotas.of("anyone").max_gpu_hours_per_month == 100  # type: ignore[call-arg]


def test_submission_beyond_the_queue_is_refused_and_names_the_quota(tmp_path: Path) -> None:
    harness = make_harness(tmp_path, max_queued_jobs=2)
    jobs = [harness.submit() for _ in range(2)]
    with pytest.raises(QuotaExceeded, match="the quota max_queued_jobs of tenant 'local' is 2, and 2 jobs are queued"):
        harness.submit()
    submit_as_other(harness)
    harness.jobs.control.cancel(PRINCIPAL, jobs[0].job_id)
    assert harness.submit().status is Status.QUEUED


def test_request_sent_again_gets_the_job_that_filled_the_quota(tmp_path: Path) -> None:
    harness = make_harness(tmp_path, max_queued_jobs=1)
    first = harness.jobs.submission.submit(PRINCIPAL, make_train_request(), "key")
    assert harness.jobs.submission.submit(PRINCIPAL, make_train_request(), "key").job_id == first.job_id
    with pytest.raises(QuotaExceeded):
        harness.jobs.submission.submit(PRINCIPAL, make_train_request(job_name="another"), "key")
    with pytest.raises(QuotaExceeded):
        harness.jobs.submission.submit(PRINCIPAL, make_train_request(), "another key")


def test_export_and_resume_count_as_submissions(tmp_path: Path) -> None:
    harness = make_harness(tmp_path, max_queued_jobs=1)
    job = start(harness)
    harness.write_checkpoint(job, step=3)
    harness.jobs.control.pause(PRINCIPAL, job.job_id)
    harness.finish(harness.write_result(job, "paused", last_checkpoint_step=3))
    harness.submit()
    with pytest.raises(QuotaExceeded):
        harness.jobs.control.resume(PRINCIPAL, job.job_id, ResumeRequest.model_validate({}))
    with pytest.raises(QuotaExceeded):
        harness.jobs.exports.export(PRINCIPAL, job.job_id, 3, ExportRequest.model_validate({}))


def test_jobs_beyond_the_running_quota_wait_and_say_so(tmp_path: Path) -> None:
    harness = make_harness(tmp_path, max_running_jobs=2)
    jobs = [harness.submit() for _ in range(4)]
    other = submit_as_other(harness)
    harness.reconcile()
    statuses = [harness.find_job(job).status for job in jobs]
    assert statuses == [Status.PREPARING, Status.PREPARING, Status.QUEUED, Status.QUEUED]
    assert harness.jobs.repository.get(other.job_id).status is Status.PREPARING
    reason = harness.jobs.queries.get_refreshed(PRINCIPAL, jobs[2].job_id).pending_reason
    assert reason == "waits for the quota max_running_jobs of tenant 'local': 2 may run at a time"
    harness.claim(jobs[0], 1, "p")
    harness.finish(harness.write_result(jobs[0], artifacts=[make_artifact(jobs[0])]))
    harness.reconcile()
    assert harness.find_job(jobs[2]).status is Status.PREPARING


def test_month_that_is_used_up_pauses_running_jobs_and_keeps_the_others_waiting(tmp_path: Path) -> None:
    harness = make_harness(tmp_path, max_gpu_hours_per_month=1)
    harness.clock.advance(600)  # not at the first moment of the month
    first, second = start(harness), start(harness)
    harness.clock.advance(1500)
    waiting = harness.submit()
    harness.launcher.slots = 0
    harness.clock.advance(280)  # 3560 GPU seconds of 3600 are used
    assert harness.report(first, 1, make_batch(first_seq=1)).directive == "pause"
    assert harness.report(second, 1, make_batch(first_seq=1)).directive == "pause"
    for job in (first, second):
        harness.finish(harness.write_result(job, "paused", last_checkpoint_step=1))
        assert harness.find_job(job).pause_reason == "gpu_hours_quota"
    harness.clock.advance(60)
    harness.launcher.slots = 10
    harness.launcher.states = {}
    with pytest.raises(QuotaExceeded, match=r"max_gpu_hours_per_month of tenant 'local' is 1, and 0\.99 are used"):
        harness.submit()
    submit_as_other(harness)
    harness.clock.advance(31 * 86400)
    harness.reconcile()
    assert harness.find_job(waiting).status is Status.PREPARING
    assert harness.jobs.control.resume(PRINCIPAL, first.job_id, ResumeRequest.model_validate({})).status is Status.QUEUED


def test_cost_quota_counts_jobs_that_were_deleted(tmp_path: Path) -> None:
    harness = make_harness(tmp_path, max_cost_usd_per_month=USD_PER_HOUR)
    job = start(harness)
    harness.clock.advance(3599)
    harness.finish(harness.write_result(job, artifacts=[make_artifact(job)]))
    assert harness.jobs.deletion.delete(PRINCIPAL, job.job_id)
    with pytest.raises(QuotaExceeded, match=r"max_cost_usd_per_month of tenant 'local' is 1\.4188, and \$1\.42 are used"):
        harness.submit()
    assert submit_as_other(harness).status is Status.QUEUED


def test_compute_without_gpu_is_not_held_back_by_gpu_hours(tmp_path: Path) -> None:
    cpu = FakeLauncher("own", ("cpu",))
    cpu.profiles["cpu"] = make_profile("cpu")
    harness = make_harness(tmp_path, cpu, max_gpu_hours_per_month=0)
    job = start(harness)
    harness.clock.advance(7200)
    assert harness.report(job, 1, make_batch(first_seq=1)).directive == "continue"


def test_upload_beyond_the_stored_bytes_is_refused_before_it_is_stored(tmp_path: Path) -> None:
    datasets = make_datasets(tmp_path, make_quotas(max_stored_bytes=1000))
    row = {"messages": [{"role": "user", "content": "x" * 300}, {"role": "assistant", "content": "y"}]}

    def ingest(count: int) -> None:
        rows = [json.dumps(row | {"messages": [{"role": "user", "content": f"{n}" * 300}, row["messages"][1]]}) for n in range(count)]
        datasets.ingestion.ingest(PRINCIPAL, Upload("rows.jsonl", "rows", stream=io.BytesIO("\n".join(rows).encode()), options=NO_SPLIT))

    with pytest.raises(
        QuotaExceeded, match=r"max_stored_bytes of tenant 'local' is 1000, and 0 bytes are stored, and this would add 1\d\d\d"
    ):
        ingest(3)
    assert not list((tmp_path / "objects").rglob("*.jsonl"))
    ingest(2)
    with pytest.raises(QuotaExceeded) as excinfo:
        ingest(2)
    assert excinfo.value.hint == "delete datasets or completed jobs: DELETE /datasets/{id}, DELETE /jobs/{id}"


def test_quota_error_names_quota_use_and_cure(tmp_path: Path) -> None:
    with run_test_service(tmp_path / "home", quotas=make_quotas(max_queued_jobs=1)) as client:
        dataset_id = upload(client, ROWS).json()["processed_dataset_id"]
        assert client.post("/train", json=make_request_body(dataset_id)).status_code == 201
        error = get_error(client.post("/train", json=make_request_body(dataset_id)), 403)
    assert error["code"] == "quota_exceeded"
    assert error["message"] == "the quota max_queued_jobs of tenant 'local' is 1, and 1 jobs are queued"
    assert error["hint"] == "wait until one starts, or cancel or pause one"

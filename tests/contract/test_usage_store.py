"""What every job store promises about usage: counts of jobs, sums of ended attempts by month, and stored bytes."""

from datetime import timedelta
from pathlib import Path

import pytest

from schema.job import Artifact, ComputeRate, Job, Status
from service.adapters.jobstores.sqlite import SqliteJobStore
from service.core.accrual import Spending
from service.core.job_lists import JobQuery
from service.core.ports import IdempotencyKey, JobStore
from service.core.usage import STORED, Usage
from tests.contract.sqlite_versions import downgrade
from tests.contract.test_job_store import store
from tests.factories import START, make_attempt, make_dataset, make_job
from tests.unit.jobs_harness import make_artifact

__all__ = ["store"]

PRICED = ComputeRate(gpus=2, usd_per_hour=3.6)


def make_ended_job(job_id: str, seconds: float, **changes: object) -> Job:
    """A job whose attempt ran for some seconds from START, on two GPUs at 0.1 cents a second."""
    ended_at = START + timedelta(seconds=seconds)
    attempt = make_attempt(rate=PRICED, launched_at=START, ended_at=ended_at, outcome="failed")
    return make_job(job_id, status=Status.FAILED, attempts=(attempt,), **changes)


def test_jobs_are_counted_by_tenant_and_state(store: JobStore) -> None:
    for number, (status, tenant_id) in enumerate(
        [
            (Status.QUEUED, "local"),
            (Status.PREPARING, "local"),
            (Status.TRAINING, "local"),
            (Status.PAUSING, "local"),
            (Status.CANCELLING, "local"),
            (Status.PAUSED, "local"),
            (Status.COMPLETED, "local"),
            (Status.QUEUED, "other"),
            (Status.TRAINING, "other"),
        ]
    ):
        store.create_job(make_job(f"job-{number}", status=status, tenant_id=tenant_id))
    assert (store.count_jobs("local", "queued"), store.count_jobs("local", "active")) == (1, 4)
    assert (store.count_jobs("other", "queued"), store.count_jobs("other", "active")) == (1, 1)
    assert store.count_jobs("nobody", "queued") == 0


def test_ended_attempts_are_summed_by_tenant_and_month(store: JobStore) -> None:
    for job_id, seconds, tenant_id in (("job-1", 100, "local"), ("job-2", 50, "local"), ("job-3", 7, "other")):
        job = store.create_job(make_job(job_id, tenant_id=tenant_id))
        store.replace_job(make_ended_job(job_id, seconds, tenant_id=tenant_id, revision=job.revision))
    total = store.sum_usage("local", "2026-01")
    assert (total.gpu_seconds, total.usd) == (pytest.approx(300), pytest.approx(0.15))
    assert store.sum_usage("other", "2026-01").gpu_seconds == pytest.approx(14)
    assert store.sum_usage("local", "2026-02") == store.sum_usage("nobody", "2026-01") == Usage()


def test_attempt_is_counted_once_however_often_its_record_is_written(store: JobStore) -> None:
    job = store.create_job(make_job())
    for _ in range(3):
        job = store.replace_job(make_ended_job(job.job_id, 10, revision=job.revision))
    assert store.sum_usage("local", "2026-01").gpu_seconds == pytest.approx(20)


def test_running_attempt_is_not_in_the_sum(store: JobStore) -> None:
    job = store.create_job(make_job())
    running = make_attempt(rate=PRICED, launched_at=START)
    store.replace_job(job.model_copy(update={"status": Status.TRAINING, "attempts": (running,), "updated_at": START + timedelta(hours=1)}))
    assert store.sum_usage("local", "2026-01") == Usage()


def test_usage_of_a_month_outlives_its_job(store: JobStore) -> None:
    job = store.create_job(make_job())
    store.replace_job(make_ended_job(job.job_id, 10, revision=job.revision))
    assert store.delete_job(job.job_id)
    assert store.sum_usage("local", "2026-01").gpu_seconds == pytest.approx(20)


def test_stored_bytes_are_those_of_datasets_and_artifacts_that_exist(store: JobStore) -> None:
    job = store.create_job(make_job())
    artifact = Artifact.model_validate(make_artifact(job) | {"size_bytes": 1000})
    store.replace_job(job.model_copy(update={"status": Status.COMPLETED, "artifacts": (artifact,)}))
    store.create_dataset(make_dataset())
    store.create_dataset(make_dataset("foreign", tenant_id="other"))
    assert store.sum_usage("local", STORED).stored_bytes == 1200
    store.delete_job(job.job_id)
    assert store.sum_usage("local", STORED).stored_bytes == 200
    store.delete_dataset("dataset_1")
    assert store.sum_usage("local", STORED).stored_bytes == 0
    assert store.sum_usage("other", STORED).stored_bytes == 200


def test_list_shows_what_jobs_cost_at_any_moment(store: JobStore) -> None:
    waiting = store.create_job(make_job("job-1"))
    running = make_attempt(2, rate=PRICED, launched_at=START + timedelta(seconds=50))
    job = store.create_job(make_job("job-2", created_at=START + timedelta(seconds=1)))
    ended = make_ended_job("job-2", 10).attempts
    store.replace_job(job.model_copy(update={"status": Status.TRAINING, "attempts": (*ended, running)}))
    listed = {row.job_id: row.summary.cost for row in store.list_jobs(JobQuery("local")).rows}
    assert listed[waiting.job_id].until(START) == Spending(0.0, None)
    for seconds, usd in ((50, 0.01), (100, 0.06), (150, 0.11)):
        assert listed["job-2"].until(START + timedelta(seconds=seconds)).usd == pytest.approx(usd)
    store.delete_job("job-2")
    assert [row.job_id for row in store.list_jobs(JobQuery("local")).rows] == ["job-1"]


def test_job_is_found_by_the_key_that_created_it(store: JobStore) -> None:
    job = store.create_job(make_job(), IdempotencyKey("key", "digest"))
    assert store.find_job_by_key("local", "key", "digest") == job
    assert store.find_job_by_key("local", "key", "another request") is None
    assert store.find_job_by_key("other", "key", "digest") is None
    assert store.find_job_by_key("local", "another key", "digest") is None


def test_database_of_an_earlier_version_gets_its_usage(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    earlier = SqliteJobStore(path)
    job = earlier.create_job(make_job())
    earlier.replace_job(make_ended_job(job.job_id, 10, revision=job.revision))
    earlier.create_dataset(make_dataset())
    earlier.close()
    downgrade(path, 3)
    current = SqliteJobStore(path)
    assert current.sum_usage("local", "2026-01").gpu_seconds == pytest.approx(20)
    assert current.sum_usage("local", STORED).stored_bytes == 200
    [row] = current.list_jobs(JobQuery("local")).rows
    assert row.summary.cost.until(START).usd == pytest.approx(0.01)
    current.close()

"""A record that cannot be read stops nothing but itself: other jobs go on, and it can be seen and deleted."""

from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from schema.job import Job, Status
from schema.spec import attempt_name, result_key, spec_key
from service.adapters.jobstores.memory import MemoryJobStore
from service.core.errors import NotFound, TunesmithError, UnreadableRecord
from service.core.jobs.launch import AttemptStarter
from service.core.principals import UPKEEP_PRINCIPAL
from service.core.stored_json import MAX_RESULT_BYTES
from tests.unit.api_harness import ROWS, get_error, get_services, run_test_service, submit_job, upload
from tests.unit.jobs_harness import OTHER_PRINCIPAL, PRINCIPAL, JobsHarness

NEWER = '{"schema_version":99}'
DAMAGED = '{"schema_version":2,"job_id":"x"}'


def damage(harness: JobsHarness, job: Job, text: str = DAMAGED) -> None:
    assert isinstance(harness.store, MemoryJobStore)
    harness.store._jobs[job.job_id] = text  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize("text", [DAMAGED, NEWER, "[" * 500])
def test_other_jobs_are_launched_and_finished_beside_an_unreadable_one(harness: JobsHarness, text: str) -> None:
    damaged_queued, job = harness.submit(), harness.submit()
    damage(harness, damaged_queued, text)
    harness.reconcile()
    assert harness.find_job(job).status is Status.PREPARING
    damaged_active = harness.submit()
    harness.finish(harness.write_result(job))
    harness.reconcile()
    assert harness.find_job(damaged_active).status is Status.PREPARING
    last = harness.submit()
    damage(harness, damaged_active, text)
    harness.reconcile()
    assert harness.find_job(last).status is Status.PREPARING
    harness.jobs.reconciliation.reconcile_removed_launchers(UPKEEP_PRINCIPAL)
    harness.jobs.reconciliation.reconcile_job(damaged_active.job_id)


@pytest.mark.parametrize("error", [RecursionError, ZeroDivisionError, ValueError, TunesmithError])
def test_defect_of_one_job_does_not_stop_the_others(
    harness: JobsHarness, error: type[Exception], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken, job = harness.submit(), harness.submit()
    start = AttemptStarter.start_next

    def start_or_fail(starter: AttemptStarter, launcher: Any, job: Job, placement: Any) -> Job:
        if job.job_id == broken.job_id:
            raise error("a defect")
        return start(starter, launcher, job, placement)

    monkeypatch.setattr(AttemptStarter, "start_next", start_or_fail)
    harness.reconcile()
    assert harness.find_job(job).status is Status.PREPARING
    assert harness.find_job(broken).status is Status.QUEUED
    assert broken.job_id in [getattr(record, "job_id", None) for record in caplog.records]


def test_unreadable_job_of_another_tenant_is_not_found(harness: JobsHarness) -> None:
    job = harness.submit()
    damage(harness, job)
    with pytest.raises(NotFound):
        harness.jobs.queries.get_refreshed(OTHER_PRINCIPAL, job.job_id)
    with pytest.raises(NotFound):
        harness.jobs.deletion.delete(OTHER_PRINCIPAL, job.job_id)
    with pytest.raises(UnreadableRecord):
        harness.jobs.queries.get_refreshed(PRINCIPAL, job.job_id)


def test_unreadable_active_job_is_deleted_with_its_files_secrets_and_attempt(harness: JobsHarness) -> None:
    job = harness.submit(hf_token="hf_x", project_id="p")
    harness.reconcile()
    harness.write_checkpoint(job, 5)
    harness.objects.write(f"trained_adapters/{job.job_id}/attempt-1/a", b"x")
    damage(harness, job)
    with pytest.raises(UnreadableRecord, match="Hub"):
        harness.jobs.deletion.delete(PRINCIPAL, job.job_id, delete_hub=True)
    deleted = harness.jobs.deletion.delete(PRINCIPAL, job.job_id)
    assert deleted is not None
    assert not deleted.failures
    name = attempt_name(job.job_id, 1)
    assert deleted.resources[0] == f"attempt {name}"
    assert harness.launcher.cancels == [(f"handle of {name}", True)]
    assert harness.store.find_job_entry(job.job_id) is None
    assert list(harness.secrets.iter_job_ids()) == []
    assert [stored.key for stored in harness.objects.iter_objects("") if job.job_id in stored.key] == []


def test_unreadable_record_stops_neither_the_sweep_of_secrets_nor_the_scan_for_orphans(harness: JobsHarness) -> None:
    job = harness.submit(hf_token="hf_x")
    harness.objects.write(spec_key(job.job_id), b"{}")
    harness.secrets.put("orphan", {"hf_token": "hf_x"})
    damage(harness, job)
    assert harness.jobs.deletion.delete_stale_secrets(UPKEEP_PRINCIPAL, orphans=True) == 1
    assert harness.jobs.deletion.delete_orphans(UPKEEP_PRINCIPAL).orphans == []
    assert harness.secrets.read(job.job_id) == {"hf_token": "hf_x"}


@pytest.mark.parametrize(
    "damage_result",
    [
        lambda text: text.replace('"train_tokens":null', '"train_tokens":99999999999999999999'),
        lambda text: text.replace('"train_runtime_s":null', '"train_runtime_s":NaN'),
        lambda text: text.replace("2026-01-01", "9999-12-31"),
        lambda text: text.replace('"tracker_urls":{}', '"tracker_urls":{"a":"' + "x" * MAX_RESULT_BYTES + '"}'),
        lambda text: "[" * 100_000,
    ],
    ids=["long integer", "NaN", "year 9999", "too large", "nested"],
)
def test_result_file_that_cannot_be_stored_counts_as_none(harness: JobsHarness, damage_result: Any) -> None:
    job = harness.start_training()
    text = harness.write_result(job).model_dump_json()
    assert damage_result(text) != text
    harness.objects.write(result_key(job.job_id, 1), damage_result(text).encode())
    harness.launcher.states[f"handle of {job.job_id}.1"] = "ended"
    harness.reconcile()
    attempt = harness.find_job(job).attempts[0]
    assert attempt.outcome == "lost"


def test_unreadable_job_is_listed_explained_and_deleted_over_http(tmp_path: Path) -> None:
    with run_test_service(tmp_path) as client:
        dataset_id = upload(client, ROWS).json()["processed_dataset_id"]
        damaged, other = submit_job(client, dataset_id), submit_job(client, dataset_id)
        write_record(client, "jobs", "job_id", damaged, DAMAGED)
        assert [row["job_id"] for row in client.get("/jobs").json()["jobs"]] == [other, damaged]
        for path in (f"/jobs/{damaged}", f"/jobs/{damaged}/events", f"/jobs/{damaged}/logs", f"/jobs/{damaged}/checkpoints"):
            error = get_error(client.get(path), 409)
            assert error["code"] == "unreadable_record"
            assert "DELETE" in error["hint"]
        for action in ("cancel", "pause", "resume", "retry", "clone", "export"):
            get_error(client.post(f"/jobs/{damaged}/{action}"), 409)
        write_record(client, "jobs", "job_id", damaged, NEWER)
        assert "DELETE" in get_error(client.get(f"/jobs/{damaged}"), 503)["hint"]
        assert client.delete(f"/jobs/{damaged}").json()["deleted"] is True
        get_error(client.get(f"/jobs/{damaged}"), 404)
        assert client.get(f"/jobs/{other}").status_code == 200
        assert client.get("/health").status_code == 200


def test_unreadable_dataset_is_explained_and_deleted_over_http(tmp_path: Path) -> None:
    with run_test_service(tmp_path) as client:
        damaged, other = (upload(client, ROWS).json()["processed_dataset_id"] for _ in range(2))
        write_record(client, "datasets", "dataset_id", damaged, "{}")
        assert get_error(client.get(f"/datasets/{damaged}"), 409)["code"] == "unreadable_record"
        assert [row["processed_dataset_id"] for row in client.get("/datasets").json()["datasets"]] == [other]
        assert client.delete(f"/datasets/{damaged}").status_code == 200
        get_error(client.get(f"/datasets/{damaged}"), 404)


def write_record(client: TestClient, table: str, id_column: str, record_id: str, text: str) -> None:
    database = get_services(client).store._database  # type: ignore[attr-defined]  # behind the store's back
    with database.transaction() as db:
        db.execute(f"UPDATE {table} SET record = ? WHERE {id_column} = ?", (text, record_id))

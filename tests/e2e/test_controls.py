"""Pause, resume, cancel, retry, time slices and a killed process: one job each, over several attempts.

Real processes, real checkpoints. tests/jobs shows that a resumed training is identical bit for bit; here a step that two attempts report
must have the same loss in both.
"""

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import httpx2
import pytest

from tests.e2e.conftest import SOURCE, TUNESMITH, Json, Service, new_service, wait_until

# 54 rows in batches of 2: 27 steps an epoch, of about 35 ms. Every fifth step is logged, and every 40th is saved.
HYPERPARAMETERS = {"max_steps": -1, "gradient_accumulation_steps": 1, "logging_steps": 5, "save_strategy": "steps", "save_steps": 40}
EPOCHS, MORE_EPOCHS, STEPS_PER_EPOCH = 8, 9, 27
TOKEN = "hf_canary_again"
SHUTDOWN_RESERVE_FRACTION = 0.1  # of a time limit, kept back by the attempt


@dataclass(frozen=True)
class ResumedJob:
    """A job that was paused during its training and resumed for one more epoch."""

    paused: Json  # the job while it was paused
    checkpoints: list[Json]  # while it was paused
    processes: int  # attempt processes left while it was paused
    refused: dict[str, httpx2.Response]
    job: Json  # after completion
    events: list[Json]
    watch_output: str  # of `tunesmith watch`, from before the pause to the end


@pytest.fixture(scope="module")
def resumed_job(service: Service) -> ResumedJob:
    job_id = service.train(service.upload(), {**HYPERPARAMETERS, "epochs": EPOCHS})
    watcher = subprocess.Popen(
        [str(TUNESMITH), "watch", job_id], env=service.environment, cwd=SOURCE, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    wait_until(lambda: service.job(job_id)["progress"] is not None)
    assert service.run_cli("pause", job_id, "--wait").strip() == "paused"
    paused, processes = service.job(job_id), len(service.attempts())
    refused = {
        "learning_rate": service.http.post(f"/jobs/{job_id}/resume", json={"learning_rate": 0.1}),
        "epochs": service.http.post(f"/jobs/{job_id}/resume", json={"epochs": 2}),
        "retry": service.http.post(f"/jobs/{job_id}/retry"),
    }
    checkpoints = list_checkpoints(service, job_id)
    with set_hf_token(service):  # the job has no token and must not get one
        assert service.run_cli("resume", job_id, "--epochs", str(MORE_EPOCHS)).strip() == "queued"
    watch_output, _ = watcher.communicate(timeout=300)
    job = service.wait_until_final(job_id)
    assert job["status"] == "completed", service.log(job_id)
    return ResumedJob(paused, checkpoints, processes, refused, job, list_events(service, job_id), watch_output)


def test_pause_saves_checkpoint_and_releases_machine(resumed_job: ResumedJob) -> None:
    newest = resumed_job.checkpoints[0]
    assert resumed_job.processes == 0
    assert (newest["reason"], newest["attempt"]) == ("pause", 1)
    assert newest["step"] == resumed_job.paused["checkpoint"]["step"] == resumed_job.paused["progress"]["step"]
    assert newest["total_steps"] == EPOCHS * STEPS_PER_EPOCH
    assert [attempt["outcome"] for attempt in resumed_job.paused["attempts"]] == ["paused"]
    assert resumed_job.paused["finished_at"] is None


def test_resumed_job_continues_to_new_epoch_count(resumed_job: ResumedJob) -> None:
    paused_step = resumed_job.paused["checkpoint"]["step"]
    assert [attempt["resumed_step"] for attempt in resumed_job.job["attempts"]] == [None, paused_step]
    assert [row["event"]["from_attempt"] for row in resumed_job.events if row["event"]["type"] == "checkpoint_restored"] == [1]
    assert resumed_job.job["progress"]["step"] == MORE_EPOCHS * STEPS_PER_EPOCH
    assert resumed_job.job["training_config"]["hyperparameters"]["epochs"] == MORE_EPOCHS
    statuses = [row["event"]["status"] for row in resumed_job.events if row["event"]["type"] == "status"]
    assert statuses == ["preparing", "training", "pausing", "paused", "queued", "preparing", "training", "completed"]


def test_loss_curve_of_paused_job_has_every_step_once(resumed_job: ResumedJob) -> None:
    steps = [step for step, _ in losses(resumed_job.events)]
    assert steps == list(range(5, MORE_EPOCHS * STEPS_PER_EPOCH + 1, 5))


def test_watch_continues_across_pause(resumed_job: ResumedJob) -> None:
    paused_step = resumed_job.paused["checkpoint"]["step"]
    for text in (
        "paused",
        f"tunesmith resume {resumed_job.job['job_id']}",
        "preparing, attempt 2",
        f"continues from step {paused_step}",
        "completed",
    ):
        assert text in resumed_job.watch_output
    assert "evaluated after training" in resumed_job.watch_output


def test_invalid_resume_changes_are_rejected(resumed_job: ResumedJob) -> None:
    assert resumed_job.refused["learning_rate"].status_code == 422
    assert resumed_job.refused["learning_rate"].json()["error"]["param"] == "learning_rate"
    assert "start a new job" in resumed_job.refused["learning_rate"].json()["error"]["message"]
    assert resumed_job.refused["epochs"].status_code == 400
    assert f"planned with {EPOCHS}" in resumed_job.refused["epochs"].json()["error"]["message"]
    assert resumed_job.refused["retry"].status_code == 409
    assert "resume" in resumed_job.refused["retry"].json()["error"]["hint"]


def test_control_of_completed_job_is_rejected(resumed_job: ResumedJob, service: Service) -> None:
    job_id = resumed_job.job["job_id"]
    for action in ("pause", "resume", "retry", "cancel"):
        response = service.http.post(f"/jobs/{job_id}/{action}")
        assert (response.status_code, "completed" in response.json()["error"]["message"]) == (409, True), action
        assert service.http.post(f"/jobs/nobody/{action}").status_code == 404
    assert "nothing to resume" in service.run_cli("resume", job_id, expect_failure=True)


def test_earlier_checkpoint_is_exported_without_training(resumed_job: ResumedJob, service: Service, tmp_path: Path) -> None:
    job_id = resumed_job.job["job_id"]
    checkpoints = list_checkpoints(service, job_id)
    assert checkpoints[0]["reason"] == "end"
    earlier = checkpoints[-1]["step"]
    assert earlier < checkpoints[0]["step"]
    assert f"{earlier}/" in service.run_cli("checkpoints", job_id)
    export_id = service.run_cli("export", job_id, str(earlier), "--format", "adapter").strip()
    export = service.wait_until_final(export_id)
    assert (export["status"], export["export_of"]["step"]) == ("completed", earlier), service.log(export_id)
    assert losses(list_events(service, export_id)) == []
    files = [Path(line) for line in service.run_cli("download", export_id, "--to", str(tmp_path / "earlier")).split()]
    service.run_cli("download", job_id, "--to", str(tmp_path / "last"))
    weights = [path for path in files if path.name == "adapter_model.safetensors"]
    [last] = (tmp_path / "last").rglob("adapter_model.safetensors")
    assert weights[0].stat().st_size == last.stat().st_size
    assert weights[0].read_bytes() != last.read_bytes()


def test_missing_checkpoint_cannot_be_exported(resumed_job: ResumedJob, service: Service) -> None:
    response = service.http.post(f"/jobs/{resumed_job.job['job_id']}/checkpoints/7/export")
    assert response.status_code == 404
    for row in list_checkpoints(service, resumed_job.job["job_id"]):
        assert str(row["step"]) in response.json()["error"]["message"]


def test_orphaned_files_are_listed_and_deleted(resumed_job: ResumedJob, service: Service) -> None:
    orphan = service.home / "objects/merged_models/training_nobody/attempt-1/model.safetensors"
    orphan.parent.mkdir(parents=True)
    orphan.write_bytes(b"x" * 1000)
    deployment_id = (service.home / "deployment-id").read_text()
    mark = service.home / f"objects/deployments/{deployment_id}/jobs/training_nobody.json"
    mark.write_text('{"launched_at": "2026-01-01T00:00:00+00:00"}')
    listed = service.run_cli("orphans")
    assert "training_nobody" in listed
    assert resumed_job.job["job_id"] not in listed
    assert orphan.exists()
    assert "training_nobody" in service.run_cli("orphans", "--delete")
    assert not orphan.exists()
    assert not mark.exists()
    assert list_checkpoints(service, resumed_job.job["job_id"])  # files of existing jobs stay
    assert json.loads(service.run_cli("orphans", "--json")) == {"orphans": [], "complete": True}


def test_job_continues_after_cancel_retry_and_kill(service: Service) -> None:
    job_id = service.train(service.upload(), {**HYPERPARAMETERS, "epochs": EPOCHS}, hf_token=TOKEN)
    wait_until(lambda: service.job(job_id)["checkpoint"] is not None)
    assert service.http.post(f"/jobs/{job_id}/retry").status_code == 409  # the job is running
    assert service.run_cli("cancel", job_id, "--wait").strip() == "cancelled"
    cancelled = service.job(job_id)
    assert f"tunesmith retry {job_id}" in service.run_cli("show", job_id)
    assert "--hf-token" in service.run_cli("retry", job_id, expect_failure=True)  # the secret was deleted with the cancel
    with set_hf_token(service):
        service.run_cli("retry", job_id)
    wait_until(lambda: service.job(job_id)["checkpoint"]["attempt"] == 2)
    [attempt] = service.attempts()
    attempt.kill()
    job = service.wait_until_final(job_id)
    first, second, third = job["attempts"]
    assert [attempt["outcome"] for attempt in job["attempts"]] == ["cancelled", "lost", "completed"], service.log(job_id)
    assert second["resumed_step"] == cancelled["checkpoint"]["step"] == first["last_checkpoint_step"]
    assert third["resumed_step"] == second["last_checkpoint_step"] > first["last_checkpoint_step"]
    assert (job["failure"], job["progress"]["step"]) == (None, EPOCHS * STEPS_PER_EPOCH)
    points = losses(list_events(service, job_id))
    assert {step for step, _ in points} == set(range(5, EPOCHS * STEPS_PER_EPOCH + 1, 5))
    assert len({step for step, _ in points}) == len(set(points))  # a step that two attempts reported has the same loss in both


@pytest.fixture
def time_limited_service(tmp_path: Path, tiny_gemma: Path, resumed_job: ResumedJob) -> Iterator[Service]:
    """A service whose time limit fits a start, as long as it takes on this machine, and some training."""
    first_point = next(row["at"] for row in resumed_job.events if row["event"]["type"] == "metrics")
    start_s = (datetime.fromisoformat(first_point) - datetime.fromisoformat(resumed_job.job["attempts"][0]["created_at"])).total_seconds()
    service = new_service(tmp_path / "home", tiny_gemma)
    service.environment["TUNESMITH_LOCAL_TIME_LIMIT_S"] = str(round(1.3 * start_s + 10))
    service.start()
    yield service
    service.stop()
    service.http.close()


def test_job_longer_than_time_limit_uses_several_attempts(time_limited_service: Service) -> None:
    job_id = time_limited_service.train(time_limited_service.upload(), {**HYPERPARAMETERS, "save_steps": 100_000, "epochs": EPOCHS})
    wait_until(lambda: time_limited_service.job(job_id)["progress"] is not None)
    suspend_until_near_time_limit(time_limited_service)
    job = time_limited_service.wait_until_final(job_id, timeout_s=300)
    *slices, last = job["attempts"]
    assert (job["status"], last["outcome"]) == ("completed", "completed"), time_limited_service.log(job_id)
    assert slices
    assert {attempt["outcome"] for attempt in slices} == {"yielded"}
    assert [attempt["resumed_step"] for attempt in job["attempts"]] == [None, *(attempt["last_checkpoint_step"] for attempt in slices)]
    steps = [step for step, _ in losses(list_events(time_limited_service, job_id))]
    assert steps == list(range(5, EPOCHS * STEPS_PER_EPOCH + 1, 5))  # each step once: a slice ends at its checkpoint


def suspend_until_near_time_limit(service: Service) -> None:
    """Suspend the attempt for the time that a longer training would take, independent of this machine's speed."""
    limit_s = int(service.environment["TUNESMITH_LOCAL_TIME_LIMIT_S"])
    for attempt in service.attempts():
        attempt.suspend()
        time.sleep(max(0.0, (1 - SHUTDOWN_RESERVE_FRACTION) * limit_s - 3 - (time.time() - attempt.create_time())))
        attempt.resume()


@contextmanager
def set_hf_token(service: Service) -> Iterator[None]:
    service.environment["HF_TOKEN"] = TOKEN
    yield
    del service.environment["HF_TOKEN"]


def list_checkpoints(service: Service, job_id: str) -> list[Json]:
    return service.http.get(f"/jobs/{job_id}/checkpoints").json()["checkpoints"]


def list_events(service: Service, job_id: str) -> list[Json]:
    return service.http.get(f"/jobs/{job_id}/events", params={"limit": 1000}).json()["events"]


def losses(events: list[Json]) -> list[tuple[int, float]]:
    """Step and loss of every reported point, in order."""
    points = [row["event"] for row in events if row["event"]["type"] == "metrics"]
    return [(point["step"], point["values"]["loss"]) for point in points if point["values"].get("loss") is not None]

"""Pause, resume, cancel, retry, time slices and a killed process: one job each, however many attempts it takes.

Real processes, real checkpoints. That a continued training is the same bit for bit is shown in tests/jobs; here a step that
two attempts report must have the same loss in both.
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

from tests.e2e.conftest import SOURCE, TUNESMITH, Json, Service, new_service, until

# 54 rows in batches of 2: 27 steps an epoch, of some 35 ms. Losses of every fifth step, a checkpoint now and then.
KNOBS = {"max_steps": -1, "gradient_accumulation_steps": 1, "logging_steps": 5, "save_strategy": "steps", "save_steps": 40}
EPOCHS, MORE_EPOCHS, STEPS_AN_EPOCH = 8, 9, 27
TOKEN = "hf_canary_again"
LAST_WORD_SHARE = 0.1  # of a time limit, kept back by the attempt


@dataclass(frozen=True)
class Story:
    """A job that was paused in the middle of its training, and resumed for one more epoch."""

    paused: Json  # as it was then
    checkpoints: list[Json]  # likewise
    processes: int  # that were left then
    refused: dict[str, httpx2.Response]
    job: Json  # at the end
    events: list[Json]
    watched: str  # what `tunesmith watch` said, from before the pause to the end


@pytest.fixture(scope="module")
def story(service: Service) -> Story:
    job_id = service.train(service.upload(), {**KNOBS, "epochs": EPOCHS})
    watcher = subprocess.Popen(
        [str(TUNESMITH), "watch", job_id], env=service.environment, cwd=SOURCE, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    until(lambda: service.job(job_id)["progress"] is not None)
    assert service.tunesmith("pause", job_id, "--wait").strip() == "paused"
    paused, processes = service.job(job_id), len(service.attempts())
    refused = {
        "learning_rate": service.http.post(f"/jobs/{job_id}/resume", json={"learning_rate": 0.1}),
        "epochs": service.http.post(f"/jobs/{job_id}/resume", json={"epochs": 2}),
        "retry": service.http.post(f"/jobs/{job_id}/retry"),
    }
    checkpoints = checkpoints_of(service, job_id)
    with hf_token_in_the_environment(service):  # the job has none, and is not sent one
        assert service.tunesmith("resume", job_id, "--epochs", str(MORE_EPOCHS)).strip() == "queued"
    watched, _ = watcher.communicate(timeout=300)
    job = service.finished(job_id)
    assert job["status"] == "completed", service.log(job_id)
    return Story(paused, checkpoints, processes, refused, job, events_of(service, job_id), watched)


def test_a_pause_saves_frees_the_machine_and_keeps_the_place(story: Story) -> None:
    newest = story.checkpoints[0]
    assert story.processes == 0
    assert (newest["reason"], newest["attempt"]) == ("pause", 1)
    assert newest["step"] == story.paused["checkpoint"]["step"] == story.paused["progress"]["step"]
    assert newest["total_steps"] == EPOCHS * STEPS_AN_EPOCH
    assert [attempt["outcome"] for attempt in story.paused["attempts"]] == ["paused"]
    assert story.paused["finished_at"] is None


def test_a_resumed_job_goes_on_where_it_was_and_to_its_new_end(story: Story) -> None:
    place = story.paused["checkpoint"]["step"]
    assert [attempt["resumed_step"] for attempt in story.job["attempts"]] == [None, place]
    assert [row["event"]["from_attempt"] for row in story.events if row["event"]["type"] == "resumed"] == [1]
    assert story.job["progress"]["step"] == MORE_EPOCHS * STEPS_AN_EPOCH
    assert story.job["training_config"]["hyperparameters"]["epochs"] == MORE_EPOCHS
    statuses = [row["event"]["status"] for row in story.events if row["event"]["type"] == "status"]
    assert statuses == ["preparing", "training", "pausing", "paused", "queued", "preparing", "training", "completed"]


def test_the_loss_curve_of_a_paused_job_has_every_step_once(story: Story) -> None:
    steps = [step for step, _ in losses(story.events)]
    assert steps == list(range(5, MORE_EPOCHS * STEPS_AN_EPOCH + 1, 5))


def test_watching_goes_on_over_a_pause(story: Story) -> None:
    place = story.paused["checkpoint"]["step"]
    for said in ("paused", f"tunesmith resume {story.job['job_id']}", "preparing, attempt 2", f"goes on from step {place}", "completed"):
        assert said in story.watched
    assert "evaluated after training" in story.watched


def test_what_would_change_the_past_is_refused(story: Story) -> None:
    assert story.refused["learning_rate"].status_code == 422
    assert story.refused["learning_rate"].json()["error"]["param"] == "learning_rate"
    assert "start a new job" in story.refused["learning_rate"].json()["error"]["message"]
    assert story.refused["epochs"].status_code == 400
    assert f"planned with {EPOCHS}" in story.refused["epochs"].json()["error"]["message"]
    assert story.refused["retry"].status_code == 409
    assert "resume" in story.refused["retry"].json()["error"]["hint"]


def test_a_control_that_does_not_fit_is_refused_in_words(story: Story, service: Service) -> None:
    job_id = story.job["job_id"]
    for verb in ("pause", "resume", "retry", "cancel"):
        answer = service.http.post(f"/jobs/{job_id}/{verb}")
        assert (answer.status_code, "completed" in answer.json()["error"]["message"]) == (409, True), verb
        assert service.http.post(f"/jobs/nobody/{verb}").status_code == 404
    assert "nothing to resume" in service.tunesmith("resume", job_id, fails=True)


def test_an_earlier_checkpoint_is_exported_without_training(story: Story, service: Service, tmp_path: Path) -> None:
    job_id = story.job["job_id"]
    kept = checkpoints_of(service, job_id)
    assert kept[0]["reason"] == "end"
    earlier = kept[-1]["step"]
    assert earlier < kept[0]["step"]
    assert f"{earlier}/" in service.tunesmith("checkpoints", job_id)
    export_id = service.tunesmith("export", job_id, str(earlier), "--format", "adapter").strip()
    export = service.finished(export_id)
    assert (export["status"], export["export_of"]["step"]) == ("completed", earlier), service.log(export_id)
    assert losses(events_of(service, export_id)) == []
    files = [Path(line) for line in service.tunesmith("download", export_id, "--to", str(tmp_path / "earlier")).split()]
    service.tunesmith("download", job_id, "--to", str(tmp_path / "last"))
    weights = [path for path in files if path.name == "adapter_model.safetensors"]
    [last] = (tmp_path / "last").rglob("adapter_model.safetensors")
    assert weights[0].stat().st_size == last.stat().st_size
    assert weights[0].read_bytes() != last.read_bytes()


def test_a_checkpoint_that_is_not_there_cannot_be_exported(story: Story, service: Service) -> None:
    answer = service.http.post(f"/jobs/{story.job['job_id']}/checkpoints/7/export")
    assert answer.status_code == 404
    for row in checkpoints_of(service, story.job["job_id"]):
        assert str(row["step"]) in answer.json()["error"]["message"]


def test_files_that_belong_to_no_job_are_listed_and_removed(story: Story, service: Service) -> None:
    left_behind = service.home / "objects/merged_models/training_nobody/attempt-1/model.safetensors"
    left_behind.parent.mkdir(parents=True)
    left_behind.write_bytes(b"x" * 1000)
    listed = service.tunesmith("orphans")
    assert "training_nobody" in listed
    assert story.job["job_id"] not in listed
    assert left_behind.exists()
    assert "training_nobody" in service.tunesmith("orphans", "--delete")
    assert not left_behind.exists()
    assert checkpoints_of(service, story.job["job_id"])  # what has a job stays
    assert json.loads(service.tunesmith("orphans", "--json")) == {"orphans": [], "complete": True}


def test_a_job_goes_on_over_a_cancel_a_retry_and_a_kill(service: Service) -> None:
    job_id = service.train(service.upload(), {**KNOBS, "epochs": EPOCHS}, hf_token=TOKEN)
    until(lambda: service.job(job_id)["checkpoint"] is not None)
    assert service.http.post(f"/jobs/{job_id}/retry").status_code == 409  # it runs
    assert service.tunesmith("cancel", job_id, "--wait").strip() == "cancelled"
    cancelled = service.job(job_id)
    assert f"tunesmith retry {job_id}" in service.tunesmith("show", job_id)
    assert "--hf-token" in service.tunesmith("retry", job_id, fails=True)  # the secret went with the job
    with hf_token_in_the_environment(service):
        service.tunesmith("retry", job_id)
    until(lambda: service.job(job_id)["checkpoint"]["attempt"] == 2)
    [attempt] = service.attempts()
    attempt.kill()
    job = service.finished(job_id)
    first, second, third = job["attempts"]
    assert [attempt["outcome"] for attempt in job["attempts"]] == ["cancelled", "lost", "completed"], service.log(job_id)
    assert second["resumed_step"] == cancelled["checkpoint"]["step"] == first["saved_step"]
    assert third["resumed_step"] == second["saved_step"] > first["saved_step"]
    assert (job["failure"], job["progress"]["step"]) == (None, EPOCHS * STEPS_AN_EPOCH)
    told = losses(events_of(service, job_id))
    assert {step for step, _ in told} == set(range(5, EPOCHS * STEPS_AN_EPOCH + 1, 5))
    assert len({step for step, _ in told}) == len(set(told))  # attempts that told the same step told the same loss


@pytest.fixture
def sliced(tmp_path: Path, tiny_gemma: Path, story: Story) -> Iterator[Service]:
    """A service whose attempts may take no longer than a start, as long as it takes on this machine, and some training."""
    first_point = next(row["at"] for row in story.events if row["event"]["type"] == "metrics")
    start_s = (datetime.fromisoformat(first_point) - datetime.fromisoformat(story.job["attempts"][0]["created_at"])).total_seconds()
    service = new_service(tmp_path / "home", tiny_gemma)
    service.environment["TUNESMITH_ATTEMPT_TIME_LIMIT_S"] = str(round(1.3 * start_s + 10))
    service.start()
    yield service
    service.stop()
    service.http.close()


def test_a_job_that_outlasts_its_time_limit_is_one_job_of_several_slices(sliced: Service) -> None:
    job_id = sliced.train(sliced.upload(), {**KNOBS, "save_steps": 100_000, "epochs": EPOCHS})
    until(lambda: sliced.job(job_id)["progress"] is not None)
    hold_until_its_time_is_nearly_up(sliced)
    job = sliced.finished(job_id, within_s=300)
    *slices, last = job["attempts"]
    assert (job["status"], last["outcome"]) == ("completed", "completed"), sliced.log(job_id)
    assert slices
    assert {attempt["outcome"] for attempt in slices} == {"yielded"}
    assert [attempt["resumed_step"] for attempt in job["attempts"]] == [None, *(attempt["saved_step"] for attempt in slices)]
    told = [step for step, _ in losses(events_of(sliced, job_id))]
    assert told == list(range(5, EPOCHS * STEPS_AN_EPOCH + 1, 5))  # each once: a slice ends at its checkpoint


def hold_until_its_time_is_nearly_up(service: Service) -> None:
    """Stand still for what a longer training would take: how fast this machine is then does not matter."""
    limit_s = int(service.environment["TUNESMITH_ATTEMPT_TIME_LIMIT_S"])
    for attempt in service.attempts():
        attempt.suspend()
        time.sleep(max(0.0, (1 - LAST_WORD_SHARE) * limit_s - 3 - (time.time() - attempt.create_time())))
        attempt.resume()


@contextmanager
def hf_token_in_the_environment(service: Service) -> Iterator[None]:
    service.environment["HF_TOKEN"] = TOKEN
    yield
    del service.environment["HF_TOKEN"]


def checkpoints_of(service: Service, job_id: str) -> list[Json]:
    return service.http.get(f"/jobs/{job_id}/checkpoints").json()["checkpoints"]


def events_of(service: Service, job_id: str) -> list[Json]:
    return service.http.get(f"/jobs/{job_id}/events", params={"limit": 1000}).json()["events"]


def losses(events: list[Json]) -> list[tuple[int, float]]:
    """Step and loss of every point of the curve, in the order in which they were told."""
    points = [row["event"] for row in events if row["event"]["type"] == "metrics"]
    return [(point["step"], point["values"]["loss"]) for point in points if point["values"].get("loss") is not None]

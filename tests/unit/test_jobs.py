"""The verbs of a job, with everything in memory and time given."""

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import NoReturn

import pytest
from pydantic import ValidationError

from schema.checkpoint import MANIFEST, Checkpoint, checkpoint_key, checkpoints_prefix
from schema.events import EventBatch, PhaseChanged, ReportedEvent
from schema.job import Artifact, ArtifactFile, Failure, Gate, GateCheck, HubPush, Job, Status
from schema.requests import CloneRequest, ExportAgainRequest, ExportRequest, ResumeRequest, RetryRequest
from schema.result import PublishManifest, Result
from schema.spec import JobSpec, attempt_name, manifest_key, result_key, spec_key
from service.adapters.jobstores.memory import MemoryJobStore
from service.adapters.links import ServiceLinks
from service.adapters.secrets.local import LocalSecretStore
from service.core.errors import Conflict, Fenced, InvalidRequest, LaunchFailed, NotFound, Unauthorized, Unavailable, Unsupported
from service.core.jobs import Jobs
from service.core.ports import AttemptState, Ended, Hardware, HubAccess, HubAccount, IdempotencyKey, LaunchOrder
from service.core.tokens import TokenSigner
from service.core.trackers import Trackers
from storage import StoreUnavailable, open_store
from storage.local import LocalStore
from storage.patience import patience
from tests.factories import START, FakeClock, a_dataset, a_request, some_hardware

TENANT = "local"


class FakeLauncher:
    """Launches into a dictionary. Can be told to refuse, to be unreachable, and to die just after launching."""

    name = "fake"
    check_is_cheap = True
    profiles = ("fake",)

    def __init__(self) -> None:
        self.launched: dict[str, LaunchOrder] = {}
        self.states: dict[str, AttemptState] = {}
        self.cancels: list[tuple[str, bool]] = []
        self.slots = 10
        self.refusal: Exception | None = None
        self.dies_after_launch = False
        self.ends: dict[str, Ended] = {}
        self.facts = some_hardware()

    def launch(self, order: LaunchOrder) -> str:
        if self.refusal:
            raise self.refusal
        assert order.name not in self.launched, "launched twice"
        self.launched[order.name] = order
        self.states[f"handle of {order.name}"] = "running"
        if self.dies_after_launch:
            raise Unavailable("the answer was lost")
        return f"handle of {order.name}"

    def find(self, name: str) -> str | None:
        return f"handle of {name}" if name in self.launched else None

    def check(self, handle: str) -> AttemptState:
        return self.states[handle]

    def cancel(self, handle: str, *, force: bool) -> None:
        self.cancels.append((handle, force))

    def free_slots(self, active: int) -> int:
        return self.slots - sum(state == "running" for state in self.states.values())

    def hardware(self, profile: str | None = None) -> Hardware:
        return self.facts

    def why_ended(self, handle: str) -> Ended | None:
        return self.ends.get(handle)

    def close(self) -> None:
        return None


class FakeHub:
    """Says what it is told to; knows the commits of its repositories."""

    def __init__(self) -> None:
        self.reads: HubAccess = "unknown"
        self.writes: HubAccess = "unknown"
        self.whose: HubAccount | None = None
        self.repositories: dict[str, list[str]] = {}
        self.asked: list[tuple[str, str | None]] = []

    def read_access(self, repo_id: str, token: str | None) -> HubAccess:
        self.asked.append((repo_id, token))
        return self.reads

    def write_access(self, repo_id: str, token: str) -> HubAccess:
        self.asked.append((repo_id, token))
        return self.writes

    def account(self, token: str) -> HubAccount | None:
        return self.whose

    def commits(self, repo_id: str, token: str) -> list[str] | None:
        return self.repositories.get(repo_id)

    def delete_repository(self, repo_id: str, token: str) -> None:
        del self.repositories[repo_id]

    def close(self) -> None:
        return None


class World:
    """A whole service in memory."""

    def __init__(self, folder: Path, trackers: Trackers | None = None) -> None:
        self.clock = FakeClock()
        self.store = MemoryJobStore()
        self.objects = open_store((folder / "objects").as_uri())
        self.secrets = LocalSecretStore(folder / "secrets")
        self.launcher = FakeLauncher()
        self.hub = FakeHub()
        self.tokens = TokenSigner(b"k" * 32, self.clock)
        self.wakes = 0
        self.on_wake: Callable[[str], None] = lambda _: None
        tails = count(1)
        self.jobs = Jobs(
            store=self.store,
            secrets=self.secrets,
            configs=self.objects,
            models=self.objects,
            datasets=self.objects,
            launcher=self.launcher,
            links=ServiceLinks(self.tokens),
            tokens=self.tokens,
            clock=self.clock,
            random_tail=lambda: f"{next(tails):04x}",
            wake=self._wake,
            hub=self.hub,
            trackers=trackers,
            attempt_environment={"HF_ENDPOINT": "https://hub.example"},
        )
        self.store.create_dataset(a_dataset())

    def _wake(self, job_id: str) -> None:
        self.wakes += 1
        self.on_wake(job_id)

    def submitted(self, **changes: object) -> Job:
        return self.jobs.submit(a_request(**changes), TENANT)

    def training(self) -> Job:
        job = self.submitted()
        self.jobs.reconcile()
        self.jobs.claim(job.job_id, 1, "p")
        self.jobs.report(job.job_id, 1, a_batch(PhaseChanged(phase="training")))
        return self.find(job)

    def find(self, job: Job) -> Job:
        return self.jobs.find(job.job_id, TENANT)

    def checkpoint(self, job: Job, step: int, attempt: int = 1) -> Checkpoint:
        """A checkpoint in the bucket, as an attempt leaves it."""
        made = Checkpoint.model_validate(
            {"job_id": job.job_id, "attempt": attempt, "step": step, "total_steps": 100, "epoch": 0.5, "batch_size": 2, "files": []}
            | {"gradient_accumulation_steps": 1, "training_config": job.training_config, "created_at": START}
        )
        key = checkpoint_key(checkpoints_prefix(job.job_id, job.project_id), attempt, step)
        self.objects.write(key + MANIFEST, made.sealed())
        return made

    def write_result(self, job: Job, outcome: str = "completed", attempt: int = 1, **changes: object) -> Result:
        body = {"job_id": job.job_id, "attempt": attempt, "outcome": outcome, "started_at": START, "finished_at": START}
        result = Result.model_validate(body | changes)
        self.objects.write(result_key(job.job_id, attempt), result.model_dump_json().encode())
        return result


def an_artifact(job: Job, attempt: int = 1) -> dict[str, object]:
    key = f"trained_adapters/{job.job_id}/attempt-{attempt}/"
    files = [{"path": "adapter_model.safetensors", "size_bytes": 1, "sha256": "0" * 64}]
    return {"name": "adapter", "kind": "adapter", "uri": f"file:///{key}", "key": key, "size_bytes": 1, "files": files}


def a_batch(*events: object, first_seq: int = 0) -> EventBatch:
    return EventBatch(first_seq=first_seq, events=[ReportedEvent.model_validate({"at": START, "event": event}) for event in events])


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


# --- submitting ------------------------------------------------------------------------------------------------------


def test_a_submitted_job_is_durable_readable_and_wakes_the_launcher(world: World) -> None:
    job = world.submitted(job_name="my job")
    assert world.find(job) == job
    assert job.status is Status.QUEUED
    assert job.job_id == "training_1_gemma-3-270m_0001"
    assert world.wakes == 1


def test_two_equal_requests_are_two_jobs(world: World) -> None:
    assert world.submitted().job_id != world.submitted().job_id


def test_a_key_makes_them_one_also_when_the_token_was_renewed(world: World) -> None:
    first = world.jobs.submit(a_request(hf_token="hf_old"), TENANT, "key")
    second = world.jobs.submit(a_request(hf_token="hf_new"), TENANT, "key")
    assert first == second
    assert list(world.secrets.walk()) == [first.job_id]


def test_secrets_are_in_the_secret_store_and_nowhere_else(world: World, tmp_path: Path) -> None:
    config = {"base_model_id": "google/gemma-3-270m", "wandb_config": {"api_key": "wb_canary"}}
    job = world.jobs.submit(a_request(hf_token="hf_canary", training_config=config), TENANT)
    world.jobs.reconcile()
    assert world.secrets.read(job.job_id) == {"hf_token": "hf_canary", "wandb_api_key": "wb_canary"}
    kept = world.find(job)
    everything = kept.model_dump_json() + repr(kept) + repr(world.launcher.launched) + str(kept.training_config)
    everything += "".join(path.read_text() for path in (tmp_path / "objects").rglob("*") if path.is_file())
    everything += str(world.launcher.launched[attempt_name(job.job_id, 1)].environment)
    assert "canary" not in everything


@pytest.mark.parametrize(
    ("changes", "error", "param"),
    [
        ({"processed_dataset_id": "dataset_none"}, NotFound, "processed_dataset_id"),
        ({"training_config": {"base_model_id": "g/m", "method": "QLoRA"}}, Unsupported, "training_config.method"),
        ({"training_config": {"base_model_id": "g/m", "provider": "unsloth"}}, Unsupported, "training_config.provider"),
        ({"training_config": {"base_model_id": "g/m", "modality": "vision"}}, InvalidRequest, "training_config.modality"),
        (
            {"training_config": {"base_model_id": "g/m", "hyperparameters": {"use_fa2": True}}},
            Unsupported,
            "training_config.hyperparameters.use_fa2",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_kept(
    world: World, changes: dict[str, object], error: type[InvalidRequest], param: str
) -> None:
    with pytest.raises(error) as refusal:
        world.submitted(**changes, hf_token="hf_x")
    assert refusal.value.param == param
    assert world.store.queued_jobs(10) == []
    assert list(world.secrets.walk()) == []


def test_an_evaluation_without_held_out_rows_is_refused(world: World) -> None:
    train_only = {"train": a_dataset().splits["train"]}
    world.store.create_dataset(a_dataset("dataset_2", splits=train_only))
    with pytest.raises(InvalidRequest, match="held-out"):
        world.submitted(processed_dataset_id="dataset_2")


def test_somebody_elses_dataset_does_not_exist(world: World) -> None:
    with pytest.raises(NotFound):
        world.jobs.submit(a_request(), "another tenant")


def test_somebody_elses_job_does_not_exist(world: World) -> None:
    job = world.submitted()
    for look in (world.jobs.find, world.jobs.cancel, world.jobs.delete):
        with pytest.raises(NotFound):
            look(job.job_id, "another tenant")


# --- launching -------------------------------------------------------------------------------------------------------


def test_a_queued_job_is_launched_once_with_a_spec_and_a_token_for_this_attempt(world: World) -> None:
    job = world.submitted()
    world.jobs.reconcile()
    world.jobs.reconcile()
    [order] = world.launcher.launched.values()
    assert order.name == attempt_name(job.job_id, 1)
    assert order.environment["HF_ENDPOINT"] == "https://hub.example"
    world.tokens.check_attempt(order.environment["JOB_TOKEN"], job.job_id, 1)
    with pytest.raises(Unauthorized):
        world.tokens.check_attempt(order.environment["JOB_TOKEN"], job.job_id, 2)
    spec = JobSpec.load(world.objects.read(spec_key(job.job_id)))
    assert (spec.job_id, spec.training_config) == (job.job_id, job.training_config)
    attempt = world.find(job).attempt
    assert attempt is not None
    assert attempt.handle == f"handle of {order.name}"


def test_jobs_wait_their_turn_and_the_oldest_goes_first(world: World) -> None:
    world.launcher.slots = 1
    jobs = []
    for _ in range(3):
        jobs.append(world.submitted())
        world.clock.advance(1)
    world.jobs.reconcile()
    assert [world.find(job).status for job in jobs] == [Status.PREPARING, Status.QUEUED, Status.QUEUED]
    world.launcher.states[f"handle of {attempt_name(jobs[0].job_id, 1)}"] = "ended"
    world.write_result(jobs[0])
    world.jobs.reconcile()
    world.jobs.reconcile()
    assert [world.find(job).status for job in jobs] == [Status.COMPLETED, Status.PREPARING, Status.QUEUED]


def test_a_refused_launch_fails_the_job_with_the_reason(world: World) -> None:
    world.launcher.refusal = LaunchFailed("no such machine", hint="make setup")
    job = world.submitted(hf_token="hf_x")
    world.jobs.reconcile()
    kept = world.find(job)
    assert kept.status is Status.FAILED
    assert kept.failure is not None
    assert (kept.failure.code, kept.failure.message, kept.failure.hint) == ("launch_failed", "no such machine", "make setup")
    assert list(world.secrets.walk()) == []


def test_a_launch_whose_answer_was_lost_is_found_and_not_repeated(world: World) -> None:
    world.launcher.dies_after_launch = True
    job = world.submitted()
    world.jobs.reconcile()
    attempt = world.find(job).attempt
    assert attempt is not None
    assert attempt.handle is None
    world.launcher.dies_after_launch = False
    world.clock.advance(60)
    world.jobs.reconcile()  # FakeLauncher fails the test if it is asked twice
    attempt = world.find(job).attempt
    assert attempt is not None
    assert attempt.handle is not None


def test_a_launch_that_never_happened_is_made_again(world: World) -> None:
    world.launcher.refusal = Unavailable("not now")
    job = world.submitted()
    world.jobs.reconcile()
    world.launcher.refusal = None
    world.jobs.reconcile()
    assert world.launcher.launched == {}  # too early to look: its launcher may be at work
    world.clock.advance(60)
    world.jobs.reconcile()
    assert list(world.launcher.launched) == [attempt_name(job.job_id, 1)]


def test_one_jobs_trouble_does_not_stop_the_others(world: World) -> None:
    first = world.submitted()
    world.store.delete_dataset("dataset_1")
    world.store.create_dataset(a_dataset("dataset_2"))
    second = world.submitted(processed_dataset_id="dataset_2")
    world.jobs.reconcile()
    assert world.find(first).status is Status.FAILED
    assert world.find(second).status is Status.PREPARING


def test_a_launch_that_must_wait_says_why_until_it_is_made(world: World) -> None:
    world.launcher.refusal = Unavailable("no L4 is free", hint="ask for more")
    job = world.submitted()
    world.jobs.reconcile()
    attempt = world.find(job).attempt
    assert attempt is not None
    assert attempt.delay == "no L4 is free ask for more"
    world.launcher.refusal = None
    world.clock.advance(60)
    world.jobs.reconcile()
    attempt = world.find(job).attempt
    assert attempt is not None
    assert attempt.delay is None
    assert attempt.handle is not None


def test_a_missing_bucket_delays_the_launch_and_says_so(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_bucket(*_: object, **__: object) -> None:
        raise StoreUnavailable("no bucket configs")

    with monkeypatch.context() as patch:
        patch.setattr(world.objects, "write", no_bucket)
        job = world.submitted()
        world.jobs.reconcile()
    attempt = world.find(job).attempt
    assert attempt is not None
    assert attempt.delay == "no bucket configs"
    assert world.launcher.launched == {}
    world.clock.advance(60)
    world.jobs.reconcile()
    assert list(world.launcher.launched) == [attempt_name(job.job_id, 1)]


def test_two_services_that_look_at_once_send_an_attempt_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.launcher.refusal = Unavailable("not now")
    world.submitted()
    world.jobs.reconcile()
    world.launcher.refusal = None
    world.clock.advance(60)
    looks = []

    def find_while_another_looks(name: str) -> str | None:
        looks.append(name)
        if len(looks) == 1:
            world.jobs.reconcile()  # another instance, between this one's look and its launch
        return None

    monkeypatch.setattr(world.launcher, "find", find_while_another_looks)
    world.jobs.reconcile()  # FakeLauncher fails the test if it is asked twice
    assert len(looks) == 2
    assert len(world.launcher.launched) == 1


def test_an_attempt_that_was_claimed_is_not_sent_again(world: World) -> None:
    world.launcher.refusal = Unavailable("the answer was lost")
    job = world.submitted()
    world.jobs.reconcile()
    world.launcher.refusal = None
    world.jobs.claim(job.job_id, 1, "p")
    world.jobs.report(job.job_id, 1, a_batch())
    world.clock.advance(30)
    world.jobs.reconcile()
    assert world.launcher.launched == {}
    assert world.find(job).status is Status.PREPARING
    world.clock.advance(61)  # and nothing more is heard of it
    world.jobs.reconcile()
    assert world.find(job).attempts[0].outcome == "lost"


def test_without_a_background_task_a_submission_is_launched_at_once(world: World) -> None:
    world.on_wake = world.jobs.step
    job = world.submitted()
    assert list(world.launcher.launched) == [attempt_name(job.job_id, 1)]
    assert world.find(job).status is Status.PREPARING


def test_without_a_background_task_the_end_of_a_job_makes_room_for_the_next(world: World) -> None:
    world.on_wake = world.jobs.step
    world.launcher.slots = 1
    first, second = world.submitted(), world.submitted()
    assert world.find(second).status is Status.QUEUED
    world.launcher.states[f"handle of {attempt_name(first.job_id, 1)}"] = "ended"
    world.jobs.finish(first.job_id, world.write_result(first))
    assert world.find(second).status is Status.PREPARING


def test_where_asking_takes_time_several_jobs_are_looked_after_at_once(world: World) -> None:
    world.launcher.check_is_cheap = False
    world.launcher.slots = 20
    jobs = [world.submitted() for _ in range(20)]
    assert world.jobs.reconcile() == 20
    assert len(world.launcher.launched) == 20
    for job in jobs[:19]:
        world.write_result(job)
    world.launcher.states.pop(f"handle of {attempt_name(jobs[19].job_id, 1)}")  # and one of them is trouble
    assert world.jobs.reconcile() == 19
    assert [world.find(job).status for job in jobs[:19]] == [Status.COMPLETED] * 19


def test_who_asks_for_a_silent_job_has_it_looked_after(world: World) -> None:
    job = world.training()
    world.launcher.check_is_cheap = False
    world.on_wake = world.jobs.step
    world.write_result(job)
    assert world.jobs.look_at(job.job_id, TENANT)[0].status is Status.TRAINING  # it was heard of a moment ago
    world.clock.advance(61)
    assert world.jobs.look_at(job.job_id, TENANT)[0].status is Status.COMPLETED


def test_a_submission_is_kept_when_the_step_behind_it_fails(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(_: int) -> list[Job]:
        raise Unavailable

    world.on_wake = world.jobs.step
    monkeypatch.setattr(world.store, "active_jobs", away)
    assert world.find(world.submitted()).status is Status.QUEUED


def test_a_step_is_not_begun_when_there_is_no_time_for_it(world: World) -> None:
    world.on_wake = world.jobs.step
    with patience(1.0):
        job = world.submitted()
    assert world.find(job).status is Status.QUEUED


# --- reporting -------------------------------------------------------------------------------------------------------


def test_the_claim_hands_over_the_secrets_once(world: World) -> None:
    job = world.submitted(hf_token="hf_x")
    world.jobs.reconcile()
    assert world.jobs.claim(job.job_id, 1, "p").secrets == {"hf_token": "hf_x"}
    with pytest.raises(Fenced):
        world.jobs.claim(job.job_id, 1, "another")


def test_reports_move_the_job_and_answer_with_a_directive(world: World) -> None:
    job = world.training()
    assert job.status is Status.TRAINING
    assert world.jobs.report(job.job_id, 1, a_batch(first_seq=1)).directive == "continue"
    world.jobs.cancel(job.job_id, TENANT)
    assert world.jobs.report(job.job_id, 1, a_batch(first_seq=1)).directive == "cancel"


def test_heartbeats_do_not_touch_the_record(world: World) -> None:
    job = world.training()
    for n in range(5):
        world.jobs.report(job.job_id, 1, a_batch({"type": "metrics", "step": n, "values": {"loss": 1.0}}, first_seq=1 + n))
    assert world.find(job).revision == job.revision


def test_an_attempt_that_is_over_is_refused(world: World) -> None:
    job = world.training()
    world.jobs.finish(job.job_id, world.write_result(job))
    with pytest.raises(Fenced):
        world.jobs.report(job.job_id, 1, a_batch())


def test_the_history_tells_every_status_once(world: World) -> None:
    job = world.training()
    world.jobs.finish(job.job_id, world.write_result(job))
    world.jobs.finish(job.job_id, world.write_result(job))
    told = [stored.event for stored in world.jobs.events(job.job_id, TENANT, 0, 100)]
    assert [event.status for event in told if event.type == "status"] == ["preparing", "training", "completed"]


# --- ending ----------------------------------------------------------------------------------------------------------


def test_a_silent_attempt_is_judged_by_its_result_first(world: World) -> None:
    job = world.training()
    world.write_result(job)
    world.launcher.states[f"handle of {attempt_name(job.job_id, 1)}"] = "ended"
    world.jobs.reconcile()
    assert world.find(job).status is Status.COMPLETED


def test_an_attempt_that_ended_without_a_result_is_followed_by_the_next(world: World) -> None:
    job = world.training()
    world.launcher.states[f"handle of {attempt_name(job.job_id, 1)}"] = "ended"
    world.jobs.reconcile()
    job = world.find(job)
    assert [attempt.outcome for attempt in job.attempts] == ["lost", None]
    assert attempt_name(job.job_id, 2) in world.launcher.launched


def test_a_checkpoint_that_was_never_reported_counts_as_progress(world: World) -> None:
    job = world.training()
    world.checkpoint(job, step=8)
    world.launcher.states[f"handle of {attempt_name(job.job_id, 1)}"] = "ended"
    world.jobs.reconcile()
    assert world.find(job).checkpoint is not None
    assert world.find(job).attempts[0].saved_step == 8


# --- leases ----------------------------------------------------------------------------------------------------------


def test_a_silent_attempt_whose_process_is_there_has_a_lease_to_be_heard_again(world: World) -> None:
    job = world.training()
    world.clock.advance(3600)  # the machine slept: neither was awake
    world.jobs.reconcile()
    assert world.find(job).attempts[0].doubted_at == world.clock.now
    world.clock.advance(299)
    world.jobs.reconcile()
    assert world.launcher.cancels == []
    world.jobs.report(job.job_id, 1, a_batch())
    world.clock.advance(59)
    world.jobs.reconcile()
    assert world.launcher.cancels == []
    assert world.find(job).status is Status.TRAINING


def test_an_attempt_that_stays_silent_is_ended_and_then_given_up(world: World) -> None:
    job = world.training()
    world.clock.advance(61)
    world.jobs.reconcile()
    world.clock.advance(300)
    world.jobs.reconcile()
    assert [force for _, force in world.launcher.cancels] == [True]
    assert world.find(job).status is Status.TRAINING  # its compute may still be there
    world.clock.advance(60)
    world.jobs.reconcile()
    assert [attempt.outcome for attempt in world.find(job).attempts] == ["lost", None]
    with pytest.raises(Fenced):
        world.jobs.report(job.job_id, 1, a_batch())


def test_an_attempt_that_never_claims_itself_is_given_up_after_a_while(world: World) -> None:
    job = world.submitted()
    world.jobs.reconcile()
    for minutes in (9, 2):  # its machine may still be starting; then it is doubted
        world.clock.advance(60 * minutes)
        world.jobs.reconcile()
    assert world.find(job).attempts[0].doubted_at == world.clock.now
    world.clock.advance(60 * 6)
    world.jobs.reconcile()
    assert [attempt.outcome for attempt in world.find(job).attempts] == ["lost", None]
    with pytest.raises(Fenced):
        world.jobs.claim(job.job_id, 1, "p")


def test_a_doubt_ends_when_the_attempt_is_heard_of(world: World) -> None:
    job = world.training()
    world.clock.advance(61)
    world.jobs.reconcile()
    world.clock.advance(200)
    world.jobs.report(job.job_id, 1, a_batch())
    world.clock.advance(150)  # silent again, and longer than a lease since the first doubt
    world.jobs.reconcile()
    assert world.launcher.cancels == []
    assert world.find(job).attempts[0].doubted_at == world.clock.now


def test_a_doubt_that_is_over_does_not_come_back_with_a_clock_that_moves(world: World) -> None:
    job = world.training()
    world.clock.advance(600)  # the clock jumps ahead: silent, it seems
    world.jobs.reconcile()
    world.jobs.report(job.job_id, 1, a_batch())
    assert world.find(job).attempts[0].doubted_at is None
    world.clock.advance(-600)
    for _ in range(30):
        world.clock.advance(15)
        world.jobs.report(job.job_id, 1, a_batch())
    world.clock.advance(600)
    world.jobs.reconcile()
    assert world.launcher.cancels == []
    assert len(world.find(job).attempts) == 1


@pytest.mark.parametrize(("preempted", "status"), [(False, Status.FAILED), (True, Status.PREPARING)])  # the next attempt
def test_what_the_compute_tells_about_the_end_decides(world: World, preempted: bool, status: Status) -> None:
    job = world.training()
    handle = f"handle of {attempt_name(job.job_id, 1)}"
    world.launcher.states[handle] = "ended"
    world.launcher.ends[handle] = Ended(Failure(code="out_of_memory", message="16 GiB were not enough"), preempted)
    world.jobs.reconcile()
    kept = world.find(job)
    assert kept.status is status
    failure = kept.attempts[0].failure
    assert failure is not None
    assert (failure.code, failure.attempt) == ("out_of_memory", 1)


def test_the_end_is_not_judged_while_the_compute_does_not_say_why(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(_: str) -> Ended | None:
        raise Unavailable

    job = world.training()
    world.launcher.states[f"handle of {attempt_name(job.job_id, 1)}"] = "ended"
    monkeypatch.setattr(world.launcher, "why_ended", away)
    world.jobs.reconcile()
    assert world.find(job).status is Status.TRAINING


def test_unknown_is_not_failed(world: World) -> None:
    job = world.training()
    world.launcher.states[f"handle of {attempt_name(job.job_id, 1)}"] = "unknown"
    for _ in range(60):
        world.clock.advance(120)
        world.jobs.reconcile()
    assert world.find(job).status is Status.TRAINING
    assert len(world.launcher.launched) == 1


def test_secrets_end_with_the_job(world: World) -> None:
    job = world.submitted(hf_token="hf_x")
    world.jobs.cancel(job.job_id, TENANT)
    assert list(world.secrets.walk()) == []


def test_secrets_are_kept_when_nobody_knows_whether_the_job_was(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    create = world.store.create_job

    def kept_but_not_answered(job: Job, key: IdempotencyKey | None = None) -> Job:
        create(job, key)
        raise Unavailable("the answer was lost")

    monkeypatch.setattr(world.store, "create_job", kept_but_not_answered)
    with pytest.raises(Unavailable):
        world.submitted(hf_token="hf_x")
    (job_id,) = world.secrets.walk()
    world.jobs.reconcile()
    assert world.jobs.claim(job_id, 1, "p").secrets == {"hf_token": "hf_x"}


def test_a_sweep_destroys_what_outlived_its_job_and_nothing_else(world: World) -> None:
    ended, open_job = world.submitted(hf_token="hf_x"), world.submitted(hf_token="hf_x")
    world.jobs.cancel(ended.job_id, TENANT)
    world.secrets.put(ended.job_id, {"hf_token": "hf_x"})  # the destruction had failed
    world.secrets.put("orphan", {"hf_token": "hf_x"})
    assert world.jobs.sweep_secrets() == 1
    assert list(world.secrets.walk()) == sorted(["orphan", open_job.job_id])
    assert world.jobs.sweep_secrets(orphans=True) == 1
    assert list(world.secrets.walk()) == [open_job.job_id]


def test_a_cancel_is_told_first_then_signalled_then_forced(world: World) -> None:
    job = world.training()
    world.jobs.cancel(job.job_id, TENANT)
    world.jobs.reconcile()
    assert world.launcher.cancels == []
    world.clock.advance(1.5)
    world.jobs.reconcile()
    assert [force for _, force in world.launcher.cancels] == [False]
    world.clock.advance(10)
    world.jobs.reconcile()
    assert [force for _, force in world.launcher.cancels] == [False, True]
    world.launcher.states[f"handle of {attempt_name(job.job_id, 1)}"] = "ended"
    world.jobs.reconcile()
    assert world.find(job).status is Status.CANCELLED


# --- pause, resume, retry --------------------------------------------------------------------------------------------


def test_a_pause_is_told_to_the_attempt_and_its_place_is_kept(world: World) -> None:
    job = world.training()
    assert world.jobs.pause(job.job_id, TENANT).status is Status.PAUSING
    assert world.jobs.report(job.job_id, 1, a_batch()).directive == "pause"
    world.jobs.finish(job.job_id, world.write_result(job, "paused", saved_step=3))
    assert world.find(job).status is Status.PAUSED
    world.jobs.reconcile()
    assert len(world.launcher.launched) == 1
    world.jobs.resume(job.job_id, TENANT, ResumeRequest.model_validate({}))
    world.jobs.reconcile()
    assert attempt_name(job.job_id, 2) in world.launcher.launched


def test_a_job_is_not_launched_again_only_to_be_paused(world: World) -> None:
    world.launcher.refusal = Unavailable("no room")
    job = world.submitted()
    world.jobs.reconcile()
    world.jobs.pause(job.job_id, TENANT)
    world.launcher.refusal = None
    world.clock.advance(6)
    world.jobs.reconcile()
    assert world.find(job).status is Status.PAUSED
    assert world.launcher.launched == {}


def test_a_resume_may_ask_for_more_and_refuses_what_shaped_the_steps(world: World) -> None:
    job = world.submitted()
    world.jobs.pause(job.job_id, TENANT)
    for changes, param, words in (
        ({"epochs": 1}, "epochs", "can only grow"),
        ({"max_steps": 50}, "max_steps", "counted in epochs"),
        ({"hf_token": "hf_x"}, "hf_token", "was made without"),
    ):
        with pytest.raises(InvalidRequest, match=words) as refused:
            world.jobs.resume(job.job_id, TENANT, ResumeRequest.model_validate(changes))
        assert refused.value.param == param
    with pytest.raises(ValidationError, match="learning_rate cannot change"):
        ResumeRequest.model_validate({"learning_rate": 0.1})
    resumed = world.jobs.resume(job.job_id, TENANT, ResumeRequest.model_validate({"epochs": 9}))
    assert resumed.training_config.hyperparameters.epochs == 9
    world.jobs.reconcile()
    assert JobSpec.load(world.objects.read(spec_key(job.job_id))).training_config.hyperparameters.epochs == 9


def test_a_retry_needs_the_secrets_again_because_they_ended_with_the_job(world: World) -> None:
    job = world.submitted(hf_token="hf_x")
    world.jobs.cancel(job.job_id, TENANT)
    with pytest.raises(InvalidRequest, match="hf_token is needed again") as refused:
        world.jobs.retry(job.job_id, TENANT, RetryRequest.model_validate({}))
    assert refused.value.param == "hf_token"
    assert world.find(job).status is Status.CANCELLED
    retried = world.jobs.retry(job.job_id, TENANT, RetryRequest.model_validate({"hf_token": "hf_y"}))
    assert retried.status is Status.QUEUED
    world.jobs.reconcile()
    assert world.jobs.claim(job.job_id, 1, "p").secrets == {"hf_token": "hf_y"}


def test_a_retry_goes_on_from_checkpoints_or_from_the_start(world: World) -> None:
    job = world.training()
    world.checkpoint(job, step=8)
    world.jobs.finish(job.job_id, world.write_result(job, "failed", saved_step=8))
    world.jobs.retry(job.job_id, TENANT, RetryRequest.model_validate({}))
    world.jobs.reconcile()
    assert JobSpec.load(world.objects.read(spec_key(job.job_id))).first_attempt == 1
    assert [found.checkpoint.step for found in world.jobs.checkpoints(job.job_id, TENANT)] == [8]
    world.jobs.claim(job.job_id, 2, "p")
    world.jobs.finish(job.job_id, world.write_result(job, "failed", attempt=2))
    world.jobs.retry(job.job_id, TENANT, RetryRequest.model_validate({"from_start": True}))
    world.jobs.reconcile()
    assert JobSpec.load(world.objects.read(spec_key(job.job_id))).first_attempt == 3
    assert world.jobs.checkpoints(job.job_id, TENANT) == []


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_checkpoints_are_listed_in_the_order_in_which_they_count(world: World) -> None:
    job = world.training()
    for step, attempt in ((10, 1), (30, 1), (20, 2)):
        world.checkpoint(job, step=step, attempt=attempt)
    world.objects.write(f"{checkpoints_prefix(job.job_id, None)}attempt-3/step-00000040/adapter.bin", b"half a checkpoint")
    world.objects.write(f"{checkpoints_prefix(job.job_id, None)}attempt-3/step-00000050/manifest.json", b"{")
    found = world.jobs.checkpoints(job.job_id, TENANT)
    assert [(stored.checkpoint.attempt, stored.checkpoint.step) for stored in found] == [(2, 20), (1, 30), (1, 10)]


def test_a_checkpoint_is_exported_by_a_job_of_its_own(world: World) -> None:
    job = world.training()
    world.checkpoint(job, step=10)
    request = ExportRequest.model_validate({"export_config": {"format": "merged"}})
    made = world.jobs.export(job.job_id, 10, TENANT, request, "key-1")
    assert world.jobs.export(job.job_id, 10, TENANT, request, "key-1").job_id == made.job_id
    assert made.job_name == f"{job.job_name} at step 10"
    world.jobs.reconcile()
    spec = JobSpec.load(world.objects.read(spec_key(made.job_id)))
    assert spec.export_of is not None
    assert (spec.export_of.job_id, spec.export_of.key) == (job.job_id, checkpoint_key(checkpoints_prefix(job.job_id, None), 1, 10))
    assert spec.training_config.export_config.format == "merged"
    with pytest.raises(NotFound, match="no checkpoint at step 11; it has: 10"):
        world.jobs.export(job.job_id, 11, TENANT, request)


def test_an_export_judges_nothing_and_mirrors_nothing(world: World) -> None:
    config = {"base_model_id": "g/m", "tensorboard_config": {}, "wandb_config": {"mode": "offline"}}
    gate = {"promotion_gate": [{"metric": "perplexity", "at_most": 0.9, "relative_to_base": True}]}
    job = world.submitted(training_config=config | {"eval_config": gate})
    world.checkpoint(job, step=10)
    made = world.jobs.export(job.job_id, 10, TENANT, ExportRequest.model_validate({}))
    assert (made.training_config.tensorboard_config, made.training_config.wandb_config) == (None, None)
    assert made.training_config.eval_config.promotion_gate == []


@pytest.mark.parametrize(
    ("config", "export", "param"),
    [
        ({"method": "Full"}, {"format": "adapter"}, "export_config.format"),
        ({"method": "Full"}, {"include_lora_gguf": True}, "export_config.include_lora_gguf"),
        ({"trainer_type": "reward"}, {"include_gguf": True}, "export_config.include_gguf"),
    ],
)
def test_an_export_that_the_model_cannot_have_is_refused(
    world: World, config: dict[str, object], export: dict[str, object], param: str
) -> None:
    world.store.create_dataset(a_dataset("pairs", dataset_type="preference"))
    rows = "pairs" if "trainer_type" in config else "dataset_1"
    job = world.submitted(processed_dataset_id=rows, training_config={"base_model_id": "g/m"} | config)
    world.checkpoint(job, step=10)
    with pytest.raises(InvalidRequest) as refused:
        world.jobs.export(job.job_id, 10, TENANT, ExportRequest.model_validate({"export_config": export}))
    assert refused.value.param == param


def again(**body: object) -> ExportAgainRequest:
    return ExportAgainRequest.model_validate(body)


def test_an_export_that_names_no_step_takes_what_was_published_else_the_newest(world: World) -> None:
    job = world.training()
    for step in (10, 20, 30):
        world.checkpoint(job, step=step)
    newest = world.jobs.export_again(job.job_id, TENANT, again(), "key-1")
    assert newest.export_of is not None
    assert newest.export_of.step == 30
    world.jobs.finish(job.job_id, world.write_result(job, published_step=20))
    assert world.jobs.export_again(job.job_id, TENANT, again(), "key-1").job_id == newest.job_id  # the same request: the same job
    for body, step in (({}, 20), ({"step": 10}, 10)):
        made = world.jobs.export_again(job.job_id, TENANT, again(**body))
        assert made.export_of is not None
        assert made.export_of.step == step
    world.objects.delete(checkpoint_key(checkpoints_prefix(job.job_id, None), 1, 20) + MANIFEST)
    made = world.jobs.export_again(job.job_id, TENANT, again())
    assert made.export_of is not None
    assert made.export_of.step == 30


def test_a_job_without_checkpoints_says_why_it_cannot_be_exported(world: World) -> None:
    job = world.training()
    with pytest.raises(NotFound, match="is training and has no checkpoint yet"):
        world.jobs.export_again(job.job_id, TENANT, again())
    world.checkpoint(job, step=10)
    export = world.jobs.export_again(job.job_id, TENANT, again())
    with pytest.raises(NotFound, match="trained nothing") as refused:
        world.jobs.export_again(export.job_id, TENANT, again())
    assert f"/jobs/{job.job_id}/export" in refused.value.hint
    world.jobs.finish(job.job_id, world.write_result(job))
    world.objects.delete(checkpoint_key(checkpoints_prefix(job.job_id, None), 1, 10) + MANIFEST)
    with pytest.raises(NotFound, match="no checkpoint") as refused:
        world.jobs.export_again(job.job_id, TENANT, again())
    assert "clone" in refused.value.hint


# --- the promotion gate ----------------------------------------------------------------------------------------------


def test_what_did_not_pass_the_gate_is_completed_and_cannot_be_downloaded(world: World) -> None:
    job = world.training()
    failed = GateCheck(metric="perplexity", value=12.5, at_most=9.0, passed=False, why="12.5 is above 9")
    passed = GateCheck(metric="accuracy", value=0.9, at_least=0.5, passed=True)
    gate = Gate(passed=False, checks=(passed, failed))
    world.jobs.finish(job.job_id, world.write_result(job, gate=gate, published_step=0, trackers={"mlflow": "https://m"}))
    kept = world.find(job)
    assert (kept.status, kept.gate, kept.published_step, kept.trackers) == (Status.COMPLETED, gate, 0, {"mlflow": "https://m"})
    with pytest.raises(Conflict, match=r"perplexity: 12\.5 is above 9") as refused:
        world.jobs.download(job.job_id, TENANT, None)
    assert "accuracy" not in refused.value.message
    assert f"POST /jobs/{job.job_id}/export" in refused.value.hint


# --- clones ----------------------------------------------------------------------------------------------------------


def test_a_clone_is_a_job_of_its_own_that_says_where_it_comes_from(world: World) -> None:
    job = world.submitted(job_name="first")
    patch = CloneRequest.model_validate({"training_config": {"hyperparameters": {"epochs": 9}}})
    made = world.jobs.clone(job.job_id, TENANT, patch, "key-1")
    assert world.jobs.clone(job.job_id, TENANT, patch, "key-1").job_id == made.job_id
    assert (made.cloned_from, made.job_name, made.status) == (job.job_id, "first", Status.QUEUED)
    assert made.training_config.hyperparameters.epochs == 9
    assert world.find(job) == job
    with pytest.raises(NotFound):
        world.jobs.clone(job.job_id, "another tenant", patch)


def test_a_clone_is_refused_for_the_same_reasons_as_a_request(world: World) -> None:
    job = world.submitted()
    for patch, error in (
        ({"training_config": {"method": "QLoRA"}}, Unsupported),
        ({"training_config": {"trainer_type": "dpo"}}, InvalidRequest),
        ({"processed_dataset_id": "dataset_none"}, NotFound),
    ):
        with pytest.raises(error):
            world.jobs.clone(job.job_id, TENANT, CloneRequest.model_validate(patch))
    world.checkpoint(job, step=1)
    export = world.jobs.export_again(job.job_id, TENANT, again())
    with pytest.raises(InvalidRequest, match="trained nothing"):
        world.jobs.clone(export.job_id, TENANT, CloneRequest.model_validate({}))


# --- secrets and the deployment's trackers ---------------------------------------------------------------------------


def test_secrets_of_graders_and_trackers_are_needed_again_by_name(world: World) -> None:
    world.store.create_dataset(a_dataset("prompts", dataset_type="prompt"))
    judge = {"type": "score_model", "name": "judge", "base_url": "https://j.example", "model": "m", "api_key": "canary-1"}
    config = {"base_model_id": "g/m", "trainer_type": "grpo", "reward_config": [judge]}
    job = world.submitted(processed_dataset_id="prompts", training_config=config)
    assert "canary" not in world.find(job).model_dump_json()
    world.jobs.cancel(job.job_id, TENANT)
    with pytest.raises(InvalidRequest, match="judge_api_key is needed again") as refused:
        world.jobs.retry(job.job_id, TENANT, RetryRequest.model_validate({}))
    assert refused.value.param == "secrets.judge_api_key"
    world.jobs.retry(job.job_id, TENANT, RetryRequest.model_validate({"secrets": {"judge_api_key": "canary-2"}}))
    world.jobs.reconcile()
    assert world.jobs.claim(job.job_id, 1, "p").secrets == {"judge_api_key": "canary-2"}


def test_the_deployments_tracker_is_shown_in_the_job_and_its_secret_asked_of_nobody(tmp_path: Path) -> None:
    ours = Trackers.model_validate({"mlflow_config": {"tracking_uri": "https://ours.example", "token": "canary"}})
    world = World(tmp_path, ours)
    job = world.submitted()
    assert job.training_config.mlflow_config is not None
    assert job.training_config.mlflow_config.tracking_uri == "https://ours.example"
    assert "canary" not in world.find(job).model_dump_json()
    world.jobs.cancel(job.job_id, TENANT)
    world.jobs.retry(job.job_id, TENANT, RetryRequest.model_validate({}))
    made = world.jobs.clone(job.job_id, TENANT, CloneRequest.model_validate({}))
    world.jobs.reconcile()
    for each in (job, made):
        assert world.jobs.claim(each.job_id, 1, "p").secrets == {"mlflow_token": "canary"}


def test_a_grader_that_compares_by_a_model_finds_it_here_or_at_an_endpoint(world: World) -> None:
    world.store.create_dataset(a_dataset("prompts", dataset_type="prompt", columns=("answer",)))
    near = {"type": "text_similarity", "name": "near", "metric": "cosine", "embedding_model": "lab/small"}

    def submit(**changes: object) -> Job:
        config = {"base_model_id": "g/m", "trainer_type": "grpo", "reward_config": [near | changes]}
        return world.submitted(processed_dataset_id="prompts", training_config=config)

    with pytest.raises(InvalidRequest, match="not in this deployment's model store") as refused:
        submit()
    assert refused.value.param == "training_config.reward_config.0.embedding_model"
    submit(base_url="https://e.example")
    world.objects.write("pretrained_weights/huggingface/lab/small/config.json", b"{}")
    submit()


# --- the Hub ---------------------------------------------------------------------------------------------------------

PUSHES = {"base_model_id": "g/m", "export_config": {"destination": "hfhub", "hf_repo_id": "ada/tuned"}}


def test_a_push_needs_a_token(world: World) -> None:
    space = {"base_model_id": "g/m", "trackio_config": {"space_id": "ada/curves"}}
    for config in (PUSHES, space):
        with pytest.raises(InvalidRequest, match="needs hf_token, to write to ada/") as refused:
            world.submitted(training_config=config)
        assert refused.value.param == "hf_token"
    assert world.submitted(training_config=space, hf_token="hf_x").secret_names == ("hf_token",)
    job = world.submitted()
    world.checkpoint(job, step=1)
    with pytest.raises(InvalidRequest, match="needs hf_token"):
        world.jobs.export_again(job.job_id, TENANT, again(export_config=PUSHES["export_config"]))


def test_what_the_hub_would_refuse_is_refused_before_anything_is_kept(world: World) -> None:
    world.hub.writes, world.hub.whose = "absent", HubAccount("grace", "write", {})
    with pytest.raises(InvalidRequest, match="cannot write to 'ada'"):
        world.submitted(training_config=PUSHES, hf_token="hf_x")
    world.hub.reads = "gated"
    with pytest.raises(InvalidRequest, match="gated"):
        world.submitted()
    assert world.store.queued_jobs(10) == []
    assert list(world.secrets.walk()) == []
    world.hub.reads, world.hub.writes = "unknown", "unknown"
    world.hub.whose = None
    assert world.submitted(training_config=PUSHES, hf_token="hf_x").status is Status.QUEUED


def test_the_hub_is_not_asked_about_a_base_that_is_here(world: World) -> None:
    world.objects.write("pretrained_weights/huggingface/google/gemma-3-270m/config.json", b"{}")
    world.hub.reads = "absent"
    assert world.submitted().status is Status.QUEUED
    assert world.hub.asked == []


def test_what_a_job_pushed_is_deleted_when_asked_and_only_if_it_is_alone(world: World) -> None:
    job = world.training()
    push = HubPush(repo_id="ada/tuned", revision="a", url="https://hub")
    world.jobs.finish(job.job_id, world.write_result(job, artifacts=[an_artifact(job) | {"hub": push}]))
    world.hub.repositories["ada/tuned"] = ["initial", "a", "somebody's"]
    with pytest.raises(InvalidRequest, match="needs a token") as refused:
        world.jobs.delete(job.job_id, TENANT, with_hub=True)
    assert refused.value.param == "X-HF-Token"
    with pytest.raises(InvalidRequest, match="1 commits that are not of this job"):
        world.jobs.delete(job.job_id, TENANT, with_hub=True, hub_token="hf_x")
    assert world.find(job).deleting_since is None
    world.hub.repositories["ada/tuned"].pop()
    deleted = world.jobs.delete(job.job_id, TENANT, with_hub=True, hub_token="hf_x")
    assert deleted is not None
    assert deleted.resources[0] == "hf://ada/tuned"
    assert world.hub.repositories == {}


def test_a_deletion_that_says_nothing_of_the_hub_leaves_it_alone(world: World) -> None:
    job = world.training()
    push = HubPush(repo_id="ada/tuned", revision="a", url="https://hub")
    world.jobs.finish(job.job_id, world.write_result(job, artifacts=[an_artifact(job) | {"hub": push}]))
    world.hub.repositories["ada/tuned"] = ["initial", "a"]
    assert world.jobs.delete(job.job_id, TENANT)
    assert "ada/tuned" in world.hub.repositories


# --- files -----------------------------------------------------------------------------------------------------------


def test_what_is_published_is_listed_in_the_bucket_by_the_service(world: World) -> None:
    job = world.training()
    world.jobs.finish(job.job_id, world.write_result(job, artifacts=[an_artifact(job)]))
    manifest = PublishManifest.load(world.objects.read(manifest_key(job.job_id)))
    assert (manifest.attempt, [artifact.name for artifact in manifest.artifacts]) == (1, ["adapter"])
    assert world.find(job).manifest_written


def test_a_manifest_that_could_not_be_written_is_written_when_the_job_is_looked_at(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    job = world.training()
    result = world.write_result(job, artifacts=[an_artifact(job)])

    def away(*_: object, **__: object) -> NoReturn:
        raise StoreUnavailable("away")

    with monkeypatch.context() as broken:
        broken.setattr(world.objects, "write", away)
        assert world.jobs.finish(job.job_id, result).status is Status.COMPLETED
    assert world.objects.stat(manifest_key(job.job_id)) is None
    world.jobs.look_at(job.job_id, TENANT)
    assert world.objects.stat(manifest_key(job.job_id)) is not None


def test_an_attempt_that_was_given_up_publishes_nothing(world: World) -> None:
    job = world.training()
    world.launcher.states[f"handle of {attempt_name(job.job_id, 1)}"] = "ended"
    world.jobs.reconcile()
    late = world.write_result(job, artifacts=[an_artifact(job)])
    world.jobs.finish(job.job_id, late)
    assert world.find(job).artifacts == ()
    assert world.objects.stat(manifest_key(job.job_id)) is None


def test_files_without_a_job_are_found_and_removed(world: World) -> None:
    job = world.training()
    world.checkpoint(job, step=1)
    for key in (
        "trained_adapters/gone/attempt-1/a",
        "trained_adapters/gone/attempt-1/b",
        "checkpoints/projects/p/jobs/gone/attempt-1/step-00000001/x",
        "configs/gone.json",
        "results/gone/1.json",
        "runs/gone/attempt-1/run.json",
        "trackers/gone/events",
        "onnx_models/gone/model.onnx",
        "pretrained_weights/huggingface/a/b/config.json",
        "datasets/dataset_1/train.jsonl",
    ):
        world.objects.write(key, b"xy")
    kept = {stored.key for stored in world.objects.walk("")}
    found = world.jobs.orphans()
    assert found.complete
    assert sorted((orphan.prefix, orphan.objects, orphan.size_bytes) for orphan in found.found) == [
        ("checkpoints/projects/p/jobs/gone/", 1, 2),
        ("configs/gone.json", 1, 2),
        ("onnx_models/gone/", 1, 2),
        ("results/gone/", 1, 2),
        ("runs/gone/", 1, 2),
        ("trackers/gone/", 1, 2),
        ("trained_adapters/gone/", 2, 4),
    ]
    world.jobs.sweep_orphans()
    assert kept - {stored.key for stored in world.objects.walk("")} == {key for key in kept if "gone" in key}
    assert world.jobs.orphans().found == []


def test_a_job_that_is_being_deleted_cannot_be_retried(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    job = world.submitted()

    def away(_key: str) -> NoReturn:
        raise StoreUnavailable("away")

    world.objects.write(spec_key(job.job_id), b"{}")
    monkeypatch.setattr(world.objects, "delete", away)
    deleted = world.jobs.delete(job.job_id, TENANT)
    assert deleted is not None
    assert deleted.failures
    with pytest.raises(Conflict, match="being deleted"):
        world.jobs.retry(job.job_id, TENANT, RetryRequest.model_validate({}))


def test_deleting_stops_the_job_first_and_leaves_nothing(world: World, tmp_path: Path) -> None:
    job = world.training()
    neighbour = "trained_adapters/another/adapter.bin"
    for key in (
        f"trained_adapters/{job.job_id}/a",
        f"gguf_models/{job.job_id}/m.gguf",
        f"onnx_models/{job.job_id}/attempt-1/model.onnx",
        f"trackers/{job.job_id}/tensorboard/events",
        f"runs/{job.job_id}/attempt-1/run.json",
        f"checkpoints/test-jobs/job_{job.job_id}/1",
        neighbour,
    ):
        world.objects.write(key, b"x")
    assert world.jobs.delete(job.job_id, TENANT) is None
    assert world.find(job).status is Status.CANCELLING
    world.launcher.states[f"handle of {attempt_name(job.job_id, 1)}"] = "ended"
    world.jobs.reconcile()
    deleted = world.jobs.delete(job.job_id, TENANT)
    assert deleted is not None
    assert f"{world.objects.url}/trained_adapters/{job.job_id}/" in deleted.resources
    assert [stored.key for stored in world.objects.walk("")] == [neighbour]
    with pytest.raises(NotFound):
        world.find(job)


def test_what_could_not_be_deleted_is_said_and_the_record_stays(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    job = world.submitted()

    class Stubborn(LocalStore):
        def delete(self, key: str) -> bool:
            from storage import StoreUnavailable

            raise StoreUnavailable("read-only")

    world.objects.write(f"merged_models/{job.job_id}/m", b"x")
    world.jobs._models = Stubborn(world.objects.url)  # pyright: ignore[reportPrivateUsage]
    deleted = world.jobs.delete(job.job_id, TENANT)
    assert deleted is not None
    assert deleted.failures
    assert world.find(job).status is Status.CANCELLED


def test_a_link_is_given_for_what_is_completed(world: World) -> None:
    job = world.training()
    with pytest.raises(Conflict):
        world.jobs.download(job.job_id, TENANT, None)
    file = ArtifactFile(path="", size_bytes=1, sha256="0")
    gguf = Artifact(name="gguf-q8_0", kind="gguf", uri="u", key=f"gguf_models/{job.job_id}/m.gguf", size_bytes=1, files=[file])
    adapter = gguf.model_copy(update={"name": "adapter", "kind": "adapter", "key": f"trained_adapters/{job.job_id}/"})
    world.jobs.finish(job.job_id, world.write_result(job, artifacts=[adapter.model_dump(), gguf.model_dump()]))
    found, [(_, link)] = world.jobs.download(job.job_id, TENANT, None)
    assert found == gguf
    assert world.tokens.read_file_token(link.removeprefix("/files/")) == (gguf.key, "m.gguf")
    with pytest.raises(NotFound, match="it has: adapter, gguf-q8_0"):
        world.jobs.download(job.job_id, TENANT, "gguf-f16")

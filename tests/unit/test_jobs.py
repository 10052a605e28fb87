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
from schema.requests import CloneRequest, ExportRequest, ReexportRequest, ResumeRequest, RetryRequest
from schema.result import PublishManifest, Result
from schema.spec import JobSpec, attempt_name, manifest_key, result_key, spec_key
from service.adapters.jobstores.memory import MemoryJobStore
from service.adapters.links import ServiceUrlSigner
from service.adapters.secrets.local import LocalSecretStore
from service.core.errors import Conflict, Fenced, InvalidRequest, LaunchFailed, NotFound, Unauthorized, Unavailable, Unsupported
from service.core.jobs.service import Jobs
from service.core.ports import ExecutionState, ExitReason, HubAccess, HubAccount, IdempotencyKey, LaunchRequest, RuntimeCapabilities
from service.core.tokens import TokenSigner
from service.core.trackers import DeploymentTrackers
from storage import StoreUnavailable
from storage.deadline import deadline
from storage.file import LocalStore
from storage.registry import open_store
from tests.factories import START, FakeClock, make_capabilities, make_dataset, make_train_request

TENANT = "local"


class FakeLauncher:
    """Launches into a dictionary. Can be told to refuse, to be unreachable, and to die just after launching."""

    name = "fake"
    polling_is_free = True
    profiles = ("fake",)

    def __init__(self) -> None:
        self.launched: dict[str, LaunchRequest] = {}
        self.states: dict[str, ExecutionState] = {}
        self.cancels: list[tuple[str, bool]] = []
        self.slots = 10
        self.refusal: Exception | None = None
        self.dies_after_launch = False
        self.exit_reasons: dict[str, ExitReason] = {}
        self.capabilities = make_capabilities()

    def launch(self, request: LaunchRequest) -> str:
        if self.refusal:
            raise self.refusal
        assert request.name not in self.launched, "launched twice"
        self.launched[request.name] = request
        self.states[f"handle of {request.name}"] = "running"
        if self.dies_after_launch:
            raise Unavailable("the answer was lost")
        return f"handle of {request.name}"

    def find_handle(self, name: str) -> str | None:
        return f"handle of {name}" if name in self.launched else None

    def check(self, handle: str) -> ExecutionState:
        return self.states[handle]

    def cancel(self, handle: str, *, force: bool) -> None:
        self.cancels.append((handle, force))

    def count_free_slots(self, active_jobs: int) -> int:
        return self.slots - sum(state == "running" for state in self.states.values())

    def get_capabilities(self, profile: str | None = None) -> RuntimeCapabilities:
        return self.capabilities

    def get_exit_reason(self, handle: str) -> ExitReason | None:
        return self.exit_reasons.get(handle)

    def close(self) -> None:
        return None


class FakeHub:
    """Says what it is told to; knows the commits of its repositories."""

    def __init__(self) -> None:
        self.read_result: HubAccess = "unknown"
        self.write_result: HubAccess = "unknown"
        self.account_result: HubAccount | None = None
        self.repositories: dict[str, list[str]] = {}
        self.requests: list[tuple[str, str | None]] = []

    def check_read_access(self, repo_id: str, token: str | None) -> HubAccess:
        self.requests.append((repo_id, token))
        return self.read_result

    def check_write_access(self, repo_id: str, token: str) -> HubAccess:
        self.requests.append((repo_id, token))
        return self.write_result

    def get_account(self, token: str) -> HubAccount | None:
        return self.account_result

    def list_commits(self, repo_id: str, token: str) -> list[str] | None:
        return self.repositories.get(repo_id)

    def delete_repository(self, repo_id: str, token: str) -> None:
        del self.repositories[repo_id]

    def close(self) -> None:
        return None


class JobsHarness:
    """A whole service in memory."""

    def __init__(self, folder: Path, trackers: DeploymentTrackers | None = None) -> None:
        self.clock = FakeClock()
        self.store = MemoryJobStore()
        self.objects = open_store((folder / "objects").as_uri())
        self.secrets = LocalSecretStore(folder / "secrets")
        self.launcher = FakeLauncher()
        self.hub = FakeHub()
        self.tokens = TokenSigner(b"k" * 32, self.clock)
        self.wake_count = 0
        self.on_wake: Callable[[str], None] = lambda _: None
        tails = count(1)
        self.jobs = Jobs(
            store=self.store,
            secrets=self.secrets,
            configs=self.objects,
            models=self.objects,
            datasets=self.objects,
            launcher=self.launcher,
            url_signer=ServiceUrlSigner(self.tokens),
            tokens=self.tokens,
            clock=self.clock,
            random_suffix=lambda: f"{next(tails):04x}",
            wake=self._wake,
            hub=self.hub,
            trackers=trackers,
            attempt_environment={"HF_ENDPOINT": "https://hub.example"},
        )
        self.store.create_dataset(make_dataset())

    def _wake(self, job_id: str) -> None:
        self.wake_count += 1
        self.on_wake(job_id)

    def submit(self, **changes: object) -> Job:
        return self.jobs.submit(make_train_request(**changes), TENANT)

    def start_training(self) -> Job:
        job = self.submit()
        self.jobs.reconcile()
        self.jobs.claim(job.job_id, 1, "p")
        self.jobs.report(job.job_id, 1, make_batch(PhaseChanged(phase="training")))
        return self.find_job(job)

    def find_job(self, job: Job) -> Job:
        return self.jobs.find(job.job_id, TENANT)

    def write_checkpoint(self, job: Job, step: int, attempt: int = 1) -> Checkpoint:
        """A checkpoint in the bucket, as an attempt leaves it."""
        made = Checkpoint.model_validate(
            {"job_id": job.job_id, "attempt": attempt, "step": step, "total_steps": 100, "epoch": 0.5, "batch_size": 2, "files": []}
            | {"gradient_accumulation_steps": 1, "training_config": job.training_config, "created_at": START}
        )
        key = checkpoint_key(checkpoints_prefix(job.job_id, job.project_id), attempt, step)
        self.objects.write(key + MANIFEST, made.with_checksum())
        return made

    def write_result(self, job: Job, outcome: str = "completed", attempt: int = 1, **changes: object) -> Result:
        body = {"job_id": job.job_id, "attempt": attempt, "outcome": outcome, "started_at": START, "finished_at": START}
        result = Result.model_validate(body | changes)
        self.objects.write(result_key(job.job_id, attempt), result.model_dump_json().encode())
        return result


def make_artifact(job: Job, attempt: int = 1) -> dict[str, object]:
    key = f"trained_adapters/{job.job_id}/attempt-{attempt}/"
    files = [{"path": "adapter_model.safetensors", "size_bytes": 1, "sha256": "0" * 64}]
    return {"name": "adapter", "kind": "adapter", "uri": f"file:///{key}", "key": key, "size_bytes": 1, "files": files}


def make_batch(*events: object, first_seq: int = 0) -> EventBatch:
    return EventBatch(first_seq=first_seq, events=[ReportedEvent.model_validate({"at": START, "event": event}) for event in events])


@pytest.fixture
def harness(tmp_path: Path) -> JobsHarness:
    return JobsHarness(tmp_path)


# --- submitting ------------------------------------------------------------------------------------------------------


def test_submitted_job_is_stored_and_wakes_launcher(harness: JobsHarness) -> None:
    job = harness.submit(job_name="my job")
    assert harness.find_job(job) == job
    assert job.status is Status.QUEUED
    assert job.job_id == "training_1_gemma-3-270m_0001"
    assert harness.wake_count == 1


def test_equal_requests_create_two_jobs(harness: JobsHarness) -> None:
    assert harness.submit().job_id != harness.submit().job_id


def test_idempotency_key_ignores_changed_token(harness: JobsHarness) -> None:
    first = harness.jobs.submit(make_train_request(hf_token="hf_old"), TENANT, "key")
    second = harness.jobs.submit(make_train_request(hf_token="hf_new"), TENANT, "key")
    assert first == second
    assert list(harness.secrets.iter_job_ids()) == [first.job_id]


def test_secrets_are_in_the_secret_store_and_nowhere_else(harness: JobsHarness, tmp_path: Path) -> None:
    config = {"base_model_id": "google/gemma-3-270m", "wandb_config": {"api_key": "wb_canary"}}
    job = harness.jobs.submit(make_train_request(hf_token="hf_canary", training_config=config), TENANT)
    harness.jobs.reconcile()
    assert harness.secrets.read(job.job_id) == {"hf_token": "hf_canary", "wandb_api_key": "wb_canary"}
    kept = harness.find_job(job)
    everything = kept.model_dump_json() + repr(kept) + repr(harness.launcher.launched) + str(kept.training_config)
    everything += "".join(path.read_text() for path in (tmp_path / "objects").rglob("*") if path.is_file())
    everything += str(harness.launcher.launched[attempt_name(job.job_id, 1)].environment)
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
def test_unsupported_request_is_rejected_before_storing(
    harness: JobsHarness, changes: dict[str, object], error: type[InvalidRequest], param: str
) -> None:
    with pytest.raises(error) as refusal:
        harness.submit(**changes, hf_token="hf_x")
    assert refusal.value.param == param
    assert harness.store.list_queued_jobs(10) == []
    assert list(harness.secrets.iter_job_ids()) == []


def test_evaluation_without_held_out_rows_is_rejected(harness: JobsHarness) -> None:
    train_only = {"train": make_dataset().splits["train"]}
    harness.store.create_dataset(make_dataset("dataset_2", splits=train_only))
    with pytest.raises(InvalidRequest, match="held-out"):
        harness.submit(processed_dataset_id="dataset_2")


def test_dataset_of_other_tenant_is_not_found(harness: JobsHarness) -> None:
    with pytest.raises(NotFound):
        harness.jobs.submit(make_train_request(), "another tenant")


def test_job_of_other_tenant_is_not_found(harness: JobsHarness) -> None:
    job = harness.submit()
    for look in (harness.jobs.find, harness.jobs.cancel, harness.jobs.delete):
        with pytest.raises(NotFound):
            look(job.job_id, "another tenant")


# --- launching -------------------------------------------------------------------------------------------------------


def test_queued_job_launches_once_with_spec_and_attempt_token(harness: JobsHarness) -> None:
    job = harness.submit()
    harness.jobs.reconcile()
    harness.jobs.reconcile()
    [order] = harness.launcher.launched.values()
    assert order.name == attempt_name(job.job_id, 1)
    assert order.environment["HF_ENDPOINT"] == "https://hub.example"
    harness.tokens.verify_attempt_token(order.environment["JOB_TOKEN"], job.job_id, 1)
    with pytest.raises(Unauthorized):
        harness.tokens.verify_attempt_token(order.environment["JOB_TOKEN"], job.job_id, 2)
    spec = JobSpec.load(harness.objects.read(spec_key(job.job_id)))
    assert (spec.job_id, spec.training_config) == (job.job_id, job.training_config)
    attempt = harness.find_job(job).attempt
    assert attempt is not None
    assert attempt.handle == f"handle of {order.name}"


def test_oldest_queued_job_launches_first(harness: JobsHarness) -> None:
    harness.launcher.slots = 1
    jobs = []
    for _ in range(3):
        jobs.append(harness.submit())
        harness.clock.advance(1)
    harness.jobs.reconcile()
    assert [harness.find_job(job).status for job in jobs] == [Status.PREPARING, Status.QUEUED, Status.QUEUED]
    harness.launcher.states[f"handle of {attempt_name(jobs[0].job_id, 1)}"] = "ended"
    harness.write_result(jobs[0])
    harness.jobs.reconcile()
    harness.jobs.reconcile()
    assert [harness.find_job(job).status for job in jobs] == [Status.COMPLETED, Status.PREPARING, Status.QUEUED]


def test_launch_failure_fails_job_with_reason(harness: JobsHarness) -> None:
    harness.launcher.refusal = LaunchFailed("no such machine", hint="make setup")
    job = harness.submit(hf_token="hf_x")
    harness.jobs.reconcile()
    kept = harness.find_job(job)
    assert kept.status is Status.FAILED
    assert kept.failure is not None
    assert (kept.failure.code, kept.failure.message, kept.failure.hint) == ("launch_failed", "no such machine", "make setup")
    assert list(harness.secrets.iter_job_ids()) == []


def test_launch_with_lost_response_is_not_repeated(harness: JobsHarness) -> None:
    harness.launcher.dies_after_launch = True
    job = harness.submit()
    harness.jobs.reconcile()
    attempt = harness.find_job(job).attempt
    assert attempt is not None
    assert attempt.handle is None
    harness.launcher.dies_after_launch = False
    harness.clock.advance(60)
    harness.jobs.reconcile()  # FakeLauncher fails the test if it is asked twice
    attempt = harness.find_job(job).attempt
    assert attempt is not None
    assert attempt.handle is not None


def test_missing_launch_is_retried(harness: JobsHarness) -> None:
    harness.launcher.refusal = Unavailable("not now")
    job = harness.submit()
    harness.jobs.reconcile()
    harness.launcher.refusal = None
    harness.jobs.reconcile()
    assert harness.launcher.launched == {}  # too early to look: its launcher may be at work
    harness.clock.advance(60)
    harness.jobs.reconcile()
    assert list(harness.launcher.launched) == [attempt_name(job.job_id, 1)]


def test_one_failing_job_does_not_block_others(harness: JobsHarness) -> None:
    first = harness.submit()
    harness.store.delete_dataset("dataset_1")
    harness.store.create_dataset(make_dataset("dataset_2"))
    second = harness.submit(processed_dataset_id="dataset_2")
    harness.jobs.reconcile()
    assert harness.find_job(first).status is Status.FAILED
    assert harness.find_job(second).status is Status.PREPARING


def test_pending_launch_shows_reason_until_launched(harness: JobsHarness) -> None:
    harness.launcher.refusal = Unavailable("no L4 is free", hint="ask for more")
    job = harness.submit()
    harness.jobs.reconcile()
    attempt = harness.find_job(job).attempt
    assert attempt is not None
    assert attempt.pending_reason == "no L4 is free ask for more"
    harness.launcher.refusal = None
    harness.clock.advance(60)
    harness.jobs.reconcile()
    attempt = harness.find_job(job).attempt
    assert attempt is not None
    assert attempt.pending_reason is None
    assert attempt.handle is not None


def test_missing_bucket_delays_launch_with_reason(harness: JobsHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_bucket(*_: object, **__: object) -> None:
        raise StoreUnavailable("no bucket configs")

    with monkeypatch.context() as patch:
        patch.setattr(harness.objects, "write", no_bucket)
        job = harness.submit()
        harness.jobs.reconcile()
    attempt = harness.find_job(job).attempt
    assert attempt is not None
    assert attempt.pending_reason == "no bucket configs"
    assert harness.launcher.launched == {}
    harness.clock.advance(60)
    harness.jobs.reconcile()
    assert list(harness.launcher.launched) == [attempt_name(job.job_id, 1)]


def test_concurrent_reconcilers_launch_attempt_once(harness: JobsHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    harness.launcher.refusal = Unavailable("not now")
    harness.submit()
    harness.jobs.reconcile()
    harness.launcher.refusal = None
    harness.clock.advance(60)
    looks = []

    def find_during_other_reconcile(name: str) -> str | None:
        looks.append(name)
        if len(looks) == 1:
            harness.jobs.reconcile()  # another instance, between this one's look and its launch
        return None

    monkeypatch.setattr(harness.launcher, "find_handle", find_during_other_reconcile)
    harness.jobs.reconcile()  # FakeLauncher fails the test if it is asked twice
    assert len(looks) == 2
    assert len(harness.launcher.launched) == 1


def test_claimed_attempt_is_not_launched_again(harness: JobsHarness) -> None:
    harness.launcher.refusal = Unavailable("the answer was lost")
    job = harness.submit()
    harness.jobs.reconcile()
    harness.launcher.refusal = None
    harness.jobs.claim(job.job_id, 1, "p")
    harness.jobs.report(job.job_id, 1, make_batch())
    harness.clock.advance(30)
    harness.jobs.reconcile()
    assert harness.launcher.launched == {}
    assert harness.find_job(job).status is Status.PREPARING
    harness.clock.advance(61)  # and nothing more is heard of it
    harness.jobs.reconcile()
    assert harness.find_job(job).attempts[0].outcome == "lost"


def test_submission_launches_immediately_without_background_task(harness: JobsHarness) -> None:
    harness.on_wake = harness.jobs.reconcile_job
    job = harness.submit()
    assert list(harness.launcher.launched) == [attempt_name(job.job_id, 1)]
    assert harness.find_job(job).status is Status.PREPARING


def test_finished_job_starts_next_without_background_task(harness: JobsHarness) -> None:
    harness.on_wake = harness.jobs.reconcile_job
    harness.launcher.slots = 1
    first, second = harness.submit(), harness.submit()
    assert harness.find_job(second).status is Status.QUEUED
    harness.launcher.states[f"handle of {attempt_name(first.job_id, 1)}"] = "ended"
    harness.jobs.finish(first.job_id, harness.write_result(first))
    assert harness.find_job(second).status is Status.PREPARING


def test_jobs_are_reconciled_concurrently_when_polling_is_slow(harness: JobsHarness) -> None:
    harness.launcher.polling_is_free = False
    harness.launcher.slots = 20
    jobs = [harness.submit() for _ in range(20)]
    assert harness.jobs.reconcile() == 20
    assert len(harness.launcher.launched) == 20
    for job in jobs[:19]:
        harness.write_result(job)
    harness.launcher.states.pop(f"handle of {attempt_name(jobs[19].job_id, 1)}")  # and one of them is trouble
    assert harness.jobs.reconcile() == 19
    assert [harness.find_job(job).status for job in jobs[:19]] == [Status.COMPLETED] * 19


def test_reading_silent_job_reconciles_it(harness: JobsHarness) -> None:
    job = harness.start_training()
    harness.launcher.polling_is_free = False
    harness.on_wake = harness.jobs.reconcile_job
    harness.write_result(job)
    assert harness.jobs.get_refreshed(job.job_id, TENANT)[0].status is Status.TRAINING  # it was heard of a moment ago
    harness.clock.advance(61)
    assert harness.jobs.get_refreshed(job.job_id, TENANT)[0].status is Status.COMPLETED


def test_submission_survives_failed_reconcile_step(harness: JobsHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_unavailable(_: int) -> list[Job]:
        raise Unavailable

    harness.on_wake = harness.jobs.reconcile_job
    monkeypatch.setattr(harness.store, "list_active_jobs", raise_unavailable)
    assert harness.find_job(harness.submit()).status is Status.QUEUED


def test_step_is_skipped_when_deadline_is_near(harness: JobsHarness) -> None:
    harness.on_wake = harness.jobs.reconcile_job
    with deadline(1.0):
        job = harness.submit()
    assert harness.find_job(job).status is Status.QUEUED


# --- reporting -------------------------------------------------------------------------------------------------------


def test_first_claim_receives_secrets_and_second_is_fenced(harness: JobsHarness) -> None:
    job = harness.submit(hf_token="hf_x")
    harness.jobs.reconcile()
    assert harness.jobs.claim(job.job_id, 1, "p").secrets == {"hf_token": "hf_x"}
    with pytest.raises(Fenced):
        harness.jobs.claim(job.job_id, 1, "another")


def test_reports_update_job_and_return_directive(harness: JobsHarness) -> None:
    job = harness.start_training()
    assert job.status is Status.TRAINING
    assert harness.jobs.report(job.job_id, 1, make_batch(first_seq=1)).directive == "continue"
    harness.jobs.cancel(job.job_id, TENANT)
    assert harness.jobs.report(job.job_id, 1, make_batch(first_seq=1)).directive == "cancel"


def test_heartbeats_do_not_change_job_record(harness: JobsHarness) -> None:
    job = harness.start_training()
    for n in range(5):
        harness.jobs.report(job.job_id, 1, make_batch({"type": "metrics", "step": n, "values": {"loss": 1.0}}, first_seq=1 + n))
    assert harness.find_job(job).revision == job.revision


def test_report_of_finished_attempt_is_fenced(harness: JobsHarness) -> None:
    job = harness.start_training()
    harness.jobs.finish(job.job_id, harness.write_result(job))
    with pytest.raises(Fenced):
        harness.jobs.report(job.job_id, 1, make_batch())


def test_events_contain_each_status_once(harness: JobsHarness) -> None:
    job = harness.start_training()
    harness.jobs.finish(job.job_id, harness.write_result(job))
    harness.jobs.finish(job.job_id, harness.write_result(job))
    told = [stored.event for stored in harness.jobs.list_events(job.job_id, TENANT, 0, 100)]
    assert [event.status for event in told if event.type == "status"] == ["preparing", "training", "completed"]


# --- ending ----------------------------------------------------------------------------------------------------------


def test_result_of_ended_attempt_decides_status(harness: JobsHarness) -> None:
    job = harness.start_training()
    harness.write_result(job)
    harness.launcher.states[f"handle of {attempt_name(job.job_id, 1)}"] = "ended"
    harness.jobs.reconcile()
    assert harness.find_job(job).status is Status.COMPLETED


def test_attempt_without_result_is_followed_by_next_attempt(harness: JobsHarness) -> None:
    job = harness.start_training()
    harness.launcher.states[f"handle of {attempt_name(job.job_id, 1)}"] = "ended"
    harness.jobs.reconcile()
    job = harness.find_job(job)
    assert [attempt.outcome for attempt in job.attempts] == ["lost", None]
    assert attempt_name(job.job_id, 2) in harness.launcher.launched


def test_unreported_checkpoint_counts_as_progress(harness: JobsHarness) -> None:
    job = harness.start_training()
    harness.write_checkpoint(job, step=8)
    harness.launcher.states[f"handle of {attempt_name(job.job_id, 1)}"] = "ended"
    harness.jobs.reconcile()
    assert harness.find_job(job).checkpoint is not None
    assert harness.find_job(job).attempts[0].last_checkpoint_step == 8


# --- leases ----------------------------------------------------------------------------------------------------------


def test_silent_running_attempt_gets_a_lease(harness: JobsHarness) -> None:
    job = harness.start_training()
    harness.clock.advance(3600)  # the machine slept: neither was awake
    harness.jobs.reconcile()
    assert harness.find_job(job).attempts[0].suspected_at == harness.clock.now
    harness.clock.advance(299)
    harness.jobs.reconcile()
    assert harness.launcher.cancels == []
    harness.jobs.report(job.job_id, 1, make_batch())
    harness.clock.advance(59)
    harness.jobs.reconcile()
    assert harness.launcher.cancels == []
    assert harness.find_job(job).status is Status.TRAINING


def test_silent_attempt_is_killed_then_marked_lost(harness: JobsHarness) -> None:
    job = harness.start_training()
    harness.clock.advance(61)
    harness.jobs.reconcile()
    harness.clock.advance(300)
    harness.jobs.reconcile()
    assert [force for _, force in harness.launcher.cancels] == [True]
    assert harness.find_job(job).status is Status.TRAINING  # its compute may still be there
    harness.clock.advance(60)
    harness.jobs.reconcile()
    assert [attempt.outcome for attempt in harness.find_job(job).attempts] == ["lost", None]
    with pytest.raises(Fenced):
        harness.jobs.report(job.job_id, 1, make_batch())


def test_unclaimed_attempt_is_marked_lost_after_timeout(harness: JobsHarness) -> None:
    job = harness.submit()
    harness.jobs.reconcile()
    for minutes in (9, 2):  # its machine may still be starting; then it is doubted
        harness.clock.advance(60 * minutes)
        harness.jobs.reconcile()
    assert harness.find_job(job).attempts[0].suspected_at == harness.clock.now
    harness.clock.advance(60 * 6)
    harness.jobs.reconcile()
    assert [attempt.outcome for attempt in harness.find_job(job).attempts] == ["lost", None]
    with pytest.raises(Fenced):
        harness.jobs.claim(job.job_id, 1, "p")


def test_heartbeat_clears_suspicion(harness: JobsHarness) -> None:
    job = harness.start_training()
    harness.clock.advance(61)
    harness.jobs.reconcile()
    harness.clock.advance(200)
    harness.jobs.report(job.job_id, 1, make_batch())
    harness.clock.advance(150)  # silent again, and longer than a lease since the first doubt
    harness.jobs.reconcile()
    assert harness.launcher.cancels == []
    assert harness.find_job(job).attempts[0].suspected_at == harness.clock.now


def test_clock_jump_does_not_restore_suspicion(harness: JobsHarness) -> None:
    job = harness.start_training()
    harness.clock.advance(600)  # the clock jumps ahead: silent, it seems
    harness.jobs.reconcile()
    harness.jobs.report(job.job_id, 1, make_batch())
    assert harness.find_job(job).attempts[0].suspected_at is None
    harness.clock.advance(-600)
    for _ in range(30):
        harness.clock.advance(15)
        harness.jobs.report(job.job_id, 1, make_batch())
    harness.clock.advance(600)
    harness.jobs.reconcile()
    assert harness.launcher.cancels == []
    assert len(harness.find_job(job).attempts) == 1


@pytest.mark.parametrize(("preempted", "status"), [(False, Status.FAILED), (True, Status.PREPARING)])  # the next attempt
def test_exit_reason_decides_retry_or_failure(harness: JobsHarness, preempted: bool, status: Status) -> None:
    job = harness.start_training()
    handle = f"handle of {attempt_name(job.job_id, 1)}"
    harness.launcher.states[handle] = "ended"
    harness.launcher.exit_reasons[handle] = ExitReason(Failure(code="out_of_memory", message="16 GiB were not enough"), preempted)
    harness.jobs.reconcile()
    kept = harness.find_job(job)
    assert kept.status is status
    failure = kept.attempts[0].failure
    assert failure is not None
    assert (failure.code, failure.attempt) == ("out_of_memory", 1)


def test_end_is_not_handled_while_exit_reason_is_unavailable(harness: JobsHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_unavailable(_: str) -> ExitReason | None:
        raise Unavailable

    job = harness.start_training()
    harness.launcher.states[f"handle of {attempt_name(job.job_id, 1)}"] = "ended"
    monkeypatch.setattr(harness.launcher, "get_exit_reason", raise_unavailable)
    harness.jobs.reconcile()
    assert harness.find_job(job).status is Status.TRAINING


def test_unknown_is_not_failed(harness: JobsHarness) -> None:
    job = harness.start_training()
    harness.launcher.states[f"handle of {attempt_name(job.job_id, 1)}"] = "unknown"
    for _ in range(60):
        harness.clock.advance(120)
        harness.jobs.reconcile()
    assert harness.find_job(job).status is Status.TRAINING
    assert len(harness.launcher.launched) == 1


def test_secrets_are_destroyed_when_job_ends(harness: JobsHarness) -> None:
    job = harness.submit(hf_token="hf_x")
    harness.jobs.cancel(job.job_id, TENANT)
    assert list(harness.secrets.iter_job_ids()) == []


def test_secrets_are_kept_when_create_outcome_is_unknown(harness: JobsHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    create = harness.store.create_job

    def create_and_lose_response(job: Job, key: IdempotencyKey | None = None) -> Job:
        create(job, key)
        raise Unavailable("the answer was lost")

    monkeypatch.setattr(harness.store, "create_job", create_and_lose_response)
    with pytest.raises(Unavailable):
        harness.submit(hf_token="hf_x")
    (job_id,) = harness.secrets.iter_job_ids()
    harness.jobs.reconcile()
    assert harness.jobs.claim(job_id, 1, "p").secrets == {"hf_token": "hf_x"}


def test_sweep_destroys_only_leftover_secrets(harness: JobsHarness) -> None:
    ended, open_job = harness.submit(hf_token="hf_x"), harness.submit(hf_token="hf_x")
    harness.jobs.cancel(ended.job_id, TENANT)
    harness.secrets.put(ended.job_id, {"hf_token": "hf_x"})  # the destruction had failed
    harness.secrets.put("orphan", {"hf_token": "hf_x"})
    assert harness.jobs.delete_stale_secrets() == 1
    assert list(harness.secrets.iter_job_ids()) == sorted(["orphan", open_job.job_id])
    assert harness.jobs.delete_stale_secrets(orphans=True) == 1
    assert list(harness.secrets.iter_job_ids()) == [open_job.job_id]


def test_cancel_escalates_from_directive_to_signal_to_force(harness: JobsHarness) -> None:
    job = harness.start_training()
    harness.jobs.cancel(job.job_id, TENANT)
    harness.jobs.reconcile()
    assert harness.launcher.cancels == []
    harness.clock.advance(1.5)
    harness.jobs.reconcile()
    assert [force for _, force in harness.launcher.cancels] == [False]
    harness.clock.advance(10)
    harness.jobs.reconcile()
    assert [force for _, force in harness.launcher.cancels] == [False, True]
    harness.launcher.states[f"handle of {attempt_name(job.job_id, 1)}"] = "ended"
    harness.jobs.reconcile()
    assert harness.find_job(job).status is Status.CANCELLED


# --- pause, resume, retry --------------------------------------------------------------------------------------------


def test_pause_directive_keeps_progress_for_resume(harness: JobsHarness) -> None:
    job = harness.start_training()
    assert harness.jobs.pause(job.job_id, TENANT).status is Status.PAUSING
    assert harness.jobs.report(job.job_id, 1, make_batch()).directive == "pause"
    harness.jobs.finish(job.job_id, harness.write_result(job, "paused", saved_step=3))
    assert harness.find_job(job).status is Status.PAUSED
    harness.jobs.reconcile()
    assert len(harness.launcher.launched) == 1
    harness.jobs.resume(job.job_id, TENANT, ResumeRequest.model_validate({}))
    harness.jobs.reconcile()
    assert attempt_name(job.job_id, 2) in harness.launcher.launched


def test_pausing_unlaunched_job_does_not_relaunch_it(harness: JobsHarness) -> None:
    harness.launcher.refusal = Unavailable("no room")
    job = harness.submit()
    harness.jobs.reconcile()
    harness.jobs.pause(job.job_id, TENANT)
    harness.launcher.refusal = None
    harness.clock.advance(6)
    harness.jobs.reconcile()
    assert harness.find_job(job).status is Status.PAUSED
    assert harness.launcher.launched == {}


def test_resume_allows_extension_and_rejects_immutable_fields(harness: JobsHarness) -> None:
    job = harness.submit()
    harness.jobs.pause(job.job_id, TENANT)
    for changes, param, words in (
        ({"epochs": 1}, "epochs", "can only grow"),
        ({"max_steps": 50}, "max_steps", "counted in epochs"),
        ({"hf_token": "hf_x"}, "hf_token", "was made without"),
    ):
        with pytest.raises(InvalidRequest, match=words) as refused:
            harness.jobs.resume(job.job_id, TENANT, ResumeRequest.model_validate(changes))
        assert refused.value.param == param
    with pytest.raises(ValidationError, match="learning_rate cannot change"):
        ResumeRequest.model_validate({"learning_rate": 0.1})
    resumed = harness.jobs.resume(job.job_id, TENANT, ResumeRequest.model_validate({"epochs": 9}))
    assert resumed.training_config.hyperparameters.epochs == 9
    harness.jobs.reconcile()
    assert JobSpec.load(harness.objects.read(spec_key(job.job_id))).training_config.hyperparameters.epochs == 9


def test_retry_requires_secrets_again(harness: JobsHarness) -> None:
    job = harness.submit(hf_token="hf_x")
    harness.jobs.cancel(job.job_id, TENANT)
    with pytest.raises(InvalidRequest, match="hf_token is needed again") as refused:
        harness.jobs.retry(job.job_id, TENANT, RetryRequest.model_validate({}))
    assert refused.value.param == "hf_token"
    assert harness.find_job(job).status is Status.CANCELLED
    retried = harness.jobs.retry(job.job_id, TENANT, RetryRequest.model_validate({"hf_token": "hf_y"}))
    assert retried.status is Status.QUEUED
    harness.jobs.reconcile()
    assert harness.jobs.claim(job.job_id, 1, "p").secrets == {"hf_token": "hf_y"}


def test_retry_resumes_from_checkpoint_or_restarts(harness: JobsHarness) -> None:
    job = harness.start_training()
    harness.write_checkpoint(job, step=8)
    harness.jobs.finish(job.job_id, harness.write_result(job, "failed", saved_step=8))
    harness.jobs.retry(job.job_id, TENANT, RetryRequest.model_validate({}))
    harness.jobs.reconcile()
    assert JobSpec.load(harness.objects.read(spec_key(job.job_id))).resume_from_attempt == 1
    assert [found.checkpoint.step for found in harness.jobs.list_checkpoints(job.job_id, TENANT)] == [8]
    harness.jobs.claim(job.job_id, 2, "p")
    harness.jobs.finish(job.job_id, harness.write_result(job, "failed", attempt=2))
    harness.jobs.retry(job.job_id, TENANT, RetryRequest.model_validate({"from_start": True}))
    harness.jobs.reconcile()
    assert JobSpec.load(harness.objects.read(spec_key(job.job_id))).resume_from_attempt == 3
    assert harness.jobs.list_checkpoints(job.job_id, TENANT) == []


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_checkpoints_are_listed_in_resume_order(harness: JobsHarness) -> None:
    job = harness.start_training()
    for step, attempt in ((10, 1), (30, 1), (20, 2)):
        harness.write_checkpoint(job, step=step, attempt=attempt)
    harness.objects.write(f"{checkpoints_prefix(job.job_id, None)}attempt-3/step-00000040/adapter.bin", b"half a checkpoint")
    harness.objects.write(f"{checkpoints_prefix(job.job_id, None)}attempt-3/step-00000050/manifest.json", b"{")
    found = harness.jobs.list_checkpoints(job.job_id, TENANT)
    assert [(stored.checkpoint.attempt, stored.checkpoint.step) for stored in found] == [(2, 20), (1, 30), (1, 10)]


def test_checkpoint_export_creates_its_own_job(harness: JobsHarness) -> None:
    job = harness.start_training()
    harness.write_checkpoint(job, step=10)
    request = ExportRequest.model_validate({"export_config": {"format": "merged"}})
    made = harness.jobs.export(job.job_id, 10, TENANT, request, "key-1")
    assert harness.jobs.export(job.job_id, 10, TENANT, request, "key-1").job_id == made.job_id
    assert made.job_name == f"{job.job_name} at step 10"
    harness.jobs.reconcile()
    spec = JobSpec.load(harness.objects.read(spec_key(made.job_id)))
    assert spec.export_of is not None
    assert (spec.export_of.job_id, spec.export_of.key) == (job.job_id, checkpoint_key(checkpoints_prefix(job.job_id, None), 1, 10))
    assert spec.training_config.export_config.format == "merged"
    with pytest.raises(NotFound, match="no checkpoint at step 11; it has: 10"):
        harness.jobs.export(job.job_id, 11, TENANT, request)


def test_export_runs_no_gate_and_no_trackers(harness: JobsHarness) -> None:
    config = {"base_model_id": "g/m", "tensorboard_config": {}, "wandb_config": {"mode": "offline"}}
    gate = {"promotion_gate": [{"metric": "perplexity", "at_most": 0.9, "relative_to_base": True}]}
    job = harness.submit(training_config=config | {"eval_config": gate})
    harness.write_checkpoint(job, step=10)
    made = harness.jobs.export(job.job_id, 10, TENANT, ExportRequest.model_validate({}))
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
def test_unsupported_export_is_rejected(harness: JobsHarness, config: dict[str, object], export: dict[str, object], param: str) -> None:
    harness.store.create_dataset(make_dataset("pairs", dataset_type="preference"))
    rows = "pairs" if "trainer_type" in config else "dataset_1"
    job = harness.submit(processed_dataset_id=rows, training_config={"base_model_id": "g/m"} | config)
    harness.write_checkpoint(job, step=10)
    with pytest.raises(InvalidRequest) as refused:
        harness.jobs.export(job.job_id, 10, TENANT, ExportRequest.model_validate({"export_config": export}))
    assert refused.value.param == param


def make_reexport_request(**body: object) -> ReexportRequest:
    return ReexportRequest.model_validate(body)


def test_export_defaults_to_published_then_newest_checkpoint(harness: JobsHarness) -> None:
    job = harness.start_training()
    for step in (10, 20, 30):
        harness.write_checkpoint(job, step=step)
    newest = harness.jobs.reexport(job.job_id, TENANT, make_reexport_request(), "key-1")
    assert newest.export_of is not None
    assert newest.export_of.step == 30
    harness.jobs.finish(job.job_id, harness.write_result(job, published_step=20))
    assert (
        harness.jobs.reexport(job.job_id, TENANT, make_reexport_request(), "key-1").job_id == newest.job_id
    )  # the same request: the same job
    for body, step in (({}, 20), ({"step": 10}, 10)):
        made = harness.jobs.reexport(job.job_id, TENANT, make_reexport_request(**body))
        assert made.export_of is not None
        assert made.export_of.step == step
    harness.objects.delete(checkpoint_key(checkpoints_prefix(job.job_id, None), 1, 20) + MANIFEST)
    made = harness.jobs.reexport(job.job_id, TENANT, make_reexport_request())
    assert made.export_of is not None
    assert made.export_of.step == 30


def test_export_without_checkpoint_explains_why(harness: JobsHarness) -> None:
    job = harness.start_training()
    with pytest.raises(NotFound, match="is training and has no checkpoint yet"):
        harness.jobs.reexport(job.job_id, TENANT, make_reexport_request())
    harness.write_checkpoint(job, step=10)
    export = harness.jobs.reexport(job.job_id, TENANT, make_reexport_request())
    with pytest.raises(NotFound, match="trained nothing") as refused:
        harness.jobs.reexport(export.job_id, TENANT, make_reexport_request())
    assert f"/jobs/{job.job_id}/export" in refused.value.hint
    harness.jobs.finish(job.job_id, harness.write_result(job))
    harness.objects.delete(checkpoint_key(checkpoints_prefix(job.job_id, None), 1, 10) + MANIFEST)
    with pytest.raises(NotFound, match="no checkpoint") as refused:
        harness.jobs.reexport(job.job_id, TENANT, make_reexport_request())
    assert "clone" in refused.value.hint


# --- the promotion gate ----------------------------------------------------------------------------------------------


def test_failed_gate_completes_job_but_blocks_download(harness: JobsHarness) -> None:
    job = harness.start_training()
    failed = GateCheck(metric="perplexity", value=12.5, at_most=9.0, passed=False, reason="12.5 is above 9")
    passed = GateCheck(metric="accuracy", value=0.9, at_least=0.5, passed=True)
    gate = Gate(passed=False, checks=(passed, failed))
    harness.jobs.finish(job.job_id, harness.write_result(job, gate=gate, published_step=0, tracker_urls={"mlflow": "https://m"}))
    kept = harness.find_job(job)
    assert (kept.status, kept.gate, kept.published_step, kept.tracker_urls) == (Status.COMPLETED, gate, 0, {"mlflow": "https://m"})
    with pytest.raises(Conflict, match=r"perplexity: 12\.5 is above 9") as refused:
        harness.jobs.create_download_links(job.job_id, TENANT, None)
    assert "accuracy" not in refused.value.message
    assert f"POST /jobs/{job.job_id}/export" in refused.value.hint


# --- clones ----------------------------------------------------------------------------------------------------------


def test_clone_is_a_new_job_with_source_reference(harness: JobsHarness) -> None:
    job = harness.submit(job_name="first")
    patch = CloneRequest.model_validate({"training_config": {"hyperparameters": {"epochs": 9}}})
    made = harness.jobs.clone(job.job_id, TENANT, patch, "key-1")
    assert harness.jobs.clone(job.job_id, TENANT, patch, "key-1").job_id == made.job_id
    assert (made.cloned_from, made.job_name, made.status) == (job.job_id, "first", Status.QUEUED)
    assert made.training_config.hyperparameters.epochs == 9
    assert harness.find_job(job) == job
    with pytest.raises(NotFound):
        harness.jobs.clone(job.job_id, "another tenant", patch)


def test_clone_is_validated_like_a_request(harness: JobsHarness) -> None:
    job = harness.submit()
    for patch, error in (
        ({"training_config": {"method": "QLoRA"}}, Unsupported),
        ({"training_config": {"trainer_type": "dpo"}}, InvalidRequest),
        ({"processed_dataset_id": "dataset_none"}, NotFound),
    ):
        with pytest.raises(error):
            harness.jobs.clone(job.job_id, TENANT, CloneRequest.model_validate(patch))
    harness.write_checkpoint(job, step=1)
    export = harness.jobs.reexport(job.job_id, TENANT, make_reexport_request())
    with pytest.raises(InvalidRequest, match="trained nothing"):
        harness.jobs.clone(export.job_id, TENANT, CloneRequest.model_validate({}))


# --- secrets and the deployment's trackers ---------------------------------------------------------------------------


def test_retry_requires_grader_and_tracker_secrets_by_name(harness: JobsHarness) -> None:
    harness.store.create_dataset(make_dataset("prompts", dataset_type="prompt"))
    judge = {"type": "score_model", "name": "judge", "base_url": "https://j.example", "model": "m", "api_key": "canary-1"}
    config = {"base_model_id": "g/m", "trainer_type": "grpo", "reward_config": [judge]}
    job = harness.submit(processed_dataset_id="prompts", training_config=config)
    assert "canary" not in harness.find_job(job).model_dump_json()
    harness.jobs.cancel(job.job_id, TENANT)
    with pytest.raises(InvalidRequest, match="judge_api_key is needed again") as refused:
        harness.jobs.retry(job.job_id, TENANT, RetryRequest.model_validate({}))
    assert refused.value.param == "secrets.judge_api_key"
    harness.jobs.retry(job.job_id, TENANT, RetryRequest.model_validate({"secrets": {"judge_api_key": "canary-2"}}))
    harness.jobs.reconcile()
    assert harness.jobs.claim(job.job_id, 1, "p").secrets == {"judge_api_key": "canary-2"}


def test_deployment_tracker_is_shown_and_needs_no_user_secret(tmp_path: Path) -> None:
    ours = DeploymentTrackers.model_validate({"mlflow_config": {"tracking_uri": "https://ours.example", "token": "canary"}})
    world = JobsHarness(tmp_path, ours)
    job = world.submit()
    assert job.training_config.mlflow_config is not None
    assert job.training_config.mlflow_config.tracking_uri == "https://ours.example"
    assert "canary" not in world.find_job(job).model_dump_json()
    world.jobs.cancel(job.job_id, TENANT)
    world.jobs.retry(job.job_id, TENANT, RetryRequest.model_validate({}))
    made = world.jobs.clone(job.job_id, TENANT, CloneRequest.model_validate({}))
    world.jobs.reconcile()
    for each in (job, made):
        assert world.jobs.claim(each.job_id, 1, "p").secrets == {"mlflow_token": "canary"}


def test_embedding_grader_needs_stored_model_or_endpoint(harness: JobsHarness) -> None:
    harness.store.create_dataset(make_dataset("prompts", dataset_type="prompt", columns=("answer",)))
    near = {"type": "text_similarity", "name": "near", "metric": "cosine", "embedding_model": "lab/small"}

    def submit(**changes: object) -> Job:
        config = {"base_model_id": "g/m", "trainer_type": "grpo", "reward_config": [near | changes]}
        return harness.submit(processed_dataset_id="prompts", training_config=config)

    with pytest.raises(InvalidRequest, match="not in this deployment's model store") as refused:
        submit()
    assert refused.value.param == "training_config.reward_config.0.embedding_model"
    submit(base_url="https://e.example")
    harness.objects.write("pretrained_weights/huggingface/lab/small/config.json", b"{}")
    submit()


# --- the Hub ---------------------------------------------------------------------------------------------------------

PUSH_CONFIG = {"base_model_id": "g/m", "export_config": {"destination": "hfhub", "hf_repo_id": "ada/tuned"}}


def test_hub_push_requires_token(harness: JobsHarness) -> None:
    space = {"base_model_id": "g/m", "trackio_config": {"space_id": "ada/curves"}}
    for config in (PUSH_CONFIG, space):
        with pytest.raises(InvalidRequest, match="needs hf_token, to write to ada/") as refused:
            harness.submit(training_config=config)
        assert refused.value.param == "hf_token"
    assert harness.submit(training_config=space, hf_token="hf_x").secret_names == ("hf_token",)
    job = harness.submit()
    harness.write_checkpoint(job, step=1)
    with pytest.raises(InvalidRequest, match="needs hf_token"):
        harness.jobs.reexport(job.job_id, TENANT, make_reexport_request(export_config=PUSH_CONFIG["export_config"]))


def test_missing_hub_access_is_rejected_before_storing(harness: JobsHarness) -> None:
    harness.hub.write_result, harness.hub.account_result = "absent", HubAccount("grace", "write", {})
    with pytest.raises(InvalidRequest, match="cannot write to 'ada'"):
        harness.submit(training_config=PUSH_CONFIG, hf_token="hf_x")
    harness.hub.read_result = "gated"
    with pytest.raises(InvalidRequest, match="gated"):
        harness.submit()
    assert harness.store.list_queued_jobs(10) == []
    assert list(harness.secrets.iter_job_ids()) == []
    harness.hub.read_result, harness.hub.write_result = "unknown", "unknown"
    harness.hub.account_result = None
    assert harness.submit(training_config=PUSH_CONFIG, hf_token="hf_x").status is Status.QUEUED


def test_stored_base_model_needs_no_hub_call(harness: JobsHarness) -> None:
    harness.objects.write("pretrained_weights/huggingface/google/gemma-3-270m/config.json", b"{}")
    harness.hub.read_result = "absent"
    assert harness.submit().status is Status.QUEUED
    assert harness.hub.requests == []


def test_hub_repository_is_deleted_only_on_request_without_foreign_commits(harness: JobsHarness) -> None:
    job = harness.start_training()
    push = HubPush(repo_id="ada/tuned", revision="a", url="https://hub")
    harness.jobs.finish(job.job_id, harness.write_result(job, artifacts=[make_artifact(job) | {"hub": push}]))
    harness.hub.repositories["ada/tuned"] = ["initial", "a", "somebody's"]
    with pytest.raises(InvalidRequest, match="needs a token") as refused:
        harness.jobs.delete(job.job_id, TENANT, delete_hub=True)
    assert refused.value.param == "X-HF-Token"
    with pytest.raises(InvalidRequest, match="1 commits that are not of this job"):
        harness.jobs.delete(job.job_id, TENANT, delete_hub=True, hub_token="hf_x")
    assert harness.find_job(job).deletion_started_at is None
    harness.hub.repositories["ada/tuned"].pop()
    deleted = harness.jobs.delete(job.job_id, TENANT, delete_hub=True, hub_token="hf_x")
    assert deleted is not None
    assert deleted.resources[0] == "hf://ada/tuned"
    assert harness.hub.repositories == {}


def test_deletion_keeps_hub_repository_by_default(harness: JobsHarness) -> None:
    job = harness.start_training()
    push = HubPush(repo_id="ada/tuned", revision="a", url="https://hub")
    harness.jobs.finish(job.job_id, harness.write_result(job, artifacts=[make_artifact(job) | {"hub": push}]))
    harness.hub.repositories["ada/tuned"] = ["initial", "a"]
    assert harness.jobs.delete(job.job_id, TENANT)
    assert "ada/tuned" in harness.hub.repositories


# --- files -----------------------------------------------------------------------------------------------------------


def test_service_writes_publish_manifest(harness: JobsHarness) -> None:
    job = harness.start_training()
    harness.jobs.finish(job.job_id, harness.write_result(job, artifacts=[make_artifact(job)]))
    manifest = PublishManifest.load(harness.objects.read(manifest_key(job.job_id)))
    assert (manifest.attempt, [artifact.name for artifact in manifest.artifacts]) == (1, ["adapter"])
    assert harness.find_job(job).manifest_written


def test_unwritten_manifest_is_written_on_next_read(harness: JobsHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    job = harness.start_training()
    result = harness.write_result(job, artifacts=[make_artifact(job)])

    def raise_unavailable(*_: object, **__: object) -> NoReturn:
        raise StoreUnavailable("away")

    with monkeypatch.context() as broken:
        broken.setattr(harness.objects, "write", raise_unavailable)
        assert harness.jobs.finish(job.job_id, result).status is Status.COMPLETED
    assert harness.objects.stat(manifest_key(job.job_id)) is None
    harness.jobs.get_refreshed(job.job_id, TENANT)
    assert harness.objects.stat(manifest_key(job.job_id)) is not None


def test_lost_attempt_publishes_nothing(harness: JobsHarness) -> None:
    job = harness.start_training()
    harness.launcher.states[f"handle of {attempt_name(job.job_id, 1)}"] = "ended"
    harness.jobs.reconcile()
    late = harness.write_result(job, artifacts=[make_artifact(job)])
    harness.jobs.finish(job.job_id, late)
    assert harness.find_job(job).artifacts == ()
    assert harness.objects.stat(manifest_key(job.job_id)) is None


def test_orphaned_files_are_found_and_removed(harness: JobsHarness) -> None:
    job = harness.start_training()
    harness.write_checkpoint(job, step=1)
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
        harness.objects.write(key, b"xy")
    kept = {stored.key for stored in harness.objects.iter_objects("")}
    found = harness.jobs.list_orphans()
    assert found.complete
    assert sorted((orphan.prefix, orphan.objects, orphan.size_bytes) for orphan in found.orphans) == [
        ("checkpoints/projects/p/jobs/gone/", 1, 2),
        ("configs/gone.json", 1, 2),
        ("onnx_models/gone/", 1, 2),
        ("results/gone/", 1, 2),
        ("runs/gone/", 1, 2),
        ("trackers/gone/", 1, 2),
        ("trained_adapters/gone/", 2, 4),
    ]
    harness.jobs.delete_orphans()
    assert kept - {stored.key for stored in harness.objects.iter_objects("")} == {key for key in kept if "gone" in key}
    assert harness.jobs.list_orphans().orphans == []


def test_a_job_that_is_being_deleted_cannot_be_retried(harness: JobsHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    job = harness.submit()

    def raise_unavailable(_key: str) -> NoReturn:
        raise StoreUnavailable("away")

    harness.objects.write(spec_key(job.job_id), b"{}")
    monkeypatch.setattr(harness.objects, "delete", raise_unavailable)
    deleted = harness.jobs.delete(job.job_id, TENANT)
    assert deleted is not None
    assert deleted.failures
    with pytest.raises(Conflict, match="being deleted"):
        harness.jobs.retry(job.job_id, TENANT, RetryRequest.model_validate({}))


def test_delete_cancels_job_first_and_removes_everything(harness: JobsHarness, tmp_path: Path) -> None:
    job = harness.start_training()
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
        harness.objects.write(key, b"x")
    assert harness.jobs.delete(job.job_id, TENANT) is None
    assert harness.find_job(job).status is Status.CANCELLING
    harness.launcher.states[f"handle of {attempt_name(job.job_id, 1)}"] = "ended"
    harness.jobs.reconcile()
    deleted = harness.jobs.delete(job.job_id, TENANT)
    assert deleted is not None
    assert f"{harness.objects.url}/trained_adapters/{job.job_id}/" in deleted.resources
    assert [stored.key for stored in harness.objects.iter_objects("")] == [neighbour]
    with pytest.raises(NotFound):
        harness.find_job(job)


def test_failed_deletion_is_reported_and_keeps_record(harness: JobsHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    job = harness.submit()

    class UndeletableStore(LocalStore):
        def delete(self, key: str) -> bool:
            from storage import StoreUnavailable

            raise StoreUnavailable("read-only")

    harness.objects.write(f"merged_models/{job.job_id}/m", b"x")
    harness.jobs._models = UndeletableStore(harness.objects.url)  # pyright: ignore[reportPrivateUsage]
    deleted = harness.jobs.delete(job.job_id, TENANT)
    assert deleted is not None
    assert deleted.failures
    assert harness.find_job(job).status is Status.CANCELLED


def test_completed_job_has_download_link(harness: JobsHarness) -> None:
    job = harness.start_training()
    with pytest.raises(Conflict):
        harness.jobs.create_download_links(job.job_id, TENANT, None)
    file = ArtifactFile(path="", size_bytes=1, sha256="0")
    gguf = Artifact(name="gguf-q8_0", kind="gguf", uri="u", key=f"gguf_models/{job.job_id}/m.gguf", size_bytes=1, files=[file])
    adapter = gguf.model_copy(update={"name": "adapter", "kind": "adapter", "key": f"trained_adapters/{job.job_id}/"})
    harness.jobs.finish(job.job_id, harness.write_result(job, artifacts=[adapter.model_dump(), gguf.model_dump()]))
    found, [(_, link)] = harness.jobs.create_download_links(job.job_id, TENANT, None)
    assert found == gguf
    assert harness.tokens.read_file_token(link.removeprefix("/files/")) == (gguf.key, "m.gguf")
    with pytest.raises(NotFound, match="it has: adapter, gguf-q8_0"):
        harness.jobs.create_download_links(job.job_id, TENANT, "gguf-f16")

"""The core's job services over fakes, with a clock that a test advances."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

from schema.checkpoint import MANIFEST, Checkpoint, checkpoint_key, checkpoints_prefix
from schema.events import EventBatch, EventBatchResponse, PhaseChanged, ReportedEvent
from schema.job import Job
from schema.requests import ReexportRequest
from schema.result import Result
from schema.spec import ClaimResponse, result_key
from service.adapters.jobstores.memory import MemoryJobStore
from service.adapters.links import ServiceUrlSigner
from service.adapters.secrets.local import LocalSecretStore
from service.core.jobs.assembly import build_job_services
from service.core.jobs.trackers import DeploymentTrackers
from service.core.launchers import LauncherPool
from service.core.ports import Buckets, JobStore
from service.core.principals import LOCAL_PRINCIPAL, UPKEEP_PRINCIPAL, attempt_principal
from service.core.quotas import QuotaChecks, Quotas
from service.core.tokens import TokenSigner
from storage.registry import open_store
from tests.factories import START, make_dataset, make_train_request
from tests.fakes import FakeClock, FakeHub, FakeLauncher

PRINCIPAL = LOCAL_PRINCIPAL
OTHER_PRINCIPAL = replace(LOCAL_PRINCIPAL, tenant_id="other", subject="other")


class JobsHarness:
    """The job services and the fakes behind their ports."""

    def __init__(
        self,
        folder: Path,
        trackers: DeploymentTrackers | None = None,
        launchers: Sequence[FakeLauncher] = (),
        store: JobStore | None = None,
        quotas: Quotas | None = None,
    ) -> None:
        self.clock = FakeClock()
        self.store = store or MemoryJobStore()
        self.objects = open_store((folder / "objects").as_uri())
        self.secrets = LocalSecretStore(folder / "secrets")
        self.launchers = list(launchers) or [FakeLauncher()]
        self.launcher = self.launchers[0]
        self.hub = FakeHub()
        self.tokens = TokenSigner(b"k" * 32, self.clock)
        self.wake_count = 0
        self.on_wake: Callable[[str], None] = lambda _: None
        suffixes = count(1)
        self.jobs = build_job_services(
            store=self.store,
            secrets=self.secrets,
            buckets=Buckets(configs=self.objects, datasets=self.objects, models=self.objects),
            launchers=LauncherPool(self.launchers),
            url_signer=ServiceUrlSigner(self.tokens),
            tokens=self.tokens,
            clock=self.clock,
            random_suffix=lambda: f"{next(suffixes):04x}",
            wake=self._wake,
            hub=self.hub,
            trackers=trackers,
            quotas=QuotaChecks(self.store, quotas, self.clock) if quotas else None,
            attempt_variables={"HF_ENDPOINT": "https://hub.example"},
        )
        self.store.create_dataset(make_dataset())

    def _wake(self, job_id: str) -> None:
        self.wake_count += 1
        self.on_wake(job_id)

    def submit(self, **changes: object) -> Job:
        return self.jobs.submission.submit(PRINCIPAL, make_train_request(**changes))

    def start_training(self) -> Job:
        job = self.submit()
        self.reconcile()
        self.claim(job, 1, "p")
        self.report(job, 1, make_batch(PhaseChanged(phase="training")))
        return self.find_job(job)

    def reconcile(self) -> int:
        return self.jobs.reconciliation.reconcile(UPKEEP_PRINCIPAL)

    def claim(self, job: Job, number: int, claimant: str) -> ClaimResponse:
        return self.jobs.attempts.claim(attempt_principal(job.job_id, number), job.job_id, number, claimant)

    def report(self, job: Job, number: int, batch: EventBatch) -> EventBatchResponse:
        return self.jobs.attempts.report(attempt_principal(job.job_id, number), job.job_id, number, batch)

    def finish(self, result: Result) -> Job:
        return self.jobs.attempts.finish(attempt_principal(result.job_id, result.attempt), result)

    def find_job(self, job: Job) -> Job:
        return self.jobs.repository.find(PRINCIPAL, job.job_id)

    def write_checkpoint(self, job: Job, step: int, attempt: int = 1) -> Checkpoint:
        """Write a checkpoint to the bucket, as an attempt does."""
        checkpoint = Checkpoint.model_validate(
            {"job_id": job.job_id, "attempt": attempt, "step": step, "total_steps": 100, "epoch": 0.5, "batch_size": 2, "files": []}
            | {"gradient_accumulation_steps": 1, "training_config": job.training_config, "created_at": START}
        )
        key = checkpoint_key(checkpoints_prefix(job.job_id, job.project_id), attempt, step)
        self.objects.write(key + MANIFEST, checkpoint.with_checksum())
        return checkpoint

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


def make_reexport_request(**body: object) -> ReexportRequest:
    return ReexportRequest.model_validate(body)

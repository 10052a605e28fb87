"""The records of jobs: find one for its tenant, create one under an idempotency key, change one by compare-and-set."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from datetime import datetime

from schema.dataset import Dataset, DatasetShare, WeightedDataset
from schema.job import Job
from service.core import lifecycle
from service.core.errors import NotFound, RecordTooNew, StaleRevision, TunesmithError, Unavailable, UnreadableRecord
from service.core.event_store import Heartbeat
from service.core.job_lists import JobEntry
from service.core.ports import IdempotencyKey, JobStore, SecretStore
from service.core.principals import Principal
from service.core.stored_json import MAX_RECORD_BYTES, dump_record

log = logging.getLogger(__name__)

MAX_CHANGE_TRIES = 10  # few processes write to one job: its attempt, one caller, one reconciler


class JobRepository:
    """Job records and, stored apart from them, the secrets of each job."""

    def __init__(
        self, store: JobStore, secrets: SecretStore, clock: Callable[[], datetime], traceparent: Callable[[], str | None] = lambda: None
    ) -> None:
        """`traceparent` returns the trace context of the request that is being handled."""
        self.store = store
        self.secrets = secrets
        self.clock = clock
        self._traceparent = traceparent

    def find(self, principal: Principal, job_id: str) -> Job:
        """A job of the principal's tenant. Raises NotFound, also for a job of another tenant; UnreadableRecord, RecordTooNew."""
        job = self.find_or_none(principal, job_id)
        if job is None:
            raise _no_job(job_id)
        return job

    def find_or_none(self, principal: Principal, job_id: str) -> Job | None:
        """A job of the principal's tenant, or None. Raises UnreadableRecord, RecordTooNew."""
        try:
            job = self.store.find_job(job_id)
        except (UnreadableRecord, RecordTooNew):
            entry = self.store.find_job_entry(job_id)
            if entry is None or entry.tenant_id != principal.tenant_id:
                return None  # what the record's state is concerns its tenant only
            raise
        return job if job and job.tenant_id == principal.tenant_id else None

    def find_entry(self, principal: Principal, job_id: str) -> JobEntry:
        """What is known of a job of the principal's tenant without reading its record. Raises NotFound."""
        entry = self.store.find_job_entry(job_id)
        if entry is None or entry.tenant_id != principal.tenant_id:
            raise _no_job(job_id)
        return entry

    def get(self, job_id: str) -> Job:
        """The job, whatever its tenant: for a caller whose right to it has been checked. Raises NotFound."""
        job = self.store.find_job(job_id)
        if job is None:
            raise NotFound(f"no job {job_id!r}", param="job_id")
        return job

    def find_heartbeat(self, job: Job) -> Heartbeat | None:
        """The last heartbeat of the job's current attempt, or None."""
        heartbeat = self.store.find_heartbeat(job.job_id)
        return heartbeat if heartbeat and job.attempt and heartbeat.attempt == job.attempt.number else None

    def find_dataset(self, dataset_id: str, tenant_id: str) -> Dataset:
        """The dataset that a tenant's job trains on. Raises NotFound, UnreadableRecord, RecordTooNew."""
        try:
            dataset = self.store.find_dataset(dataset_id)
        except (UnreadableRecord, RecordTooNew):
            if self.store.find_dataset_tenant(dataset_id) == tenant_id:
                raise
            dataset = None
        if dataset is None or dataset.tenant_id != tenant_id:
            raise NotFound(f"no dataset {dataset_id!r}", hint="POST /datasets uploads one", param="processed_dataset_id")
        return dataset

    def find_datasets(self, job: Job) -> tuple[WeightedDataset, ...]:
        """The datasets that a job trains on, with their weights. Raises NotFound, UnreadableRecord, RecordTooNew."""
        shares = job.datasets or (DatasetShare(processed_dataset_id=job.processed_dataset_id, weight=1.0),)
        return tuple(
            WeightedDataset(dataset=self.find_dataset(share.processed_dataset_id, job.tenant_id), weight=share.weight) for share in shares
        )

    def create(self, job: Job, secrets: Mapping[str, str], idempotency_key: str | None, digest: str) -> Job:
        """Store a new job, or return the job created earlier under the same key. Raises IdempotencyConflict, Unavailable.

        Secrets are stored first, so that no attempt can start without them.
        """
        job = job.model_copy(update={"traceparent": self._traceparent()})
        if secrets:
            self.secrets.put(job.job_id, secrets)
        try:
            stored = self.store.create_job(job, IdempotencyKey(idempotency_key, digest) if idempotency_key else None)
        except Unavailable:
            raise  # the record may have been written all the same, and would then need its secrets
        except TunesmithError:
            self.secrets.destroy(job.job_id)
            raise
        if stored.job_id != job.job_id and job.secret_names:
            self.secrets.destroy(job.job_id)
        return stored

    def change(self, job_id: str, decide: Callable[[Job, datetime], Job], max_bytes: int = MAX_RECORD_BYTES) -> Job:
        """Apply a pure decision to the record; when another writer was faster, read the record again and decide again.

        `max_bytes` limits what an attempt may make of the record. Raises NotFound, Unavailable, TooLarge, and what `decide` raises.
        """
        for _ in range(MAX_CHANGE_TRIES):
            job = self.get(job_id)
            changed = decide(job, self.clock())
            if changed is job:
                return job
            if max_bytes < MAX_RECORD_BYTES:
                dump_record(changed, max_bytes)
            try:
                return self.replace(job, changed)
            except StaleRevision:
                continue
        raise Unavailable(f"{job_id} is being changed by too many writers at once; try again")

    def replace(self, before: Job, after: Job) -> Job:
        """Store `after` if the record is still `before`, with an event when the status changed. Raises StaleRevision, NotFound."""
        event = lifecycle.status_event(before, after)
        stored = self.store.replace_job(after, [event] if event else [])
        if event:
            log.info("status changed", extra={"job_id": after.job_id, "status": after.status, "attempt": event.attempt})
        return stored

    def destroy_secrets(self, job: Job) -> None:
        """Destroy the secrets of a job, if it has any."""
        if job.secret_names:
            self.secrets.destroy(job.job_id)


def _no_job(job_id: str) -> NotFound:
    return NotFound(f"no job {job_id!r}", hint="GET /jobs lists them", param="job_id")


def compute_digest(body: Mapping[str, object]) -> str:
    """The digest by which two requests under one idempotency key count as the same: equal for equal bodies, in any order of fields."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()

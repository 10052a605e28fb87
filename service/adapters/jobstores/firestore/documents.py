"""What the documents hold: jobs, heartbeats, datasets and idempotency keys, encoded and decoded."""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import hashlib
import re
from collections.abc import Mapping
from typing import Any, cast

from google.cloud.firestore import CollectionReference, DocumentReference
from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

from schema.dataset import Dataset
from schema.job import Job
from service.adapters.jobstores.firestore.database import Fields, Snapshot
from service.adapters.jobstores.firestore.search_terms import list_search_terms
from service.adapters.jobstores.records import format_timestamp
from service.core.accrual import JobCost
from service.core.event_store import Heartbeat
from service.core.job_lists import JobEntry, JobSummary, summarize_job
from service.core.job_store_rules import IDEMPOTENCY_TTL, work_state_of
from service.core.ports import IdempotencyKey
from service.core.stored_json import dump_record

FILTERS = ("status", "project_id", "modality", "trainer_type", "created_by")
SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")  # as schema.base.Id; Firestore accepts each of them as a document's name

_HEARTBEAT: TypeAdapter[Heartbeat] = TypeAdapter(Heartbeat)


def doc_ref_by_id(collection: CollectionReference, record_id: str) -> DocumentReference:
    """The document of a record. An id that no record can have maps to a document that never exists."""
    if SAFE_ID.fullmatch(record_id):
        return collection.document(record_id)
    return collection.document("-" + hashlib.sha256(record_id.encode(errors="replace")).hexdigest())


def fields_of(snapshot: Snapshot) -> dict[str, Any]:
    """The fields that were read; empty when there is no document."""
    return snapshot.to_dict() or {}


# --- jobs ------------------------------------------------------------------------------------------------------------


def build_job_fields(job: Job, write_ids: list[str]) -> Fields:
    """A job's document. `write_ids` are the ids of the last writes to it, newest last. A field that is None is left out."""
    filters = {
        "status": str(job.status),
        "project_id": job.project_id,
        "modality": job.training_config.summarize().modality,
        "trainer_type": job.training_config.trainer_type,
        "created_by": job.created_by,
    }
    return {
        "record": dump_record(job),
        "revision": job.revision,
        "writes": write_ids,
        "created_at": format_timestamp(job.created_at),
        "summary": summarize_job(job).model_dump_json(exclude_defaults=True),
        "list_filters": {"tenant_id": job.tenant_id} | build_filter_values(job.tenant_id, filters),
        "search_terms": list_search_terms(job),
        "work_lists": list_work_lists(job) or None,
        "work_state": None,  # what versions before 0.2 wrote instead
        "active_dataset_id": None if job.status.is_final else job.processed_dataset_id,
        "active_mixed_dataset_ids": None if job.status.is_final else list(job.dataset_ids[1:]) or None,
    }


def list_work_lists(job: Job) -> list[str]:
    """The lists of work that a job is in: that of all launchers, and that of each launcher that has its next step."""
    state = work_state_of(job)
    return [state, *(f"{state}/{launcher}" for launcher in job.launchers)] if state else []


def build_filter_values(tenant_id: str, values: Mapping[str, str | None]) -> dict[str, str]:
    """The fields that lists filter by. Each value starts with the tenant, so merged indexes never touch another tenant's jobs."""
    return {name: f"{tenant_id}/{value}" for name in FILTERS if (value := values.get(name)) is not None}


def load_summary(snapshot: Snapshot) -> JobSummary:
    """A job as lists show it. Raises ValidationError."""
    stored: str | dict[str, Any] = snapshot.get("summary")
    if isinstance(stored, str):
        return JobSummary.load(stored)
    fields = {"job_id": snapshot.id, "created_at": snapshot.get("created_at"), "cost": JobCost.load(stored.get("cost", "{}"))}
    return JobSummary.model_validate(stored | fields)  # a map, as earlier versions wrote it


def load_entry(snapshot: Snapshot) -> JobEntry:
    """What is known of a job without reading its record."""
    return JobEntry(snapshot.get("list_filters.tenant_id"), load_summary(snapshot))


# --- heartbeats ------------------------------------------------------------------------------------------------------


def build_heartbeat_fields(heartbeat: Heartbeat, last_cursor: int) -> Fields:
    """A heartbeat's document; `last_cursor` is the cursor of the job's newest event."""
    return {"heartbeat": _HEARTBEAT.dump_json(heartbeat).decode(), "last_cursor": last_cursor}


def load_heartbeat(snapshot: Snapshot) -> Heartbeat | None:
    """The job's heartbeat; None before the first."""
    text = fields_of(snapshot).get("heartbeat")
    if not text:
        return None
    try:
        return _HEARTBEAT.validate_json(text)
    except ValidationError:  # an earlier version stored a progress that is not a number; the next heartbeat replaces it
        fields = cast(dict[str, object], from_json(text))
        return _HEARTBEAT.validate_python(fields | {"progress": None})


def last_cursor_of(snapshot: Snapshot) -> int:
    """The cursor of the job's newest event; 0 before the first."""
    return fields_of(snapshot).get("last_cursor", 0)


# --- datasets --------------------------------------------------------------------------------------------------------


def build_dataset_fields(dataset: Dataset) -> Fields:
    """A dataset's document."""
    return {
        "record": dump_record(dataset),
        "tenant_id": dataset.tenant_id,
        "created_at": format_timestamp(dataset.created_at),
    }


# --- idempotency keys ------------------------------------------------------------------------------------------------


def idempotency_key_id(tenant_id: str, key: str) -> str:
    """The name of a key's document: a key may be any text, a document's name may not."""
    return hashlib.sha256(f"{tenant_id}/{key}".encode()).hexdigest()


def build_idempotency_fields(job: Job, idempotency: IdempotencyKey) -> Fields:
    """A key's document. Firestore deletes it some time after `expire_at`."""
    return {
        "body_digest": idempotency.body_digest,
        "job_id": job.job_id,
        "created_at": format_timestamp(job.created_at),
        "expire_at": job.created_at + IDEMPOTENCY_TTL,
    }

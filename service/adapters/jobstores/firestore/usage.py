"""The collection of usage: what each attempt, job and dataset adds to its tenant's usage of a period. Quotas sum it.

Firestore sums a field with an index of the filter and that field, so each field is summed by a query of its own. A sum is billed as one
read per thousand entries.
"""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Iterable

from google.cloud.firestore import CollectionReference, DocumentReference, FieldFilter, Query, WriteBatch
from google.cloud.firestore_v1.aggregation import AggregationQuery

from service.adapters.jobstores.firestore.database import NO_RETRIES, RPC_TIMEOUT_S, Database
from service.core.usage import JobState, Usage, UsageEntry, statuses_of
from storage.deadline import remaining_s


def usage_ref(usage: CollectionReference, period: str, key: str) -> DocumentReference:
    """The document of an entry. Keys name a job or a dataset, whose ids no two tenants share."""
    return usage.document(f"{period}~{key}")


def write_usage(batch: WriteBatch, usage: CollectionReference, entries: Iterable[UsageEntry]) -> None:
    """Write entries over earlier ones of the same key, in the commit that changes their record."""
    for entry in entries:
        fields = {
            "scope": _scope(entry.tenant_id, entry.period),
            "gpu_seconds": entry.usage.gpu_seconds,
            "usd": entry.usage.usd,
            "stored_bytes": entry.usage.stored_bytes,
        }
        batch.set(usage_ref(usage, entry.period, entry.key), fields)


def sum_usage(database: Database, usage: CollectionReference, tenant_id: str, period: str) -> Usage:
    """The sum of a tenant's entries of a period."""
    entries = usage.where(filter=FieldFilter("scope", "==", _scope(tenant_id, period)))
    gpu_seconds, usd, stored_bytes = (
        run_aggregation(database, AggregationQuery(entries).sum(field)) for field in ("gpu_seconds", "usd", "stored_bytes")
    )
    return Usage(gpu_seconds=gpu_seconds, usd=usd, stored_bytes=round(stored_bytes))


def count_jobs(database: Database, jobs: CollectionReference, tenant_id: str, state: JobState) -> int:
    """How many jobs of a tenant have a status of that state, with the index that lists them by status."""
    statuses = [f"{tenant_id}/{status}" for status in statuses_of(state)]
    matching = jobs.where(filter=FieldFilter("list_filters.status", "in", statuses)).order_by("created_at", direction=Query.DESCENDING)
    return round(run_aggregation(database, AggregationQuery(matching).count()))


def _scope(tenant_id: str, period: str) -> str:
    return f"{tenant_id}/{period}"


def run_aggregation(database: Database, query: AggregationQuery) -> float:
    """The value of a query with one aggregation. Raises Unavailable."""
    results = database.run_with_retry(lambda: list(query.stream(retry=NO_RETRIES, timeout=remaining_s(RPC_TIMEOUT_S))))
    return float(results[0][0].value)

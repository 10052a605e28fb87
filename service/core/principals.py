"""Who calls: every verb of the core takes a Principal first, and requires the scope that the verb needs.

Callers, attempts and the service's own upkeep are principals alike. Which principal a request belongs to is decided at the edge (`api/`).
"""

from dataclasses import dataclass
from enum import StrEnum

from service.core.errors import Forbidden

ANY_TENANT = "*"  # no tenant has this id: it is not a valid one


class Scope(StrEnum):
    """What a principal may do."""

    JOBS_READ = "jobs:read"
    JOBS_WRITE = "jobs:write"
    DATASETS_READ = "datasets:read"
    DATASETS_WRITE = "datasets:write"
    ATTEMPT = "attempt"  # claim, report and finish one attempt, which is the subject
    UPKEEP = "upkeep"  # reconcile and clean up, for all tenants


@dataclass(frozen=True)
class Principal:
    """One caller. It sees and changes only what belongs to its tenant."""

    tenant_id: str
    subject: str  # who it is within the tenant, for logs
    scopes: frozenset[Scope]

    def require(self, scope: Scope) -> None:
        """Raise Forbidden unless the principal has the scope."""
        if scope not in self.scopes:
            raise Forbidden(f"{self.subject} may not do this: it lacks the scope {scope}")


# Without identities every caller is this one. It may also do the upkeep, which a scheduler calls.
LOCAL_PRINCIPAL = Principal("local", "local", frozenset(Scope) - {Scope.ATTEMPT})
# The service itself, in its background task.
UPKEEP_PRINCIPAL = Principal(ANY_TENANT, "upkeep", frozenset({Scope.UPKEEP}))


def attempt_principal(job_id: str, number: int) -> Principal:
    """The principal of one attempt, whose token has been verified. Its job decides the tenant."""
    return Principal(ANY_TENANT, attempt_subject(job_id, number), frozenset({Scope.ATTEMPT}))


def attempt_subject(job_id: str, number: int) -> str:
    """The subject of an attempt's principal."""
    return f"attempt:{job_id}.{number}"

"""Who calls: every verb of the core takes a Principal first, and requires the scope that the verb needs.

Callers, attempts and the service's own upkeep are principals alike. Which principal a request belongs to is decided at the edge (`api/`).
"""

from dataclasses import dataclass
from enum import StrEnum

from service.core.errors import Forbidden

ANY_TENANT = "*"  # no tenant has this id: it is not a valid one
LOCAL_TENANT = "local"  # the tenant of a deployment that has no other


class Scope(StrEnum):
    """What a principal may do."""

    JOBS_READ = "jobs:read"
    JOBS_WRITE = "jobs:write"
    DATASETS_READ = "datasets:read"
    DATASETS_WRITE = "datasets:write"
    ADMIN = "admin"  # the API keys and the audit log of the tenant
    OPERATE = "operate"  # the API keys and the audit log of every tenant
    ATTEMPT = "attempt"  # claim, report and finish one attempt, which is the subject
    UPKEEP = "upkeep"  # reconcile and clean up, for all tenants


class Role(StrEnum):
    """A set of scopes with a name, as rule files and API keys give them. Each of the first four includes the one before it."""

    READ = "read"
    SUBMIT = "submit"
    ADMIN = "admin"
    OPERATOR = "operator"  # runs the deployment
    SCHEDULER = "scheduler"  # calls /internal/reconcile and /internal/cleanup, and nothing else


_READ = frozenset({Scope.JOBS_READ, Scope.DATASETS_READ})
_SUBMIT = _READ | {Scope.JOBS_WRITE, Scope.DATASETS_WRITE}
_ADMIN = _SUBMIT | {Scope.ADMIN}
ROLE_SCOPES: dict[Role, frozenset[Scope]] = {
    Role.READ: _READ,
    Role.SUBMIT: _SUBMIT,
    Role.ADMIN: _ADMIN,
    Role.OPERATOR: _ADMIN | {Scope.OPERATE, Scope.UPKEEP},
    Role.SCHEDULER: frozenset({Scope.UPKEEP}),
}


@dataclass(frozen=True)
class Principal:
    """One caller. It sees and changes only what belongs to its tenant."""

    tenant_id: str
    subject: str  # who it is within the tenant: for logs, the audit log and rate limits
    scopes: frozenset[Scope]

    def require(self, scope: Scope) -> None:
        """Raise Forbidden unless the principal has the scope."""
        if scope not in self.scopes:
            raise Forbidden(f"{self.subject} may not do this: it lacks the scope {scope}", hint="GET /whoami shows what it may do")


def role_principal(tenant_id: str, subject: str, *roles: Role) -> Principal:
    """A principal with the scopes of some roles."""
    return Principal(tenant_id, subject, frozenset[Scope]().union(*(ROLE_SCOPES[role] for role in roles)))


# Who has the token in the home folder: the account that runs the service.
LOCAL_PRINCIPAL = role_principal(LOCAL_TENANT, "local", Role.OPERATOR)
# The service itself, in its background task.
UPKEEP_PRINCIPAL = Principal(ANY_TENANT, "upkeep", frozenset({Scope.UPKEEP}))


def attempt_principal(job_id: str, number: int) -> Principal:
    """The principal of one attempt, whose token has been verified. Its job decides the tenant."""
    return Principal(ANY_TENANT, attempt_subject(job_id, number), frozenset({Scope.ATTEMPT}))


def attempt_subject(job_id: str, number: int) -> str:
    """The subject of an attempt's principal."""
    return f"attempt:{job_id}.{number}"

"""`/whoami`, `/keys` and `/audit`: who a caller is, the API keys of a tenant, and what its callers did."""

from datetime import datetime, timedelta
from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from schema.base import Id, Label, Strict
from service.api.dependencies import PrincipalDep, ServicesDep
from service.api.route import LimitedRoute, limits
from service.core.access.keys import NewKey
from service.core.access.ports import AuditQuery
from service.core.access.records import ApiKey, AuditEntry, KeyScope, KeyScopes, Outcome

router = APIRouter(route_class=LimitedRoute, tags=["access"])

DEFAULT_KEY_DAYS = 90
MAX_KEY_DAYS = 3650


class WhoAmI(BaseModel):
    """A caller, as the service knows it."""

    tenant_id: str
    subject: str
    scopes: list[str]


class CreateKeyRequest(Strict):
    """`POST /keys`: an API key for another service or a person."""

    name: Label = Field(description="What the key is for.")
    scopes: KeyScopes = Field(
        ("submit",),
        strict=False,
        description="`read` shows jobs and datasets, `submit` also creates and changes them, `admin` also manages keys and reads the audit "
        "log.",
    )
    expires_in_days: int = Field(DEFAULT_KEY_DAYS, ge=1, le=MAX_KEY_DAYS)
    tenant_id: Id | None = Field(None, description="Only for an operator of the deployment. Default: the caller's own tenant.")


class KeyView(BaseModel):
    """A key without its secret part."""

    key_id: str
    name: str
    tenant_id: str
    scopes: list[KeyScope]
    created_at: datetime
    created_by: str
    expires_at: datetime
    revoked_at: datetime | None


class CreateKeyResponse(KeyView):
    """A new key. `key` is shown here and never again."""

    key: str


class KeyList(BaseModel):
    """Keys, newest first."""

    keys: list[KeyView]


class AuditEntryView(BaseModel):
    """One action: who, what, when, from where, and the outcome."""

    at: datetime
    tenant_id: str
    subject: str
    action: str
    resource: str | None
    outcome: Outcome
    status: int
    code: str | None
    address: str | None
    request_id: str | None


class AuditPage(BaseModel):
    """Entries of the audit log, newest first."""

    entries: list[AuditEntryView]
    next_cursor: str | None


@router.get("/whoami")
async def get_whoami(principal: PrincipalDep) -> WhoAmI:
    """Who the service takes the caller for, and what it may do."""
    return WhoAmI(tenant_id=principal.tenant_id, subject=principal.subject, scopes=sorted(principal.scopes))


@router.post("/keys", status_code=201)
def create_key(body: CreateKeyRequest, services: ServicesDep, principal: PrincipalDep) -> CreateKeyResponse:
    """Create an API key. The answer is the only place that ever shows it."""
    request = NewKey(body.name, body.scopes, timedelta(days=body.expires_in_days), body.tenant_id)
    key, secret = services.keys.create(principal, request)
    return CreateKeyResponse(**_key_view(key).model_dump(), key=secret)


@router.get("/keys")
def list_keys(
    services: ServicesDep,
    principal: PrincipalDep,
    all_tenants: Annotated[bool, Query(description="Only for an operator of the deployment.")] = False,
) -> KeyList:
    """The API keys of the caller's tenant, revoked and expired ones included."""
    return KeyList(keys=[_key_view(key) for key in services.keys.list_keys(principal, all_tenants=all_tenants)])


@router.delete("/keys/{key_id}")
@limits(can_conflict=False)
def revoke_key(key_id: Id, services: ServicesDep, principal: PrincipalDep) -> KeyView:
    """Revoke a key. Each process of the service refuses it within ten seconds. Can be repeated."""
    return _key_view(services.keys.revoke(principal, key_id))


@router.get("/audit")
def list_audit_entries(
    services: ServicesDep,
    principal: PrincipalDep,
    limit: Annotated[int, Query(ge=1, le=500)] = 100,
    cursor: Annotated[str | None, Query(max_length=500)] = None,
    subject: Annotated[str | None, Query(max_length=300)] = None,
    action: Annotated[str | None, Query(max_length=100, description="An operation id of this API.")] = None,
    all_tenants: Annotated[bool, Query(description="Only for an operator of the deployment.")] = False,
) -> AuditPage:
    """What callers changed, and the links to models that they took, newest first."""
    query = AuditQuery(None if all_tenants else principal.tenant_id, limit, cursor, subject, action)
    page = services.audit_log.list_entries(principal, query)
    return AuditPage(entries=[_entry_view(entry) for entry in page.rows], next_cursor=page.next_cursor)


def _key_view(key: ApiKey) -> KeyView:
    return KeyView.model_validate(key.model_dump(exclude={"digest", "schema_version"}))


def _entry_view(entry: AuditEntry) -> AuditEntryView:
    return AuditEntryView.model_validate(entry.model_dump(exclude={"entry_id", "schema_version"}))

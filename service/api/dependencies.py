"""FastAPI dependencies of the endpoints: the service's parts, and the caller's tenant.

Both are `async` because they never block: FastAPI would run a plain function in its thread pool.
"""

from typing import Annotated

from fastapi import Depends, Header, Request
from pydantic import StringConstraints

from service.bootstrap import Services

LOCAL_TENANT = "local"


async def get_services(request: Request) -> Services:
    """The parts of the running service."""
    return request.app.state.services


async def get_tenant_id() -> str:
    """The caller's tenant. There is only one so far."""
    return LOCAL_TENANT


ServicesDep = Annotated[Services, Depends(get_services)]
TenantDep = Annotated[str, Depends(get_tenant_id)]
IdempotencyHeader = Annotated[
    str | None,
    Header(alias="Idempotency-Key", description="The same key with the same body returns the same job, for 24 hours."),
    StringConstraints(min_length=1, max_length=255, pattern=r"^[\x21-\x7e]+$"),
]

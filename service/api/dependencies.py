"""What endpoints ask for: the service's parts, and on whose behalf they act.

Both are `async` because they never wait: FastAPI would send a plain function through its thread pool.
"""

from typing import Annotated

from fastapi import Depends, Header, Request
from pydantic import StringConstraints

from service.bootstrap import Services

LOCAL_TENANT = "local"


async def get_services(request: Request) -> Services:
    """The service that this request reached."""
    return request.app.state.services


async def get_tenant_id() -> str:
    """Whose jobs these are. The local profile has one tenant."""
    return LOCAL_TENANT


ServicesDep = Annotated[Services, Depends(get_services)]
TenantDep = Annotated[str, Depends(get_tenant_id)]
IdempotencyHeader = Annotated[
    str | None,
    Header(alias="Idempotency-Key", description="The same key with the same body is the same job, for 24 hours."),
    StringConstraints(min_length=1, max_length=255, pattern=r"^[\x21-\x7e]+$"),
]

"""What endpoints ask for: the service's parts, and on whose behalf they act.

Both are `async` because they never wait: FastAPI would send a plain function through its thread pool.
"""

from typing import Annotated

from fastapi import Depends, Header, Request
from pydantic import StringConstraints

from service.bootstrap import Parts

LOCAL_TENANT = "local"


async def parts_of(request: Request) -> Parts:
    """The service that this request reached."""
    return request.app.state.parts


async def tenant_of() -> str:
    """Whose jobs these are. The local profile has one tenant."""
    return LOCAL_TENANT


UsesParts = Annotated[Parts, Depends(parts_of)]
ForTenant = Annotated[str, Depends(tenant_of)]
IdempotencyHeader = Annotated[
    str | None,
    Header(alias="Idempotency-Key", description="The same key with the same body is the same job, for 24 hours."),
    StringConstraints(min_length=1, max_length=255, pattern=r"^[\x21-\x7e]+$"),
]

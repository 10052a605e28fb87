"""FastAPI dependencies of the endpoints: the service's parts, and the caller.

Both are `async` because they never block: FastAPI would run a plain function in its thread pool.
"""

from typing import Annotated

from fastapi import Depends, Header, Request
from pydantic import StringConstraints

from service.bootstrap import Services
from service.core.principals import Principal


async def get_services(request: Request) -> Services:
    """The parts of the running service."""
    return request.app.state.services


async def get_principal(request: Request) -> Principal:
    """Who calls: the caller or the attempt that the route has authenticated."""
    return request.state.principal


ServicesDep = Annotated[Services, Depends(get_services)]
PrincipalDep = Annotated[Principal, Depends(get_principal)]
IdempotencyHeader = Annotated[
    str | None,
    Header(alias="Idempotency-Key", description="The same key with the same body returns the same job, for 24 hours."),
    StringConstraints(min_length=1, max_length=255, pattern=r"^[\x21-\x7e]+$"),
]

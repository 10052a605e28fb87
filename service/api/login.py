"""`/login`: how a browser becomes a caller, without a token in its storage or in its scripts."""

from typing import Annotated

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel
from starlette.responses import RedirectResponse, Response

from service.api.authentication import SESSION_COOKIE
from service.api.dependencies import PrincipalDep, ServicesDep
from service.api.route import LimitedRoute, limits
from service.core.access.logins import CODE_TTL
from service.core.errors import Forbidden

router = APIRouter(route_class=LimitedRoute, tags=["access"])


class LoginCode(BaseModel):
    """A link that logs a browser in as the caller; it works once, for a minute."""

    url: str
    expires_in_s: int


@router.post("/login-codes", status_code=201)
@limits(can_conflict=False)
async def create_login_code(services: ServicesDep, principal: PrincipalDep) -> LoginCode:
    """Create a link with which the caller's browser logs in: `tunesmith open` opens it."""
    code = services.logins.create_code(principal)
    return LoginCode(url=f"{services.settings.url}/login?code={code}", expires_in_s=int(CODE_TTL.total_seconds()))


@router.get("/login", status_code=303, response_class=RedirectResponse)
@limits(access="public", needs_token=True)
async def log_in(request: Request, services: ServicesDep, code: Annotated[str, Query(max_length=2000)]) -> Response:
    """Give the browser a session, and show it the documentation. A foreign page's link is refused: it could log somebody in as another."""
    if request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        raise Forbidden("a page of another site led here", hint="open the link by itself")
    session = services.logins.redeem_code(code)
    response = RedirectResponse(request.scope.get("root_path", "") + "/docs", status_code=303)
    response.set_cookie(
        SESSION_COOKIE,
        session.token,
        max_age=session.expires_in_s,
        httponly=True,
        samesite="strict",
        secure=services.settings.url.startswith("https:"),
    )
    return response


@router.post("/logout", status_code=204)
@limits(access="public", can_conflict=False)
async def log_out() -> Response:
    """Remove the browser's session."""
    response = Response(status_code=204)
    response.delete_cookie(SESSION_COOKIE, httponly=True, samesite="strict")
    return response

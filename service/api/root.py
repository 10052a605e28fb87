"""`GET /`: what this service is, and where to go next."""

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, RedirectResponse, Response

from schema.version import VERSION
from service.api.route import LimitedRoute, limits

router = APIRouter(route_class=LimitedRoute, include_in_schema=False)

LINKS = {"docs": "/docs", "openapi": "/openapi.json", "health": "/health", "capabilities": "/capabilities"}


@router.get("/")
@limits(access="public")
async def get_root(request: Request) -> Response:
    """The name, the version and links, as JSON; a browser, which accepts HTML, is redirected to the documentation."""
    prefix = request.scope.get("root_path", "")
    if "text/html" in request.headers.get("accept", ""):
        return RedirectResponse(prefix + LINKS["docs"])
    links = {name: prefix + path for name, path in LINKS.items()}
    return JSONResponse({"name": "Tunesmith", "version": VERSION} | links)

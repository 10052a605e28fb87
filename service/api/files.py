"""Downloads through links that the service signs itself, for stores that cannot sign links."""

from fastapi import APIRouter
from starlette.responses import FileResponse, Response

from service.api.dependencies import ServicesDep
from service.api.route import LimitedRoute, limits
from service.core.errors import NotFound
from storage.file import LocalStore

router = APIRouter(route_class=LimitedRoute, tags=["files"])


@router.get("/files/{token}", response_class=FileResponse)
@limits(needs_token=True, access="public")
def download_file(token: str, services: ServicesDep) -> Response:
    """The file that a link points to. Range requests work, so an interrupted download can continue."""
    key, filename = services.tokens.read_file_token(token)
    if not isinstance(services.buckets.models, LocalStore):
        raise NotFound("this deployment's object store signs its own links", hint="GET /jobs/download/{job_id} returns new ones")
    path = services.buckets.models.path_for_key(key)
    if not path.is_file():
        raise NotFound("the file no longer exists")
    return FileResponse(path, filename=filename, media_type="application/octet-stream")

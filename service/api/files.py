"""Objects behind signed links, for stores that cannot sign links of their own."""

from fastapi import APIRouter
from starlette.responses import FileResponse, Response

from service.api.deps import UsesParts
from service.core.errors import NotFound
from storage.local import LocalStore

router = APIRouter(tags=["files"])


@router.get("/files/{token}", response_class=FileResponse)
def file(token: str, parts: UsesParts) -> Response:
    """The object that the link is for; ranges are honoured, so a broken download can go on."""
    key, filename = parts.tokens.read_file_token(token)
    if not isinstance(parts.objects.models, LocalStore):
        raise NotFound("this deployment's object store signs its own links")
    path = parts.objects.models.path_of(key)
    if not path.is_file():
        raise NotFound("the file is not there any more")
    return FileResponse(path, filename=filename, media_type="application/octet-stream")

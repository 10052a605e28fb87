"""`gs://bucket/…`: objects of Google Cloud Storage."""

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from jobs.ingest.sources import Downloaded, SourceRequest
from jobs.ingest.sources.objects import download_objects
from schema.sources import BucketSource, parse_source

if TYPE_CHECKING:
    from storage.gs import GcsStore

TOKEN_LIFE = timedelta(hours=12)  # longer than Google's: a token that the caller sent is never refreshed


def download(request: SourceRequest) -> Downloaded:
    """Download every object that the source names. Raises JobFailed."""
    source = parse_source(request.config.source)
    assert isinstance(source, BucketSource)
    store = _open_store(request, f"gs://{source.bucket}")
    try:
        return download_objects(request, source, store)
    finally:
        store.close()


def _open_store(request: SourceRequest, url: str) -> "GcsStore":
    from storage.gs import GcsStore

    match request.config.rights:
        case "caller":
            token = request.secrets["google_access_token"]
            return GcsStore(url, get_token=lambda: (token, datetime.now(UTC) + TOKEN_LIFE))
        case "deployment" if request.stores.get_token is not None:
            return GcsStore(url, get_token=request.stores.get_token)
        case "deployment" if _has_credentials():
            return GcsStore(url)
        case _:
            return GcsStore(url, anonymous=True)


def _has_credentials() -> bool:
    """Whether this machine has credentials of its own. A laptop without any still reads public buckets."""
    import google.auth
    from google.auth.exceptions import DefaultCredentialsError

    try:
        google.auth.default()
    except DefaultCredentialsError:
        return False
    return True

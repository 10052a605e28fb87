"""`incoming/…`: an object of the deployment's own dataset bucket, which the service has checked to be the caller's."""

from pathlib import PurePath

from jobs.ingest.sources import Downloaded, SourceRequest, check_size, local_path
from jobs.runtime.errors import JobFailed
from jobs.runtime.retry import download_with_retry, retry_store
from schema.ingestion import InputFile
from storage import NoSuchObject
from storage.file import LocalStore


def download(request: SourceRequest) -> Downloaded:
    """Download the object; one in a folder of this machine is read where it is. Raises JobFailed."""
    key, store = request.config.source, request.stores.datasets
    stored = retry_store(f"{key} cannot be read", lambda: store.stat(key), code="internal")
    check_size(request, [key] if stored else [], 0 if stored is None or isinstance(store, LocalStore) else stored.size_bytes)
    try:
        path = store.path_for_key(key) if isinstance(store, LocalStore) else download_with_retry(store, key, local_path(request, 0))
    except NoSuchObject as error:
        raise JobFailed("invalid_data", f"{key} was deleted before it was read", "upload the file again") from error
    return Downloaded((InputFile(path=str(path), name=PurePath(key).name),), key)

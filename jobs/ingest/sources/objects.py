"""Objects of a bucket: list what a source names, and download it, verified and retried by the store."""

from collections.abc import Callable
from typing import TypeVar

from jobs.ingest.sources import RIGHTS_HINTS, Downloaded, SourceRequest, check_size, local_path
from jobs.runtime.errors import JobFailed
from schema.ingestion import InputFile
from schema.sources import BucketSource
from storage import NoSuchObject, ObjectStore, StorageError
from storage.remote import TransientStoreError

ReturnT = TypeVar("ReturnT")


def download_objects(request: SourceRequest, source: BucketSource, store: ObjectStore) -> Downloaded:
    """Download every object that the source names, in the order of their keys. Raises JobFailed."""
    keys = _call(request, lambda: _list_keys(request, source, store))
    files: list[InputFile] = []
    for number, key in enumerate(keys):
        request.check_stop()
        path = local_path(request, number)
        _call(request, lambda key=key, path=path: store.download(key, path))
        files.append(InputFile(path=str(path), name=key.removeprefix(source.folder)))
    return Downloaded(tuple(files), request.config.source)


def _list_keys(request: SourceRequest, source: BucketSource, store: ObjectStore) -> list[str]:
    if source.is_single:
        stored = store.stat(source.pattern)
        found = [] if stored is None else [stored]
    else:
        found = [stored for stored in store.iter_objects(source.prefix) if source.matches(stored.key)]
    keys = [stored.key for stored in found]
    check_size(request, keys, sum(stored.size_bytes for stored in found))
    return keys


def _call(request: SourceRequest, operation: Callable[[], ReturnT]) -> ReturnT:
    """Call the store. Raises JobFailed that says what the caller can do."""
    source = request.config.source
    try:
        return operation()
    except NoSuchObject as error:
        raise JobFailed("invalid_data", f"{source} was changed while it was read", "retry the job once nobody writes to it") from error
    except TransientStoreError as error:
        raise JobFailed("internal", f"{source} cannot be read now: {error}", "retry the job") from error
    except StorageError as error:
        reason = str(error).partition("; ")[0]  # what follows is for the owner of the bucket
        raise JobFailed("auth", f"{source} cannot be read: {reason}", RIGHTS_HINTS[request.config.rights]) from error

"""Finds the store behind a URL."""

from pkgutil import resolve_name

from storage import ObjectStore, StorageError

# One line adds a store: URL scheme → "module:Class". The class is constructed with the URL.
STORES = {
    "file": "storage.file:LocalStore",
    "gs": "storage.gs:GcsStore",
    "s3": "storage.s3:S3Store",
}


def open_store(url: str) -> ObjectStore:
    """The store behind a URL such as file:///home/me/objects. Makes no request. Raises StorageError for an unknown scheme."""
    scheme = url.partition("://")[0]
    if scheme not in STORES:
        raise StorageError(f"no object store for {url!r}; known schemes: {', '.join(sorted(STORES))}")
    return resolve_name(STORES[scheme])(url)

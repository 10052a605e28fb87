"""Finds the store behind a URL."""

from pkgutil import resolve_name

from storage import ObjectStore, StorageError, TokenSource

# One line adds a store: URL scheme → "module:Class". The class is constructed with the URL.
STORES = {
    "file": "storage.file:LocalStore",
    "gs": "storage.gs:GcsStore",
    "s3": "storage.s3:S3Store",
}


def open_store(url: str, get_token: TokenSource | None = None) -> ObjectStore:
    """The store behind a URL such as file:///home/me/objects. Makes no request. Raises StorageError for an unknown scheme.

    `get_token` is for gs:// stores: it replaces the credentials that Google's libraries find on the machine.
    """
    scheme = url.partition("://")[0]
    if scheme not in STORES:
        raise StorageError(f"no object store for {url!r}; known schemes: {', '.join(sorted(STORES))}")
    store_class = resolve_name(STORES[scheme])
    return store_class(url, get_token=get_token) if scheme == "gs" and get_token else store_class(url)

"""Signed links to single objects of the model store, valid for a limited time.

Adapters of the UrlSigner port belong here, one file per kind of store that signs its own links. Who may have a link is not decided here.
"""

from pkgutil import resolve_name
from urllib.parse import quote

from service.core.errors import InvalidRequest
from service.core.links import SignedUpload, UrlSigner
from service.core.tokens import TokenSigner
from storage import ObjectStore

MAX_EXPIRES_S = 7 * 24 * 3600  # the limit of version 4 signatures, Google's and Amazon's

# One line adds a signer: URL scheme of the store → "module:Class". The class is constructed with the store.
URL_SIGNERS = {
    "gs": "service.adapters.links.cloud_storage:CloudStorageUrlSigner",
    "s3": "service.adapters.links.s3:S3UrlSigner",
}


class ServiceUrlSigner:
    """Signs `/files/{token}` and `/datasets/uploads/{token}`, which this service serves. The token names the object and the expiry."""

    def __init__(self, tokens: TokenSigner) -> None:
        self._tokens = tokens

    def sign_url(self, key: str, filename: str, expires_s: int) -> str:
        return f"/files/{self._tokens.sign_file_token(key, filename, expires_s)}"

    def sign_upload(self, key: str, size_bytes: int, expires_s: int) -> SignedUpload:
        return SignedUpload(f"/datasets/uploads/{self._tokens.sign_upload_token(key, size_bytes, expires_s)}", {})


def create_url_signer(objects: ObjectStore, tokens: TokenSigner, *, iam_emulator_host: str | None = None) -> UrlSigner:
    """The signer for a store: the store's own, or this service for a folder on its disk."""
    scheme = objects.url.partition("://")[0]
    if scheme not in URL_SIGNERS:
        return ServiceUrlSigner(tokens)
    return resolve_name(URL_SIGNERS[scheme])(objects, emulator_host=iam_emulator_host)


def content_disposition(filename: str) -> str:
    """The Content-Disposition header that saves a download under the name, whatever its characters (RFC 6266)."""
    plain = "".join(char if 32 <= ord(char) < 127 and char not in '"\\%' else "_" for char in filename)
    encoded = "" if plain == filename else f"; filename*=UTF-8''{quote(filename, safe='')}"
    return f'attachment; filename="{plain}"{encoded}'


def check_expiry(expires_s: int) -> int:
    """Return the seconds if a signature can last that long. Raises InvalidRequest."""
    if not 0 < expires_s <= MAX_EXPIRES_S:
        raise InvalidRequest(f"a link lasts from 1 second to 7 days, not {expires_s} seconds")
    return expires_s

"""Links that S3 serves, signed locally with the service's credentials. They expire no later than the credentials."""

from service.adapters.links import check_expiry, content_disposition
from service.core.errors import Unavailable
from service.core.links import SignedUpload
from storage import StoreUnavailable
from storage.s3 import S3Store


class S3UrlSigner:
    """Links to the objects of an S3 bucket."""

    def __init__(self, store: S3Store, *, emulator_host: str | None = None) -> None:
        del emulator_host  # signing makes no request
        self._store = store

    def sign_url(self, key: str, filename: str, expires_s: int) -> str:
        try:
            return self._store.presign_url(key, content_disposition(filename), check_expiry(expires_s))
        except StoreUnavailable as error:
            raise Unavailable(str(error), hint="set the credentials of the service") from error

    def sign_upload(self, key: str, size_bytes: int, expires_s: int) -> SignedUpload:
        try:
            url = self._store.presign_upload(key, size_bytes, check_expiry(expires_s))
        except StoreUnavailable as error:
            raise Unavailable(str(error), hint="set the credentials of the service") from error
        return SignedUpload(url, {"Content-Length": str(size_bytes)})

"""Links that S3 itself serves, signed here with the credentials of the service. They end no later than those do."""

from service.adapters.links import attachment, check_life
from service.core.errors import Unavailable
from storage import StoreUnavailable
from storage.s3 import S3Store


class S3Links:
    """Links to the objects of an S3 bucket."""

    def __init__(self, store: S3Store, *, emulator_host: str | None = None) -> None:
        del emulator_host  # signing asks nobody
        self._store = store

    def link(self, key: str, filename: str, expires_s: int) -> str:
        try:
            return self._store.presigned(key, attachment(filename), check_life(expires_s))
        except StoreUnavailable as error:
            raise Unavailable(str(error), hint="set the credentials of the service") from error

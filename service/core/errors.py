"""Everything that goes wrong on purpose. The docstring of an error is its default message.

TunesmithError
├── InvalidRequest 400      the request cannot be carried out as it stands
│   ├── Unsupported 400     well-formed, but not what this deployment does
│   └── InvalidDataset 400  a row of the upload is not usable
├── NotFound 404
├── Conflict 409            the thing is not in a state for that
│   ├── StaleRevision 409   somebody else changed the record first
│   ├── Fenced 409          the attempt is not the current one any more
│   └── IdempotencyConflict 409
├── Unauthorized 401
├── TooLarge 413
└── Unavailable 503         a part we need does not answer; try again
    └── RecordTooNew 503    a newer version of Tunesmith wrote the record
"""

from http import HTTPStatus


class TunesmithError(Exception):
    """Something went wrong."""

    status = HTTPStatus.INTERNAL_SERVER_ERROR
    code = "internal"

    def __init__(self, message: str = "", *, hint: str = "", param: str | None = None) -> None:
        self.message = message or (type(self).__doc__ or "").strip()
        self.hint = hint
        self.param = param
        super().__init__(self.message)


class InvalidRequest(TunesmithError):
    """The request cannot be carried out as it stands."""

    status = HTTPStatus.BAD_REQUEST
    code = "invalid_request"


class Unsupported(InvalidRequest):
    """This deployment cannot do that."""

    code = "unsupported"


class InvalidDataset(InvalidRequest):
    """The dataset is not usable."""

    code = "invalid_data"


class Unauthorized(TunesmithError):
    """The token is missing, expired or not for this."""

    status = HTTPStatus.UNAUTHORIZED
    code = "unauthorized"


class NotFound(TunesmithError):
    """There is no such thing."""

    status = HTTPStatus.NOT_FOUND
    code = "not_found"


class Conflict(TunesmithError):
    """The thing is not in a state for that."""

    status = HTTPStatus.CONFLICT
    code = "conflict"


class StaleRevision(Conflict):
    """Somebody else changed the record first; read it again."""

    code = "stale"


class Fenced(Conflict):
    """The attempt is not the current one, or belongs to another process."""

    code = "fenced"


class IdempotencyConflict(Conflict):
    """The Idempotency-Key was used before with another request."""

    code = "idempotency_conflict"


class TooLarge(TunesmithError):
    """The body is larger than this deployment accepts."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    code = "too_large"


class Unavailable(TunesmithError):
    """A part of the service does not answer; try again."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    code = "unavailable"
    retry_after_s = 2


class RecordTooNew(Unavailable):
    """A newer version of Tunesmith wrote the record."""


class DiskFull(Unavailable):
    """The disk of the service is full."""

    status = HTTPStatus.INSUFFICIENT_STORAGE
    code = "storage_full"


class LaunchFailed(TunesmithError):
    """The compute refused the attempt; it never started."""

    code = "launch_failed"

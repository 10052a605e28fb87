"""The deliberate errors of the service, each with its HTTP status. The docstring of an error is its default message.

TunesmithError
├── InvalidRequest 400      the request is not valid as it stands
│   ├── Unsupported 400     this deployment cannot do that
│   │   └── DoesNotFit 400  the hardware has too little memory for it
│   └── InvalidDataset 400  a row of the upload is not valid
├── NotFound 404
├── Conflict 409            the resource's state does not allow it
│   ├── StaleRevision 409   another writer changed the record first
│   ├── Fenced 409          the attempt is no longer the current one
│   ├── UnreadableRecord 409  the stored record is damaged; it can only be deleted
│   └── IdempotencyConflict 409
├── Unauthorized 401
├── Forbidden 403           the caller lacks a scope
│   └── QuotaExceeded 403   the tenant has used up a quota
├── TooManyRequests 429     the caller has exceeded a rate limit
├── TooLarge 413
├── Unavailable 503         a part of the service does not answer; try again
│   ├── RecordTooNew 503    a newer version of Tunesmith wrote the record
│   ├── TooManyFollowers 503  a client cannot follow a job now
│   ├── NoCapacity 503      the launcher has no compute for an attempt now; never sent to a caller
│   └── DiskFull 507
└── LaunchFailed            the launcher refused an attempt for good; never sent to a caller
"""

from collections.abc import Mapping
from http import HTTPStatus


class TunesmithError(Exception):
    """Base class of all deliberate errors."""

    status = HTTPStatus.INTERNAL_SERVER_ERROR
    code = "internal"

    def __init__(self, message: str = "", *, hint: str = "", param: str | None = None) -> None:
        self.message = message or (type(self).__doc__ or "").strip()
        self.hint = hint
        self.param = param
        self.others: tuple[TunesmithError, ...] = ()  # found in the same request; this one is the first
        super().__init__(self.message)

    @property
    def problems(self) -> "tuple[TunesmithError, ...]":
        """All problems of the request, this one first."""
        return (self, *self.others)


class InvalidRequest(TunesmithError):
    """The request is not valid as it stands."""

    status = HTTPStatus.BAD_REQUEST
    code = "invalid_request"


class Unsupported(InvalidRequest):
    """This deployment cannot do that."""

    code = "unsupported"


class DoesNotFit(Unsupported):
    """The hardware has too little memory for the job."""


class InvalidDataset(InvalidRequest):
    """The dataset is not valid."""

    code = "invalid_data"


class Unauthorized(TunesmithError):
    """The token is missing, expired or meant for something else."""

    status = HTTPStatus.UNAUTHORIZED
    code = "unauthorized"


class Forbidden(TunesmithError):
    """The caller may not do this."""

    status = HTTPStatus.FORBIDDEN
    code = "forbidden"


class QuotaExceeded(Forbidden):
    """The tenant has used up a quota of this deployment."""

    code = "quota_exceeded"


class TooManyRequests(TunesmithError):
    """Too many requests in too short a time."""

    status = HTTPStatus.TOO_MANY_REQUESTS
    code = "too_many_requests"

    def __init__(self, message: str = "", *, hint: str = "", headers: Mapping[str, str]) -> None:
        super().__init__(message, hint=hint)
        self.headers = headers  # of the response: Retry-After, and the state of the limit


class NotFound(TunesmithError):
    """The resource does not exist."""

    status = HTTPStatus.NOT_FOUND
    code = "not_found"


class Conflict(TunesmithError):
    """The resource's state does not allow this."""

    status = HTTPStatus.CONFLICT
    code = "conflict"


class StaleRevision(Conflict):
    """Another writer changed the record first; read it again."""

    code = "stale"


class Fenced(Conflict):
    """The attempt is not the current one, or belongs to another process."""

    code = "fenced"


class UnreadableRecord(Conflict):
    """The stored record cannot be read."""

    code = "unreadable_record"


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


class TooManyFollowers(Unavailable):
    """Too many clients follow jobs now."""

    code = "too_many_followers"
    retry_after_s = 10


class NoCapacity(Unavailable):
    """The launcher has no compute for the attempt now, and started nothing."""


class DiskFull(Unavailable):
    """The disk of the service is full."""

    status = HTTPStatus.INSUFFICIENT_STORAGE
    code = "storage_full"


class LaunchFailed(TunesmithError):
    """The launcher refused the attempt for good; raise Unavailable for errors worth retrying."""

    code = "launch_failed"

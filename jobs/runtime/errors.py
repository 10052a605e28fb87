"""The errors that end an attempt early, and how an exception becomes a Failure with a message and a hint for the user."""

import errno
from collections.abc import Iterator
from typing import Literal

from schema.job import Failure, FailureCode

# Why an attempt stops early: the job is canceled or paused, the compute is taken away, or the time limit is near.
StopReason = Literal["cancel", "pause", "preempted", "time_slice"]

DEFAULT_OUT_OF_MEMORY_HINT = "request hardware with more memory"  # a family that knows more says so in its training config
MAX_MESSAGE_LENGTH = 300  # characters: one line of a table; the full traceback is in the log


class JobFailed(Exception):
    """The job cannot succeed, for a known reason. The message and the hint are shown to the user."""

    def __init__(self, code: FailureCode, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.failure = Failure(code=code, message=message, hint=hint)


class Stopped(BaseException):
    """The attempt stops before it is done. A BaseException, so that no library catches it."""

    def __init__(self, reason: StopReason) -> None:
        super().__init__(reason)
        self.reason: StopReason = reason


class AttemptTaken(Exception):
    """Another process owns the attempt."""


class ClaimRefused(Exception):
    """The service does not know this attempt or does not accept its token."""


def failure_of(error: Exception, out_of_memory_hint: str = DEFAULT_OUT_OF_MEMORY_HINT) -> Failure:
    """The failure to report for an exception. Errors of libraries are recognized by name, so that no heavy library is imported here.

    Messages hold no rows and no secrets: only our own texts, and the first line of an unknown error.
    """
    if isinstance(error, JobFailed):
        return error.failure
    class_names = {cls.__name__ for cls in type(error).__mro__}
    text = str(error)
    if "OutOfMemoryError" in class_names or isinstance(error, MemoryError) or "can't allocate memory" in text:
        return Failure(
            code="out_of_memory",
            message="the attempt ran out of memory",
            hint=out_of_memory_hint,
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Failure(code="internal", message="no space left on the attempt's disk", hint="free some space, or use save_strategy 'no'")
    if "StoreUnavailable" in class_names:
        return Failure(code="internal", message=_first_line(text), hint="the object store did not respond or is full; retry the job")
    if "NoSuchObject" in class_names:
        return Failure(code="internal", message=_first_line(text), hint="a file of the job has been deleted; upload the dataset again")
    return Failure(
        code="internal", message=_first_line(f"{type(error).__name__}: {text}"), hint="the traceback is in the log of the attempt"
    )


def exception_chain(error: BaseException) -> Iterator[BaseException]:
    """The error, the one it was raised from, and so on."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _first_line(text: str) -> str:
    line = text.strip().partition("\n")[0]
    return line if len(line) <= MAX_MESSAGE_LENGTH else line[: MAX_MESSAGE_LENGTH - 1] + "…"

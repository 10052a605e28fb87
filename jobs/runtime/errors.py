"""What ends an attempt early, and how an exception becomes a Failure that a person can act on."""

import errno
from typing import Literal

from schema.job import Failure, FailureCode

# Why an attempt ends early: somebody wants the job to end, or to wait; its compute is taken away; its time is up.
StopReason = Literal["cancel", "pause", "preempted", "time_slice"]

MAX_MESSAGE_LENGTH = 300  # one line in a table; the whole traceback is in the log


class JobFailed(Exception):
    """The job cannot succeed, for a reason we know. The message and the hint are shown to the user."""

    def __init__(self, code: FailureCode, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.failure = Failure(code=code, message=message, hint=hint)


class Stopped(BaseException):
    """The attempt ends here although it is not done. No Exception, so that no library swallows it."""

    def __init__(self, reason: StopReason) -> None:
        super().__init__(reason)
        self.reason: StopReason = reason


class AttemptTaken(Exception):
    """Another process owns the attempt."""


class ClaimRefused(Exception):
    """The service does not know this attempt, or its token."""


def failure_of(error: Exception) -> Failure:
    """The failure that an exception stands for. Vendor errors are known by name, so that nothing heavy is imported here.

    Messages never carry what may hold a row or a secret: only our own words, and the first line of unknown errors.
    """
    if isinstance(error, JobFailed):
        return error.failure
    names = {kind.__name__ for kind in type(error).__mro__}
    text = str(error)
    if "OutOfMemoryError" in names or isinstance(error, MemoryError) or "can't allocate memory" in text:
        return Failure(
            code="out_of_memory",
            message="the attempt ran out of memory",
            hint="lower batch_size or max_seq_length (raise gradient_accumulation_steps to keep the effective batch), or use method LoRA",
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Failure(code="internal", message="no space left on the attempt's disk", hint="free some space, or use save_strategy 'no'")
    if "StoreUnavailable" in names:
        return Failure(code="internal", message=_one_line(text), hint="the object store did not answer or is full; retry the job")
    if "NoSuchObject" in names:
        return Failure(code="internal", message=_one_line(text), hint="a file of the job has been deleted; upload the dataset again")
    return Failure(code="internal", message=_one_line(f"{type(error).__name__}: {text}"), hint="the traceback is in the log of the attempt")


def _one_line(text: str) -> str:
    line = text.strip().partition("\n")[0]
    return line if len(line) <= MAX_MESSAGE_LENGTH else line[: MAX_MESSAGE_LENGTH - 1] + "…"

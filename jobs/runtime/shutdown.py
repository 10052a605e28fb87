"""How an attempt ends: its outcomes and exit codes, the time each ending may take, and writing `result.json`."""

import logging
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

from jobs.runtime.errors import JobFailed, StopReason
from jobs.runtime.retry import retry_store
from schema.result import Result
from schema.spec import result_key
from storage import ObjectExists, ObjectStore

log = logging.getLogger(__name__)

Outcome = Literal["completed", "failed", "cancelled", "paused", "yielded"]

OUTCOME_BY_REASON: dict[StopReason, Outcome] = {"cancel": "cancelled", "pause": "paused", "preempted": "yielded", "time_slice": "yielded"}


class ExitCode(IntEnum):
    """How the process ends."""

    COMPLETED = 0
    FAILED = 1
    CANCELLED = 10
    FENCED = 11
    PAUSED = 12
    YIELDED = 13


EXIT_CODES: dict[Outcome, ExitCode] = {
    "completed": ExitCode.COMPLETED,
    "failed": ExitCode.FAILED,
    "cancelled": ExitCode.CANCELLED,
    "paused": ExitCode.PAUSED,
    "yielded": ExitCode.YIELDED,
}


@dataclass(frozen=True)
class ShutdownTimeouts:
    """How long each part of an ending may take."""

    report_s: float  # to send the last events, and again to report the result to the service
    tries: int  # to write the result to the object store; the waits between tries start at 0.5 s and double
    checkpoint_s: float = 0.0  # for a checkpoint that is being uploaded
    tracker_s: float = 0.0  # for a tracker to send its remaining data


SHUTDOWN_TIMEOUTS: dict[Outcome, ShutdownTimeouts] = {
    "completed": ShutdownTimeouts(report_s=10.0, tries=8, checkpoint_s=60.0, tracker_s=60.0),
    "failed": ShutdownTimeouts(report_s=5.0, tries=6, checkpoint_s=30.0, tracker_s=10.0),
    "cancelled": ShutdownTimeouts(report_s=0.3, tries=2),  # a cancel must be over in two seconds
    "paused": ShutdownTimeouts(report_s=5.0, tries=6, checkpoint_s=60.0, tracker_s=20.0),
    "yielded": ShutdownTimeouts(report_s=5.0, tries=6, checkpoint_s=60.0, tracker_s=20.0),
}
FORCED_SHUTDOWN = ShutdownTimeouts(report_s=0.3, tries=2)  # the platform is about to kill the process, or a person waits


def cap_timeouts(timeouts: ShutdownTimeouts, killed_in_s: float | None) -> ShutdownTimeouts:
    """The timeouts shortened so that the result is written before the process is killed; unchanged without a time limit."""
    if killed_in_s is None:
        return timeouts
    # Two eighths for the checkpoint, two for the trackers, one each for the events, their thread, the service and the store.
    eighth_s = killed_in_s / 8
    return ShutdownTimeouts(
        report_s=min(timeouts.report_s, max(FORCED_SHUTDOWN.report_s, eighth_s)),
        tries=timeouts.tries if eighth_s > timeouts.report_s else FORCED_SHUTDOWN.tries,
        checkpoint_s=min(timeouts.checkpoint_s, 2 * eighth_s),
        tracker_s=min(timeouts.tracker_s, 2 * eighth_s),
    )


def write_result(store: ObjectStore, result: Result, tries: int) -> Result:
    """Write `result.json` unless it exists. Returns the result that counts.

    If the attempt already has a result in the store, that one counts. If the store does not accept the result, a completed attempt
    becomes a failed one: its artifacts must not be published without it.
    """
    key = result_key(result.job_id, result.attempt)
    content = result.model_dump_json(indent=1).encode()
    try:
        try:
            retry_store("the result could not be written", lambda: store.write(key, content, if_absent=True), tries=tries)
        except ObjectExists:
            return Result.load(retry_store("the result could not be read", lambda: store.read(key), tries=tries))
    except JobFailed as error:
        log.error("result could not be written", extra={"error": error.failure.message})
        if result.outcome == "completed":
            return result.model_copy(update={"outcome": "failed", "failure": error.failure})
    return result

"""`python -m jobs.run [--name JOB.ATTEMPT]`: run one attempt of one job. Settings come from the environment (jobs/runtime/settings.py).

The name only makes the process easy to find in a process list. Exit codes:

    0   completed; or another process owns the attempt, and nothing was changed
    1   failed: the result says why, and the traceback is in the log
    10  canceled
    11  fenced: another attempt has replaced this one, or the job is deleted; nothing more was written
    12  paused: the job continues from its checkpoint when it is resumed
    13  yielded: the time limit was near or the compute was taken away; the next attempt continues from the checkpoint
"""

import os
import sys
import time
import traceback
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jobs.runtime.attempt import Attempt


def main() -> int:
    """Run the attempt; returns the exit code."""
    # Before anything heavy is imported, so that the log starts immediately.
    name = sys.argv[2] if len(sys.argv) > 2 else "unnamed"
    print(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} INFO attempt started name={name} pid={os.getpid()}", flush=True)

    from jobs.runtime.attempt import Attempt
    from jobs.runtime.errors import Stopped
    from jobs.runtime.logs import configure_logging
    from jobs.runtime.settings import read_settings, use_one_gpu

    configure_logging()
    use_one_gpu()
    attempt = Attempt(read_settings())
    try:
        return run_attempt(attempt)
    except Stopped as stopped:
        return attempt.finish_stopped(stopped.reason)


def run_attempt(attempt: "Attempt") -> int:
    """Run the attempt until it completes or fails; returns the exit code. Raises Stopped if it is stopped before that."""
    from jobs.runtime.errors import AttemptTaken, ClaimRefused, failure_of
    from jobs.runtime.shutdown import ExitCode

    try:
        attempt.claim()
        return attempt.finish("completed", artifacts=attempt.train_and_export())
    except AttemptTaken:
        print("another process owns the attempt; nothing to do", flush=True)
        return ExitCode.COMPLETED
    except ClaimRefused as error:
        print(f"the claim was refused: {error}", flush=True)
        return ExitCode.FAILED
    except Exception as error:  # noqa: BLE001  # the boundary: every error becomes a failure with a message and a hint
        sys.stderr.write(attempt.redact(traceback.format_exc()))
        attempt.reraise_if_stopping()
        failure = failure_of(error, attempt.out_of_memory_hint)
        failure = failure.model_copy(update={"message": attempt.redact(failure.message)})
        return attempt.finish("failed", failure=failure)


if __name__ == "__main__":
    exit_code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)  # a library's exit handler must not delay the end or change the exit code

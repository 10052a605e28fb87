"""`python -m jobs.run [--name JOB.ATTEMPT]`: one attempt of one job; settings come from the environment (jobs/runtime/settings.py).

The name is only there so that the process can be found in a list of processes. Exit codes:

    0   completed; or another process owns the attempt, and nothing was touched
    1   failed: the result says why, and the traceback is in the log
    10  cancelled
    11  fenced: the service has given the attempt up, and nothing more was written
    12  paused: the job waits, and goes on from what was saved
    13  yielded: its time was up or its machine taken away; the next attempt goes on from what was saved
"""

import os
import sys
import time
import traceback
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jobs.runtime.attempt import Attempt


def main() -> int:
    """Work at the attempt; returns the exit code."""
    # Before anything is imported, so that the log begins at once.
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
    except Stopped as request:
        return attempt.finish_stopped(request.reason)


def run_attempt(attempt: "Attempt") -> int:
    """The attempt from its claim to its own end; returns the exit code. Raises Stopped when it is stopped before that."""
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
    except Exception as error:  # noqa: BLE001  # the boundary: whatever it is becomes a failure that a person can read
        sys.stderr.write(attempt.redact(traceback.format_exc()))
        attempt.reraise_if_stopping()
        failure = failure_of(error)
        failure = failure.model_copy(update={"message": attempt.redact(failure.message)})
        return attempt.finish("failed", failure=failure)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # no library's exit handler may hold the process up, or change how it ends

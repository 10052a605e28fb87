"""`python -m jobs.llm.worker`: a worker process of a training on several GPUs.

jobs/llm/distributed.py starts it and sends its arguments on stdin.

It ends when rank 0 does: its stdin is closed then. Signals are rank 0's to hear. Exit codes:

    0   the training is over
    1   it failed: the traceback is in the log, and rank 0 knows the reason if it is one of ours
    17  memory ran out
    18  the other processes are gone
"""

import os
import pickle
import signal
import sys
import threading
import traceback


def main() -> int:
    """Take part in the training; returns the exit code."""
    from jobs.runtime.logs import configure_logging

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    configure_logging()
    errand = pickle.load(sys.stdin.buffer)  # noqa: S301  # from rank 0, through its own pipe
    threading.Thread(target=_exit_when_stdin_closes, name="rank-0", daemon=True).start()

    from jobs.llm.distributed import EXIT_OOM, EXIT_PEER_LOST, write_worker_failure
    from jobs.llm.oom import is_out_of_memory
    from jobs.llm.training_loop import train_worker_rank
    from jobs.runtime.errors import JobFailed

    try:
        train_worker_rank(errand)
    except JobFailed as failed:
        traceback.print_exc()
        write_worker_failure(errand, failed)
        return 1
    except (RuntimeError, MemoryError) as error:
        traceback.print_exc()
        if is_out_of_memory(error):
            return EXIT_OOM
        return EXIT_PEER_LOST if "closed by peer" in str(error) or "reset by peer" in str(error) else 1
    return 0


def _exit_when_stdin_closes() -> None:
    sys.stdin.buffer.read()  # until it is closed
    os._exit(0)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # without the libraries' goodbyes, which wait for each other

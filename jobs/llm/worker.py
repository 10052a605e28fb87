"""`python -m jobs.llm.worker`: a worker process of a training on several GPUs.

`jobs/llm/worker_pool.py` starts it in rank 0 and sends its WorkerArgs on stdin. The worker ends when stdin is closed, which happens
when rank 0 ends. It ignores SIGTERM and SIGINT: rank 0 handles them. Exit codes:

    0   the training ended
    1   the training failed: the traceback is in the log; the reason of a JobFailed is also in a file for rank 0
    17  memory ran out
    18  the connection to another process was lost
"""

import os
import pickle
import signal
import sys
import threading
import traceback


def main() -> int:
    """Take part in the training. Returns the exit code."""
    from jobs.runtime.logs import configure_logging

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    configure_logging()
    worker_args = pickle.load(sys.stdin.buffer)  # noqa: S301  # from rank 0, through its own pipe
    threading.Thread(target=_exit_when_stdin_closes, name="rank-0", daemon=True).start()

    from jobs.llm.oom import is_out_of_memory
    from jobs.llm.training_loop import train_worker_rank
    from jobs.llm.worker_pool import EXIT_OOM, EXIT_PEER_LOST, write_worker_failure
    from jobs.runtime.errors import JobFailed

    try:
        train_worker_rank(worker_args)
    except JobFailed as failed:
        traceback.print_exc()
        write_worker_failure(worker_args, failed)
        return 1
    except (RuntimeError, MemoryError) as error:
        traceback.print_exc()
        if is_out_of_memory(error):
            return EXIT_OOM
        return EXIT_PEER_LOST if "closed by peer" in str(error) or "reset by peer" in str(error) else 1
    return 0


def _exit_when_stdin_closes() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    exit_code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)  # skip the libraries' exit handlers, which wait for each other

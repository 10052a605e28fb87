"""`python -m jobs.ingest TASK`: carry out one ingestion in a process of its own.

TASK is a JSON file with an `IngestTask`. The outcome is written to `outcome.json` in its output folder; standard output has a line of
JSON for each report of progress. Exit codes:

    0   there is an outcome; it also says what is wrong with the files
    1   it failed for another reason, which is on standard error
"""

import sys
from pathlib import Path

from jobs.ingest.limits import limit_process
from jobs.ingest.pipeline import ingest
from schema.ingestion import IngestProgress, IngestTask

OUTCOME_FILE = "outcome.json"


def main(arguments: list[str]) -> int:
    """Run the task; returns the exit code."""
    task = IngestTask.load(Path(arguments[0]).read_bytes())
    limit_process(task.limits.max_memory_bytes)
    outcome = ingest(task, _print_progress)
    (Path(task.output) / OUTCOME_FILE).write_text(outcome.model_dump_json())
    return 0


def _print_progress(progress: IngestProgress) -> None:
    print(progress.model_dump_json(), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""`python -m jobs.ingest.token_lengths TASK`: count the tokens of a stored dataset in a process of its own.

TASK is a JSON file with a `TokenLengthsTask`; the outcome is written to `token_lengths.json` in its output folder. Exit codes are those of
`jobs.ingest`. A chat template is a program of the base's author: it is rendered in a sandbox, and this process has limits.
"""

import sys
from pathlib import Path

from jobs.ingest.limits import limit_process
from jobs.ingest.reports.token_lengths import count_tokens
from jobs.ingest.reports.tokenizer_files import UnusableTokenizer
from schema.ingestion import TokenLengthsOutcome, TokenLengthsTask

OUTCOME_FILE = "token_lengths.json"


def main(arguments: list[str]) -> int:
    """Run the task; returns the exit code."""
    task = TokenLengthsTask.load(Path(arguments[0]).read_bytes())
    limit_process(task.limits.max_memory_bytes)
    splits = {name: Path(path) for name, path in task.splits.items()}
    try:
        lengths = count_tokens(splits, task.base_model_id, Path(task.tokenizer_folder), task.max_seq_length)
        outcome = TokenLengthsOutcome(lengths=lengths)
    except UnusableTokenizer as error:
        outcome = TokenLengthsOutcome(refused=error.problem)
    (Path(task.output) / OUTCOME_FILE).write_text(outcome.model_dump_json())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

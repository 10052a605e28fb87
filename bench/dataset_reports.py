"""B16: what the parts of a dataset's report cost, of rows of about 250 tokens; token lengths by the tokenizer of a real base.

The parts of a sample are measured by themselves, in seconds for 20,000 rows; token lengths in rows per second, with a tokenizer that is
loaded already.
"""

import os
import subprocess

from bench.context import BenchmarkContext
from bench.figures import Measurement, at_least, at_most
from bench.ingestion import write_chat_rows
from bench.servers import SOURCE, make_environment
from schema.base import ForwardCompatible
from schema.ingestion import REPORT_SAMPLE_ROWS

NAME = "dataset_reports"
DATA_PYTHON = SOURCE / ".venvs/data/bin/python"
BASE_VARIABLE = "TUNESMITH_BENCH_BASE_FOLDER"  # a folder with a base's tokenizer, such as that of Gemma 3 270M


class Request(ForwardCompatible):
    """What the process measures."""

    rows: str
    tokenizer_folder: str | None = None


class Costs(ForwardCompatible):
    """Seconds for all rows, by part."""

    parts: dict[str, float]
    token_rows_per_s: float | None = None
    tokens_per_row: float = 0.0


async def measure(context: BenchmarkContext) -> list[Measurement]:
    """Measure in a process of the environment `data`."""
    rows = context.folder / "rows.jsonl"
    write_chat_rows(rows, REPORT_SAMPLE_ROWS)
    request = Request(rows=str(rows), tokenizer_folder=os.environ.get(BASE_VARIABLE))
    environment = make_environment(context.folder, PYTHONPATH=str(SOURCE), PYTHONUTF8="1")
    command = [DATA_PYTHON, "-m", "bench.dataset_reports_process", request.model_dump_json()]
    result = subprocess.run(command, cwd=SOURCE, env=environment, check=True, capture_output=True, text=True)
    costs = Costs.load(result.stdout.splitlines()[-1].encode())
    figures = [Measurement(NAME, f"{name}, {REPORT_SAMPLE_ROWS:,} rows", seconds, "s") for name, seconds in costs.parts.items()]
    figures.append(Measurement(NAME, "all parts of a sample", sum(costs.parts.values()), "s", at_most(15)))
    note = f"{costs.tokens_per_row:.0f} tokens per row" if costs.token_rows_per_s else f"set {BASE_VARIABLE}"
    return [
        *figures,
        Measurement(NAME, "token lengths", costs.token_rows_per_s, "rows/s", at_least(2500) if costs.token_rows_per_s else None, note),
    ]

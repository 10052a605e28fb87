"""Memory runs out in step k, one to four times, in training and in evaluation; in some cases not even one row fits.

The cases run in the trainer's environment (tests/chaos/memory_cases.py) with the real trainer on a tiny Gemma and are evaluated here.
"""

import json
import math
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.chaos.campaign import CampaignError, Row, Size
from tests.chaos.service import SOURCE, TRAINER_PYTHON, Json

BATCH_SIZE = 16  # rows of a batch, and the effective batch size
LOSS_TOLERANCE = 1e-5
MAX_RETRIES = 4


@dataclass(frozen=True)
class MemoryCase:
    """The phase and first step in which memory runs out, and the number of rows that fit; with 0, not even one row fits."""

    phase: Literal["training", "evaluation"]
    step: int
    rows_that_fit: int


def run(size: Size) -> Row:
    """Compare every case with the training that had enough memory."""
    with tempfile.TemporaryDirectory(prefix="chaos-memory-") as folder:
        outcome = _run_trainer(Path(folder), size)
    cases: list[Json] = outcome["cases"]
    recovered = [case for case in cases if case["rows_that_fit"] > 0]
    training = [case for case in recovered if case["phase"] == "training"]
    difference = max(_difference(case, outcome["reference"]) for case in recovered)
    problems = [problem for case in cases if (problem := _describe_problem(case))]
    return Row(
        fault="out of memory",
        injected=f"{len(training)} times in training at step k, {len(recovered) - len(training)} in evaluation, 1 to 4 times in a row; "
        f"{len(cases) - len(recovered)} where nothing fits",
        expected=f"effective batch constant, loss within {LOSS_TOLERANCE:g}, at most {MAX_RETRIES} retries, then a typed error",
        observed=f"{_summarize(cases)}, losses within {difference:.1g}" + (f"; WRONG: {problems[0]}" if problems else ""),
        passed=not problems and difference <= LOSS_TOLERANCE,
    )


def _run_trainer(folder: Path, size: Size) -> Json:
    environment = {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HOME": str(folder)}
    command = [TRAINER_PYTHON, "-m", "tests.chaos.memory_cases", folder, size]
    done = subprocess.run(command, cwd=SOURCE, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise CampaignError(f"the memory cases could not run: {done.stderr.strip().rpartition(chr(10))[2]}")
    return json.loads(done.stdout.splitlines()[-1])


def _describe_problem(case: Json) -> str:
    """Describe what is wrong with a case; empty if it is correct."""
    name = f"{case['phase']} at step {case['step']} with room for {case['rows_that_fit']}"
    expected_sizes = [size for size in (8, 4, 2, 1) if size >= case["rows_that_fit"]] if case["phase"] == "training" else []
    if case["failures"] == 0:
        return f"{name}: memory never ran out"
    if case["reduced_batch_sizes"] != expected_sizes:
        return f"{name}: batches {case['reduced_batch_sizes']} instead of {expected_sizes}"
    if case["effective_batch_sizes"] not in ([BATCH_SIZE], []):
        return f"{name}: effective batches {case['effective_batch_sizes']}"
    if case["rows_that_fit"] > 0:
        return f"{name}: {case['failure']['message']}" if case["failure"] else ""
    typed = case["failure"] and case["failure"]["code"] == "out_of_memory" and case["failure"]["hint"]
    return "" if typed else f"{name}: no typed error"


def _difference(case: Json, reference: Json) -> float:
    """The largest difference of a loss, including the evaluation's; infinite when a step is missing."""
    if case["losses"].keys() != reference["losses"].keys() or case["eval_loss"] is None:
        return math.inf
    steps = [abs(case["losses"][step] - loss) for step, loss in reference["losses"].items()]
    return max(*steps, abs(case["eval_loss"] - reference["eval_loss"]))


def _summarize(cases: list[Json]) -> str:
    effective = ", ".join(map(str, sorted({size for case in cases for size in case["effective_batch_sizes"]})))
    errors = ", ".join(sorted({case["failure"]["code"] for case in cases if case["failure"]})) or "none"
    return f"effective batch {effective}, at most {max(len(case['reduced_batch_sizes']) for case in cases)} retries, errors: {errors}"

"""Cost of exporting a billion parameters: merging tensor by tensor, and peft's merge of the whole model; both converted to GGUF.

Runs alternate, each in its own process. Memory is the peak of that process or of the converter that it starts.
"""

import asyncio
import json
import os
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from bench.context import MISSING_TRAINER_NOTE, REAL_TRAINER, BenchmarkContext
from bench.figures import Measurement, at_most, exactly, median
from bench.servers import SOURCE, make_environment

NAME = "exports"
ROUNDS = 3
MERGE_METHODS = ("streamed", "whole", "whole-bf16")


@dataclass(frozen=True)
class MergeRun:
    """One run of one merge method."""

    seconds: float
    merge_s: float
    cpu_s: float
    peak_bytes: int
    digest: str


async def measure(context: BenchmarkContext) -> list[Measurement]:
    """Time and memory of each merge method."""
    if not REAL_TRAINER.exists():
        return [Measurement(NAME, "memory of a merge", None, "", at_most(0.35), MISSING_TRAINER_NOTE)]
    return await asyncio.to_thread(_measure_all, context.folder)


def _measure_all(folder: Path) -> list[Measurement]:
    _run_python(folder, "infra/gemma_270m.py", "--cache-only")  # for its tokenizer
    _run_python(folder, "-m", "bench.merging", "make", str(folder))
    runs: dict[str, list[MergeRun]] = {method: [] for method in MERGE_METHODS}
    for _ in range(ROUNDS):
        for method in MERGE_METHODS:
            runs[method].append(_run_merge(folder, method))
    differing = len({run.digest for method in ("streamed", "whole") for run in runs[method]}) - 1
    ours, theirs, rounded_twice = (runs[method] for method in MERGE_METHODS)
    both = f"{_describe_runs(ours)}; {_describe_runs(theirs)}"
    in_bf16 = f"peft rounds twice and makes different tensors: {_describe_runs(rounded_twice)}"
    return [
        Measurement(NAME, "results that differ from merge_and_unload", differing, "", exactly(0), "in the GGUF file, byte by byte"),
        Measurement(NAME, "memory, relative to merge_and_unload", _ratio(ours, theirs, "peak_bytes"), "×", at_most(0.35), both),
        Measurement(NAME, "time, relative to merge_and_unload", _ratio(ours, theirs, "seconds"), "×", at_most(0.6), both),
        Measurement(
            NAME, "memory, relative to merge_and_unload in bf16", _ratio(ours, rounded_twice, "peak_bytes"), "×", at_most(0.35), in_bf16
        ),
        Measurement(NAME, "time, relative to merge_and_unload in bf16", _ratio(ours, rounded_twice, "seconds"), "×", None, in_bf16),
    ]


def _ratio(ours: list[MergeRun], theirs: list[MergeRun], field: Literal["seconds", "peak_bytes"]) -> float:
    return _median(ours, field) / _median(theirs, field)


def _median(runs: list[MergeRun], field: str) -> float:
    return median([asdict(run)[field] for run in runs])


def _describe_runs(runs: list[MergeRun]) -> str:
    time = f"{_median(runs, 'seconds'):.1f} s, {_median(runs, 'merge_s'):.1f} of them merging, {_median(runs, 'cpu_s'):.1f} s of CPU time"
    return f"{_median(runs, 'peak_bytes') / 1e9:.2f} GB, {time}"


def _run_merge(folder: Path, method: str) -> MergeRun:
    return MergeRun(**json.loads(_run_python(folder, "-m", "bench.merging", method, str(folder)).splitlines()[-1]))


def _run_python(folder: Path, *arguments: str) -> str:
    user_folders = {name: os.environ[name] for name in ("HOME", "XDG_CACHE_HOME") if name in os.environ}
    variables = make_environment(folder, PYTHONPATH=str(SOURCE)) | user_folders
    return subprocess.run([REAL_TRAINER, *arguments], cwd=SOURCE, env=variables, check=True, capture_output=True, text=True).stdout

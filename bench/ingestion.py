"""B15: speed and memory of ingestion: 1,000,000 rows of JSON lines, 1 GB, checked, split and kept by one run of `python -m jobs.ingest`.

The rows are conversations of two to six messages, with system messages, Unicode and escaped line breaks, as `json.dumps` writes them. The
peak is the resident memory of the process with its children, sampled while it runs; pages of files that it maps are counted.
"""

import json
import random
import resource
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from bench.context import BenchmarkContext
from bench.figures import Measurement, at_least, at_most, exactly, median
from bench.servers import SOURCE, make_environment
from schema.ingestion import IngestOptions, IngestOutcome, IngestTask, InputFile

NAME = "ingestion"
DATA_PYTHON = SOURCE / ".venvs/data/bin/python"
ROWS = 1_000_000
SMALL_ROWS = 20
SMALL_RUNS = 5
MB = 1_000_000
SENTENCES = 4000
SAMPLING_INTERVAL_S = 0.05
TEXT = (
    "the model reads a row and answers it with what was asked for in plain words which a person can check against numbers dates names "
    "places code results tables naïve café größer Москва 東京 quickly because every answer is learned as it stands here"
)


async def measure(context: BenchmarkContext) -> list[Measurement]:
    """Measure the large file once, and what a small one costs."""
    source = context.folder / "rows.jsonl"
    write_chat_rows(source, ROWS)
    size_mb = source.stat().st_size / MB
    elapsed_s, peak_mb, outcome = run_ingestion(context.folder / "large", source)
    kept = sum(split.rows for split in outcome.rows.splits.values()) if outcome.rows else 0
    source.unlink()
    small = context.folder / "small.jsonl"
    write_chat_rows(small, SMALL_ROWS)
    small_s = [run_ingestion(context.folder / f"small-{number}", small)[0] for number in range(SMALL_RUNS)]
    note = f"{size_mb:,.0f} MB in {elapsed_s:.1f} s, with the start of the process"
    return [
        Measurement(NAME, f"{ROWS:,} rows of JSON lines", ROWS / elapsed_s, "rows/s", at_least(40_000), note),
        Measurement(NAME, "rows kept", kept, "", exactly(ROWS)),
        Measurement(NAME, "peak memory with children", peak_mb, "MB", at_most(500)),
        Measurement(NAME, f"{SMALL_ROWS} rows", median(small_s), "s", at_most(0.5), "with the start of the process"),
    ]


def write_chat_rows(path: Path, rows: int, seed: int = 0) -> None:
    """Write distinct conversations of about 1 kB each."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=number % 4 == 0) + "\n" for number, row in enumerate(_make_rows(rows, seed)))


def _make_rows(rows: int, seed: int) -> Iterator[object]:
    rng, words = random.Random(seed), TEXT.split()
    sentences = [" ".join(rng.choices(words, k=rng.randint(8, 16))) for _ in range(SENTENCES)]
    for number in range(rows):
        messages = [{"role": "system", "content": "Answer in a few words."}] if number % 3 == 0 else []
        for turn in range(rng.randint(1, 3)):
            messages.append({"role": "user", "content": f"{number}.{turn}: {rng.choice(sentences)}?"})
            messages.append({"role": "assistant", "content": '.\n"'.join(rng.choices(sentences, k=4))})
        yield {"messages": messages}


def run_ingestion(folder: Path, source: Path) -> tuple[float, float, IngestOutcome]:
    """Seconds, peak megabytes and outcome of one ingestion. Raises RuntimeError when it fails."""
    folder.mkdir()
    options = IngestOptions()  # type: ignore[call-arg]  # every field has a default
    task = IngestTask(files=(InputFile(path=str(source), name=source.name),), options=options, output=str(folder))
    (folder / "task.json").write_text(task.model_dump_json())
    environment = make_environment(folder, PYTHONPATH=str(SOURCE), PYTHONUTF8="1")
    started_at = time.perf_counter()
    process = subprocess.Popen(
        [DATA_PYTHON, "-m", "jobs.ingest", folder / "task.json"], cwd=SOURCE, env=environment, stdout=subprocess.DEVNULL
    )
    peak_bytes = 0
    while process.poll() is None:
        peak_bytes = max(peak_bytes, _measure_memory(process.pid))
        time.sleep(SAMPLING_INTERVAL_S)
    elapsed_s = time.perf_counter() - started_at
    if process.returncode:
        raise RuntimeError(f"the ingestion ended with code {process.returncode}")
    return elapsed_s, peak_bytes / MB, IngestOutcome.load((folder / "outcome.json").read_bytes())


def _measure_memory(pid: int) -> int:
    """Resident bytes of a process and its children, of which shared pages count for each."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (OSError, IndexError):
        return 0  # it has ended
    return pages * resource.getpagesize() + sum(_measure_memory(int(child)) for child in children)

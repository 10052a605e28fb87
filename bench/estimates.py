"""How close the dry run is: real small trainings here, each beside what `POST /train?dry_run=true` said of it.

Steps and tokens must be exact, sizes close, and the measured time inside the range. It trains the real Gemma 3 270M and the tiny one,
one after the other; peak memory is the most that the attempt's process held while it trained. Run it on a machine without other work:

    .venvs/dev/bin/python -m bench.estimates                     # about a quarter of an hour
    .venvs/dev/bin/python -m bench.estimates --only NAME …       # some
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from bench.gemma_270m import REAL_BASE, Json, get_job, install_real_base
from bench.http import Request, request_json
from bench.launch import BASE as TINY_BASE
from bench.launch import install_tiny_base
from bench.servers import SOURCE, Server, run_service

POLL_S = 0.25
TIMEOUT_S = 600.0
SEED = 5


@dataclass(frozen=True)
class Case:
    """One training: its base, rows and configuration."""

    name: str
    base: str
    rows: str  # a key of ROW_MAKERS
    count: int  # of rows
    words: int  # about so many words in each text
    config: Json = field(default_factory=dict)


def _lora(steps: int, **hyperparameters: Any) -> Json:
    return {"hyperparameters": {"max_steps": steps, "logging_steps": 1, "learning_rate": 1e-5} | hyperparameters}


CASES = (
    Case("sft, LoRA, short rows", REAL_BASE, "messages", 60, 20, _lora(6, batch_size=4, gradient_accumulation_steps=1, max_seq_length=256)),
    Case("sft, LoRA, defaults", REAL_BASE, "messages", 40, 60, _lora(4)),
    Case(
        "sft, LoRA, packed",
        REAL_BASE,
        "messages",
        80,
        30,
        {"hyperparameters": {"epochs": 1, "packing": True, "batch_size": 1, "gradient_accumulation_steps": 2, "max_seq_length": 512}},
    ),
    Case("sft, LoRA, long rows", REAL_BASE, "text", 30, 500, _lora(3, batch_size=2, gradient_accumulation_steps=1, max_seq_length=1024)),
    Case("sft, LoRA, truncated", REAL_BASE, "text", 30, 300, _lora(4, batch_size=2, gradient_accumulation_steps=2, max_seq_length=128)),
    Case(
        "sft, Full, merged",
        REAL_BASE,
        "prompt_completion",
        40,
        30,
        {"method": "Full", "export_config": {"format": "merged"}}
        | _lora(4, batch_size=2, gradient_accumulation_steps=1, max_seq_length=128),
    ),
    Case(
        "sft, LoRA, two GGUF files",
        REAL_BASE,
        "messages",
        40,
        30,
        {"export_config": {"format": ["adapter", "merged"], "include_gguf": True, "gguf_quantization": ["q8_0", "q4_k_m"]}}
        | _lora(3, batch_size=2, gradient_accumulation_steps=1, max_seq_length=256),
    ),
    Case("dpo, LoRA", REAL_BASE, "preference", 30, 25, {"trainer_type": "dpo"} | _lora(4, gradient_accumulation_steps=2)),
    Case("orpo, LoRA", REAL_BASE, "preference", 30, 25, {"trainer_type": "orpo"} | _lora(4, gradient_accumulation_steps=2)),
    Case(
        "kto, LoRA",
        REAL_BASE,
        "unpaired_preference",
        40,
        25,
        {"trainer_type": "kto"} | _lora(3, batch_size=2, gradient_accumulation_steps=1),
    ),
    Case(
        "tiny, sft, Full, epochs",
        TINY_BASE,
        "messages",
        200,
        30,
        {"method": "Full", "hyperparameters": {"epochs": 2, "max_seq_length": 512}},
    ),
    Case(
        "tiny, sft, packed",
        TINY_BASE,
        "messages",
        300,
        40,
        {"hyperparameters": {"epochs": 2, "packing": True, "batch_size": 2, "max_seq_length": 1024}},
    ),
)


@dataclass(frozen=True)
class Outcome:
    """What a training really took."""

    steps: int
    tokens: int  # seen by the model in all steps
    total_s: float  # from the launch to the end
    train_s: float
    peak_bytes: int  # of the process while it trained
    export_peak_bytes: int  # of the process in its whole life
    phases_s: dict[str, float]
    artifact_bytes: dict[str, int]


def make_rows(case: Case) -> bytes:
    """The rows of a case, always the same: sentences of words from the documentation."""
    rng = random.Random(f"{SEED} {case.name}")
    words = (SOURCE / "docs/training.md").read_text().split()

    def text() -> str:
        start, count = rng.randrange(len(words) // 2), max(3, round(case.words * rng.lognormvariate(0, 0.5)))
        return " ".join(words[start : start + count])

    makers = {
        "messages": lambda: {"messages": [{"role": "user", "content": text()}, {"role": "assistant", "content": text()}]},
        "prompt_completion": lambda: {"prompt": text(), "completion": text()},
        "text": lambda: {"text": text()},
        "preference": lambda: {"prompt": text(), "chosen": text(), "rejected": text()},
        "unpaired_preference": lambda: {"prompt": text(), "completion": text(), "label": rng.random() < 0.5},
    }
    return b"".join(json.dumps(makers[case.rows]()).encode() + b"\n" for _ in range(case.count))


async def upload(server: Server, content: bytes) -> str:
    """Upload rows, with a tenth held out; returns the id of the dataset."""
    boundary = "bench"
    parts = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="eval_fraction"\r\n\r\n0.1\r\n'
        f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="rows.jsonl"\r\n\r\n'
    )
    body = parts.encode() + content + f"\r\n--{boundary}--\r\n".encode()
    request = Request("POST", "/datasets", body, {"Content-Type": f"multipart/form-data; boundary={boundary}"})
    return (await request_json(server.url, request))["processed_dataset_id"]


async def train(server: Server, body: Json) -> Outcome:
    """Train, and measure it. Raises RuntimeError if the job fails."""
    started_at = time.monotonic()
    job_id = (await request_json(server.url, Request("POST", "/train", body)))["job_id"]
    peak_bytes = export_peak_bytes = 0
    process: psutil.Process | None = None
    phases_s: dict[str, float] = {}
    while (job := await get_job(server, job_id))["status"] != "completed":
        if job["status"] == "failed" or time.monotonic() > started_at + TIMEOUT_S:
            raise RuntimeError(f"the job is {job['status']}: {job['failure']}")
        process = process or _find_process(job_id)
        if process is not None and (size := _read_peak_bytes(process)):
            export_peak_bytes = max(export_peak_bytes, size)
            if job["phase"] == "training":
                peak_bytes = max(peak_bytes, size)
        name = job["phase"] or "start"
        phases_s[name] = phases_s.get(name, 0.0) + POLL_S
        await asyncio.sleep(POLL_S)
    total_s = time.monotonic() - started_at
    record: Json = json.loads((server.home / f"objects/runs/{job_id}/attempt-1/run.json").read_text())
    return Outcome(
        steps=record["published_step"],
        tokens=record["train_tokens"],
        total_s=total_s,
        train_s=record["time"]["train_runtime_s"],
        peak_bytes=peak_bytes,
        export_peak_bytes=export_peak_bytes,
        phases_s=phases_s,
        artifact_bytes={artifact["name"]: artifact["size_bytes"] for artifact in record["artifacts"]},
    )


def _find_process(job_id: str) -> psutil.Process | None:
    return next((each for each in psutil.process_iter(["cmdline"]) if f"{job_id}.1" in (each.info["cmdline"] or [])), None)


def _read_peak_bytes(process: psutil.Process) -> int:
    """The most memory that a process held until now; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


async def estimate(server: Server, body: Json) -> Json:
    """What the dry run says of the request, once the tokens of its rows are counted."""
    base = body["training_config"]["base_model_id"]
    path = f"/datasets/{body['processed_dataset_id']}/token_lengths"
    await request_json(server.url, Request("POST", path, {"base_model_id": base}))
    plan = await request_json(server.url, Request("POST", "/train?dry_run=true", body))
    (profile,) = plan["profiles"]
    memory = profile["memory"]
    return {
        "steps": plan["steps"]["total_steps"],
        "tokens": plan["tokens"]["total"],
        "exact": plan["tokens"]["exact"],
        "total_s": profile["seconds"],
        "phases_s": {each["phase"]: each["seconds"] for each in profile["phases"]},
        "peak_bytes": max(memory["peak_bytes"], memory["evaluation_bytes"]),
        "artifact_bytes": {each["name"]: each["size_bytes"] for each in plan["artifacts"]},
    }


async def measure(cases: tuple[Case, ...], folder: Path, earlier: dict[str, Json], results: Path | None) -> list[Json]:
    """Estimate each case, and train it unless it was measured before."""
    home = folder / "home"
    await asyncio.to_thread(install_real_base, home)
    await asyncio.to_thread(install_tiny_base, home)
    settings = {"PYTHONPATH": str(SOURCE)}
    rows: list[Json] = []
    async with run_service(home, {"OMP_NUM_THREADS": str(psutil.cpu_count() or 1)}, settings=settings) as server:
        await request_json(server.url, Request("GET", "/capabilities"))  # the service probes the trainer's environment once
        for case in cases:
            dataset_id = await upload(server, make_rows(case))
            body = {"processed_dataset_id": dataset_id, "training_config": {"base_model_id": case.base} | case.config}
            estimated = await estimate(server, body)
            try:
                measured = earlier.get(case.name) or asdict(await train(server, body))
            except RuntimeError as error:
                print(f"{case.name}: {error}", file=sys.stderr)
                continue
            rows.append({"name": case.name, "estimated": estimated, "measured": measured})
            if results:
                results.write_text(json.dumps(rows, indent=1))
            print(describe(rows[-1]), flush=True)
    return rows


HEADER = """| training | steps | tokens | peak memory | whole job | artifacts |
|---|---|---|---|---|---|"""


def describe(row: Json) -> str:
    """A line of the table: estimated → measured."""
    estimated, measured = row["estimated"], row["measured"]
    about = "" if estimated["exact"] else "≈ "
    sizes = [
        f"{name} {size / 1e6:.0f} → {measured['artifact_bytes'][name] / 1e6:.0f} MB"
        for name, size in estimated["artifact_bytes"].items()
        if name in measured["artifact_bytes"]
    ]
    total = estimated["total_s"]
    return (
        f"| {row['name']} | {estimated['steps']} → {measured['steps']} | {about}{estimated['tokens']:,} → {measured['tokens']:,} | "
        f"{estimated['peak_bytes'] / 1e9:.2f} → {measured['peak_bytes'] / 1e9:.2f} GB | "
        f"{total['low']:.0f} to {total['high']:.0f} s → {measured['total_s']:.0f} s | {', '.join(sizes)} |"
    )


def main() -> int:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.estimates", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="*", metavar="NAME", default=[], help="some of the trainings")
    parser.add_argument("--measured", type=Path, metavar="FILE", help="the results of an earlier run, whose trainings are not repeated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    args = parser.parse_args()
    cases = tuple(case for case in CASES if not args.only or case.name in args.only)
    earlier = {row["name"]: row["measured"] for row in json.loads(args.measured.read_text())} if args.measured else {}
    print(HEADER)
    with tempfile.TemporaryDirectory(prefix="bench-estimates-") as folder:
        rows = asyncio.run(measure(cases, Path(folder), earlier, args.json))
    return 0 if len(rows) == len(cases) else 1


if __name__ == "__main__":
    sys.exit(main())

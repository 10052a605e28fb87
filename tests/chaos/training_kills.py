"""The training process is killed (−9) at random steps and inside saves; the service starts the next attempt each time.

A job with the same configuration trains undisturbed at the same time. Both are real: `python -m jobs.run` in the trainer's
environment on a tiny Gemma, with packing, dropout, shuffling and gradient accumulation, over several epochs. The row compares the events
that their processes spooled at every step and the files of the adapters.
"""

import hashlib
import json
import os
import random
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from schema.checkpoint import MANIFEST, checkpoint_key, checkpoints_prefix
from tests.chaos.campaign import CampaignError, Row, Size
from tests.chaos.service import SOURCE, TRAINER_PYTHON, Json, Service, service
from tests.waiting import wait_until

BASE = "tests/tiny-gemma"
SAVE_STEPS = 5
KILLS: dict[Size, tuple[int, int]] = {"full": (20, 5), "short": (1, 1)}  # in total, and of them inside a save
MAX_STEPS: dict[Size, int] = {"full": 260, "short": 20}
MAX_STEP_WAIT_S = 120.0  # from the launch to the step: a busy machine needs 20 s to import the libraries
TAIL_BYTES = 8192  # of an attempt's spool: its last steps
WORDS = ("files", "copy", "open", "close", "read", "write", "path", "name", "value", "number", "string", "object", "call")


def run(size: Size) -> Row:
    """Train the same job twice and keep killing one of them."""
    kills, inside = KILLS[size]
    with tempfile.TemporaryDirectory(prefix="chaos-training-") as folder:
        home = Path(folder, "home")
        build_tiny_base(home)
        variables = {"TUNESMITH_LOCAL_MAX_CONCURRENT_JOBS": "2"}
        with service(home, **variables) as running, ThreadPoolExecutor(1) as pool:
            dataset_id = running.upload(rows())
            undisturbed = pool.submit(lambda: _wait_until_completed(running, _submit(running, dataset_id, size)))
            killed = KilledJob(running, _submit(running, dataset_id, size))
            kill_costs = killed.kill_repeatedly(kills, inside)
            outcome = _compare(running, undisturbed.result(), _wait_until_completed(running, killed.job_id), kill_costs)
    return Row(
        fault="training process killed (−9)",
        injected=f"{kills} kills at random steps, {inside} of them inside a save; packing, dropout, shuffling, accumulation",
        expected="loss series and weights differ by exactly 0.0; lost work at most one save interval",
        observed=str(outcome),
        passed=outcome.attempts == kills + 1 and outcome.passed,
    )


@dataclass(frozen=True)
class Outcome:
    """The differences between the two jobs."""

    attempts: int
    steps: int
    repeated: int  # steps that ran more than once
    missing: int  # steps of the undisturbed job that the other never reported
    difference: float  # the largest, of any number at any step
    same_weights: bool
    lost_steps: int  # the largest number of steps that one kill cost

    @property
    def passed(self) -> bool:
        return (self.missing, self.difference, self.same_weights) == (0, 0.0, True) and self.lost_steps <= SAVE_STEPS

    def __str__(self) -> str:
        series = f"{self.attempts} attempts; losses of {self.steps} steps ({self.repeated} of them repeated) differ by {self.difference}"
        weights = "weights are the same bytes" if self.same_weights else "weights DIFFER"
        missing = f", {self.missing} steps missing" if self.missing else ""
        return f"{series}{missing}, {weights}; at most {self.lost_steps} steps lost of an interval of {SAVE_STEPS}"


@dataclass(frozen=True)
class KillCost:
    """The steps that one kill cost."""

    at_step: int
    resumed_step: int

    @property
    def steps(self) -> int:
        return self.at_step - self.resumed_step


class KilledJob:
    """A job whose attempts are killed."""

    def __init__(self, running: Service, job_id: str) -> None:
        self.job_id = job_id
        self._running = running
        self._rng = random.Random(9)
        self._number = 0

    def kill_repeatedly(self, kills: int, kills_inside_save: int) -> list[KillCost]:
        """Kill that many attempts, some of them inside a save; return the cost of each kill."""
        kinds = [True] * kills_inside_save + [False] * (kills - kills_inside_save)
        self._rng.shuffle(kinds)
        at_steps: list[int] = []
        resumed_steps: list[int] = []
        for inside_a_save in kinds:
            process = self._next_attempt()
            wait_until(lambda: self._step > 0, MAX_STEP_WAIT_S, interval_s=0.005, description=f"a step of attempt {self._number}")
            resumed_steps.append(self._resumed_step)
            self._suspend_inside_save(process) if inside_a_save else self._suspend_at_step(process)
            at_steps.append(self._step)
            process.kill()
        self._next_attempt()
        wait_until(lambda: self._step > 0, MAX_STEP_WAIT_S, interval_s=0.005, description=f"a step of attempt {self._number}")
        resumed_steps.append(self._resumed_step)
        return [KillCost(at_step, resumed_step) for at_step, resumed_step in zip(at_steps, resumed_steps[1:], strict=True)]

    def _next_attempt(self) -> psutil.Process:
        self._number += 1
        name = f"{self.job_id}.{self._number}"
        wait_until(lambda: self._process(name) is not None, MAX_STEP_WAIT_S, interval_s=0.05, description=f"attempt {name}")
        process = self._process(name)
        if process is None:
            raise CampaignError(f"attempt {name} ended by itself")
        return process

    def _process(self, name: str) -> psutil.Process | None:
        return next((process for process in self._running.attempts() if name in process.info["cmdline"]), None)

    def _suspend_at_step(self, process: psutil.Process) -> None:
        """Suspend after a random step. Later attempts save first: three attempts without a checkpoint would be too many."""
        target_step = self._resumed_step + self._rng.randint(1, 2 * SAVE_STEPS)
        wait_until(
            lambda: self._step >= target_step and (self._has_checkpoint or self._number == 1),
            MAX_STEP_WAIT_S,
            interval_s=0.001,
            description=f"step {target_step}",
        )
        process.suspend()

    def _suspend_inside_save(self, process: psutil.Process) -> None:
        """Suspend while a checkpoint is written or uploaded: its folder exists, its manifest does not."""
        deadline = time.monotonic() + MAX_STEP_WAIT_S
        while time.monotonic() < deadline:
            if self._has_checkpoint and self._unfinished_saves():
                time.sleep(self._rng.choice((0.0, 0.005, 0.02)))
                process.suspend()
                if self._unfinished_saves():
                    return
                process.resume()
            time.sleep(0.0005)
        raise CampaignError(f"attempt {self._number} was never inside a save")

    @property
    def _folder(self) -> Path:
        return self._running.home / "attempts" / f"{self.job_id}.{self._number}"

    @property
    def _step(self) -> int:
        """The last step that the running attempt spooled."""
        return max((step for step, _ in points(self._folder, TAIL_BYTES)), default=0)

    @property
    def _resumed_step(self) -> int:
        return next((event["step"] for event in events(self._folder) if event["type"] == "checkpoint_restored"), 0)

    @property
    def _has_checkpoint(self) -> bool:
        """Whether the running attempt has uploaded a checkpoint."""
        return any(self._manifests().glob(f"step-*/{MANIFEST}"))

    def _unfinished_saves(self) -> list[Path]:
        """Checkpoints on the attempt's disk that are not uploaded yet."""
        folders = self._folder.glob("checkpoints/checkpoint-*")
        return [path for path in folders if not self._manifest_of(int(path.name.rpartition("-")[2])).exists()]

    def _manifest_of(self, step: int) -> Path:
        return self._running.home / "objects" / checkpoint_key(checkpoints_prefix(self.job_id, None), self._number, step) / MANIFEST

    def _manifests(self) -> Path:
        return self._manifest_of(0).parent.parent


def events(folder: Path, tail_bytes: int = 1 << 30) -> Iterator[Json]:
    """The events that an attempt spooled, in order; the last line may be truncated, and so may the first of a tail."""
    for path in folder.glob("events-*.jsonl"):
        for line in path.read_bytes()[-tail_bytes:].splitlines():
            with suppress(ValueError):
                yield json.loads(line)["event"]


def points(folder: Path, tail_bytes: int = 1 << 30) -> Iterator[tuple[int, Json]]:
    """The metrics that an attempt spooled, by step: loss, gradient norm and learning rate."""
    for event in events(folder, tail_bytes):
        if event["type"] == "metrics":
            yield event["step"], {name: event["values"].get(name) for name in ("loss", "grad_norm", "learning_rate")}


def rows() -> str:
    """Short conversations, all different."""
    lines = []
    for n in range(64):
        answer = " ".join(["it returns a", WORDS[(3 * n) % 13], *[WORDS[n % 7]] * (n % 4)])
        conversation = [{"role": "user", "content": f"what does {WORDS[n % 13]} do {n}"}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": conversation}))
    return "\n".join(lines)


def build_tiny_base(home: Path) -> None:
    """Build the tiny Gemma where a service of that home looks for base models, in the trainer's environment."""
    folder = home / "objects/pretrained_weights/huggingface" / BASE
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [TRAINER_PYTHON, "-m", "tests.tiny_gemma", folder]
    built = subprocess.run(command, cwd=SOURCE, env=environment, capture_output=True, text=True)
    if built.returncode != 0:
        raise CampaignError(f"the tiny base could not be built: {built.stderr.strip().rpartition(chr(10))[2]}")


def _submit(running: Service, dataset_id: str, size: Size) -> str:
    hyperparameters = {
        "max_steps": MAX_STEPS[size],
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_seq_length": 64,
        "packing": True,
    }
    hyperparameters |= {"lora_rank": 4, "lora_dropout": 0.1, "logging_steps": 1, "save_strategy": "steps", "save_steps": SAVE_STEPS}
    config = {"base_model_id": BASE, "hyperparameters": hyperparameters}
    response = running.request("POST", "/train", json={"processed_dataset_id": dataset_id, "training_config": config})
    if response.status_code != 201:
        raise CampaignError(f"the job was rejected: {response.text}")
    return response.json()["job_id"]


def _wait_until_completed(running: Service, job_id: str) -> Json:
    wait_until(
        lambda: running.job(job_id)["status"] in ("completed", "failed", "cancelled"),
        300,
        interval_s=0.5,
        description=f"the end of {job_id}",
    )
    job = running.job(job_id)
    if job["status"] != "completed":
        raise CampaignError(f"{job_id} is {job['status']}: {job['failure']}")
    return job


def _compare(running: Service, reference: Json, killed: Json, kill_costs: list[KillCost]) -> Outcome:
    expected = dict(_read_points(running, reference))
    actual = list(_read_points(running, killed))
    differences = [_difference(values, expected[step]) for step, values in actual]
    return Outcome(
        attempts=len(killed["attempts"]),
        steps=len(expected),
        repeated=len(actual) - len({step for step, _ in actual}),
        missing=len(expected.keys() - {step for step, _ in actual}),
        difference=max(differences),
        same_weights=_adapter_digest(running, reference) == _adapter_digest(running, killed),
        lost_steps=max(cost.steps for cost in kill_costs),
    )


def _read_points(running: Service, job: Json) -> Iterator[tuple[int, Json]]:
    for attempt in job["attempts"]:
        yield from points(running.home / "attempts" / f"{job['job_id']}.{attempt['number']}")


def _difference(values: Json, expected: Json) -> float:
    return max(abs(values[name] - expected[name]) for name in expected)


def _adapter_digest(running: Service, job: Json) -> str:
    """The digest of the published adapter."""
    [path] = (running.home / "objects/trained_adapters" / job["job_id"]).rglob("adapter_model.safetensors")
    return hashlib.sha256(path.read_bytes()).hexdigest()

"""Damage the newest checkpoint of a job, differently for every seed; the next attempt must resume from the one before.

The full row also counts what the stock Trainer does with the same damage (tests/chaos/stock_trainer.py, in the trainer's environment).
"""

import hashlib
import json
import random
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from jobs.runtime.checkpoints import CheckpointInfo, Checkpoints
from schema.checkpoint import MANIFEST, checkpoint_key, checkpoints_prefix
from schema.events import CheckpointRestored, CheckpointSkipped, Event
from schema.spec import JobSpec, StoreUrls
from storage.file import LocalStore
from tests.chaos.campaign import CampaignError, Row, Size
from tests.chaos.damage import DAMAGES, damage
from tests.chaos.service import SOURCE, TRAINER_PYTHON
from tests.factories import make_config, make_dataset

SEEDS: dict[Size, int] = {"full": 100, "short": 20}
STEPS = (5, 10, 15)
# The file names of a real checkpoint, with similar sizes; verification does not depend on the contents.
FILES = {
    "adapter_model.safetensors": 40_000,
    "adapter_config.json": 900,
    "optimizer.pt": 80_000,
    "scheduler.pt": 1_500,
    "rng_state.pth": 14_000,
    "trainer_state.json": 2_000,
    "tunesmith.json": 300,
}


def run(size: Size) -> Row:
    """Damage one checkpoint per seed and count how the next attempt resumes."""
    seeds = range(SEEDS[size])
    with tempfile.TemporaryDirectory(prefix="chaos-checkpoints-") as folder:
        outcomes = [_resume_from_damaged(Path(folder, str(seed)), seed) for seed in seeds]
        stock = _run_stock_trainer(Path(folder, "stock"), len(seeds)) if size == "full" else "the stock Trainer was not tested"
    fell_back, reported = sum(outcome.fell_back for outcome in outcomes), sum(outcome.reported for outcome in outcomes)
    return Row(
        fault="newest checkpoint damaged",
        injected=f"{', '.join(DAMAGES)}: {len(seeds)} seeds, any of its files",
        expected=f"{len(seeds)} fall back to the last verified one, with an event; no crash, no silent load",
        observed=f"{fell_back} fell back, {reported} reported it; {stock}",
        passed=fell_back == reported == len(seeds),
    )


@dataclass(frozen=True)
class Outcome:
    """How an attempt resumed."""

    fell_back: bool  # to the newest intact checkpoint, and the restored copy is intact
    reported: bool  # one event names the damaged checkpoint, another the restored one


def _resume_from_damaged(folder: Path, seed: int) -> Outcome:
    store = LocalStore((folder / "objects").as_uri())
    spec = _make_spec(store)
    digests = _save_all(store, spec, folder)
    newest = folder / "objects" / checkpoint_key(spec.checkpoints_prefix, 1, STEPS[-1])
    damage(newest, seed, (*FILES, MANIFEST))
    emitted: list[Event] = []
    checkpoints = _checkpoints(store, spec, 2, folder / "second", emitted)
    restored = checkpoints.fetch_latest()
    checkpoints.close()
    if restored is None:
        return Outcome(fell_back=False, reported=False)
    restored_digests = {name: hashlib.sha256((restored.folder / name).read_bytes()).hexdigest() for name in FILES}
    skipped = [(event.attempt, event.step) for event in emitted if isinstance(event, CheckpointSkipped)]
    resumed = [(event.from_attempt, event.step) for event in emitted if isinstance(event, CheckpointRestored)]
    return Outcome(
        fell_back=restored.checkpoint.step == STEPS[-2] and restored_digests == digests[STEPS[-2]],
        reported=(skipped, resumed) == ([(1, STEPS[-1])], [(1, STEPS[-2])]),
    )


def _save_all(store: LocalStore, spec: JobSpec, folder: Path) -> dict[int, dict[str, str]]:
    """Save the checkpoints of attempt 1; return the digests of their files by step."""
    checkpoints = _checkpoints(store, spec, 1, folder / "first", [])
    digests: dict[int, dict[str, str]] = {}
    for step in STEPS:
        checkpoint_folder = folder / "first" / f"checkpoint-{step}"
        checkpoint_folder.mkdir(parents=True)
        for number, (name, size_bytes) in enumerate(FILES.items()):
            (checkpoint_folder / name).write_bytes(random.Random(1000 * step + number).randbytes(size_bytes))
        digests[step] = {name: hashlib.sha256((checkpoint_folder / name).read_bytes()).hexdigest() for name in FILES}
        checkpoints.submit(checkpoint_folder, _make_checkpoint_info(step))
        if not checkpoints.wait_until_uploaded():
            raise CampaignError(f"the checkpoint of step {step} could not be saved")
    checkpoints.close()
    return digests


def _checkpoints(store: LocalStore, spec: JobSpec, attempt: int, folder: Path, events: list[Event]) -> Checkpoints:
    folder.mkdir(parents=True, exist_ok=True)
    return Checkpoints(store=store, spec=spec, attempt=attempt, folder=folder, save_total_limit=len(STEPS), emit=events.append)


def _make_checkpoint_info(step: int) -> CheckpointInfo:
    return CheckpointInfo(
        step=step,
        total_steps=100,
        epoch=step / 10,
        reason="interval",
        eval_loss=None,
        save_s=0.0,
    )


def _make_spec(store: LocalStore) -> JobSpec:
    return JobSpec(
        job_id="job-1",
        job_name="a job",
        tenant_id="local",
        training_config=make_config(),
        dataset=make_dataset(),
        stores=StoreUrls(datasets=store.url, models=store.url, configs=store.url),
        checkpoints_prefix=checkpoints_prefix("job-1", None),
    )


def _run_stock_trainer(folder: Path, seeds: int) -> str:
    """Describe how often the stock Trainer's `resume_from_checkpoint` picks, crashes on or silently loads damaged checkpoints."""
    command = [TRAINER_PYTHON, "-m", "tests.chaos.stock_trainer", folder, str(seeds)]
    environment = {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HOME": str(folder)}
    done = subprocess.run(command, cwd=SOURCE, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise CampaignError(f"the stock Trainer could not run: {done.stderr.strip().rpartition(chr(10))[2]}")
    counts = json.loads(done.stdout.splitlines()[-1])
    outcomes = f"crashed {counts['crashed']} times, loaded it silently {counts['loaded']} times, fell back {counts['fell_back']} times"
    return f"the stock Trainer picked the damaged one {counts['picked']} times, {outcomes}"

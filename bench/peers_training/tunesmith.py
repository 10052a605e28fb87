"""Tunesmith's trainer, by the code that an attempt runs, without a service."""

import os
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

from bench.by_hand import Nobody
from bench.peers_training.plan import RANK, SEED, Plan, Seen, Stopwatch, run
from jobs.checkpoints import Checkpoints
from jobs.context import JobContext, Secrets, Stores
from jobs.trainers.sft import train as train_sft
from schema.checkpoint import checkpoints_prefix
from schema.events import Event, Metrics
from schema.job import Phase, Progress
from schema.spec import JobSpec
from schema.training import SftConfig

JOB = "bench"
BASE = "bench/base"


class Watching:
    """A voice that tells the stopwatch."""

    def __init__(self, watch: Stopwatch) -> None:
        self._watch = watch

    def report(self, event: Event) -> None:
        """A point of the curve."""
        if isinstance(event, Metrics):
            self._watch.logged(event.values.get("loss"), event.values.get("grad_norm"))

    def place(self, *, phase: Phase | None = None, progress: Progress | None = None) -> None:
        """The steps begin, or one is done."""
        if phase == "training":
            self._watch.begins()
        if progress is not None:
            self._watch.stepped(progress.step)


def train(plan: Plan) -> Seen:
    """One epoch over the rows."""
    watch = Stopwatch()
    workdir = Path(plan.out)
    spec = spec_of(plan, workdir / "objects")
    checkpoints = Checkpoints(
        store=Stores(spec.stores).models, spec=spec, attempt=1, folder=workdir / "checkpoints", keep=1, tell=Nobody().report
    )
    context = JobContext(spec, 1, workdir, Secrets({}), Stores(spec.stores), Watching(watch), Nobody(), checkpoints)
    assert isinstance(spec.training_config, SftConfig)
    trained = train_sft(spec.training_config, context)
    context.checkpoints.settle()
    watch.seen.tokens = trained.train_tokens
    watch.seen.labels = labels_in(context, spec)
    watch.seen.adapter = str(trained.folder)
    return watch.seen


def spec_of(plan: Plan, objects: Path) -> JobSpec:
    """The job, and its base and rows in a store."""
    # A store takes no symbolic links, and a copy of a large base is a copy of a large base.
    shutil.copytree(plan.base, objects / "pretrained_weights/huggingface" / BASE, copy_function=os.link)
    content = Path(plan.rows).read_bytes()
    (objects / "datasets").mkdir()
    (objects / "datasets/train.jsonl").write_bytes(content)
    split = {"rows": content.count(b"\n"), "size_bytes": len(content), "sha256": sha256(content).hexdigest(), "key": "datasets/train.jsonl"}
    dataset = {"processed_dataset_id": "d", "tenant_id": "local", "name": "d", "dataset_type": "prompt_completion", "digest": ""}
    dataset |= {"splits": {"train": split}, "rows_uploaded": split["rows"], "created_at": "2026-01-01T00:00:00Z"}
    return JobSpec.model_validate(
        {"job_id": JOB, "job_name": JOB, "tenant_id": "local", "dataset": dataset, "training_config": config_of(plan)}
        | {"stores": dict.fromkeys(("datasets", "models", "configs"), f"file://{objects}")}
        | {"checkpoints": checkpoints_prefix(JOB, None)}
    )


def config_of(plan: Plan) -> dict[str, Any]:
    """What a user would send; schedule, decay and dropout are those that TRL has when it is told nothing."""
    knobs = {
        "packing": plan.packing,
        "batch_size": plan.batch_size,
        "gradient_accumulation_steps": plan.accumulation,
        "max_seq_length": plan.max_length,
        "learning_rate": plan.learning_rate,
        "epochs": 1,
        "use_fa2": plan.use_fa2,
        "logging_steps": plan.logging_steps,
        "warmup_ratio": 0.0,
        "weight_decay": 0.0,
        "lora_rank": RANK,
        "lora_alpha": RANK,
        "lora_dropout": 0.0,
        "save_strategy": "no",
        "seed": SEED,
    }
    return {"base_model_id": BASE, "hyperparameters": knobs, "eval_config": {"sample_prompts": 0}}


def labels_in(context: JobContext, spec: JobSpec) -> int:
    """How many tokens were to be learned."""
    from transformers import AutoTokenizer

    from jobs.data.render import NO_LABEL, read_rows, render

    tokenizer = AutoTokenizer.from_pretrained(context.workdir / "model")
    longest = spec.training_config.hyperparameters.max_seq_length
    rows = render(read_rows(context.workdir / "data/train.jsonl"), "prompt_completion", tokenizer, longest).rows
    return sum(label != NO_LABEL for row in rows for label in row.labels)


if __name__ == "__main__":
    run(train)

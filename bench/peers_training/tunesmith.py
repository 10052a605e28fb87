"""Tunesmith's trainer, with the code that an attempt runs but without the service."""

import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from bench.direct_training import NoOpControl
from bench.peers_training.plan import RANK, SEED, Stopwatch, TrainingPlan, TrainingRecord, run_script
from jobs.llm.trainers.sft import SftTask
from jobs.llm.trainers.sft import train as train_sft
from jobs.runtime.checkpoints import Checkpoints
from jobs.runtime.context import JobContext, Secrets, Stores
from schema.checkpoint import checkpoints_prefix
from schema.events import Event, MetricsLogged
from schema.job import Progress
from schema.spec import JobSpec
from schema.training import SftConfig
from schema.types import Phase

JOB_ID = "bench"
BASE = "bench/base"


class StopwatchEventSink:
    """An event sink that calls the stopwatch."""

    def __init__(self, watch: Stopwatch) -> None:
        self._watch = watch

    def report(self, event: Event) -> None:
        """Record the metrics of a step."""
        if isinstance(event, MetricsLogged):
            self._watch.record_metrics(event.values.get("loss"), event.values.get("grad_norm"))

    def set_progress(self, *, phase: Phase | None = None, progress: Progress | None = None) -> None:
        """Start the stopwatch, or record the end of a step."""
        if phase == "training":
            self._watch.start()
        if progress is not None:
            self._watch.record_step(progress.step)
            self._watch.record.step_tokens.append(self._watch.record.tokens)


def train(plan: TrainingPlan) -> TrainingRecord:
    """One epoch over the rows, or `max_steps` steps."""
    watch = Stopwatch()
    workdir = Path(plan.output_folder)
    spec = make_spec(plan, workdir / "objects")
    checkpoints = Checkpoints(
        store=Stores(spec.stores).models,
        spec=spec,
        attempt=1,
        folder=workdir / "checkpoints",
        save_total_limit=1,
        emit=NoOpControl().report,
    )
    context = JobContext(spec, 1, workdir, Secrets({}), Stores(spec.stores), StopwatchEventSink(watch), NoOpControl(), checkpoints)
    assert isinstance(spec.training_config, SftConfig)
    with tokens_recorded(watch):
        trained = train_sft(spec.training_config, context)
    context.checkpoints.wait_until_uploaded()
    watch.record.tokens = trained.train_tokens
    watch.record.labels = count_labels(context, spec) if plan.max_steps < 0 else 0
    watch.record.adapter = str(trained.folder)
    return watch.record


@contextmanager
def tokens_recorded(watch: Stopwatch) -> Generator[None]:
    """A context in which the trainer adds the tokens of each batch to the record, before the step of the batch ends."""
    count_tokens = SftTask.count_tokens

    def count_and_record(task: SftTask, inputs: Any) -> int:
        tokens = count_tokens(task, inputs)
        watch.record.tokens += tokens
        return tokens

    SftTask.count_tokens = count_and_record
    try:
        yield
    finally:
        SftTask.count_tokens = count_tokens


def make_spec(plan: TrainingPlan, objects: Path) -> JobSpec:
    """The spec of the job; puts its base and rows into a store."""
    # Hard links: the store rejects symbolic links, and copying a large base takes long.
    shutil.copytree(plan.base, objects / "pretrained_weights/huggingface" / BASE, copy_function=os.link)
    content = Path(plan.rows_path).read_bytes()
    (objects / "datasets").mkdir()
    (objects / "datasets/train.jsonl").write_bytes(content)
    split = {"rows": content.count(b"\n"), "size_bytes": len(content), "sha256": sha256(content).hexdigest(), "key": "datasets/train.jsonl"}
    dataset = {"processed_dataset_id": "d", "tenant_id": "local", "name": "d", "dataset_type": "prompt_completion", "digest": ""}
    dataset |= {"splits": {"train": split}, "rows_uploaded": split["rows"], "created_at": "2026-01-01T00:00:00Z"}
    return JobSpec.model_validate(
        {"job_id": JOB_ID, "job_name": JOB_ID, "tenant_id": "local", "dataset": dataset, "training_config": make_config(plan)}
        | {"stores": dict.fromkeys(("datasets", "models", "configs"), f"file://{objects}")}
        | {"checkpoints_prefix": checkpoints_prefix(JOB_ID, None)}
    )


def make_config(plan: TrainingPlan) -> dict[str, Any]:
    """The training config that a user would send: nothing but the length of the training, or what TRL has by default."""
    measured = {"logging_steps": plan.logging_steps, "learning_rate": plan.learning_rate, "seed": SEED, "save_strategy": "no"}
    if plan.flags == "defaults":
        return {"base_model_id": BASE, "hyperparameters": measured | {"max_steps": plan.max_steps}}
    hyperparameters = measured | {
        "packing": plan.packing,
        "batch_size": plan.batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "max_seq_length": plan.max_length,
        "epochs": 1,
        "max_steps": plan.max_steps,
        "use_fa2": plan.use_fa2,
        "warmup_ratio": 0.0,
        "weight_decay": 0.0,
        "lora_rank": RANK,
        "lora_alpha": RANK,
        "lora_dropout": 0.0,
    }
    return {"base_model_id": BASE, "hyperparameters": hyperparameters, "eval_config": {"sample_prompts": 0}}


def count_labels(context: JobContext, spec: JobSpec) -> int:
    """The number of labeled tokens in the training split."""
    from transformers import AutoTokenizer

    from jobs.llm.chat_format import choose_chat_format
    from jobs.llm.data.tokenize import IGNORE_INDEX, RowTokenizer, read_rows, tokenize_split

    tokenizer = AutoTokenizer.from_pretrained(context.workdir / "model")
    max_length = spec.training_config.hyperparameters.max_seq_length
    row_tokenizer = RowTokenizer(tokenizer, choose_chat_format(tokenizer, spec.training_config))
    rows = tokenize_split(read_rows(context.workdir / "data/train.jsonl"), "prompt_completion", row_tokenizer, max_length).rows
    return sum(label != IGNORE_INDEX for row in rows for label in row.labels)


if __name__ == "__main__":
    run_script(train)

"""Counts to `max_steps`, and can be paused and resumed at every step."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.runtime.context import JobContext
from jobs.runtime.save_policy import SavePolicy, TrainingControlState
from jobs.runtime.training_control import TrainingControl
from schema.job import EvalMetrics

COUNT_FILE = "count"


@dataclass(frozen=True)
class TrainedCount:
    """The count, on disk."""

    folder: Path
    step: int
    train_runtime_s: float
    train_rows: int
    metrics: EvalMetrics | None = None
    base_metrics: EvalMetrics | None = None
    base_folder: Path | None = None
    train_tokens: int | None = None
    cuda: str | None = None


def count_up(config: Any, context: JobContext) -> TrainedCount:
    return _count(config, context, by=1)


def count_by_two(config: Any, context: JobContext) -> TrainedCount:
    return _count(config, context, by=2)


def _count(config: Any, context: JobContext, by: int) -> TrainedCount:
    source = context.spec.export_of
    restored = context.checkpoints.fetch(source) if source else context.checkpoints.fetch_latest()
    state = TrainingControlState.read(restored.folder) if restored else TrainingControlState()
    count = int((restored.folder / COUNT_FILE).read_text()) if restored else 0
    total_steps = state.step if source else config.hyperparameters.max_steps
    control = TrainingControl(context, SavePolicy("steps", 10), state, total_steps=total_steps)
    context.enter_phase("counting")
    started_s = time.monotonic()
    control.start()
    with context.stop.defer_stop():
        while not control.is_done and not control.should_stop():
            control.on_step_begin()
            time.sleep(config.hyperparameters.step_s)
            count += by
            control.on_step_end(control.step + 1, 1.0 / count)
            context.log_metrics(control.step, {"loss": control.pop_mean_loss(), "count": float(count)})
            if control.should_stop() or control.should_save(epoch_ended=False):
                _save(control, context, count)
        control.raise_if_stopped()
    folder = context.workdir / "model"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / COUNT_FILE).write_text(str(count))
    return TrainedCount(folder, control.step, time.monotonic() - started_s, context.spec.dataset.rows)


def _save(control: TrainingControl, context: JobContext, count: int) -> None:
    folder = context.workdir / "checkpoints" / str(control.step)

    def write_files() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / COUNT_FILE).write_text(str(count))

    control.save(folder, 0.0, write_files)

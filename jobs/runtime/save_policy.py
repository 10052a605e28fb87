"""When a training saves a checkpoint, and the state that it saves beside the library's own files so that it resumes exactly."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import ConfigDict, Field, JsonValue

from schema.checkpoint import move_batch_to_details
from schema.job import EvalMetrics
from schema.migrations import Migration, VersionedRecord

STATE_FILE = "tunesmith.json"

MAX_CHECKPOINT_INTERVAL_S = 300.0  # at most five minutes of work are lost, however long the job's own interval is
MAX_SAVE_OVERHEAD = 1 / 20  # largest fraction of the time that safety checkpoints may block the training


@dataclass(frozen=True)
class SavePolicy:
    """The job's save_strategy, plus safety checkpoints at most every MAX_CHECKPOINT_INTERVAL_S. Strategy "no" saves neither."""

    strategy: Literal["no", "steps", "epoch"]
    save_steps: int

    def is_due(self, step: int, *, epoch_ended: bool, since_last_save_s: float, save_s: float) -> bool:
        """Whether to save after this step. `save_s` is how long the last save blocked the training."""
        match self.strategy:
            case "no":
                return False
            case "steps" if step % self.save_steps == 0:
                return True
            case "epoch" if epoch_ended:
                return True
            case _:
                return since_last_save_s >= compute_checkpoint_interval_s(save_s)


def compute_checkpoint_interval_s(save_s: float) -> float:
    """The longest time between checkpoints, given that a save blocks the training for `save_s`."""
    return max(MAX_CHECKPOINT_INTERVAL_S, save_s / MAX_SAVE_OVERHEAD)


class TrainingControlState(VersionedRecord):
    """`tunesmith.json` in a checkpoint: the state that the library's files do not have."""

    model_config = ConfigDict(ser_json_inf_nan="strings", allow_inf_nan=True)  # libraries record NaN for undefined metrics
    migrations: ClassVar[Mapping[int, Migration]] = {1: move_batch_to_details}

    schema_version: int = 2
    details: dict[str, JsonValue] = Field(default={})  # the family's own, copied into the checkpoint's manifest
    step: int = 0
    tokens_seen: int = 0
    train_s: float = 0.0  # training time of all attempts so far
    loss_buffer: tuple[float, ...] = ()  # losses of the steps since metrics were last logged
    logged_metrics_buffer: dict[str, tuple[float, ...]] = Field(default={})  # what the library collected since it last logged
    best_loss: float | None = None  # the lowest eval_loss
    best_step: int | None = None
    evaluations_without_improvement: int = 0
    metrics_by_step: dict[int, EvalMetrics] = Field(default={})  # only the newest
    evaluation_due: bool = False  # the training stopped before it evaluated this step
    base_metrics: EvalMetrics | None = None
    evaluation_s: float | None = None  # how long the last evaluation took

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The state in a checkpoint's folder."""
        return cls.load((folder / STATE_FILE).read_bytes())

    def write(self, folder: Path) -> None:
        """Write the state beside the library's files."""
        (folder / STATE_FILE).write_text(self.model_dump_json(indent=1))

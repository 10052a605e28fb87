"""When a training is saved, and what is saved beside the library's own files, so that it goes on as if nothing had happened."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import ConfigDict, Field

from schema.base import ForwardCompatible
from schema.job import EvalMetrics

STATE_FILE = "tunesmith.json"

MAX_CHECKPOINT_INTERVAL_S = 300.0  # no more than five minutes of work are lost, however long the job's own interval is
MAX_SAVE_OVERHEAD = 1 / 20  # of the time, at most, the training stands still for the safety interval


@dataclass(frozen=True)
class SavePolicy:
    """When the job wants checkpoints: as its save_strategy says, and after the safety interval."""

    strategy: Literal["no", "steps", "epoch"]
    save_steps: int

    def is_due(self, step: int, *, epoch_ended: bool, since_last_save_s: float, save_s: float) -> bool:
        """Whether to save after this step, `since_s` after the last time, which made the training stand still for `blocked_s`."""
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
    """How long a training goes without a checkpoint, when saving makes it stand still for `blocked_s`."""
    return max(MAX_CHECKPOINT_INTERVAL_S, save_s / MAX_SAVE_OVERHEAD)


class TrainingControlState(ForwardCompatible):
    """`tunesmith.json` in a checkpoint: what the library does not keep for us."""

    model_config = ConfigDict(ser_json_inf_nan="strings")  # TRL gathers NaN where a figure has no meaning

    batch_size: int
    gradient_accumulation_steps: int
    step: int = 0
    tokens_seen: int = 0
    train_s: float = 0.0  # of all attempts, up to here
    loss_buffer: tuple[float, ...] = ()  # losses of the steps since the last point of the curve
    logged_metrics_buffer: dict[str, tuple[float, ...]] = Field(default={})  # what the library has gathered for it, by name
    best_loss: float | None = None  # the lowest eval_loss so far
    best_step: int | None = None
    evaluations_without_improvement: int = 0  # evaluations since then
    metrics_by_step: dict[int, EvalMetrics] = Field(default={})  # by step; the newest alone
    evaluation_due: bool = False  # the training ended at a step at which it was to be measured
    base_metrics: EvalMetrics | None = None

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The state in a checkpoint's folder."""
        return cls.load((folder / STATE_FILE).read_bytes())

    def write(self, folder: Path) -> None:
        """Put it beside the library's files."""
        (folder / STATE_FILE).write_text(self.model_dump_json(indent=1))

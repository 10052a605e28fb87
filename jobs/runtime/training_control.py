"""The course of a training: what it has seen so far, when it is saved, and when it must end.

It decides and remembers; what moves the weights tells it what happens. No library is in here, so that every trainer can have one.
"""

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.llm.oom import BatchConfig, is_disk_full
from jobs.runtime.checkpoints import CheckpointInfo
from jobs.runtime.errors import JobFailed, Stopped, StopReason
from jobs.runtime.save_policy import SavePolicy, TrainingControlState
from schema.checkpoint import CheckpointReason
from schema.job import EvalMetrics

if TYPE_CHECKING:
    from jobs.runtime.context import JobContext

# How fast a checkpoint is written and uploaded, until the first one has been: a guess on the slow side.
GUESSED_BYTES_PER_S = 50e6


class EvaluationInterrupted(Exception):
    """The training must end now: what is being measured is measured when it goes on."""


@dataclass(frozen=True)
class EarlyStoppingPolicy:
    """What becomes of the measurements: whether the best checkpoint is published, and when a training that gets no better ends."""

    load_best_model_at_end: bool = False
    patience: int | None = None  # evaluations in a row without a lower eval_loss
    threshold: float = 0.0  # nats by which it must fall


class TrainingControl:
    """A training on its way from where `state` left it to `total_steps`."""

    def __init__(
        self,
        context: "JobContext",
        save_policy: SavePolicy,
        state: TrainingControlState,
        *,
        total_steps: int,
        early_stopping: EarlyStoppingPolicy = EarlyStoppingPolicy(),  # frozen
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.step = state.step
        self.total_steps = total_steps
        self.tokens_seen = state.tokens_seen
        self.stop_reason: StopReason | None = None  # why it ends before it is done
        self.checkpoint_bytes = 0  # roughly
        self.logged_metrics_buffer = dict(state.logged_metrics_buffer)  # what the library has gathered for the next point
        self.should_save_best = False  # this step is the best so far, and is to be published
        self._early_stopping = early_stopping
        self._best_loss, self.best_step, self._evaluations_without_improvement = (
            state.best_loss,
            state.best_step,
            state.evaluations_without_improvement,
        )
        self._published_step: int | None = None
        self._context = context
        self._save_policy = save_policy
        self._state = state
        self._clock = clock
        self._loss_buffer = list(state.loss_buffer)
        self._metrics_by_step = dict(state.metrics_by_step)
        self._evaluation_due = state.evaluation_due
        self._started_at = self._saved_at = self._step_started_at = clock()
        self._longest_step_s = self._save_s = 0.0
        self._saved_step: int | None = None

    @property
    def batch_config(self) -> BatchConfig:
        """How many rows go through the model at once."""
        return BatchConfig(self._state.batch_size, self._state.gradient_accumulation_steps)

    @property
    def evaluation_is_due(self) -> bool:
        """The training ended at a step at which it was to be measured, and was not."""
        return self._evaluation_due

    @property
    def is_done(self) -> bool:
        """All steps are done, or more of them make it no better."""
        return self.step >= self.total_steps or (
            self._early_stopping.patience is not None and self._evaluations_without_improvement >= self._early_stopping.patience
        )

    @property
    def load_best_model_at_end(self) -> bool:
        """The best checkpoint is published, not the last."""
        return self._early_stopping.load_best_model_at_end

    @property
    def published_step(self) -> int:
        """The step whose weights are published."""
        return self.step if self._published_step is None else self._published_step

    @published_step.setter
    def published_step(self, step: int) -> None:
        self._published_step = step

    @property
    def eta_s(self) -> float | None:
        """Seconds until the last step, at the speed of this attempt; None before its first."""
        done = self.step - self._state.step
        return (self._clock() - self._started_at) / done * (self.total_steps - self.step) if done else None

    @property
    def state(self) -> TrainingControlState:
        """What has to be known to go on from here."""
        return self._state.model_copy(
            update={
                "step": self.step,
                "tokens_seen": self.tokens_seen,
                "train_s": self._state.train_s + self._trained_s,
                "loss_buffer": tuple(self._loss_buffer),
                "logged_metrics_buffer": {name: tuple(values) for name, values in self.logged_metrics_buffer.items()},
                "best_loss": self._best_loss,
                "best_step": self.best_step,
                "evaluations_without_improvement": self._evaluations_without_improvement,
                "metrics_by_step": self._metrics_by_step,
                "evaluation_due": self._evaluation_due,
                "base_metrics": self._context.state.base_metrics,
            }
        )

    @property
    def _trained_s(self) -> float:
        return self._clock() - self._started_at if self.step > self._state.step else 0.0

    def start(self) -> None:
        """The first step comes now."""
        self._started_at = self._saved_at = self._clock()

    def on_step_begin(self) -> None:
        """An optimizer step begins."""
        self._step_started_at = self._clock()

    def on_step_end(self, step: int, loss: float) -> None:
        """An optimizer step is done, its loss in nats per label. Raises Stopped when cancelled, JobFailed when it is no number."""
        self._context.check_stop()
        self.step = step
        self._longest_step_s = max(self._longest_step_s, self._clock() - self._step_started_at)
        if not math.isfinite(loss):
            raise make_divergence_error(f"the loss is no number any more at step {step}")
        self._loss_buffer.append(loss)

    def pop_mean_loss(self) -> float:
        """The mean loss of the steps since the last point of the curve; the next window begins."""
        window, self._loss_buffer = self._loss_buffer, []
        return math.fsum(window) / len(window)

    def should_stop(self) -> bool:
        """Whether the training must be saved and end here: somebody asked, or time is short. Raises Stopped when cancelled."""
        self._context.check_stop()
        if self.stop_reason is None and self._context.should_yield(self._step_and_save_s):
            self.stop_reason = self._context.stop.stop_reason or "time_slice"
        return self.stop_reason is not None

    def should_save(self, *, epoch_ended: bool) -> bool:
        """Whether this step is to be saved."""
        since_s = self._clock() - self._saved_at
        due = self._save_policy.is_due(self.step, epoch_ended=epoch_ended, since_last_save_s=since_s, save_s=self._save_s)
        return due or self.is_done or self.stop_reason is not None

    def evaluate(self, evaluate_fn: Callable[[Callable[[], None]], EvalMetrics]) -> EvalMetrics | None:
        """Measure at this step, once. None when the training must end first: then it is due when that goes on.

        `measure` is given what it has to call now and then.
        """
        if self.step in self._metrics_by_step:
            return self._metrics_by_step[self.step]
        self._evaluation_due = True
        try:
            found = evaluate_fn(self._check_stop)
        except EvaluationInterrupted:
            return None
        self._metrics_by_step, self._evaluation_due = {self.step: found}, False
        self._context.log_evaluation("during", self.step, found)
        self._update_best(found)
        return found

    def save(self, folder: Path, epoch: float, write_files: Callable[[], object]) -> None:
        """Let `write` fill the folder, and hand it over to be kept; a full disk is got over. Nothing is saved twice."""
        if self._saved_step == self.step:
            return
        began = self._saved_at = self._clock()
        if not self._write_checkpoint(folder, write_files):
            return
        self.should_save_best = False
        if self.load_best_model_at_end:  # one that still waits to be uploaded would be dropped for this one, and may be the best
            self._context.checkpoints.wait_until_uploaded()
        self._context.notify_checkpoint_saved(folder, self.step)
        self._saved_step = self.step
        self._saved_at = self._clock()
        self._save_s = self._saved_at - began
        self._context.checkpoints.submit(folder, self._checkpoint_info(epoch))

    def raise_if_stopped(self) -> None:
        """The steps are over. Raises Stopped when the training was asked to end, as soon as what was saved is durable."""
        reason = self.stop_reason or self._context.stop.stop_reason
        if reason is not None:
            self._context.checkpoints.wait_until_uploaded(self._context.stop.time_left_s())
            raise Stopped(reason)

    @property
    def _step_and_save_s(self) -> float:
        """What one more step, and then a checkpoint, may take."""
        upload_s = self._context.checkpoints.max_upload_s
        saving_s = (
            self._save_s + upload_s
            if self._saved_step is not None and upload_s
            else max(self.checkpoint_bytes / GUESSED_BYTES_PER_S, self._save_s)
        )
        return self._longest_step_s + saving_s

    def _update_best(self, metrics: EvalMetrics) -> None:
        """Whether this is the best measurement so far, and whether there is still hope."""
        loss = metrics.eval_loss
        if loss is not None and (self._best_loss is None or loss < self._best_loss - self._early_stopping.threshold):
            self._best_loss, self.best_step, self._evaluations_without_improvement = loss, self.step, 0
            self.should_save_best = self.load_best_model_at_end
            return
        self._evaluations_without_improvement += 1
        if self._early_stopping.patience is not None and self._evaluations_without_improvement >= self._early_stopping.patience:
            why = f"eval_loss has not fallen below {self._best_loss} in {self._evaluations_without_improvement} evaluations"
            self._context.log_decision("early_stopping", f"step {self.step}", why)

    def _check_stop(self) -> None:
        if self.should_stop():
            raise EvaluationInterrupted

    def _write_checkpoint(self, folder: Path, write_files: Callable[[], object]) -> bool:
        from safetensors import SafetensorError

        for is_last_try in (False, True):
            try:
                write_files()
                self.state.write(folder)
                return True
            except (OSError, RuntimeError, SafetensorError) as error:
                if not is_disk_full(error):
                    raise
            shutil.rmtree(folder, ignore_errors=True)
            room = self._context.checkpoints.prune_local()
            if is_last_try or not room:
                break
        self._context.warn("disk_full", f"there is no room on the disk to save step {self.step}; the training goes on without")
        return False

    def _checkpoint_info(self, epoch: float) -> CheckpointInfo:
        measured = self._metrics_by_step.get(self.step)
        return CheckpointInfo(
            step=self.step,
            total_steps=self.total_steps,
            epoch=epoch,
            reason=self._checkpoint_reason,
            eval_loss=measured.eval_loss if measured else None,
            batch_size=self._state.batch_size,
            gradient_accumulation_steps=self._state.gradient_accumulation_steps,
            save_s=self._save_s,
        )

    @property
    def _checkpoint_reason(self) -> CheckpointReason:
        match self.stop_reason:
            case _ if self.is_done:
                return "end"
            case "pause" | "preempted" | "time_slice" as reason:
                return reason
            case _:
                return "interval"


def make_divergence_error(message: str) -> JobFailed:
    """A training that has lost its numbers: going on would only cost."""
    return JobFailed("invalid_config", message, "lower learning_rate, or raise warmup_ratio")

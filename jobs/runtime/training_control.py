"""Control a training: track its progress, decide when to save and evaluate, and when to stop.

TrainingControl only decides and keeps state; the training loop reports each step to it. It uses no ML library, so every trainer can
use it.
"""

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from pydantic import JsonValue

from jobs.runtime.background_task import BackgroundTask
from jobs.runtime.checkpoints import CheckpointInfo
from jobs.runtime.context import JobContext
from jobs.runtime.disk_full import write_folder
from jobs.runtime.early_stopping import NO_EARLY_STOPPING, EarlyStopping, EarlyStoppingPolicy
from jobs.runtime.errors import JobFailed, Stopped, StopReason
from jobs.runtime.save_policy import SavePolicy, TrainingControlState
from jobs.runtime.training_timer import TrainingTimer
from schema.checkpoint import CheckpointReason
from schema.estimate.disk import estimate_save_s
from schema.job import EvalMetrics


class EvaluationInterrupted(Exception):
    """The training must stop during an evaluation. The next attempt repeats the evaluation."""


class TrainingControl:
    """The control of one training, from `state` to `total_steps`."""

    def __init__(
        self,
        context: JobContext,
        save_policy: SavePolicy,
        state: TrainingControlState,
        *,
        total_steps: int,
        early_stopping: EarlyStoppingPolicy = NO_EARLY_STOPPING,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.step = state.step
        self.total_steps = total_steps
        self.tokens_seen = state.tokens_seen
        self.stop_reason: StopReason | None = None  # why it stops before it is done
        self.checkpoint_bytes = 0  # an estimate
        self.background_check: BackgroundTask[None] | None = None  # its failure stops the training, before anything is saved
        self.evaluation_interval: int | None = None  # steps between the evaluations during the training; None: there are none
        self.steps_between_saves = 1  # only multiples of it are saved, except the last step
        self.logged_metrics_buffer = dict(state.logged_metrics_buffer)  # what the library collected since it last logged
        self.load_best_model_at_end = early_stopping.load_best_model_at_end  # publish the best checkpoint, not the last
        self.should_save_best = False  # this step is the best so far, and the best step is published
        self._early_stopping = EarlyStopping(early_stopping, state)
        self._published_step: int | None = None
        self._context = context
        self._save_policy = save_policy
        self._state = state
        self._timer = TrainingTimer(clock)
        self._loss_buffer = list(state.loss_buffer)
        self._metrics_by_step = dict(state.metrics_by_step)
        self._evaluation_due = state.evaluation_due
        self._saved_step: int | None = None

    @property
    def details(self) -> Mapping[str, JsonValue]:
        """What the family itself keeps in every checkpoint, such as the batch of this attempt."""
        return self._state.details

    @property
    def evaluation_is_due(self) -> bool:
        """The training stopped before or during an evaluation, which is still to be done."""
        return self._evaluation_due

    @property
    def is_done(self) -> bool:
        """All steps are done, or early stopping ended the training."""
        return self.step >= self.total_steps or self._early_stopping.ends_training

    @property
    def best_step(self) -> int | None:
        """The step with the lowest eval_loss so far."""
        return self._early_stopping.best_step

    @property
    def published_step(self) -> int:
        """The step whose weights are published."""
        return self.step if self._published_step is None else self._published_step

    @published_step.setter
    def published_step(self, step: int) -> None:
        self._published_step = step

    @property
    def eta_s(self) -> float | None:
        """Seconds until the last step, with the evaluations before it, at the speed of this attempt; None before its first step."""
        steps_done = self.step - self._state.step
        if not steps_done:
            return None
        step_s = (self._timer.elapsed_s - self._timer.evaluations_s) / steps_done
        return step_s * (self.total_steps - self.step) + self._evaluations_left * (self.evaluation_s or 0.0)

    @property
    def evaluation_s(self) -> float | None:
        """How long the last evaluation took, perhaps in an earlier attempt; None before the first."""
        return self._state.evaluation_s if self._timer.evaluation_s is None else self._timer.evaluation_s

    @property
    def state(self) -> TrainingControlState:
        """The state to resume from this step."""
        return self._state.model_copy(
            update={
                "step": self.step,
                "tokens_seen": self.tokens_seen,
                "train_s": self._state.train_s + (self._timer.elapsed_s if self.step > self._state.step else 0.0),
                "loss_buffer": tuple(self._loss_buffer),
                "logged_metrics_buffer": {name: tuple(values) for name, values in self.logged_metrics_buffer.items()},
                "best_loss": self._early_stopping.best_loss,
                "best_step": self._early_stopping.best_step,
                "evaluations_without_improvement": self._early_stopping.evaluations_without_improvement,
                "metrics_by_step": self._metrics_by_step,
                "evaluation_due": self._evaluation_due,
                "base_metrics": self._context.state.base_metrics,
                "evaluation_s": self.evaluation_s,
            }
        )

    def start(self) -> None:
        """Start timing: the first step begins now."""
        self._timer.start()

    def on_step_begin(self) -> None:
        """An optimizer step begins."""
        self._timer.begin_step()

    def on_step_end(self, step: int, loss: float) -> None:
        """An optimizer step ended with `loss` in nats per label. Raises Stopped if canceled, JobFailed if the loss is not finite."""
        self._context.check_stop()
        if self.background_check is not None and self.background_check.is_done:
            self._finish_background_check()
        self.step = step
        self._timer.end_step()
        if not math.isfinite(loss):
            raise make_divergence_error(f"the loss is NaN or infinite at step {step}")
        self._loss_buffer.append(loss)

    def pop_mean_loss(self) -> float:
        """The mean loss of the steps since the last call. Empties the buffer."""
        losses, self._loss_buffer = self._loss_buffer, []
        return math.fsum(losses) / len(losses)

    def should_stop(self) -> bool:
        """Whether to save and stop after this step: on request, or because time runs out. Raises Stopped if the job was canceled."""
        self._context.check_stop()
        if self._can_save and self.stop_reason is None and self._context.should_yield(self._step_and_save_s):
            self.stop_reason = self._context.stop.stop_reason or "time_slice"
        return self.stop_reason is not None

    def should_save(self, *, epoch_ended: bool) -> bool:
        """Whether to save a checkpoint after this step."""
        timer = self._timer
        is_due = self._save_policy.is_due(
            self.step, epoch_ended=epoch_ended, since_last_save_s=timer.since_last_save_s, save_s=timer.save_s
        )
        return self._can_save and (is_due or self.is_done or self.stop_reason is not None)

    def evaluate(self, evaluate_fn: Callable[[Callable[[], None]], EvalMetrics]) -> EvalMetrics | None:
        """Evaluate this step, once per step. None if the training must stop first; then the next attempt evaluates.

        `evaluate_fn` gets a function that it must call between batches and that raises EvaluationInterrupted.
        """
        if self.step in self._metrics_by_step:
            return self._metrics_by_step[self.step]
        self._evaluation_due = True
        try:
            with self._timer.time_evaluation():
                metrics = evaluate_fn(self._raise_if_stopping)
        except EvaluationInterrupted:
            return None
        self._metrics_by_step, self._evaluation_due = {self.step: metrics}, False
        self._context.log_evaluation("during", self.step, metrics)
        if self._early_stopping.record_evaluation(self.step, metrics.eval_loss):
            self.should_save_best = self.load_best_model_at_end
        elif self._early_stopping.ends_training:
            evaluations = self._early_stopping.evaluations_without_improvement
            reason = f"eval_loss has not fallen below {self._early_stopping.best_loss} in {evaluations} evaluations"
            self._context.log_decision("early_stopping", f"step {self.step}", reason)
        return metrics

    def evaluate_base(self, evaluate_fn: Callable[[Callable[[], None]], EvalMetrics]) -> None:
        """Evaluate the base, before the first step or later. If the training must stop first, it stays to be done.

        `evaluate_fn` gets a function as in `evaluate`.
        """
        try:
            with self._timer.pause_for_evaluation():
                metrics = evaluate_fn(self._raise_if_stopping)
        except EvaluationInterrupted:
            return
        self._context.log_evaluation("before", 0, metrics)

    def save(self, folder: Path, epoch: float, write_files: Callable[[], object]) -> None:
        """Let `write_files` fill the folder and submit it for upload. On a full disk the checkpoint is skipped. No step is saved twice."""

        def write_files_and_state() -> None:
            write_files()
            self.state.write(folder)

        if self._saved_step == self.step:
            return
        self._finish_background_check()
        checkpoints = self._context.checkpoints
        self._timer.begin_save()
        if not write_folder(folder, write_files_and_state, checkpoints.prune_local):
            self._context.warn("disk_full", f"the disk is full: step {self.step} was not saved; training continues")
            return
        self.should_save_best = False
        if self.load_best_model_at_end:  # this checkpoint would replace a pending one in the upload queue, which may be the best
            checkpoints.wait_until_uploaded()
        self._context.notify_checkpoint_saved(folder, self.step)
        self._saved_step = self.step
        self._timer.end_save()
        checkpoints.submit(folder, self._make_checkpoint_info(epoch))

    def raise_if_stopped(self) -> None:
        """Call after the last step. Raises Stopped if the training was stopped, once the last checkpoint is uploaded."""
        reason = self.stop_reason or self._context.stop.stop_reason
        if reason is not None:
            self._context.checkpoints.wait_until_uploaded(self._context.stop.time_left_s())
            raise Stopped(reason)

    @property
    def _evaluations_left(self) -> int:
        """Evaluations before the last step; that of the last step is the one of the published model."""
        interval = self.evaluation_interval
        return max((self.total_steps - 1) // interval - self.step // interval, 0) if interval else 0

    @property
    def _can_save(self) -> bool:
        return self.step % self.steps_between_saves == 0 or self.is_done

    @property
    def _step_and_save_s(self) -> float:
        """How long it may take until the next step that can be saved is saved."""
        timer, upload_s = self._timer, self._context.checkpoints.max_upload_s
        steps_s = timer.longest_step_s * self.steps_between_saves
        if self._saved_step is not None and upload_s:
            return steps_s + timer.save_s + upload_s
        return steps_s + max(estimate_save_s(self.checkpoint_bytes), timer.save_s)

    def _finish_background_check(self) -> None:
        """Wait for the check that runs beside the first steps. Raises what it raises."""
        if self.background_check is not None:
            self.background_check.wait()
            self.background_check = None

    def _raise_if_stopping(self) -> None:
        if self.should_stop():
            raise EvaluationInterrupted

    def _make_checkpoint_info(self, epoch: float) -> CheckpointInfo:
        metrics = self._metrics_by_step.get(self.step)
        return CheckpointInfo(
            step=self.step,
            total_steps=self.total_steps,
            epoch=epoch,
            reason=self._checkpoint_reason,
            eval_loss=metrics.eval_loss if metrics else None,
            save_s=self._timer.save_s,
            details=self._state.details,
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
    """The failure of a training whose loss or weights are not finite: continuing would only cost money."""
    return JobFailed("invalid_config", message, "lower learning_rate or raise warmup_ratio")

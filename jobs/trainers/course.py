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

from jobs.checkpoints import Mark
from jobs.errors import JobFailed, Reason, Stopped
from jobs.trainers.healing import BatchPlan, is_disk_full
from jobs.trainers.saving import SavePolicy, TrainingState
from schema.checkpoint import CheckpointReason
from schema.job import EvalMetrics

if TYPE_CHECKING:
    from jobs.context import JobContext

# How fast a checkpoint is written and uploaded, until the first one has been: a guess on the slow side.
GUESSED_BYTES_PER_S = 50e6


class EvaluationInterrupted(Exception):
    """The training must end now: what is being measured is measured when it goes on."""


@dataclass(frozen=True)
class BestPolicy:
    """What becomes of the measurements: whether the best checkpoint is published, and when a training that gets no better ends."""

    published: bool = False
    patience: int | None = None  # evaluations in a row without a lower eval_loss
    threshold: float = 0.0  # nats by which it must fall


class Course:
    """A training on its way from where `state` left it to `total_steps`."""

    def __init__(
        self,
        context: "JobContext",
        policy: SavePolicy,
        state: TrainingState,
        *,
        total_steps: int,
        best: BestPolicy = BestPolicy(),  # frozen
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.step = state.step
        self.total_steps = total_steps
        self.tokens_seen = state.tokens_seen
        self.stopping: Reason | None = None  # why it ends before it is done
        self.checkpoint_bytes = 0  # roughly
        self.window_metrics = dict(state.window_metrics)  # what the library has gathered for the next point
        self.must_save_best = False  # this step is the best so far, and is to be published
        self._best = best
        self._best_loss, self.best_step, self._stale = state.best_loss, state.best_step, state.stale
        self._published_step: int | None = None
        self._context = context
        self._policy = policy
        self._state = state
        self._clock = clock
        self._window = list(state.window)
        self._measured = dict(state.measured)
        self._evaluation_due = state.evaluation_due
        self._began = self._saved_at = self._step_began = clock()
        self._longest_step_s = self._blocked_s = 0.0
        self._saved_step: int | None = None

    @property
    def plan(self) -> BatchPlan:
        """How many rows go through the model at once."""
        return BatchPlan(self._state.batch_size, self._state.gradient_accumulation_steps)

    @property
    def evaluation_is_due(self) -> bool:
        """The training ended at a step at which it was to be measured, and was not."""
        return self._evaluation_due

    @property
    def is_done(self) -> bool:
        """All steps are done, or more of them make it no better."""
        return self.step >= self.total_steps or (self._best.patience is not None and self._stale >= self._best.patience)

    @property
    def wants_best(self) -> bool:
        """The best checkpoint is published, not the last."""
        return self._best.published

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
        return (self._clock() - self._began) / done * (self.total_steps - self.step) if done else None

    @property
    def state(self) -> TrainingState:
        """What has to be known to go on from here."""
        return self._state.model_copy(
            update={
                "step": self.step,
                "tokens_seen": self.tokens_seen,
                "train_s": self._state.train_s + self._trained_s,
                "window": tuple(self._window),
                "window_metrics": {name: tuple(values) for name, values in self.window_metrics.items()},
                "best_loss": self._best_loss,
                "best_step": self.best_step,
                "stale": self._stale,
                "measured": self._measured,
                "evaluation_due": self._evaluation_due,
                "base_metrics": self._context.findings.base_metrics,
            }
        )

    @property
    def _trained_s(self) -> float:
        return self._clock() - self._began if self.step > self._state.step else 0.0

    def begin(self) -> None:
        """The first step comes now."""
        self._began = self._saved_at = self._clock()

    def step_begins(self) -> None:
        """An optimizer step begins."""
        self._step_began = self._clock()

    def step_done(self, step: int, loss: float) -> None:
        """An optimizer step is done, its loss in nats per label. Raises Stopped when cancelled, JobFailed when it is no number."""
        self._context.check()
        self.step = step
        self._longest_step_s = max(self._longest_step_s, self._clock() - self._step_began)
        if not math.isfinite(loss):
            raise diverged(f"the loss is no number any more at step {step}")
        self._window.append(loss)

    def logged_loss(self) -> float:
        """The mean loss of the steps since the last point of the curve; the next window begins."""
        window, self._window = self._window, []
        return math.fsum(window) / len(window)

    def must_end(self) -> bool:
        """Whether the training must be saved and end here: somebody asked, or time is short. Raises Stopped when cancelled."""
        self._context.check()
        if self.stopping is None and self._context.must_yield(self._cost_s):
            self.stopping = self._context.stop.wanted or "time_slice"
        return self.stopping is not None

    def must_save(self, *, epoch_ended: bool) -> bool:
        """Whether this step is to be saved."""
        since_s = self._clock() - self._saved_at
        due = self._policy.is_due(self.step, epoch_ended=epoch_ended, since_s=since_s, blocked_s=self._blocked_s)
        return due or self.is_done or self.stopping is not None

    def evaluate(self, measure: Callable[[Callable[[], None]], EvalMetrics]) -> EvalMetrics | None:
        """Measure at this step, once. None when the training must end first: then it is due when that goes on.

        `measure` is given what it has to call now and then.
        """
        if self.step in self._measured:
            return self._measured[self.step]
        self._evaluation_due = True
        try:
            found = measure(self._pulse)
        except EvaluationInterrupted:
            return None
        self._measured, self._evaluation_due = {self.step: found}, False
        self._context.evaluated("during", self.step, found)
        self._compare(found)
        return found

    def save(self, folder: Path, epoch: float, write: Callable[[], object]) -> None:
        """Let `write` fill the folder, and hand it over to be kept; a full disk is got over. Nothing is saved twice."""
        if self._saved_step == self.step:
            return
        began = self._saved_at = self._clock()
        if not self._written(folder, write):
            return
        self.must_save_best = False
        if self.wants_best:  # one that still waits to be uploaded would be dropped for this one, and may be the best
            self._context.checkpoints.settle()
        self._context.checkpoint_made(folder, self.step)
        self._saved_step = self.step
        self._saved_at = self._clock()
        self._blocked_s = self._saved_at - began
        self._context.checkpoints.keep(folder, self._mark(epoch))

    def end(self) -> None:
        """The steps are over. Raises Stopped when the training was asked to end, as soon as what was saved is durable."""
        reason = self.stopping or self._context.stop.wanted
        if reason is not None:
            self._context.checkpoints.settle(self._context.stop.time_left_s())
            raise Stopped(reason)

    @property
    def _cost_s(self) -> float:
        """What one more step, and then a checkpoint, may take."""
        upload_s = self._context.checkpoints.cost_s
        saving_s = (
            self._blocked_s + upload_s
            if self._saved_step is not None and upload_s
            else max(self.checkpoint_bytes / GUESSED_BYTES_PER_S, self._blocked_s)
        )
        return self._longest_step_s + saving_s

    def _compare(self, found: EvalMetrics) -> None:
        """Whether this is the best measurement so far, and whether there is still hope."""
        loss = found.eval_loss
        if loss is not None and (self._best_loss is None or loss < self._best_loss - self._best.threshold):
            self._best_loss, self.best_step, self._stale = loss, self.step, 0
            self.must_save_best = self.wants_best
            return
        self._stale += 1
        if self._best.patience is not None and self._stale >= self._best.patience:
            why = f"eval_loss has not fallen below {self._best_loss} in {self._stale} evaluations"
            self._context.decided("early_stopping", f"step {self.step}", why)

    def _pulse(self) -> None:
        if self.must_end():
            raise EvaluationInterrupted

    def _written(self, folder: Path, write: Callable[[], object]) -> bool:
        from safetensors import SafetensorError

        for is_last_try in (False, True):
            try:
                write()
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

    def _mark(self, epoch: float) -> Mark:
        measured = self._measured.get(self.step)
        return Mark(
            step=self.step,
            total_steps=self.total_steps,
            epoch=epoch,
            reason=self._reason,
            eval_loss=measured.eval_loss if measured else None,
            batch_size=self._state.batch_size,
            gradient_accumulation_steps=self._state.gradient_accumulation_steps,
            save_s=self._blocked_s,
        )

    @property
    def _reason(self) -> CheckpointReason:
        match self.stopping:
            case _ if self.is_done:
                return "end"
            case "pause" | "preempted" | "time_slice" as reason:
                return reason
            case _:
                return "interval"


def diverged(message: str) -> JobFailed:
    """A training that has lost its numbers: going on would only cost."""
    return JobFailed("invalid_config", message, "lower learning_rate, or raise warmup_ratio")

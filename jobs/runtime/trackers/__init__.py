"""Trackers: they show a job's curves somewhere else: W&B, MLflow, TensorBoard, Trackio; several at once.

Here belong one file per tracker and the thread in which each of them works. Nothing here can fail a training or hold it
up: a tracker that raises is left out from then on, with one warning. One line adds a tracker.
"""

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from pkgutil import resolve_name
from typing import Protocol

from jobs.runtime.context import JobContext
from schema.events import EvaluationCompleted, MetricsLogged, SamplesGenerated

log = logging.getLogger(__name__)

# The tracker's name → "module:Class"; it is used when the training config has a field `{name}_config`.
TRACKERS = {
    "wandb": "jobs.runtime.trackers.wandb_tracker:WandbTracker",
    "mlflow": "jobs.runtime.trackers.mlflow_tracker:MlflowTracker",
    "tensorboard": "jobs.runtime.trackers.tensorboard_tracker:TensorboardTracker",
    "trackio": "jobs.runtime.trackers.trackio_tracker:TrackioTracker",
}

CHECKPOINT_TIMEOUT_S = 120  # to take a checkpoint's files before they are rotated away


class Tracker(Protocol):
    """What a tracker does. May raise anything, at any time; made with the job's context."""

    @property
    def run_id(self) -> str | None:
        """What the tracker calls this job's run, once it has begun. Every attempt of the job goes on with the same one."""
        ...

    def start(self) -> str | None:
        """Begin, or go on where the attempt before ended; returns where the curves can be seen, if anywhere."""
        ...

    def log_metrics(self, event: MetricsLogged) -> None: ...

    def log_evaluation(self, event: EvaluationCompleted) -> None: ...

    def log_samples(self, event: SamplesGenerated) -> None: ...

    def log_checkpoint(self, folder: Path, step: int) -> None: ...

    def log_model(self, folder: Path) -> None: ...

    def finish(self, *, succeeded: bool) -> None:
        """Send what is left. A run that has not succeeded is shown as failed; one that another attempt continues has."""
        ...


class TrackerThread:
    """A tracker at work in a thread of its own, one call after the other."""

    def __init__(self, name: str, tracker: Tracker, context: JobContext) -> None:
        self.name = name
        self._tracker = tracker
        self._context = context
        self._broken = False
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)

    @property
    def run_id(self) -> str | None:
        """The tracker's run, once it has begun."""
        return self._tracker.run_id

    def start(self) -> None:
        self._submit(lambda: self._context.log_tracker(self.name, self._tracker.start()))

    def log_metrics(self, event: MetricsLogged) -> None:
        self._submit(lambda: self._tracker.log_metrics(event))

    def log_evaluation(self, event: EvaluationCompleted) -> None:
        self._submit(lambda: self._tracker.log_evaluation(event))

    def log_samples(self, event: SamplesGenerated) -> None:
        self._submit(lambda: self._tracker.log_samples(event))

    def log_checkpoint(self, folder: Path, step: int) -> None:
        wait([self._submit(lambda: self._tracker.log_checkpoint(folder, step))], CHECKPOINT_TIMEOUT_S)

    def log_model(self, folder: Path) -> None:
        self._submit(lambda: self._tracker.log_model(folder))

    def finish(self, *, succeeded: bool, timeout_s: float) -> None:
        """Let the tracker send what it has; what takes longer than `patience_s` is lost."""
        last = self._submit(lambda: self._tracker.finish(succeeded=succeeded))
        if not wait([last], timeout_s).done and not self._broken:
            self._context.warn("tracker_unfinished", f"{self.name} did not finish within {timeout_s:.0f} s; its last points may be missing")
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _submit(self, call: Callable[[], None]) -> Future[None]:
        future = self._pool.submit(lambda: None if self._broken else call())
        future.add_done_callback(self._handle_result)
        return future

    def _handle_result(self, future: Future[None]) -> None:
        error = None if future.cancelled() else future.exception()
        if error is None or self._broken:
            return
        self._broken = True
        reason = str(error).partition("\n")[0][:200]
        self._context.warn("tracker_failed", f"{self.name} stopped, the training goes on without it: {type(error).__name__}: {reason}")


def start_trackers(context: JobContext) -> list[TrackerThread]:
    """Start every tracker that the training config asks for, and let it hear what the context is told."""
    config = context.spec.training_config
    wanted = [name for name in TRACKERS if f"{name}_config" in type(config).model_fields and getattr(config, f"{name}_config") is not None]
    threads = [TrackerThread(name, resolve_name(TRACKERS[name])(context), context) for name in wanted]
    for thread in threads:
        thread.start()
    context.listeners.extend(threads)
    return threads

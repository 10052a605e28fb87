"""Trackers, which show a job's metrics elsewhere: W&B, MLflow, TensorBoard, Trackio; several at once.

One file per tracker belongs here, and the thread that each of them runs in. A tracker cannot fail a training or delay it: one that
raises is dropped with one warning. One line in TRACKERS adds a tracker.
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

CHECKPOINT_TIMEOUT_S = 120  # for a tracker to read a checkpoint's files before they are deleted


class Tracker(Protocol):
    """A tracker, constructed with the job's context. Every method may raise anything."""

    @property
    def run_id(self) -> str | None:
        """The tracker's id of the job's run, once it has started. Every attempt of the job continues the same run."""
        ...

    def start(self) -> str | None:
        """Start the run, or continue that of the previous attempt; returns the address of the run's page, if it has one."""
        ...

    def log_metrics(self, event: MetricsLogged) -> None: ...

    def log_evaluation(self, event: EvaluationCompleted) -> None: ...

    def log_samples(self, event: SamplesGenerated) -> None: ...

    def log_checkpoint(self, folder: Path, step: int) -> None: ...

    def log_model(self, folder: Path) -> None: ...

    def finish(self, *, succeeded: bool) -> None:
        """Send the remaining data. A run that another attempt continues counts as succeeded."""
        ...


class TrackerThread:
    """Runs a tracker's calls one after the other in its own thread."""

    def __init__(self, name: str, tracker: Tracker, context: JobContext) -> None:
        self.name = name
        self._tracker = tracker
        self._context = context
        self._broken = False
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)

    @property
    def run_id(self) -> str | None:
        """The tracker's id of the run, once it has started."""
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
        """Let the tracker send its remaining data; what takes longer than `timeout_s` is lost."""
        finished = self._submit(lambda: self._tracker.finish(succeeded=succeeded))
        if not wait([finished], timeout_s).done and not self._broken:
            self._context.warn(
                "tracker_unfinished", f"{self.name} did not finish within {timeout_s:.0f} s; its last metrics may be missing"
            )
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
        self._context.warn("tracker_failed", f"{self.name} stopped, the training continues without it: {type(error).__name__}: {reason}")


def start_trackers(context: JobContext) -> list[TrackerThread]:
    """Start every tracker that the training config asks for, and register it as a listener of the context."""
    config = context.spec.training_config
    names = [name for name in TRACKERS if f"{name}_config" in type(config).model_fields and getattr(config, f"{name}_config") is not None]
    threads = [TrackerThread(name, resolve_name(TRACKERS[name])(context), context) for name in names]
    for thread in threads:
        thread.start()
    context.listeners.extend(threads)
    return threads

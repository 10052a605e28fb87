"""What a trainer and an exporter may touch: the spec, the stores, the secrets, a folder, and a voice."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from jobs.runtime.errors import StopReason
from schema.events import (
    ArtifactUploaded,
    DecisionMade,
    EvaluationCompleted,
    Event,
    GateEvaluated,
    MetricsLogged,
    PhaseChanged,
    SamplesGenerated,
    TrackerStarted,
    WarningRaised,
)
from schema.job import Artifact, EvalMetrics, Gate, Phase, Progress
from schema.spec import JobSpec, StoreUrls
from storage import ObjectStore
from storage.registry import open_store

if TYPE_CHECKING:
    from jobs.runtime.checkpoints import Checkpoints

log = logging.getLogger(__name__)

# What the next step, save and upload may take more than the longest so far: rows differ in length, and a network has bad moments.
YIELD_MARGIN = 1.5
YIELD_SLACK_S = 1.0  # the same where everything is fast, and a share of nothing would be nothing


class EventSink(Protocol):
    """Where events go."""

    def report(self, event: Event) -> None:
        """Take an event; never raises."""
        ...

    def set_progress(self, *, phase: Phase | None = None, progress: Progress | None = None) -> None:
        """Where the attempt is now."""
        ...


class TrainingListener(Protocol):
    """Another place that shows the curves; never raises, never blocks for long."""

    def log_metrics(self, event: MetricsLogged) -> None:
        """A point of the curves."""
        ...

    def log_evaluation(self, event: EvaluationCompleted) -> None:
        """A measurement on the held-out rows."""
        ...

    def log_samples(self, event: SamplesGenerated) -> None:
        """Answers to held-out prompts."""
        ...

    def log_checkpoint(self, folder: Path, step: int) -> None:
        """A checkpoint was written, and may be removed when this returns."""
        ...

    def log_model(self, folder: Path) -> None:
        """The trained model was written."""
        ...


class Secrets(Mapping[str, str]):
    """The job's secrets, by name. Printing it shows the names alone."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self._values = dict(values)

    def __getitem__(self, name: str) -> str:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Secrets({', '.join(sorted(self._values))})"

    def redact(self, text: str) -> str:
        """The text without any of the values."""
        for value in self._values.values():
            text = text.replace(value, "**********") if value else text
        return text


@dataclass(frozen=True)
class Stores:
    """The object stores of the job, opened when they are first used."""

    urls: StoreUrls

    @cached_property
    def datasets(self) -> ObjectStore:
        return open_store(self.urls.datasets)

    @cached_property
    def models(self) -> ObjectStore:
        return open_store(self.urls.models)

    @cached_property
    def configs(self) -> ObjectStore:
        return open_store(self.urls.configs)


@dataclass
class AttemptState:
    """What is known of the attempt so far; it becomes the result, also when the attempt fails."""

    metrics: EvalMetrics | None = None
    base_metrics: EvalMetrics | None = None
    gate: Gate | None = None
    wandb_url: str | None = None
    trackers: dict[str, str] = field(default_factory=dict)
    decisions: dict[str, str] = field(default_factory=dict)


class StopSignal(Protocol):
    """Whether the attempt was asked to stop, and when it must."""

    @property
    def stop_reason(self) -> StopReason | None:
        """What was asked for, if anything."""
        ...

    def check(self) -> None:
        """Raises Stopped when it was; inside `politely` only for a cancel, or when the time is up."""
        ...

    def defer_stop(self) -> AbstractContextManager[None]:
        """Inside, the main thread looks at `wanted` at every step by itself; only a cancel, or the end of the time, interrupts it.

        Raises Stopped on the way out when something was asked for and has not been obeyed yet.
        """
        ...

    def time_left_s(self) -> float | None:
        """Until everything but the last word must be done; None: no limit."""
        ...


@dataclass
class JobContext:
    """One attempt at one job, seen from inside."""

    spec: JobSpec
    attempt: int
    workdir: Path
    secrets: Secrets
    stores: Stores
    event_sink: EventSink
    stop: StopSignal
    checkpoints: "Checkpoints"
    listeners: list[TrainingListener] = field(default_factory=list)
    state: AttemptState = field(default_factory=AttemptState)

    def enter_phase(self, phase: Phase) -> None:
        """Enter a phase of the work. Raises Stopped."""
        self.check_stop()
        self.event_sink.set_progress(phase=phase)
        self._log_and_report(PhaseChanged(phase=phase), phase=phase)

    def report_progress(self, progress: Progress) -> None:
        """How far the training is; travels with the next report."""
        self.event_sink.set_progress(progress=progress)

    def log_metrics(
        self,
        step: int,
        values: Mapping[str, float | None],
        *,
        epoch: float | None = None,
        notes: Mapping[str, str] | None = None,
        progress: Progress | None = None,
    ) -> None:
        """A point of the curves; a number that could not be had is None, and its note says why."""
        event = MetricsLogged(step=step, epoch=epoch, values=dict(values), notes=dict(notes or {}), progress=progress)
        self._log_and_report(event, step=step, **values)
        for mirror in self.listeners:
            mirror.log_metrics(event)

    def log_evaluation(self, when: Literal["before", "during", "after"], step: int, metrics: EvalMetrics) -> None:
        """The model was measured on the held-out rows."""
        event = EvaluationCompleted(when=when, step=step, metrics=metrics)
        if when == "before":
            self.state.base_metrics = metrics
        else:
            self.state.metrics = metrics
        self._log_and_report(event, when=when, step=step, eval_loss=metrics.eval_loss, perplexity=metrics.perplexity)
        for mirror in self.listeners:
            mirror.log_evaluation(event)

    def log_samples(self, event: SamplesGenerated) -> None:
        """What the model answers to a few held-out prompts."""
        self._log_and_report(event, when=event.when, step=event.step)  # the texts are somebody's data: no log has them
        for mirror in self.listeners:
            mirror.log_samples(event)

    def log_gate(self, gate: Gate) -> None:
        """The promotion gate has looked at the trained model."""
        self.state.gate = gate
        self._log_and_report(GateEvaluated(gate=gate), passed=gate.passed)

    def log_decision(self, key: str, value: str, reason: str) -> None:
        """Something was chosen by the attempt itself."""
        self.state.decisions[key] = value
        self._log_and_report(DecisionMade(setting=key, value=value, reason=reason), what=key, value=value, why=reason)

    def warn(self, code: str, message: str) -> None:
        """Something the user should know, and that does not stop the job."""
        message = self.secrets.redact(message)
        self._log_and_report(WarningRaised(code=code, message=message), code=code, text=message)

    def log_tracker(self, tracker: str, url: str | None) -> None:
        """A tracker mirrors the job."""
        if tracker == "wandb":
            self.state.wandb_url = url
        if url:
            self.state.trackers[tracker] = url
        self._log_and_report(TrackerStarted(tracker=tracker, url=url), tracker=tracker, url=url)

    def log_artifact(self, artifact: Artifact) -> None:
        """An artifact is uploaded and verified."""
        self._log_and_report(ArtifactUploaded(artifact=artifact), artifact=artifact.name, size_bytes=artifact.size_bytes)

    def emit(self, event: Event) -> None:
        """Something happened that has an event of its own, such as a checkpoint that is durable."""
        facts = event.model_dump(exclude={"type"})
        self._log_and_report(
            event, **{"text" if name == "message" else name: value for name, value in facts.items()}
        )  # a log line has a message

    def notify_checkpoint_saved(self, folder: Path, step: int) -> None:
        """A checkpoint is on this machine, complete; when this returns, it may be removed."""
        for mirror in self.listeners:
            mirror.log_checkpoint(folder, step)

    def notify_model_saved(self, folder: Path) -> None:
        """The trained model is complete."""
        for mirror in self.listeners:
            mirror.log_model(folder)

    def check_stop(self) -> None:
        """Raises Stopped when the attempt was asked to stop."""
        self.stop.check()

    def should_yield(self, required_s: float) -> bool:
        """Whether the training must save and end now: it was asked to, or one more step, save and upload (`cost_s`) may not fit."""
        return self.stop.stop_reason is not None or deadline_reached(required_s, self.stop.time_left_s())

    def _log_and_report(self, event: Event, **facts: object) -> None:
        log.info(event.type, extra={name: value for name, value in facts.items() if value is not None})
        self.event_sink.report(event)


def deadline_reached(required_s: float, time_left_s: float | None) -> bool:
    """Whether what took `cost_s` so far may not be over in the time that is left."""
    return time_left_s is not None and time_left_s < required_s * YIELD_MARGIN + YIELD_SLACK_S

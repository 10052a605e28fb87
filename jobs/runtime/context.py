"""JobContext: what trainers and exporters use of the runtime: the spec, stores, secrets, a folder, events, checkpoints and stop signals."""

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

from jobs.runtime.checkpoints import Checkpoints
from jobs.runtime.errors import StopReason
from jobs.runtime.remaining_time import RemainingTime
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
from schema.job import Artifact, EvalMetrics, Gate, Progress
from schema.result import Ingested
from schema.spec import JobSpec, StoreUrls
from schema.types import Phase
from storage import ObjectStore, TokenSource
from storage.registry import open_store

log = logging.getLogger(__name__)

# The next step, save and upload may take this much longer than the longest so far: rows differ in length, networks in speed.
YIELD_MARGIN = 1.5
YIELD_SLACK_S = 1.0  # added to it, for trainings where all of these are fast


class EventSink(Protocol):
    """Receives the events of an attempt."""

    def report(self, event: Event) -> None:
        """Take an event; never raises."""
        ...

    def set_progress(self, *, phase: Phase | None = None, progress: Progress | None = None) -> None:
        """Set the current phase and progress of the attempt."""
        ...


class TrainingListener(Protocol):
    """Receives metrics, samples, checkpoints and the model, such as a tracker; never raises, never blocks for long."""

    def log_metrics(self, event: MetricsLogged) -> None:
        """Metrics of one step."""
        ...

    def log_evaluation(self, event: EvaluationCompleted) -> None:
        """An evaluation on the held-out rows."""
        ...

    def log_samples(self, event: SamplesGenerated) -> None:
        """Completions of held-out prompts."""
        ...

    def log_checkpoint(self, folder: Path, step: int) -> None:
        """A checkpoint was written; it may be deleted when this returns."""
        ...

    def log_model(self, folder: Path) -> None:
        """The trained model was written."""
        ...


class Secrets(Mapping[str, str]):
    """The job's secrets, by name. Its repr shows only the names."""

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
        """The text with every secret replaced by asterisks."""
        for value in self._values.values():
            text = text.replace(value, "**********") if value else text
        return text


@dataclass(frozen=True)
class Stores:
    """The object stores of the job, each opened at its first use."""

    urls: StoreUrls
    get_token: TokenSource | None = None  # of the service, for gs:// stores; None: the machine's own credentials

    @cached_property
    def datasets(self) -> ObjectStore:
        return open_store(self.urls.datasets, self.get_token)

    @cached_property
    def models(self) -> ObjectStore:
        return open_store(self.urls.models, self.get_token)

    @cached_property
    def configs(self) -> ObjectStore:
        return open_store(self.urls.configs, self.get_token)


@dataclass
class AttemptState:
    """What the attempt has measured and decided so far. It becomes part of the result, even if the attempt fails."""

    metrics: EvalMetrics | None = None
    base_metrics: EvalMetrics | None = None
    gate: Gate | None = None
    wandb_url: str | None = None
    trackers: dict[str, str] = field(default_factory=dict)
    decisions: dict[str, str] = field(default_factory=dict)
    ingested: Ingested | None = None


class StopSignal(Protocol):
    """Whether the attempt should stop, and by when."""

    @property
    def stop_reason(self) -> StopReason | None:
        """The requested reason to stop; None if nothing is requested."""
        ...

    def check(self) -> None:
        """Raises Stopped if a stop is requested; inside `defer_stop` only for a cancel or when the time is up."""
        ...

    def defer_stop(self) -> AbstractContextManager[None]:
        """Inside, the main thread polls `stop_reason` at every step; only a cancel or the time limit interrupts it.

        On exit, raises Stopped for a request that was not handled inside.
        """
        ...

    def time_left_s(self) -> float | None:
        """Seconds until everything except writing the result must be done; None without a limit."""
        ...


@dataclass
class JobContext:
    """One attempt of one job, as trainers and exporters see it."""

    spec: JobSpec
    attempt: int
    workdir: Path
    secrets: Secrets
    stores: Stores
    event_sink: EventSink
    stop: StopSignal
    checkpoints: Checkpoints
    listeners: list[TrainingListener] = field(default_factory=list)
    state: AttemptState = field(default_factory=AttemptState)
    remaining: RemainingTime = field(default_factory=RemainingTime)

    def enter_phase(self, phase: Phase) -> None:
        """Report that a phase of the work begins. Raises Stopped."""
        self.check_stop()
        self.remaining.enter(phase)
        self.event_sink.set_progress(phase=phase)
        self._log_and_report(PhaseChanged(phase=phase), phase=phase)

    def report_progress(self, progress: Progress) -> None:
        """Set the training's progress; it is sent with the next batch of events."""
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
        """Report metrics of one step. A metric without a value, or that is not finite, is None, and its note says why."""
        finite = {name: value if value is None or math.isfinite(value) else None for name, value in values.items()}
        not_finite = {name: "it was not a finite number" for name, value in finite.items() if value is None and values[name] is not None}
        event = MetricsLogged(step=step, epoch=epoch, values=finite, notes=not_finite | dict(notes or {}), progress=progress)
        self._log_and_report(event, step=step, **finite)
        for listener in self.listeners:
            listener.log_metrics(event)

    def log_evaluation(self, when: Literal["before", "during", "after"], step: int, metrics: EvalMetrics) -> None:
        """Report an evaluation on the held-out rows."""
        event = EvaluationCompleted(when=when, step=step, metrics=metrics)
        if when == "before":
            self.state.base_metrics = metrics
        else:
            self.state.metrics = metrics
        perplexities = {"perplexity": metrics.perplexity, "content_perplexity": metrics.content_perplexity}
        self._log_and_report(event, when=when, step=step, eval_loss=metrics.eval_loss, **perplexities)
        for listener in self.listeners:
            listener.log_evaluation(event)

    def log_samples(self, event: SamplesGenerated) -> None:
        """Report the model's completions of a few held-out prompts."""
        self._log_and_report(event, when=event.when, step=event.step)  # the texts are user data and do not go into the log
        for listener in self.listeners:
            listener.log_samples(event)

    def log_gate(self, gate: Gate) -> None:
        """Report the outcome of the promotion gate."""
        self.state.gate = gate
        self._log_and_report(GateEvaluated(gate=gate), passed=gate.passed)

    def log_decision(self, key: str, value: str, reason: str) -> None:
        """Report a setting that the attempt itself chose, and why."""
        self.state.decisions[key] = value
        self._log_and_report(DecisionMade(setting=key, value=value, reason=reason), setting=key, value=value, reason=reason)

    def warn(self, code: str, message: str) -> None:
        """Report a problem that the user should know about and that does not fail the job."""
        message = self.secrets.redact(message)
        self._log_and_report(WarningRaised(code=code, message=message), code=code, text=message)

    def log_tracker(self, tracker: str, url: str | None) -> None:
        """Report that a tracker has started, with the address of its run."""
        event = TrackerStarted(tracker=tracker, url=url)
        if tracker == "wandb":
            self.state.wandb_url = event.page
        if url:
            self.state.trackers[tracker] = url
        self._log_and_report(event, tracker=tracker, url=url)

    def log_artifact(self, artifact: Artifact) -> None:
        """Report an artifact that is uploaded and verified."""
        self._log_and_report(ArtifactUploaded(artifact=artifact), artifact=artifact.name, size_bytes=artifact.size_bytes)

    def emit(self, event: Event) -> None:
        """Report an event that has no specific method here, such as CheckpointSaved."""
        # "message" is a reserved name in a log record.
        facts = {"text" if name == "message" else name: value for name, value in event.model_dump(exclude={"type"}).items()}
        self._log_and_report(event, **facts)

    def notify_checkpoint_saved(self, folder: Path, step: int) -> None:
        """Tell the listeners that a complete checkpoint is on this machine; it may be deleted when this returns."""
        for listener in self.listeners:
            listener.log_checkpoint(folder, step)

    def notify_model_saved(self, folder: Path) -> None:
        """Tell the listeners that the trained model is complete."""
        for listener in self.listeners:
            listener.log_model(folder)

    def check_stop(self) -> None:
        """Raises Stopped if a stop is requested."""
        self.stop.check()

    def should_yield(self, required_s: float) -> bool:
        """Whether the training must save and end now: a stop is requested, or one more step, save and upload (`required_s`) may not fit."""
        return self.stop.stop_reason is not None or deadline_reached(required_s, self.stop.time_left_s())

    def _log_and_report(self, event: Event, **facts: object) -> None:
        log.info(event.type, extra={name: value for name, value in facts.items() if value is not None})
        self.event_sink.report(event)


def deadline_reached(required_s: float, time_left_s: float | None) -> bool:
    """Whether work that took `required_s` seconds before may not fit into the time that is left."""
    return time_left_s is not None and time_left_s < required_s * YIELD_MARGIN + YIELD_SLACK_S

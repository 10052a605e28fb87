"""One attempt, from the claim to the last word.

claim        this process owns the attempt, or ends without touching anything
spec         what to do, from the object store
trainer      named by the training config, found at "module:function"; goes on from the job's newest checkpoint
gate         a model that does not reach what the request asks for is reported, and goes no further
exporters    make, verify and upload the artifacts
run.json     where they come from, beside them; and the push to the Hub, if they are to go there
result.json  the last word, durable; then the service is told as well

An attempt that was stopped says its last word too: what it saved is where the next one goes on.
"""

import logging
import os
import shutil
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import IntEnum
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, assert_never
from uuid import uuid4

from jobs.runtime.checkpoints import Checkpoints
from jobs.runtime.client import ServiceClient
from jobs.runtime.context import AttemptState, JobContext, Secrets, Stores
from jobs.runtime.errors import JobFailed, Stopped, StopReason
from jobs.runtime.promotion_gate import evaluate_gate
from jobs.runtime.reporter import Reporter, Spool
from jobs.runtime.retry import retry_store
from jobs.runtime.settings import Settings
from jobs.runtime.stop import StopController
from jobs.runtime.subprocesses import kill_children
from jobs.runtime.trackers import TrackerThread, start_trackers
from schema.events import Directive
from schema.job import Artifact, Failure
from schema.result import Result
from schema.spec import JobSpec, result_key, spec_key
from storage import ObjectExists, ObjectStore
from storage.registry import open_store

if TYPE_CHECKING:
    from jobs.llm.trained_model import TrainedModel
    from jobs.runtime.provenance_recorder import ProvenanceRecorder

log = logging.getLogger(__name__)

PROVENANCE_RECORDER = "jobs.runtime.provenance_recorder:Seal"

Outcome = Literal["completed", "failed", "cancelled", "paused", "yielded"]

OUTCOME_BY_REASON: dict[StopReason, Outcome] = {"cancel": "cancelled", "pause": "paused", "preempted": "yielded", "time_slice": "yielded"}

# What trainers and exporters write into the attempt's folder: gigabytes that nobody reads afterwards.
SCRATCH_FOLDERS = ("base", "data", "checkpoints", "model", "exports")


class ExitCode(IntEnum):
    """How the process ends."""

    COMPLETED = 0
    FAILED = 1
    CANCELLED = 10
    FENCED = 11
    PAUSED = 12
    YIELDED = 13


@dataclass(frozen=True)
class ShutdownTimeouts:
    """What an ending may take."""

    report_s: float  # for the last events, and again for the service to take the last word
    tries: int  # to make the last word durable: the waits between them begin with half a second and double
    checkpoint_s: float = 0.0  # for a checkpoint that is being uploaded
    tracker_s: float = 0.0  # for a tracker to send what it has


SHUTDOWN_TIMEOUTS = {
    "completed": ShutdownTimeouts(report_s=10.0, tries=8, checkpoint_s=60.0, tracker_s=60.0),
    "failed": ShutdownTimeouts(report_s=5.0, tries=6, checkpoint_s=30.0, tracker_s=10.0),
    "cancelled": ShutdownTimeouts(report_s=0.3, tries=2),  # it must be over in two seconds
    "paused": ShutdownTimeouts(report_s=5.0, tries=6, checkpoint_s=60.0, tracker_s=20.0),
    "yielded": ShutdownTimeouts(report_s=5.0, tries=6, checkpoint_s=60.0, tracker_s=20.0),
}
FORCED_SHUTDOWN = ShutdownTimeouts(report_s=0.3, tries=2)  # the platform is about to kill the process, or a person waits


class Attempt:
    """The attempt that this process works at."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._started_at = datetime.now(UTC)
        self._claimant = f"{socket.gethostname()}-{os.getpid()}-{uuid4().hex[:8]}"
        self._client = ServiceClient(settings)
        self._stop = StopController(last_resort=self._force_finish, heard=self._refresh_directive)
        self._secrets = Secrets({})
        self._state = AttemptState()
        self._owned = False
        self._checkpoints: Checkpoints | None = None
        self._reporter: Reporter | None = None
        self._trackers: list[TrackerThread] = []
        self._trained: TrainedModel | None = None
        self._build_final_result: Callable[[], Result] | None = None  # how it ends if nobody stops it: it is done, or has failed
        self._finish_lock = threading.Lock()

    def claim(self) -> None:
        """Own the attempt. Raises AttemptTaken, ClaimRefused, Stopped."""
        self._stop.install_signal_handlers(self._settings.time_limit_s)
        answer = self._client.claim(self._claimant)
        self._owned = True
        self._secrets = Secrets(answer.secrets)
        log.info("attempt claimed", extra={"job_id": self._settings.job_id, "attempt": self._settings.attempt})
        if answer.directive in ("cancel", "pause"):
            self._apply_directive(answer.directive)
        self._stop.check()

    def train_and_export(self) -> tuple[Artifact, ...]:
        """Train and export. Raises whatever goes wrong, and Stopped."""
        key = spec_key(self._settings.job_id)
        spec = JobSpec.load(retry_store("the job's spec could not be read", lambda: self._store.read(key), code="internal"))
        context = self._create_context(spec)
        self._state = context.state
        self._validate_export(context)
        seal: ProvenanceRecorder = _import_object(PROVENANCE_RECORDER)(context, image=self._settings.image, started_at=self._started_at)
        self._trackers = start_trackers(context)
        trained: TrainedModel = _import_object(spec.training_config.trainer)(spec.training_config, context)
        self._trained = trained
        context.notify_model_saved(trained.folder)
        if not self._passes_gate(trained, context):
            return ()

        from jobs.llm.exporters import export_all

        return export_all(trained, context, lambda products, artifacts: seal.finalize(trained, products, artifacts))

    def _validate_export(self, context: JobContext) -> None:
        """Raises JobFailed for what could not be handed over in the end, before anything is paid for."""
        from jobs.llm.exporters import check_exportable
        from jobs.runtime.hub import check_push

        config = context.spec.training_config
        check_exportable(config)
        if config.export_config.destination == "hfhub":
            check_push(context)

    def _passes_gate(self, trained: "TrainedModel", context: JobContext) -> bool:
        """Whether the model passes the gate, if there is one. Who exports a checkpoint has decided for himself."""
        thresholds = context.spec.training_config.eval_config.promotion_gate
        if not thresholds or context.spec.export_of:
            return True
        gate = evaluate_gate(thresholds, trained.metrics, trained.base_metrics)
        context.log_gate(gate)
        return gate.passed

    def finish(
        self, outcome: Literal["completed", "failed"], *, failure: Failure | None = None, artifacts: tuple[Artifact, ...] = ()
    ) -> ExitCode:
        """The last word of an attempt that came to its own end. Who asks it to stop meanwhile gets it sooner, and no other."""
        self._build_final_result = lambda: self._build_result(outcome, failure=failure, artifacts=artifacts)
        self._stop.begin_shutdown()
        self._flush(self._shutdown_timeouts(outcome), succeeded=outcome == "completed")
        self._stop.finalize()
        return self._publish_result(self._build_final_result(), self._shutdown_timeouts(outcome))

    def finish_stopped(self, reason: StopReason) -> ExitCode:
        """The last word of an attempt that was asked to stop. A cancel that comes before it is spoken wins."""
        self._stop.begin_shutdown()
        if reason != "cancel":
            self._flush(self._shutdown_timeouts(OUTCOME_BY_REASON[reason]), succeeded=True)
        if self._stop.finalize() == "cancel":
            reason = "cancel"
        return self._publish_result(
            self._build_result(OUTCOME_BY_REASON[reason], reason=reason), self._shutdown_timeouts(OUTCOME_BY_REASON[reason])
        )

    def _force_finish(self, reason: StopReason) -> None:
        """In place of a main thread that is inside a call which cannot be interrupted."""
        self._stop.finalize()
        result = self._build_final_result() if self._build_final_result else self._build_result(OUTCOME_BY_REASON[reason], reason=reason)
        os._exit(self._publish_result(result, FORCED_SHUTDOWN))

    def _shutdown_timeouts(self, outcome: Outcome) -> ShutdownTimeouts:
        return cap_timeouts(SHUTDOWN_TIMEOUTS[outcome], self._stop.time_until_kill_s())

    def _flush(self, timeouts: ShutdownTimeouts, *, succeeded: bool) -> None:
        """Let a checkpoint that is on its way arrive, and the trackers send what they have. A run that is to go on has not failed."""
        if self._checkpoints is not None:
            self._checkpoints.wait_until_uploaded(timeouts.checkpoint_s)
        for tracker in self._trackers:
            tracker.finish(succeeded=succeeded, timeout_s=timeouts.tracker_s)

    def _publish_result(self, result: Result, timeouts: ShutdownTimeouts) -> ExitCode:
        """Say the last word, to the object store and to the service; what it was decides how the process ends.

        The events go first: once the result is there the attempt is over, and the service takes no more.
        """
        with self._finish_lock:
            kill_children()
            if not self._owned:  # perhaps another process does: its last word is still to come
                log.info("attempt ended before it was claimed", extra={"outcome": result.outcome})
                return EXIT_CODES[result.outcome]
            if self._reporter is not None:
                self._reporter.flush(timeouts.report_s)
                self._reporter.close(timeouts.report_s)
            result = self._write(result, timeouts.tries)
            told = self._client.finish(result, timeout_s=timeouts.report_s)
            if self._checkpoints is not None:
                self._checkpoints.close()
            self._remove_work_files()
            log.info("attempt ended", extra={"outcome": result.outcome, "reported": told})
        return EXIT_CODES[result.outcome]

    def _remove_work_files(self) -> None:
        """Give the disk back: what counts has been uploaded. The events, and a tracker's offline run, stay with the log."""
        for name in SCRATCH_FOLDERS:
            shutil.rmtree(self._settings.workdir / name, ignore_errors=True)

    def reraise_if_stopping(self) -> None:
        """Raises Stopped when the job is being cancelled, or its machine taken away: what breaks then is no fault of the job."""
        if self._stop.stop_reason in ("cancel", "preempted"):
            raise Stopped(self._stop.stop_reason)

    def redact(self, text: str) -> str:
        """The text without the job's secrets and the attempt's token."""
        return self._secrets.redact(text).replace(self._settings.token, "**********")

    @property
    def _store(self) -> ObjectStore:
        return open_store(self._settings.spec_store_url)

    def _create_context(self, spec: JobSpec) -> JobContext:
        workdir, stores = self._settings.workdir, Stores(spec.stores)
        spool = Spool(workdir / f"events-{self._settings.attempt}.jsonl")
        self._reporter = Reporter(self._client, spool, self._settings.report_interval_s, self._apply_directive, self._exit_fenced)
        self._checkpoints = Checkpoints(
            store=stores.models,
            spec=spec,
            attempt=self._settings.attempt,
            folder=workdir / "checkpoints",
            save_total_limit=spec.training_config.hyperparameters.save_total_limit,
            emit=lambda event: context.emit(event),
            get_tracker_run_ids=lambda: {tracker.name: tracker.run_id for tracker in self._trackers if tracker.run_id},
        )
        context = JobContext(
            spec=spec,
            attempt=self._settings.attempt,
            workdir=workdir,
            secrets=self._secrets,
            stores=stores,
            event_sink=self._reporter,
            stop=self._stop,
            checkpoints=self._checkpoints,
        )
        self._reporter.start()
        return context

    def _apply_directive(self, directive: Directive) -> None:
        match directive:
            case "continue":
                return
            case "cancel" | "pause":
                self._stop.request(directive)
            case _:
                assert_never(directive)

    def _refresh_directive(self, reason: StopReason) -> None:
        """Where a cancel comes as a SIGTERM too, only the service knows which it is, and answers the next report with it."""
        if reason == "preempted" and self._reporter is not None:
            self._reporter.flush_soon()

    def _exit_fenced(self) -> None:
        """Another attempt has taken over, or the job is gone: end at once and write nothing."""
        kill_children()
        os._exit(ExitCode.FENCED)

    def _build_result(
        self, outcome: Outcome, *, reason: StopReason | None = None, failure: Failure | None = None, artifacts: tuple[Artifact, ...] = ()
    ) -> Result:
        trained, checkpoints = self._trained, self._checkpoints
        return Result(
            job_id=self._settings.job_id,
            attempt=self._settings.attempt,
            claimant=self._claimant,
            outcome=outcome,
            yield_reason=reason if reason in ("preempted", "time_slice") else None,
            last_checkpoint_step=checkpoints.saved_step if checkpoints else None,
            resumed_step=checkpoints.resumed_step if checkpoints else None,
            failure=failure and failure.model_copy(update={"attempt": self._settings.attempt}),
            metrics=self._state.metrics,
            base_metrics=self._state.base_metrics,
            gate=self._state.gate,
            published_step=trained.step if trained else None,
            wandb_url=self._state.wandb_url,
            tracker_urls=self._state.trackers,
            artifacts=artifacts,
            train_rows=trained.train_rows if trained else None,
            train_tokens=trained.train_tokens if trained else None,
            train_runtime_s=trained.train_runtime_s if trained else None,
            started_at=self._started_at,
            finished_at=datetime.now(UTC),
        )

    def _write(self, result: Result, tries: int) -> Result:
        """Make the result durable; returns the one that counts. Without it nothing is completed."""
        key = result_key(result.job_id, result.attempt)
        content = result.model_dump_json(indent=1).encode()
        try:
            return self._write_if_absent(result, key, content, tries)
        except JobFailed as error:
            log.error("result could not be written", extra={"error": error.failure.message})
            if result.outcome != "completed":
                return result
            return result.model_copy(update={"outcome": "failed", "failure": error.failure})

    def _write_if_absent(self, result: Result, key: str, content: bytes, tries: int) -> Result:
        """The result, or the one that is there: the last word has been spoken already. Raises JobFailed."""
        try:
            retry_store("the result could not be written", lambda: self._store.write(key, content, if_absent=True), tries=tries)
        except ObjectExists:
            return Result.load(retry_store("the result could not be read", lambda: self._store.read(key), tries=tries))
        return result


# Any: what stands behind a name is known when it is loaded.
def _import_object(import_path: str) -> Any:  # noqa: ANN401
    """What a line "module:name" names."""
    module, _, name = import_path.partition(":")
    return getattr(import_module(module), name)


EXIT_CODES: dict[Outcome, ExitCode] = {
    "completed": ExitCode.COMPLETED,
    "failed": ExitCode.FAILED,
    "cancelled": ExitCode.CANCELLED,
    "paused": ExitCode.PAUSED,
    "yielded": ExitCode.YIELDED,
}


def cap_timeouts(timeouts: ShutdownTimeouts, killed_in_s: float | None) -> ShutdownTimeouts:
    """What is left of a patience when the process is killed soon, so that the last word is spoken whoever does not answer."""
    if killed_in_s is None:
        return timeouts
    eighth_s = killed_in_s / 8  # two for the checkpoint, two for the trackers; events, their sender, the last word; the store
    return ShutdownTimeouts(
        report_s=min(timeouts.report_s, max(FORCED_SHUTDOWN.report_s, eighth_s)),
        tries=timeouts.tries if eighth_s > timeouts.report_s else FORCED_SHUTDOWN.tries,
        checkpoint_s=min(timeouts.checkpoint_s, 2 * eighth_s),
        tracker_s=min(timeouts.tracker_s, 2 * eighth_s),
    )

"""One attempt at a job, from its claim to its result.

claim        this process owns the attempt, or exits without touching anything
spec         what to do, read from the object store
train        the function that the training config names; it continues from the job's newest checkpoint
gate         a model that misses the requested thresholds is reported and not exported
export       the family's function makes, verifies and uploads the artifacts
run.json     the provenance record, stored beside the artifacts; then the push to the Hub, if the job asks for one
result.json  the result, durable in the object store; then it is reported to the service

A stopped attempt writes a result too: the next attempt continues from what it saved.
"""

import logging
import os
import shutil
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pkgutil import resolve_name
from typing import Literal, assert_never

from jobs.runtime.checkpoints import Checkpoints
from jobs.runtime.client import ServiceClient
from jobs.runtime.context import AttemptState, JobContext, Secrets, Stores
from jobs.runtime.errors import DEFAULT_OUT_OF_MEMORY_HINT, Stopped, StopReason
from jobs.runtime.family import TrainedModel
from jobs.runtime.hub import check_push
from jobs.runtime.promotion_gate import evaluate_gate
from jobs.runtime.provenance import ProvenanceRecorder
from jobs.runtime.remaining_time import RemainingTime
from jobs.runtime.reporter import Reporter, Spool
from jobs.runtime.retry import retry_store
from jobs.runtime.settings import Settings
from jobs.runtime.shutdown import (
    EXIT_CODES,
    FORCED_SHUTDOWN,
    OUTCOME_BY_REASON,
    SHUTDOWN_TIMEOUTS,
    ExitCode,
    Outcome,
    ShutdownTimeouts,
    cap_timeouts,
    write_result,
)
from jobs.runtime.stop import StopController
from jobs.runtime.subprocesses import kill_children
from jobs.runtime.trackers import TrackerThread, start_trackers
from schema.events import Directive
from schema.job import Artifact, Failure
from schema.result import Result
from schema.spec import JobSpec, spec_key
from storage import TokenSource
from storage.registry import open_store

log = logging.getLogger(__name__)

# What trainers and exporters write into the attempt's folder: gigabytes that nothing reads after the attempt.
SCRATCH_FOLDERS = ("base", "data", "checkpoints", "model", "exports", "source", "output")


class Attempt:
    """The attempt that this process works on."""

    def __init__(self, settings: Settings) -> None:
        self.out_of_memory_hint = DEFAULT_OUT_OF_MEMORY_HINT  # until the spec names the family
        self._settings = settings
        self._started_at = datetime.now(UTC)
        self._client = ServiceClient(settings)
        self._stop = StopController(self._force_finish, on_request=self._refresh_directive)
        self._secrets = Secrets({})
        self._state = AttemptState()
        self._remaining = RemainingTime()
        self._claimed = False
        self._get_store_token: TokenSource | None = None
        self._checkpoints: Checkpoints | None = None
        self._reporter: Reporter | None = None
        self._trackers: list[TrackerThread] = []
        self._trained: TrainedModel | None = None
        # Set once the attempt has completed or failed: the result that a forced exit writes then.
        self._build_final_result: Callable[[], Result] | None = None
        self._finish_lock = threading.Lock()

    # --- claim, train and export -------------------------------------------------------------------------------------

    def claim(self) -> None:
        """Take ownership of the attempt. Raises AttemptTaken, ClaimRefused, Stopped."""
        self._stop.install_signal_handlers(self._settings.time_limit_s)
        response = self._client.claim()
        self._claimed = True
        if self._settings.spec_store_url.startswith("gs://") and self._client.issues_store_tokens():
            self._get_store_token = self._client.fetch_store_token
        self._secrets = Secrets(response.secrets)
        log.info("attempt claimed", extra={"job_id": self._settings.job_id, "attempt": self._settings.attempt})
        if response.directive in ("cancel", "pause"):
            self._apply_directive(response.directive)
        self._stop.check()

    def train_and_export(self) -> tuple[Artifact, ...]:
        """Train and export; no artifacts if the model fails its promotion gate. Raises Stopped, JobFailed and anything a library raises."""
        key, store = spec_key(self._settings.job_id), open_store(self._settings.spec_store_url, self._get_store_token)
        spec = JobSpec.load(retry_store("the job's spec could not be read", lambda: store.read(key), code="internal"))
        config = spec.training_config
        self.out_of_memory_hint = config.out_of_memory_hint
        context = self._create_context(spec)
        self._state = context.state

        # Before anything is computed: fail if the result could not be exported or pushed.
        resolve_name(config.check_export)(config)
        if config.export_config.destination == "hfhub":
            check_push(context)

        recorder = ProvenanceRecorder(context, image=self._settings.image, started_at=self._started_at)
        self._trackers = start_trackers(context)
        trained: TrainedModel = resolve_name(config.train)(config, context)
        self._trained = trained
        context.notify_model_saved(trained.folder)

        thresholds = config.eval_config.promotion_gate
        if thresholds and not spec.export_of:  # a request to export a given checkpoint has no gate
            gate = evaluate_gate(thresholds, trained.metrics, trained.base_metrics)
            context.log_gate(gate)
            if not gate.passed:
                return ()
        return resolve_name(config.export)(trained, context, partial(recorder.finalize, trained))

    def _create_context(self, spec: JobSpec) -> JobContext:
        workdir, stores = self._settings.workdir, Stores(spec.stores, self._get_store_token)
        spool = Spool(workdir / f"events-{self._settings.attempt}.jsonl")
        self._reporter = Reporter(
            self._client, spool, self._settings.report_interval_s, self._apply_directive, self._exit_fenced, self._remaining.read
        )
        self._checkpoints = Checkpoints(
            store=stores.models,
            spec=spec,
            attempt=self._settings.attempt,
            folder=workdir / "checkpoints",
            save_total_limit=spec.training_config.hyperparameters.save_total_limit,
            emit=lambda event: context.emit(event),  # a lambda, because `context` is created below
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
            remaining=self._remaining,
        )
        self._reporter.start()
        return context

    # --- directives of the service -----------------------------------------------------------------------------------

    def _apply_directive(self, directive: Directive) -> None:
        match directive:
            case "continue":
                return
            case "cancel" | "pause":
                self._stop.request(directive)
            case _:
                assert_never(directive)

    def _refresh_directive(self, reason: StopReason) -> None:
        """After a SIGTERM, ask the service whether the job is being canceled: some launchers cancel with SIGTERM too."""
        if reason == "preempted" and self._reporter is not None:
            self._reporter.flush_soon()

    def _exit_fenced(self) -> None:
        """Exit at once and write nothing: another attempt has taken over, or the job is deleted."""
        kill_children()
        os._exit(ExitCode.FENCED)

    # --- finish ------------------------------------------------------------------------------------------------------

    def reraise_if_stopping(self) -> None:
        """Raises Stopped if the job is being canceled or the compute taken away: errors at that time are not the job's fault."""
        if self._stop.stop_reason in ("cancel", "preempted"):
            raise Stopped(self._stop.stop_reason)

    def redact(self, text: str) -> str:
        """The text without the job's secrets and the attempt's tokens."""
        return self._client.redact(self._secrets.redact(text))

    def finish(
        self, outcome: Literal["completed", "failed"], *, failure: Failure | None = None, artifacts: tuple[Artifact, ...] = ()
    ) -> ExitCode:
        """Publish the result of an attempt that completed or failed. A stop request during this only shortens it."""
        self._build_final_result = lambda: self._build_result(outcome, failure=failure, artifacts=artifacts)
        self._remaining.end()
        self._stop.begin_shutdown()
        self._flush(outcome, succeeded=outcome == "completed")
        self._stop.finalize()
        return self._publish_result(self._build_final_result(), self._shutdown_timeouts(outcome))

    def finish_stopped(self, reason: StopReason) -> ExitCode:
        """Publish the result of an attempt that was stopped. A cancel that arrives before the result is built wins."""
        self._stop.begin_shutdown()
        if reason != "cancel":
            self._flush(OUTCOME_BY_REASON[reason], succeeded=True)  # a run that another attempt continues has not failed
        if self._stop.finalize() == "cancel":
            reason = "cancel"
        outcome = OUTCOME_BY_REASON[reason]
        return self._publish_result(self._build_result(outcome, reason=reason), self._shutdown_timeouts(outcome))

    def _force_finish(self, reason: StopReason) -> None:
        """Publish the result from another thread and exit, because the main thread is inside a call that cannot be interrupted."""
        self._stop.finalize()
        result = self._build_final_result() if self._build_final_result else self._build_result(OUTCOME_BY_REASON[reason], reason=reason)
        os._exit(self._publish_result(result, FORCED_SHUTDOWN))

    def _shutdown_timeouts(self, outcome: Outcome) -> ShutdownTimeouts:
        return cap_timeouts(SHUTDOWN_TIMEOUTS[outcome], self._stop.time_until_kill_s())

    def _flush(self, outcome: Outcome, *, succeeded: bool) -> None:
        """Wait for the checkpoint that is being uploaded and for the trackers to send what they have."""
        timeouts = self._shutdown_timeouts(outcome)
        if self._checkpoints is not None:
            self._checkpoints.wait_until_uploaded(timeouts.checkpoint_s)
        for tracker in self._trackers:
            tracker.finish(succeeded=succeeded, timeout_s=timeouts.tracker_s)

    def _build_result(
        self, outcome: Outcome, *, reason: StopReason | None = None, failure: Failure | None = None, artifacts: tuple[Artifact, ...] = ()
    ) -> Result:
        trained, checkpoints = self._trained, self._checkpoints
        return Result(
            job_id=self._settings.job_id,
            attempt=self._settings.attempt,
            claimant=self._client.claimant,
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
            ingested=self._state.ingested if outcome == "completed" else None,
            train_rows=trained.train_rows if trained else None,
            train_tokens=trained.train_tokens if trained else None,
            train_runtime_s=trained.train_runtime_s if trained else None,
            started_at=self._started_at,
            finished_at=datetime.now(UTC),
        )

    def _publish_result(self, result: Result, timeouts: ShutdownTimeouts) -> ExitCode:
        """Write the result to the object store and report it to the service. The outcome that counts decides the exit code.

        The events go first: after the result the service accepts no more of them.
        """
        with self._finish_lock:
            kill_children()
            if not self._claimed:  # another process may own the attempt; only the owner writes a result
                log.info("attempt ended before it was claimed", extra={"outcome": result.outcome})
                return EXIT_CODES[result.outcome]
            if self._reporter is not None:
                self._reporter.flush(timeouts.report_s)
                self._reporter.close(timeouts.report_s)
            result = write_result(open_store(self._settings.spec_store_url, self._get_store_token), result, timeouts.tries)
            reported = self._client.finish(result, timeout_s=timeouts.report_s)
            if self._checkpoints is not None:
                self._checkpoints.close()
            # Free the disk: everything that matters is uploaded. The events and a tracker's offline run are kept with the log.
            for name in SCRATCH_FOLDERS:
                shutil.rmtree(self._settings.workdir / name, ignore_errors=True)
            log.info("attempt ended", extra={"outcome": result.outcome, "reported": reported})
        return EXIT_CODES[result.outcome]

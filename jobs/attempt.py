"""One attempt, from the claim to the last word.

claim        this process owns the attempt, or ends without touching anything
spec         what to do, from the object store
trainer      named by the training config, found at "module:function"
exporters    make, verify, upload and publish the artifacts
result.json  the last word, durable; then the service is told as well
"""

import logging
import os
import shutil
import socket
import threading
from datetime import UTC, datetime
from enum import IntEnum
from importlib import import_module
from typing import TYPE_CHECKING, Literal, assert_never
from uuid import uuid4

from jobs.children import kill_children
from jobs.client import ServiceClient
from jobs.context import Findings, JobContext, Secrets, Stores
from jobs.errors import Cancelled
from jobs.report import Reporter, Spool
from jobs.settings import Settings
from jobs.stop import Reason, Stop
from jobs.trackers import TrackerThread, start_trackers
from schema.events import Directive
from schema.job import Artifact, Failure
from schema.result import Result
from schema.spec import JobSpec, result_key, spec_key
from storage import ObjectExists, ObjectStore, StorageError, open_store

if TYPE_CHECKING:
    from jobs.trained import TrainedModel

log = logging.getLogger(__name__)

Outcome = Literal["completed", "failed", "cancelled"]


# What trainers and exporters write into the attempt's folder: gigabytes that nobody reads afterwards.
HEAVY_FOLDERS = ("base", "data", "checkpoints", "model", "exports")


class ExitCode(IntEnum):
    """How the process ends."""

    COMPLETED = 0
    FAILED = 1
    CANCELLED = 10
    FENCED = 11


# Seconds for the last events and the last word, and for a tracker to finish. A cancel must be over in two seconds.
PATIENCE_S = {"completed": (10.0, 60.0), "failed": (5.0, 10.0), "cancelled": (0.3, 0.0)}


class Attempt:
    """The attempt that this process works at."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._started_at = datetime.now(UTC)
        self._claimant = f"{socket.gethostname()}-{os.getpid()}-{uuid4().hex[:8]}"
        self._client = ServiceClient(settings)
        self._stop = Stop(last_resort=self._end_for)
        self._secrets = Secrets({})
        self._findings = Findings()
        self._context: JobContext | None = None
        self._reporter: Reporter | None = None
        self._trackers: list[TrackerThread] = []
        self._trained: TrainedModel | None = None
        self._ending = threading.Lock()

    def claim(self) -> None:
        """Own the attempt. Raises AttemptTaken, ClaimRefused, Cancelled."""
        self._stop.listen(self._settings.time_limit_s)
        answer = self._client.claim(self._claimant)
        self._secrets = Secrets(answer.secrets)
        log.info("attempt claimed", extra={"job_id": self._settings.job_id, "attempt": self._settings.attempt})
        if answer.directive == "cancel":
            raise Cancelled("cancel")

    def work(self) -> tuple[Artifact, ...]:
        """Train and export. Raises whatever goes wrong, and Cancelled."""
        spec = JobSpec.load(self._store.read(spec_key(self._settings.job_id)))
        context = self._open(spec)
        self._findings = context.findings
        self._trackers = start_trackers(context)
        module, _, function = spec.training_config.trainer.partition(":")
        trained: TrainedModel = getattr(import_module(module), function)(spec.training_config, context)
        self._trained = trained
        context.model_saved(trained.folder)

        from jobs.exporters import export_all

        return export_all(trained, context)

    def end(self, outcome: Outcome, *, failure: Failure | None = None, artifacts: tuple[Artifact, ...] = ()) -> ExitCode:
        """Say the last word, to the object store and to the service; what it was decides how the process ends.

        The events go first: once the result is there the attempt is over, and the service takes no more.
        """
        self._stop.settle()
        with self._ending:
            words_s, tracker_s = PATIENCE_S[outcome]
            for tracker in self._trackers if tracker_s else ():
                tracker.finish(succeeded=outcome == "completed", patience_s=tracker_s)
            kill_children()
            if self._reporter is not None:
                self._reporter.flush(words_s)
                self._reporter.close(words_s)
            result = self._write(self._result(outcome, failure, artifacts))
            told = self._client.finish(result, patience_s=words_s)
            self._sweep()
            log.info("attempt ended", extra={"outcome": result.outcome, "service_knows": told})
        return {"completed": ExitCode.COMPLETED, "cancelled": ExitCode.CANCELLED}.get(result.outcome, ExitCode.FAILED)

    def end_cancelled(self, reason: str) -> ExitCode:
        """The last word of an attempt that was asked to stop."""
        if reason != "timeout":
            return self.end("cancelled")
        limit = f"{self._settings.time_limit_s:.0f} s"
        hint = "lower epochs or max_steps, or ask for a longer time limit"
        return self.end("failed", failure=Failure(code="timeout", message=f"the attempt ran into its time limit of {limit}", hint=hint))

    def _sweep(self) -> None:
        """Give the disk back: what counts has been uploaded. The events, and a tracker's offline run, stay with the log."""
        for name in HEAVY_FOLDERS:
            shutil.rmtree(self._settings.workdir / name, ignore_errors=True)

    def redact(self, text: str) -> str:
        """The text without the job's secrets and the attempt's token."""
        return self._secrets.redact(text).replace(self._settings.token, "**********")

    @property
    def _store(self) -> ObjectStore:
        return open_store(self._settings.spec_store_url)

    def _open(self, spec: JobSpec) -> JobContext:
        workdir = self._settings.workdir
        spool = Spool(workdir / f"events-{self._settings.attempt}.jsonl")
        self._reporter = Reporter(self._client, spool, self._settings.report_interval_s, self._heed, self._leave)
        context = JobContext(
            spec=spec,
            attempt=self._settings.attempt,
            workdir=workdir,
            secrets=self._secrets,
            stores=Stores(spec.stores),
            voice=self._reporter,
            stop=self._stop,
        )
        self._context = context
        self._reporter.start()
        return context

    def _heed(self, directive: Directive) -> None:
        match directive:
            case "continue":
                return
            case "cancel":
                self._stop.ask("cancel")
            case "pause":
                assert self._context is not None
                self._context.warn("pause_unavailable", "this image cannot pause; the attempt goes on")
            case _:
                assert_never(directive)

    def _leave(self) -> None:
        """Another attempt has taken over, or the job is gone: end at once and write nothing."""
        kill_children()
        os._exit(ExitCode.FENCED)

    def _end_for(self, reason: Reason) -> None:
        """In place of a main thread that is inside a call which cannot be interrupted."""
        os._exit(self.end_cancelled(reason))

    def _result(self, outcome: Outcome, failure: Failure | None, artifacts: tuple[Artifact, ...]) -> Result:
        trained = self._trained
        return Result(
            job_id=self._settings.job_id,
            attempt=self._settings.attempt,
            claimant=self._claimant,
            outcome=outcome,
            failure=failure and failure.model_copy(update={"attempt": self._settings.attempt}),
            metrics=self._findings.metrics,
            base_metrics=self._findings.base_metrics,
            wandb_url=self._findings.wandb_url,
            artifacts=artifacts,
            train_rows=trained.train_rows if trained else None,
            train_tokens=trained.train_tokens if trained else None,
            train_runtime_s=trained.train_runtime_s if trained else None,
            started_at=self._started_at,
            finished_at=datetime.now(UTC),
        )

    def _write(self, result: Result) -> Result:
        """Make the result durable; returns the one that counts. Without it nothing is completed."""
        key = result_key(result.job_id, result.attempt)
        try:
            self._store.write(key, result.model_dump_json(indent=1).encode(), if_absent=True)
        except ObjectExists:
            return Result.load(self._store.read(key))  # the last word has been spoken already
        except StorageError as error:
            log.error("result could not be written", extra={"error": str(error)})
            failure = result.failure or Failure(code="upload_failed", message=f"result.json could not be written: {error}")
            return result.model_copy(update={"outcome": "failed" if result.outcome == "completed" else result.outcome, "failure": failure})
        return result

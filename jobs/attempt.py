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

from jobs.checkpoints import Checkpoints
from jobs.children import kill_children
from jobs.client import ServiceClient
from jobs.context import Findings, JobContext, Secrets, Stores
from jobs.errors import JobFailed, Reason, Stopped
from jobs.evaluation.gate import judge
from jobs.patience import patiently
from jobs.report import Reporter, Spool
from jobs.settings import Settings
from jobs.stop import Stop
from jobs.trackers import TrackerThread, start_trackers
from schema.events import Directive
from schema.job import Artifact, Failure
from schema.result import Result
from schema.spec import JobSpec, result_key, spec_key
from storage import ObjectExists, ObjectStore, open_store

if TYPE_CHECKING:
    from jobs.seal import Seal
    from jobs.trained import TrainedModel

log = logging.getLogger(__name__)

SEAL = "jobs.seal:Seal"

Outcome = Literal["completed", "failed", "cancelled", "paused", "yielded"]

OUTCOMES: dict[Reason, Outcome] = {"cancel": "cancelled", "pause": "paused", "preempted": "yielded", "time_slice": "yielded"}

# What trainers and exporters write into the attempt's folder: gigabytes that nobody reads afterwards.
HEAVY_FOLDERS = ("base", "data", "checkpoints", "model", "exports")


class ExitCode(IntEnum):
    """How the process ends."""

    COMPLETED = 0
    FAILED = 1
    CANCELLED = 10
    FENCED = 11
    PAUSED = 12
    YIELDED = 13


@dataclass(frozen=True)
class Patience:
    """What an ending may take."""

    words_s: float  # for the last events, and again for the service to take the last word
    tries: int  # to make the last word durable: the waits between them begin with half a second and double
    checkpoint_s: float = 0.0  # for a checkpoint that is being uploaded
    tracker_s: float = 0.0  # for a tracker to send what it has


PATIENCE = {
    "completed": Patience(words_s=10.0, tries=8, checkpoint_s=60.0, tracker_s=60.0),
    "failed": Patience(words_s=5.0, tries=6, checkpoint_s=30.0, tracker_s=10.0),
    "cancelled": Patience(words_s=0.3, tries=2),  # it must be over in two seconds
    "paused": Patience(words_s=5.0, tries=6, checkpoint_s=60.0, tracker_s=20.0),
    "yielded": Patience(words_s=5.0, tries=6, checkpoint_s=60.0, tracker_s=20.0),
}
HASTY = Patience(words_s=0.3, tries=2)  # the platform is about to kill the process, or a person waits


class Attempt:
    """The attempt that this process works at."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._started_at = datetime.now(UTC)
        self._claimant = f"{socket.gethostname()}-{os.getpid()}-{uuid4().hex[:8]}"
        self._client = ServiceClient(settings)
        self._stop = Stop(last_resort=self._end_for, heard=self._ask_why)
        self._secrets = Secrets({})
        self._findings = Findings()
        self._owned = False
        self._checkpoints: Checkpoints | None = None
        self._reporter: Reporter | None = None
        self._trackers: list[TrackerThread] = []
        self._trained: TrainedModel | None = None
        self._own_end: Callable[[], Result] | None = None  # how it ends if nobody stops it: it is done, or has failed
        self._ending = threading.Lock()

    def claim(self) -> None:
        """Own the attempt. Raises AttemptTaken, ClaimRefused, Stopped."""
        self._stop.listen(self._settings.time_limit_s)
        answer = self._client.claim(self._claimant)
        self._owned = True
        self._secrets = Secrets(answer.secrets)
        log.info("attempt claimed", extra={"job_id": self._settings.job_id, "attempt": self._settings.attempt})
        if answer.directive in ("cancel", "pause"):
            self._heed(answer.directive)
        self._stop.check()

    def work(self) -> tuple[Artifact, ...]:
        """Train and export. Raises whatever goes wrong, and Stopped."""
        key = spec_key(self._settings.job_id)
        spec = JobSpec.load(patiently("the job's spec could not be read", lambda: self._store.read(key), code="internal"))
        context = self._open(spec)
        self._findings = context.findings
        self._refuse_the_impossible(context)
        seal: Seal = _named(SEAL)(context, image=self._settings.image, started_at=self._started_at)
        self._trackers = start_trackers(context)
        trained: TrainedModel = _named(spec.training_config.trainer)(spec.training_config, context)
        self._trained = trained
        context.model_saved(trained.folder)
        if not self._may_be_published(trained, context):
            return ()

        from jobs.exporters import export_all

        return export_all(trained, context, lambda products, artifacts: seal.put_on(trained, products, artifacts))

    def _refuse_the_impossible(self, context: JobContext) -> None:
        """Raises JobFailed for what could not be handed over in the end, before anything is paid for."""
        from jobs.exporters import refuse_impossible
        from jobs.hub import check_push

        config = context.spec.training_config
        refuse_impossible(config)
        if config.export_config.destination == "hfhub":
            check_push(context)

    def _may_be_published(self, trained: "TrainedModel", context: JobContext) -> bool:
        """Whether the model passes the gate, if there is one. Who exports a checkpoint has decided for himself."""
        thresholds = context.spec.training_config.eval_config.promotion_gate
        if not thresholds or context.spec.export_of:
            return True
        gate = judge(thresholds, trained.metrics, trained.base_metrics)
        context.judged(gate)
        return gate.passed

    def end(
        self, outcome: Literal["completed", "failed"], *, failure: Failure | None = None, artifacts: tuple[Artifact, ...] = ()
    ) -> ExitCode:
        """The last word of an attempt that came to its own end. Who asks it to stop meanwhile gets it sooner, and no other."""
        self._own_end = lambda: self._result(outcome, failure=failure, artifacts=artifacts)
        self._stop.unwound()
        self._tidy(self._patience(outcome), succeeded=outcome == "completed")
        self._stop.settle()
        return self._say(self._own_end(), self._patience(outcome))

    def end_stopped(self, reason: Reason) -> ExitCode:
        """The last word of an attempt that was asked to stop. A cancel that comes before it is spoken wins."""
        self._stop.unwound()
        if reason != "cancel":
            self._tidy(self._patience(OUTCOMES[reason]), succeeded=True)
        if self._stop.settle() == "cancel":
            reason = "cancel"
        return self._say(self._result(OUTCOMES[reason], reason=reason), self._patience(OUTCOMES[reason]))

    def _end_for(self, reason: Reason) -> None:
        """In place of a main thread that is inside a call which cannot be interrupted."""
        self._stop.settle()
        result = self._own_end() if self._own_end else self._result(OUTCOMES[reason], reason=reason)
        os._exit(self._say(result, HASTY))

    def _patience(self, outcome: Outcome) -> Patience:
        return within(PATIENCE[outcome], self._stop.killed_in_s())

    def _tidy(self, patience: Patience, *, succeeded: bool) -> None:
        """Let a checkpoint that is on its way arrive, and the trackers send what they have. A run that is to go on has not failed."""
        if self._checkpoints is not None:
            self._checkpoints.settle(patience.checkpoint_s)
        for tracker in self._trackers:
            tracker.finish(succeeded=succeeded, patience_s=patience.tracker_s)

    def _say(self, result: Result, patience: Patience) -> ExitCode:
        """Say the last word, to the object store and to the service; what it was decides how the process ends.

        The events go first: once the result is there the attempt is over, and the service takes no more.
        """
        with self._ending:
            kill_children()
            if not self._owned:  # perhaps another process does: its last word is still to come
                log.info("attempt ended before it was claimed", extra={"outcome": result.outcome})
                return EXIT_CODES[result.outcome]
            if self._reporter is not None:
                self._reporter.flush(patience.words_s)
                self._reporter.close(patience.words_s)
            result = self._write(result, patience.tries)
            told = self._client.finish(result, patience_s=patience.words_s)
            if self._checkpoints is not None:
                self._checkpoints.close()
            self._sweep()
            log.info("attempt ended", extra={"outcome": result.outcome, "service_knows": told})
        return EXIT_CODES[result.outcome]

    def _sweep(self) -> None:
        """Give the disk back: what counts has been uploaded. The events, and a tracker's offline run, stay with the log."""
        for name in HEAVY_FOLDERS:
            shutil.rmtree(self._settings.workdir / name, ignore_errors=True)

    def refuse_to_fail(self) -> None:
        """Raises Stopped when the job is being cancelled, or its machine taken away: what breaks then is no fault of the job."""
        if self._stop.wanted in ("cancel", "preempted"):
            raise Stopped(self._stop.wanted)

    def redact(self, text: str) -> str:
        """The text without the job's secrets and the attempt's token."""
        return self._secrets.redact(text).replace(self._settings.token, "**********")

    @property
    def _store(self) -> ObjectStore:
        return open_store(self._settings.spec_store_url)

    def _open(self, spec: JobSpec) -> JobContext:
        workdir, stores = self._settings.workdir, Stores(spec.stores)
        spool = Spool(workdir / f"events-{self._settings.attempt}.jsonl")
        self._reporter = Reporter(self._client, spool, self._settings.report_interval_s, self._heed, self._leave)
        self._checkpoints = Checkpoints(
            store=stores.models,
            spec=spec,
            attempt=self._settings.attempt,
            folder=workdir / "checkpoints",
            keep=spec.training_config.hyperparameters.save_total_limit,
            tell=lambda event: context.told(event),
            trackers=lambda: {tracker.name: tracker.run_id for tracker in self._trackers if tracker.run_id},
        )
        context = JobContext(
            spec=spec,
            attempt=self._settings.attempt,
            workdir=workdir,
            secrets=self._secrets,
            stores=stores,
            voice=self._reporter,
            stop=self._stop,
            checkpoints=self._checkpoints,
        )
        self._reporter.start()
        return context

    def _heed(self, directive: Directive) -> None:
        match directive:
            case "continue":
                return
            case "cancel" | "pause":
                self._stop.ask(directive)
            case _:
                assert_never(directive)

    def _ask_why(self, reason: Reason) -> None:
        """Where a cancel comes as a SIGTERM too, only the service knows which it is, and answers the next report with it."""
        if reason == "preempted" and self._reporter is not None:
            self._reporter.hurry()

    def _leave(self) -> None:
        """Another attempt has taken over, or the job is gone: end at once and write nothing."""
        kill_children()
        os._exit(ExitCode.FENCED)

    def _result(
        self, outcome: Outcome, *, reason: Reason | None = None, failure: Failure | None = None, artifacts: tuple[Artifact, ...] = ()
    ) -> Result:
        trained, checkpoints = self._trained, self._checkpoints
        return Result(
            job_id=self._settings.job_id,
            attempt=self._settings.attempt,
            claimant=self._claimant,
            outcome=outcome,
            yielded_because=reason if reason in ("preempted", "time_slice") else None,
            saved_step=checkpoints.saved_step if checkpoints else None,
            resumed_step=checkpoints.resumed_step if checkpoints else None,
            failure=failure and failure.model_copy(update={"attempt": self._settings.attempt}),
            metrics=self._findings.metrics,
            base_metrics=self._findings.base_metrics,
            gate=self._findings.gate,
            published_step=trained.step if trained else None,
            wandb_url=self._findings.wandb_url,
            trackers=self._findings.trackers,
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
            return self._first(result, key, content, tries)
        except JobFailed as error:
            log.error("result could not be written", extra={"error": error.failure.message})
            if result.outcome != "completed":
                return result
            return result.model_copy(update={"outcome": "failed", "failure": error.failure})

    def _first(self, result: Result, key: str, content: bytes, tries: int) -> Result:
        """The result, or the one that is there: the last word has been spoken already. Raises JobFailed."""
        try:
            patiently("the result could not be written", lambda: self._store.write(key, content, if_absent=True), tries=tries)
        except ObjectExists:
            return Result.load(patiently("the result could not be read", lambda: self._store.read(key), tries=tries))
        return result


# Any: what stands behind a name is known when it is loaded.
def _named(place: str) -> Any:  # noqa: ANN401
    """What a line "module:name" names."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


EXIT_CODES: dict[Outcome, ExitCode] = {
    "completed": ExitCode.COMPLETED,
    "failed": ExitCode.FAILED,
    "cancelled": ExitCode.CANCELLED,
    "paused": ExitCode.PAUSED,
    "yielded": ExitCode.YIELDED,
}


def within(patience: Patience, killed_in_s: float | None) -> Patience:
    """What is left of a patience when the process is killed soon, so that the last word is spoken whoever does not answer."""
    if killed_in_s is None:
        return patience
    eighth_s = killed_in_s / 8  # two for the checkpoint, two for the trackers; events, their sender, the last word; the store
    return Patience(
        words_s=min(patience.words_s, max(HASTY.words_s, eighth_s)),
        tries=patience.tries if eighth_s > patience.words_s else HASTY.tries,
        checkpoint_s=min(patience.checkpoint_s, 2 * eighth_s),
        tracker_s=min(patience.tracker_s, 2 * eighth_s),
    )

"""Claims, reports, results and control requests in any order, repeated and late, compared with a model independent of the service.

Hypothesis generates the sequences. After every step the record, the attempts and the stored events must equal the model; where the model
says that a step is rejected, the service must reject it. `completed` is final; only a retry leaves `failed` and `cancelled`.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from infra.loopback.firestore import run_firestore_emulator
from schema.capabilities import EnvironmentManifest
from schema.events import CheckpointSaved, DecisionMade, Event, EventBatch, PhaseChanged, ReportedEvent
from schema.job import Job
from schema.requests import ResumeRequest, RetryRequest
from schema.result import Result
from service.adapters.jobstores.sqlite import SqliteJobStore
from service.adapters.links import ServiceUrlSigner
from service.adapters.secrets.local import LocalSecretStore
from service.core.errors import Conflict, Fenced
from service.core.jobs.assembly import JobServices, build_job_services
from service.core.launchers import LauncherPool
from service.core.limits import Limits
from service.core.ports import Buckets, ExecutionState, JobStore, LaunchRequest
from service.core.principals import LOCAL_PRINCIPAL, UPKEEP_PRINCIPAL, attempt_principal
from service.core.tokens import TokenSigner
from storage.registry import open_store
from tests.chaos.campaign import Row, Size
from tests.chaos.simulation import in_memory_folder, without_warnings
from tests.factories import START, make_dataset, make_manifest, make_profile, make_train_request
from tests.fakes import FakeClock

SEQUENCES: dict[Size, tuple[int, int]] = {"full": (10_000, 300), "short": (150, 15)}  # on SQLite, on Firestore
STEPS_PER_SEQUENCE = 15
MAX_MESSAGE_CHARS = 1500  # the last steps explain most
INVARIANTS = ("state.the_", "state.every_", "state.teardown")
PRINCIPAL = LOCAL_PRINCIPAL
# Limits from the service's documentation, not imported from it, so that the model stays independent.
MAX_ATTEMPTS_WITHOUT_PROGRESS, MAX_LOST_ATTEMPTS = 5, 3
UNFINISHED = ("queued", "preparing", "training", "pausing", "paused", "cancelling")
ACTIVE = ("preparing", "training", "pausing", "cancelling")


class FakeLauncher:
    """A launcher that accepts everything and whose executions end when a sequence says so."""

    name = "fake"
    polling_is_free = True

    def __init__(self) -> None:
        self.limits = Limits()
        self.profiles = {"fake": make_profile()}
        self.ended_handles: set[str] = set()
        self.launched: dict[str, list[int]] = {}  # job → its attempts, in the order in which they were launched

    def launch(self, launch_request: LaunchRequest) -> str:
        self.launched.setdefault(launch_request.job_id, []).append(launch_request.attempt)
        return launch_request.name

    def find_handle(self, name: str) -> str | None:
        job_id, _, number = name.rpartition(".")
        return name if int(number) in self.launched.get(job_id, []) else None

    def check(self, handle: str) -> ExecutionState:
        return "ended" if handle in self.ended_handles else "running"

    def cancel(self, handle: str, *, force: bool) -> None:
        """Does nothing."""

    def count_free_slots(self, active_jobs: int) -> int:
        return 1000

    def list_environments(self) -> dict[str, EnvironmentManifest]:
        return {"llm": make_manifest()}

    def ping(self) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


@dataclass
class ModelAttempt:
    """An attempt in the model."""

    previous_best_step: int  # the latest checkpoint when the attempt started
    owner: str | None = None
    next_seq: int = 0
    saved_step: int | None = None
    outcome: str | None = None


@dataclass
class ModelJob:
    """The job in the model."""

    status: str = "queued"
    attempts: list[ModelAttempt] = field(default_factory=list[ModelAttempt])
    events: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    best_step: int = 0  # the latest valid checkpoint
    attempts_without_progress: int = 0
    lost_attempts: int = 0
    retried: bool = False

    def is_active(self, number: int) -> bool:
        """Whether this attempt may report."""
        return number == len(self.attempts) and self.status in ACTIVE and self.attempts[-1].outcome is None

    def end(self, outcome: str) -> None:
        """End the running attempt with that outcome."""
        attempt = self.attempts[-1]
        if outcome == "cancelled" and self.status != "cancelling":
            outcome = "preempted"
        if outcome == "paused" and self.status not in ("pausing", "cancelling"):
            outcome = "yielded"
        attempt.outcome = outcome
        early = outcome in ("yielded", "preempted", "lost")
        if early and (attempt.saved_step or 0) > attempt.previous_best_step:
            self.attempts_without_progress = self.lost_attempts = 0
        elif early:
            self.attempts_without_progress += 1
            self.lost_attempts += outcome == "lost"
        self.best_step = max(self.best_step, attempt.saved_step or 0)
        self.status = self._next_status(outcome, early=early)

    def _next_status(self, outcome: str, *, early: bool) -> str:
        if outcome == "completed":
            return "completed"
        if self.status == "cancelling":
            return "cancelled"
        if self.status == "pausing" and (early or outcome == "paused"):
            return "paused"
        if early and self.attempts_without_progress < MAX_ATTEMPTS_WITHOUT_PROGRESS and self.lost_attempts < MAX_LOST_ATTEMPTS:
            return "queued"
        return "failed"


class JobStateMachine(RuleBasedStateMachine):
    """One job in the store that `service` uses, and its model."""

    def __init__(self, service: JobServices, store: JobStore, launcher: FakeLauncher) -> None:
        super().__init__()
        self.service, self.store, self.launcher = service, store, launcher
        self.model = ModelJob()
        self.job_id = service.submission.submit(PRINCIPAL, make_train_request()).job_id
        self.last_call: Callable[[], None] = lambda: None

    @initialize(status=st.sampled_from(["queued", "preparing", "training", "training", "training"]))
    def start(self, status: str) -> None:
        """Start most sequences during a training, where most calls are allowed."""
        if status != "queued":
            self.reconcile()
        if status == "training":
            self.claim(1, "a")
            self._report(1, 0, ["training", "save"], 3)

    def teardown(self) -> None:
        """End the job, so that the next sequence starts without one."""
        with suppress(Conflict):
            self.service.control.cancel(PRINCIPAL, self.job_id)
        if self.job().status not in ("completed", "failed", "cancelled"):
            self.launcher.ended_handles.add(f"{self.job_id}.{len(self.model.attempts)}")
            self.service.reconciliation.reconcile(UPKEEP_PRINCIPAL)

    def job(self) -> Job:
        """The record."""
        job = self.store.find_job(self.job_id)
        assert job is not None
        return job

    # --- the launcher

    @rule()
    def reconcile(self) -> None:
        """Reconcile once."""
        self.service.reconciliation.reconcile(UPKEEP_PRINCIPAL)
        self._apply_reconcile()

    @rule()
    def lose_process(self) -> None:
        """The running process disappears; reconcile once."""
        if self.model.attempts and self.model.attempts[-1].outcome is None:
            self.launcher.ended_handles.add(f"{self.job_id}.{len(self.model.attempts)}")
            self.service.reconciliation.reconcile(UPKEEP_PRINCIPAL)
            self.model.end("lost")
            self._apply_reconcile()

    def _apply_reconcile(self) -> None:
        if self.model.status == "queued":
            self.model.status = "preparing"
            self.model.attempts.append(ModelAttempt(self.model.best_step))

    # --- attempts

    @rule(number=st.integers(0, 4), claimant=st.sampled_from("ab"))
    def claim(self, number: int, claimant: str) -> None:
        allowed = self.model.is_active(number) and self.model.attempts[-1].owner in (None, claimant)
        self._expect(lambda: self.service.attempts.claim(attempt_principal(self.job_id, number), self.job_id, number, claimant), allowed)
        if allowed:
            self.model.attempts[-1].owner = claimant

    @rule(
        shift_back=st.integers(0, 3), events=st.lists(st.sampled_from(["training", "save", "decide"]), max_size=3), step=st.integers(1, 30)
    )
    def report(self, shift_back: int, events: list[str], step: int) -> None:
        """The running attempt reports, or the last one that ran."""
        self._report(len(self.model.attempts), -shift_back, events, step)

    @rule(number=st.integers(0, 4), shift=st.integers(-3, 3), events=st.lists(st.sampled_from(["training", "save"]), max_size=2))
    def report_any_attempt(self, number: int, shift: int, events: list[str]) -> None:
        """Any attempt reports, with a repetition or a gap."""
        self._report(number, shift, events, 3)

    def _report(self, number: int, shift: int, event_names: list[str], step: int) -> None:
        is_known = 1 <= number <= len(self.model.attempts)
        first = max(0, (self.model.attempts[number - 1].next_seq if is_known else 0) + shift)
        events: list[Event] = [make_event(name, step) for name in event_names]
        batch = EventBatch(first_seq=first, events=[ReportedEvent(at=START, event=event) for event in events])

        def act() -> None:
            allowed = self.model.is_active(number) and self.model.attempts[-1].owner is not None
            self._expect(
                lambda: self.service.attempts.report(
                    attempt_principal(self.job_id, number), self.job_id, number, batch, self._find_owner(number)
                ),
                allowed,
            )
            if allowed:  # checked again: the attempt may have started since
                self._apply_report(number, self.model.attempts[number - 1], first, event_names, step)

        act()
        self.last_call = act

    def _apply_report(self, number: int, attempt: ModelAttempt, first: int, event_names: list[str], step: int) -> None:
        new = range(max(first, attempt.next_seq), first + len(event_names))
        self.model.events += [(number, seq) for seq in new]
        attempt.next_seq = max(attempt.next_seq, first + len(event_names)) if event_names else attempt.next_seq
        if "training" in event_names and self.model.status == "preparing":
            self.model.status = "training"
        if "save" in event_names:
            attempt.saved_step = max(attempt.saved_step or 0, step)

    @rule(
        number=st.integers(0, 4),
        outcome=st.sampled_from(["completed", "failed", "cancelled", "paused", "yielded"]),
        saved=st.none() | st.integers(1, 30),
    )
    def finish_any(self, number: int, outcome: str, saved: int | None) -> None:
        self._finish(number, outcome, saved)

    @rule(outcome=st.sampled_from(["completed", "failed", "paused", "yielded", "yielded"]), saved=st.none() | st.integers(1, 30))
    def finish(self, outcome: str, saved: int | None) -> None:
        self._finish(len(self.model.attempts), outcome, saved)

    def _finish(self, number: int, outcome: str, saved: int | None) -> None:
        body = {
            "job_id": self.job_id,
            "attempt": number,
            "outcome": outcome,
            "last_checkpoint_step": saved,
            "started_at": START,
            "finished_at": START,
        }

        def act() -> None:
            is_owned = 1 <= number <= len(self.model.attempts) and self.model.attempts[number - 1].owner is not None
            is_over = is_owned and self.model.attempts[number - 1].outcome is not None
            result = Result.model_validate(body | {"claimant": self._find_owner(number)})
            self._expect(
                lambda: self.service.attempts.finish(attempt_principal(self.job_id, number), result),
                is_over or (is_owned and self.model.is_active(number)),
            )
            if is_owned and not is_over:
                attempt = self.model.attempts[-1]
                attempt.saved_step = max(attempt.saved_step or 0, saved) if saved else attempt.saved_step
                self.model.end(outcome)

        act()
        self.last_call = act

    def _find_owner(self, number: int) -> str:
        """The process that claimed the attempt; another one if nobody has."""
        is_known = 1 <= number <= len(self.model.attempts)
        return (self.model.attempts[number - 1].owner if is_known else None) or "nobody"

    @rule()
    def repeat_last_call(self) -> None:
        """The last report or result arrives a second time."""
        self.last_call()

    # --- users

    @rule()
    def cancel(self) -> None:
        allowed = self.model.status in UNFINISHED or self.model.status == "cancelled"
        self._expect(lambda: self.service.control.cancel(PRINCIPAL, self.job_id), allowed)
        if allowed and self.model.status in ("queued", "paused"):
            self.model.status = "cancelled"
        elif allowed and self.model.status != "cancelled":
            self.model.status = "cancelling"

    @rule()
    def pause(self) -> None:
        allowed = self.model.status in ("queued", "preparing", "training", "pausing", "paused")
        self._expect(lambda: self.service.control.pause(PRINCIPAL, self.job_id), allowed)
        if allowed:
            self.model.status = "paused" if self.model.status in ("queued", "paused") else "pausing"

    @rule()
    def resume(self) -> None:
        allowed = self.model.status in ("paused", "queued", "preparing", "training")
        self._expect(lambda: self.service.control.resume(PRINCIPAL, self.job_id, ResumeRequest.model_validate({})), allowed)
        if self.model.status == "paused":
            self.model.status, self.model.attempts_without_progress, self.model.lost_attempts = "queued", 0, 0

    @rule(from_start=st.booleans())
    def retry(self, from_start: bool) -> None:
        ended = self.model.status in ("failed", "cancelled")
        allowed = ended or (self.model.retried and self.model.status != "completed")
        self._expect(
            lambda: self.service.control.retry(PRINCIPAL, self.job_id, RetryRequest.model_validate({"from_start": from_start})), allowed
        )
        if ended:
            self.model.status, self.model.attempts_without_progress, self.model.lost_attempts, self.model.retried = "queued", 0, 0, True
            self.model.best_step = 0 if from_start else self.model.best_step

    # --- invariants

    @invariant()
    def the_record_matches_the_model(self) -> None:
        job = self.job()
        assert job.status == self.model.status
        assert [attempt.outcome for attempt in job.attempts] == [attempt.outcome for attempt in self.model.attempts]
        assert [attempt.claimed_by for attempt in job.attempts] == [attempt.owner for attempt in self.model.attempts]
        assert [attempt.last_checkpoint_step for attempt in job.attempts] == [attempt.saved_step for attempt in self.model.attempts]

    @invariant()
    def the_events_match_the_model(self) -> None:
        stored = self.store.list_events(self.job_id, 0, 1000)
        assert [(event.attempt, event.seq) for event in stored if event.attempt > 0] == self.model.events

    @invariant()
    def every_attempt_was_launched_once(self) -> None:
        assert self.launcher.launched.get(self.job_id, []) == list(range(1, len(self.model.attempts) + 1))

    def _expect(self, action: Callable[[], object], is_allowed: bool) -> None:
        try:
            action()
        except (Conflict, Fenced):
            assert not is_allowed, "the service rejected an allowed call"
            return
        assert is_allowed, "the service accepted a call that it had to reject"


def make_event(name: str, step: int) -> Event:
    """An event of an attempt."""
    match name:
        case "training":
            return PhaseChanged(phase="training")
        case "save":
            return CheckpointSaved(step=step, epoch=1.0, reason="interval", size_bytes=1, save_s=0.0, upload_s=0.0)
        case _:
            return DecisionMade(setting="x", value="y", reason="z")


def run(size: Size) -> Row:
    """Run the sequences on both stores."""
    on_sqlite, on_firestore = SEQUENCES[size]
    differences: dict[str, str] = {}
    with without_warnings(), in_memory_folder("chaos-reports-") as folder:
        for name, sequences, open_job_store in (
            ("SQLite", on_sqlite, open_sqlite_store),
            ("Firestore", on_firestore, open_firestore_store),
        ):
            with open_job_store(folder) as store:
                differences[name] = _run_sequences(store, folder / name, sequences)
    return Row(
        fault="duplicate, late and reordered reports",
        injected=f"{on_sqlite:,} random sequences of {STEPS_PER_SEQUENCE} steps on SQLite, {on_firestore:,} on the Firestore emulator",
        expected="terminal states immutable, model equals store",
        observed="; ".join(f"{name}: {difference or 'model equals store'}" for name, difference in differences.items()),
        passed=not any(differences.values()),
    )


def _run_sequences(store: JobStore, folder: Path, sequences: int) -> str:
    """Describe the first difference; empty when there is none."""
    store.create_dataset(make_dataset())
    clock, launcher, suffixes = FakeClock(), FakeLauncher(), count(1)
    objects = open_store((folder / "objects").as_uri())
    tokens = TokenSigner(b"k" * 32, clock)
    service = build_job_services(
        store=store,
        secrets=LocalSecretStore(folder / "secrets"),
        buckets=Buckets(configs=objects, datasets=objects, models=objects),
        launchers=LauncherPool([launcher]),
        url_signer=ServiceUrlSigner(tokens),
        deployment_id="reports",
        tokens=tokens,
        clock=clock,
        random_suffix=lambda: f"{next(suffixes):06x}",
    )
    options = settings(
        max_examples=sequences,
        stateful_step_count=STEPS_PER_SEQUENCE,
        deadline=None,
        database=None,
        phases=[Phase.generate],  # the first failing sequence is enough; the message contains it
        suppress_health_check=tuple(HealthCheck),  # pyright: ignore[reportArgumentType]  # an enum is iterable
    )
    try:
        # Any: Hypothesis accepts any callable that makes a machine, but is typed to take a class.
        make: Any = lambda: JobStateMachine(service, store, launcher)  # noqa: E731
        run_state_machine_as_test(make, settings=options)
    except (AssertionError, ExceptionGroup) as error:
        return f"differs: {error} {_failing_sequence(error)}"
    return ""


def _failing_sequence(error: Exception) -> str:
    """The sequence that failed, from Hypothesis' notes on the error."""
    notes = [line for note in getattr(error, "__notes__", ()) for line in note.splitlines()]
    steps = [line.strip() for line in notes if line.strip().startswith("state.")]
    return "; ".join(line for line in steps if not line.startswith(INVARIANTS))[-MAX_MESSAGE_CHARS:]


@contextmanager
def open_sqlite_store(folder: Path) -> Iterator[JobStore]:
    """A database file in memory."""
    store = SqliteJobStore(folder / "tunesmith.db")
    try:
        yield store
    finally:
        store.close()


@contextmanager
def open_firestore_store(_folder: Path) -> Iterator[JobStore]:
    """The emulator through Google's client."""
    from service.adapters.jobstores.firestore.store import FirestoreJobStore

    with run_firestore_emulator() as host:
        os.environ["FIRESTORE_EMULATOR_HOST"] = host
        store = FirestoreJobStore(project_id="chaos-reports", database="(default)")
        try:
            yield store
        finally:
            store.close()
            del os.environ["FIRESTORE_EMULATOR_HOST"]

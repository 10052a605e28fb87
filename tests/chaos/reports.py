"""Claims, reports, last words and wishes in any order, twice and too late, against a model that knows nothing of the service's code.

Hypothesis makes the sequences. After every deed the record, the attempts and the stored events must be what the model says; where the
model says that a deed is refused, the service must refuse it. `completed` is the end; out of `failed` and `cancelled` leads a retry alone.
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

from infra.loopback.firestore import firestore_emulator
from schema.events import CheckpointSaved, Decided, Event, EventBatch, PhaseChanged, ReportedEvent
from schema.job import Job
from schema.requests import ResumeRequest, RetryRequest
from schema.result import Result
from service.adapters.jobstores.sqlite import SqliteJobStore
from service.adapters.links import ServiceLinks
from service.adapters.secrets.local import LocalSecretStore
from service.core.errors import Conflict, Fenced
from service.core.jobs import Jobs
from service.core.ports import AttemptState, Hardware, JobStore, LaunchOrder
from service.core.tokens import TokenSigner
from storage import open_store
from tests.chaos.campaign import Row, Size
from tests.chaos.core_world import quick_folder, without_warnings
from tests.factories import START, FakeClock, a_dataset, a_request, some_hardware

SEQUENCES: dict[Size, tuple[int, int]] = {"full": (10_000, 300), "short": (150, 15)}  # on SQLite, on Firestore
DEEDS = 15  # in a sequence
LONGEST_STORY = 1500  # characters; its end says most
INVARIANTS = ("state.the_", "state.every_", "state.teardown")
TENANT = "local"
# What the service promises in its documentation, said once more: how often a job is tried in vain.
IN_VAIN, LOST_IN_VAIN = 5, 3
UNFINISHED = ("queued", "preparing", "training", "pausing", "paused", "cancelling")
AT_WORK = ("preparing", "training", "pausing", "cancelling")


class Machines:
    """A compute that takes everything, and whose executions end when a sequence says so."""

    name = "fake"
    check_is_cheap = True
    profiles: tuple[str, ...] = ("fake",)

    def __init__(self) -> None:
        self.gone: set[str] = set()
        self.launched: dict[str, list[int]] = {}  # job → its attempts, in the order in which they were launched

    def launch(self, order: LaunchOrder) -> str:
        self.launched.setdefault(order.job_id, []).append(order.attempt)
        return order.name

    def find(self, name: str) -> str | None:
        job_id, _, number = name.rpartition(".")
        return name if int(number) in self.launched.get(job_id, []) else None

    def check(self, handle: str) -> AttemptState:
        return "ended" if handle in self.gone else "running"

    def cancel(self, handle: str, *, force: bool) -> None:
        """Nobody listens."""

    def free_slots(self, active: int) -> int:
        return 1000

    def hardware(self, profile: str | None = None) -> Hardware:
        return some_hardware()

    def close(self) -> None:
        """There is nothing."""


@dataclass
class KnownAttempt:
    """An attempt, as the model knows it."""

    best_before: int  # the furthest checkpoint when it began
    owner: str | None = None
    next_seq: int = 0
    saved: int | None = None
    outcome: str | None = None


@dataclass
class Known:
    """The job, as the model knows it."""

    status: str = "queued"
    attempts: list[KnownAttempt] = field(default_factory=list[KnownAttempt])
    events: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    best: int = 0  # the furthest checkpoint that counts
    in_vain: int = 0
    lost_in_vain: int = 0
    retried: bool = False

    def is_at_work(self, number: int) -> bool:
        """Whether that is the attempt which may speak."""
        return number == len(self.attempts) and self.status in AT_WORK and self.attempts[-1].outcome is None

    def end(self, outcome: str) -> None:
        """The attempt at work has ended so."""
        attempt = self.attempts[-1]
        if outcome == "cancelled" and self.status != "cancelling":
            outcome = "preempted"
        if outcome == "paused" and self.status not in ("pausing", "cancelling"):
            outcome = "yielded"
        attempt.outcome = outcome
        early = outcome in ("yielded", "preempted", "lost")
        if early and (attempt.saved or 0) > attempt.best_before:
            self.in_vain = self.lost_in_vain = 0
        elif early:
            self.in_vain += 1
            self.lost_in_vain += outcome == "lost"
        self.best = max(self.best, attempt.saved or 0)
        self.status = self._after(outcome, early=early)

    def _after(self, outcome: str, *, early: bool) -> str:
        if outcome == "completed":
            return "completed"
        if self.status == "cancelling":
            return "cancelled"
        if self.status == "pausing" and (early or outcome == "paused"):
            return "paused"
        if early and self.in_vain < IN_VAIN and self.lost_in_vain < LOST_IN_VAIN:
            return "queued"
        return "failed"


class Reports(RuleBasedStateMachine):
    """One job in the store that `service` has, and its model."""

    def __init__(self, service: Jobs, store: JobStore, machines: Machines) -> None:
        super().__init__()
        self.service, self.store, self.machines = service, store, machines
        self.known = Known()
        self.job_id = service.submit(a_request(), TENANT).job_id
        self.last: Callable[[], None] = lambda: None

    @initialize(far=st.sampled_from(["queued", "preparing", "training", "training", "training"]))
    def begin(self, far: str) -> None:
        """Most sequences begin in the middle of a training: that is where the most can happen."""
        if far != "queued":
            self.look()
        if far == "training":
            self.claim(1, "a")
            self._report(1, 0, ["training", "save"], 3)

    def teardown(self) -> None:
        """The next sequence is to find no work of this one."""
        with suppress(Conflict):
            self.service.cancel(self.job_id, TENANT)
        if self.job().status not in ("completed", "failed", "cancelled"):
            self.machines.gone.add(f"{self.job_id}.{len(self.known.attempts)}")
            self.service.reconcile()

    def job(self) -> Job:
        """The record."""
        found = self.store.find_job(self.job_id)
        assert found is not None
        return found

    # --- the compute

    @rule()
    def look(self) -> None:
        """The reconciler comes by."""
        self.service.reconcile()
        self._looked()

    @rule()
    def vanish(self) -> None:
        """The process at work is gone, and the reconciler comes by."""
        if self.known.attempts and self.known.attempts[-1].outcome is None:
            self.machines.gone.add(f"{self.job_id}.{len(self.known.attempts)}")
            self.service.reconcile()
            self.known.end("lost")
            self._looked()

    def _looked(self) -> None:
        if self.known.status == "queued":
            self.known.status = "preparing"
            self.known.attempts.append(KnownAttempt(self.known.best))

    # --- attempts

    @rule(number=st.integers(0, 4), who=st.sampled_from("ab"))
    def claim(self, number: int, who: str) -> None:
        may = self.known.is_at_work(number) and self.known.attempts[-1].owner in (None, who)
        self._try(lambda: self.service.claim(self.job_id, number, who), may)
        if may:
            self.known.attempts[-1].owner = who

    @rule(back=st.integers(0, 3), told=st.lists(st.sampled_from(["training", "save", "decide"]), max_size=3), step=st.integers(1, 30))
    def report(self, back: int, told: list[str], step: int) -> None:
        """The attempt at work, or the last one that was."""
        self._report(len(self.known.attempts), -back, told, step)

    @rule(number=st.integers(0, 4), shift=st.integers(-3, 3), told=st.lists(st.sampled_from(["training", "save"]), max_size=2))
    def report_of_any(self, number: int, shift: int, told: list[str]) -> None:
        """Any attempt, again what it said, or with a gap."""
        self._report(number, shift, told, 3)

    def _report(self, number: int, shift: int, told: list[str], step: int) -> None:
        is_known = 1 <= number <= len(self.known.attempts)
        first = max(0, (self.known.attempts[number - 1].next_seq if is_known else 0) + shift)
        events: list[Event] = [an_event(what, step) for what in told]
        batch = EventBatch(first_seq=first, events=[ReportedEvent(at=START, event=event) for event in events])

        def act() -> None:
            may = self.known.is_at_work(number)
            self._try(lambda: self.service.report(self.job_id, number, batch), may)
            if may:  # asked anew: the attempt may have begun since
                self._heard(number, self.known.attempts[number - 1], first, told, step)

        act()
        self.last = act

    def _heard(self, number: int, attempt: KnownAttempt, first: int, told: list[str], step: int) -> None:
        new = range(max(first, attempt.next_seq), first + len(told))
        self.known.events += [(number, seq) for seq in new]
        attempt.next_seq = max(attempt.next_seq, first + len(told)) if told else attempt.next_seq
        if "training" in told and self.known.status == "preparing":
            self.known.status = "training"
        if "save" in told:
            attempt.saved = max(attempt.saved or 0, step)

    @rule(
        number=st.integers(0, 4),
        outcome=st.sampled_from(["completed", "failed", "cancelled", "paused", "yielded"]),
        saved=st.none() | st.integers(1, 30),
    )
    def finish_any(self, number: int, outcome: str, saved: int | None) -> None:
        self._finish(number, outcome, saved)

    @rule(outcome=st.sampled_from(["completed", "failed", "paused", "yielded", "yielded"]), saved=st.none() | st.integers(1, 30))
    def finish(self, outcome: str, saved: int | None) -> None:
        self._finish(len(self.known.attempts), outcome, saved)

    def _finish(self, number: int, outcome: str, saved: int | None) -> None:
        body = {
            "job_id": self.job_id,
            "attempt": number,
            "outcome": outcome,
            "saved_step": saved,
            "started_at": START,
            "finished_at": START,
        }
        result = Result.model_validate(body)

        def act() -> None:
            is_known = 1 <= number <= len(self.known.attempts)
            is_over = is_known and self.known.attempts[number - 1].outcome is not None
            self._try(lambda: self.service.finish(self.job_id, result), is_over or self.known.is_at_work(number))
            if is_known and not is_over:
                attempt = self.known.attempts[-1]
                attempt.saved = max(attempt.saved or 0, saved) if saved else attempt.saved
                self.known.end(outcome)

        act()
        self.last = act

    @rule()
    def once_more(self) -> None:
        """The last report or last word arrives a second time."""
        self.last()

    # --- people

    @rule()
    def cancel(self) -> None:
        may = self.known.status in UNFINISHED or self.known.status == "cancelled"
        self._try(lambda: self.service.cancel(self.job_id, TENANT), may)
        if may and self.known.status in ("queued", "paused"):
            self.known.status = "cancelled"
        elif may and self.known.status != "cancelled":
            self.known.status = "cancelling"

    @rule()
    def pause(self) -> None:
        may = self.known.status in ("queued", "preparing", "training", "pausing", "paused")
        self._try(lambda: self.service.pause(self.job_id, TENANT), may)
        if may:
            self.known.status = "paused" if self.known.status in ("queued", "paused") else "pausing"

    @rule()
    def resume(self) -> None:
        may = self.known.status in ("paused", "queued", "preparing", "training")
        self._try(lambda: self.service.resume(self.job_id, TENANT, ResumeRequest.model_validate({})), may)
        if self.known.status == "paused":
            self.known.status, self.known.in_vain, self.known.lost_in_vain = "queued", 0, 0

    @rule(from_start=st.booleans())
    def retry(self, from_start: bool) -> None:
        ended = self.known.status in ("failed", "cancelled")
        may = ended or (self.known.retried and self.known.status != "completed")
        self._try(lambda: self.service.retry(self.job_id, TENANT, RetryRequest.model_validate({"from_start": from_start})), may)
        if ended:
            self.known.status, self.known.in_vain, self.known.lost_in_vain, self.known.retried = "queued", 0, 0, True
            self.known.best = 0 if from_start else self.known.best

    # --- what must be so

    @invariant()
    def the_record_is_the_model(self) -> None:
        job = self.job()
        assert job.status == self.known.status
        assert [attempt.outcome for attempt in job.attempts] == [attempt.outcome for attempt in self.known.attempts]
        assert [attempt.claimed_by for attempt in job.attempts] == [attempt.owner for attempt in self.known.attempts]
        assert [attempt.saved_step for attempt in job.attempts] == [attempt.saved for attempt in self.known.attempts]

    @invariant()
    def the_events_are_the_model_s(self) -> None:
        stored = self.store.page_events(self.job_id, 0, 1000)
        assert [(event.attempt, event.seq) for event in stored if event.attempt > 0] == self.known.events

    @invariant()
    def every_attempt_was_launched_once(self) -> None:
        assert self.machines.launched.get(self.job_id, []) == list(range(1, len(self.known.attempts) + 1))

    def _try(self, act: Callable[[], object], may: bool) -> None:
        try:
            act()
        except (Conflict, Fenced):
            assert not may, "what had to be accepted was refused"
            return
        assert may, "what had to be refused was accepted"


def an_event(what: str, step: int) -> Event:
    """What an attempt tells."""
    match what:
        case "training":
            return PhaseChanged(phase="training")
        case "save":
            return CheckpointSaved(step=step, epoch=1.0, reason="interval", size_bytes=1, save_s=0.0, upload_s=0.0)
        case _:
            return Decided(what="x", value="y", why="z")


def run(size: Size) -> Row:
    """Both stores."""
    on_sqlite, on_firestore = SEQUENCES[size]
    found: dict[str, str] = {}
    with without_warnings(), quick_folder("chaos-reports-") as folder:
        for name, sequences, opened in (("SQLite", on_sqlite, sqlite), ("Firestore", on_firestore, firestore)):
            with opened(folder) as store:
                found[name] = _play(store, folder / name, sequences)
    return Row(
        fault="duplicate, late and reordered reports",
        injected=f"{on_sqlite:,} random sequences of {DEEDS} deeds on SQLite, {on_firestore:,} on the Firestore emulator",
        wanted="terminal states immutable, model equals store",
        found="; ".join(f"{name}: {told or 'model equals store'}" for name, told in found.items()),
        passed=not any(found.values()),
    )


def _play(store: JobStore, folder: Path, sequences: int) -> str:
    """What was found wrong; nothing when all is well."""
    store.create_dataset(a_dataset())
    clock, machines, tails = FakeClock(), Machines(), count(1)
    objects = open_store((folder / "objects").as_uri())
    tokens = TokenSigner(b"k" * 32, clock)
    service = Jobs(
        store=store,
        secrets=LocalSecretStore(folder / "secrets"),
        configs=objects,
        models=objects,
        datasets=objects,
        launcher=machines,
        links=ServiceLinks(tokens),
        tokens=tokens,
        clock=clock,
        random_tail=lambda: f"{next(tails):06x}",
    )
    how = settings(
        max_examples=sequences,
        stateful_step_count=DEEDS,
        deadline=None,
        database=None,
        phases=[Phase.generate],  # the first that is found is enough: what it was is in the message
        suppress_health_check=tuple(HealthCheck),  # pyright: ignore[reportArgumentType]  # an enum, whatever its metaclass says
    )
    try:
        # Any: Hypothesis takes whatever makes a machine, and says that it takes a class.
        make: Any = lambda: Reports(service, store, machines)  # noqa: E731
        run_state_machine_as_test(make, settings=how)
    except (AssertionError, ExceptionGroup) as error:
        return f"differs: {error} {_deeds(error)}"
    return ""


def _deeds(error: Exception) -> str:
    """The sequence that found it, as Hypothesis notes it beside the error."""
    notes = [line for note in getattr(error, "__notes__", ()) for line in note.splitlines()]
    told = [line.strip() for line in notes if line.strip().startswith("state.")]
    return "; ".join(line for line in told if not line.startswith(INVARIANTS))[-LONGEST_STORY:]


@contextmanager
def sqlite(folder: Path) -> Iterator[JobStore]:
    """A file in memory."""
    store = SqliteJobStore(folder / "tunesmith.db")
    try:
        yield store
    finally:
        store.close()


@contextmanager
def firestore(_folder: Path) -> Iterator[JobStore]:
    """The emulator, asked through Google's own client."""
    from service.adapters.jobstores.firestore import FirestoreJobStore

    with firestore_emulator() as host:
        os.environ["FIRESTORE_EMULATOR_HOST"] = host
        store = FirestoreJobStore(project_id="chaos-reports", database="(default)")
        try:
            yield store
        finally:
            store.close()
            del os.environ["FIRESTORE_EMULATOR_HOST"]

"""The service is killed (−9) again and again while clients submit jobs and attempts of earlier ones run.

Eight clients send each request under an Idempotency-Key of its own and repeat it until they are answered, as every client of ours
does. What they were told is held against what the service knows when it is left alone at last, and against the ledger in which
every attempt's process notes itself.
"""

import random
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx2

from infra.loopback.firestore import firestore_emulator
from tests.chaos.campaign import Broken, Row, Size
from tests.chaos.ledger import Ledger, read_ledger
from tests.chaos.service import Service, a_train_request, light_trainer, service, until, what_is_corrupt

STORES = ("SQLite", "Firestore")
CLIENTS = 8
SLOTS = 8
REAL_ONE_IN = 10  # attempts that are the real `jobs.run`, which takes 0.4 s of a processor; the others take 0.05
SUBMISSIONS: dict[Size, tuple[int, int]] = {"full": (1000, 200), "short": (40, 6)}  # and kills
LIFE_MOST_S = 20.0  # to take its share of the submissions; a machine that is busy needs a few seconds
SETTLE_MOST_S = {"full": 180.0, "short": 60.0}
RETRY_S = 0.1


def run(size: Size) -> Row:
    """Both stores side by side: a service that starts keeps one processor busy."""
    submissions, kills = SUBMISSIONS[size]
    with ThreadPoolExecutor(len(STORES)) as pool:
        found = dict(zip(STORES, pool.map(lambda name: _campaign(name, size), STORES), strict=True))
    return Row(
        fault="service killed (−9)",
        injected=f"{kills} kills during {submissions:,} submissions by {CLIENTS} clients, on each store",
        wanted="0 acknowledged jobs lost, 0 launched twice, 0 stuck",
        found="; ".join(f"{name}: {outcome}" for name, outcome in found.items()),
        passed=all(outcome.good for outcome in found.values()),
    )


@dataclass(frozen=True)
class Outcome:
    """What was counted."""

    kills: int
    kills_under_way: int  # before the last submission was answered
    tries: int
    acknowledged: int
    lost: int  # told to a client, and not there
    doubled: int  # jobs beyond one for each key
    twice: int  # jobs with a second attempt, or with two processes that were given the claim
    refused: int  # second processes of an attempt that were not given it
    stuck: int
    failed: int
    corrupt: str  # what SQLite finds wrong with its file

    @property
    def good(self) -> bool:
        nothing_bad = (self.lost, self.doubled, self.twice, self.stuck, self.failed) == (0, 0, 0, 0, 0)
        return nothing_bad and not self.corrupt and self.kills == self.kills_under_way

    def __str__(self) -> str:
        jobs = f"{self.lost} lost, {self.doubled} doubled, {self.twice} launched twice, {self.stuck} stuck, {self.failed} failed"
        file = f", file CORRUPT: {self.corrupt}" if self.corrupt else ""
        how = f"{self.kills_under_way} of {self.kills} kills under way, {self.tries:,} tries, {self.refused} second starts refused"
        return f"{jobs}{file} ({how})"


@dataclass
class Submissions:
    """What the clients have to do, and what they were told. The killer lets them have a few at a time."""

    total: int
    answered: dict[str, str] = field(default_factory=dict[str, str])  # key → job id
    differing: int = 0  # keys that were answered with two jobs
    tries: int = 0
    allowed: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    over: threading.Event = field(default_factory=threading.Event)
    refusals: list[str] = field(default_factory=list[str])
    _next: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self) -> str | None:
        """The key of the next one; None when there are no more, or nobody wants them any more."""
        self.allowed.acquire()
        with self._lock:
            if self._next >= self.total or self.over.is_set():
                return None
            self._next += 1
            return f"key-{self._next}"

    def tried(self) -> None:
        with self._lock:
            self.tries += 1

    def note(self, key: str, job_id: str) -> None:
        with self._lock:
            if self.answered.setdefault(key, job_id) != job_id:
                self.differing += 1

    @property
    def done(self) -> bool:
        return len(self.answered) == self.total


def _campaign(store: str, size: Size) -> Outcome:
    total, kills = SUBMISSIONS[size]
    with tempfile.TemporaryDirectory(prefix="chaos-kills-") as folder, _store(store) as variables:
        trainer = light_trainer(Path(folder, "trainer"), real_one_in=REAL_ONE_IN)
        variables |= {"TUNESMITH_TRAINER_PYTHON": str(trainer), "TUNESMITH_MAX_CONCURRENT_JOBS": str(SLOTS)}
        with service(Path(folder, "home"), **variables) as running:
            submissions = Submissions(total)
            with _clients(running, submissions, running.upload()):
                under_way = _kill_and_start(running, submissions, kills)
                until(lambda: submissions.done, LIFE_MOST_S * 3, "the last answer")
            if submissions.refusals:
                raise Broken(f"a submission was refused: {submissions.refusals[0]}")
            _repeat_all(running, submissions)
            stuck = _wait_for_the_end(running, SETTLE_MOST_S[size])
            ledger = read_ledger(Path(folder, "trainer", "ledger"))
            return _count(running, submissions, ledger, kills, under_way, stuck)


@contextmanager
def _store(name: str) -> Iterator[dict[str, str]]:
    """The settings of a service on that store."""
    if name == "SQLite":
        yield {"TUNESMITH_JOB_STORE": "sqlite"}
        return
    with firestore_emulator() as host:
        yield {"TUNESMITH_JOB_STORE": "firestore", "FIRESTORE_EMULATOR_HOST": host, "PROJECT_ID": "chaos"}


def _kill_and_start(running: Service, submissions: Submissions, kills: int) -> int:
    """Kill at any moment: while it starts, while it writes, between two answers. Returns how often submissions were under way."""
    chance = random.Random(4)
    released = under_way = 0
    for kill in range(kills):
        lives_left = kills - kill
        share = chance.randint(1, max(1, 2 * (submissions.total - released) // lives_left - 1))
        share = min(share, submissions.total - released - lives_left)  # every later life has one to be killed over
        submissions.allowed.release(share)
        released += share
        _live(submissions, released - chance.randint(0, share), chance)
        under_way += not submissions.done
        running.kill()
        running.start()
    submissions.allowed.release(submissions.total + CLIENTS)
    return under_way


def _live(submissions: Submissions, answered: int, chance: random.Random) -> None:
    """Returns at some moment after so many answers."""
    until(lambda: len(submissions.answered) >= answered, LIFE_MOST_S, f"{answered} answers", every_s=0.001)
    time.sleep(chance.choice((0.0, chance.uniform(0, 0.02), chance.uniform(0, 0.2))))


@contextmanager
def _clients(running: Service, submissions: Submissions, dataset_id: str) -> Iterator[None]:
    threads = [threading.Thread(target=_client, args=(running.url, submissions, dataset_id), daemon=True) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        submissions.over.set()
        submissions.allowed.release(submissions.total + CLIENTS)
        for thread in threads:
            thread.join(30)


def _client(url: str, submissions: Submissions, dataset_id: str) -> None:
    with httpx2.Client(base_url=url, timeout=10) as http:
        while (key := submissions.take()) is not None:
            while not submissions.over.is_set() and not _submitted(http, submissions, dataset_id, key):
                time.sleep(RETRY_S)


def _submitted(http: httpx2.Client, submissions: Submissions, dataset_id: str, key: str) -> bool:
    """Whether there was an answer; without one the same request is sent again."""
    submissions.tried()
    try:
        answer = http.post("/train", json=a_train_request(dataset_id, job_name=key), headers={"Idempotency-Key": key})
    except httpx2.TransportError:
        return False
    if answer.status_code == 201:
        submissions.note(key, answer.json()["job_id"])
    elif answer.status_code < 500:
        submissions.refusals.append(answer.text)
    return answer.status_code == 201


def _repeat_all(running: Service, submissions: Submissions) -> None:
    """Every request once more, as from a client whose answer was lost: the same job must come back."""
    dataset_id = running.ask("GET", "/datasets").json()["datasets"][0]["processed_dataset_id"]
    with httpx2.Client(base_url=running.url, timeout=30) as http:
        for key in list(submissions.answered):
            _submitted(http, submissions, dataset_id, key)


def _wait_for_the_end(running: Service, within_s: float) -> int:
    """How many jobs are not final after that."""
    deadline = time.monotonic() + within_s
    while (open_jobs := sum(job["status"] not in ("completed", "failed", "cancelled") for job in running.jobs())) > 0:
        if time.monotonic() > deadline:
            break
        time.sleep(0.5)
    return open_jobs


def _count(running: Service, submissions: Submissions, ledger: Ledger, kills: int, under_way: int, stuck: int) -> Outcome:
    known = {job["job_id"]: job["status"] for job in running.jobs()}
    told = set(submissions.answered.values())
    jobs_of_owners = [name.rpartition(".")[0] for name in ledger.owned.elements()]
    return Outcome(
        kills=kills,
        kills_under_way=under_way,
        tries=submissions.tries,
        acknowledged=len(submissions.answered),
        lost=len(told - known.keys()),
        doubled=len(known) - len(told) + submissions.differing,
        twice=len(jobs_of_owners) - len(set(jobs_of_owners)),
        refused=ledger.started.total() - ledger.owned.total(),
        stuck=stuck,
        failed=sum(status in ("failed", "cancelled") for status in known.values()),
        corrupt=what_is_corrupt(running.home / "tunesmith.db") if "sqlite" in running.variables.values() else "",
    )

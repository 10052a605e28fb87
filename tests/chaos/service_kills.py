"""The service is killed (−9) repeatedly while clients submit jobs and attempts of earlier jobs run.

Clients send each request with its own Idempotency-Key and repeat it until they get an answer, as Tunesmith's client does. The jobs they got
are compared with the service's records once it runs undisturbed, and with the log in which every attempt's process records itself.
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

from infra.loopback.firestore import run_firestore_emulator
from tests.chaos.attempt_log import AttemptLog, read_attempt_log
from tests.chaos.campaign import CampaignError, Row, Size
from tests.chaos.service import Service, find_corruption, make_light_trainer, make_train_request, service
from tests.waiting import wait_until

STORES = ("SQLite", "Firestore")
CLIENTS = 8
SLOTS = 8
REAL_ONE_IN = 10  # attempts that are the real `jobs.run`, which takes 0.4 s of CPU time; the others take 0.05 s
SUBMISSIONS: dict[Size, tuple[int, int]] = {"full": (1000, 200), "short": (40, 6)}  # and kills
MAX_LIFETIME_S = 20.0  # for the submissions released during it; a busy machine needs a few seconds
MAX_SETTLE_S = {"full": 180.0, "short": 60.0}
RETRY_S = 0.1


def run(size: Size) -> Row:
    """Run both stores side by side: a starting service uses one core."""
    submissions, kills = SUBMISSIONS[size]
    with ThreadPoolExecutor(len(STORES)) as pool:
        outcomes = dict(zip(STORES, pool.map(lambda name: _run_campaign(name, size), STORES), strict=True))
    return Row(
        fault="service killed (−9)",
        injected=f"{kills} kills during {submissions:,} submissions by {CLIENTS} clients, on each store",
        expected="0 acknowledged jobs lost, 0 launched twice, 0 stuck",
        observed="; ".join(f"{name}: {outcome}" for name, outcome in outcomes.items()),
        passed=all(outcome.passed for outcome in outcomes.values()),
    )


@dataclass(frozen=True)
class Outcome:
    """What was counted."""

    kills: int
    kills_during_submissions: int  # before the last submission was answered
    tries: int
    acknowledged: int
    lost: int  # acknowledged to a client and missing
    duplicate_jobs: int  # jobs beyond one for each key
    launched_twice: int  # jobs with a second attempt, or with two processes that got the claim
    refused_claims: int  # second processes of an attempt that did not get the claim
    stuck: int
    failed: int
    corrupt: str  # the errors that SQLite finds in its file

    @property
    def passed(self) -> bool:
        no_damage = (self.lost, self.duplicate_jobs, self.launched_twice, self.stuck, self.failed) == (0, 0, 0, 0, 0)
        return no_damage and not self.corrupt and self.kills == self.kills_during_submissions

    def __str__(self) -> str:
        jobs = (
            f"{self.lost} lost, {self.duplicate_jobs} doubled, {self.launched_twice} launched twice, "
            f"{self.stuck} stuck, {self.failed} failed"
        )
        file = f", file CORRUPT: {self.corrupt}" if self.corrupt else ""
        counts = f"{self.kills_during_submissions} of {self.kills} kills, {self.tries:,} tries, {self.refused_claims} second starts refused"
        return f"{jobs}{file} ({counts})"


@dataclass
class Submissions:
    """The requests of the clients and their answers. The killer releases a few at a time."""

    total: int
    answered: dict[str, str] = field(default_factory=dict[str, str])  # key → job id
    conflicting_answers: int = 0  # keys that were answered with two jobs
    tries: int = 0
    permits: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    stopped: threading.Event = field(default_factory=threading.Event)
    rejections: list[str] = field(default_factory=list[str])
    _next: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def next_key(self) -> str | None:
        """The key of the next request; None when there are no more or the campaign stopped."""
        self.permits.acquire()
        with self._lock:
            if self._next >= self.total or self.stopped.is_set():
                return None
            self._next += 1
            return f"key-{self._next}"

    def count_try(self) -> None:
        with self._lock:
            self.tries += 1

    def record_answer(self, key: str, job_id: str) -> None:
        with self._lock:
            if self.answered.setdefault(key, job_id) != job_id:
                self.conflicting_answers += 1

    @property
    def all_answered(self) -> bool:
        return len(self.answered) == self.total


def _run_campaign(store: str, size: Size) -> Outcome:
    total, kills = SUBMISSIONS[size]
    with tempfile.TemporaryDirectory(prefix="chaos-kills-") as folder, _open_store(store) as variables:
        trainer = make_light_trainer(Path(folder, "trainer"), real_one_in=REAL_ONE_IN)
        variables |= trainer | {"TUNESMITH_LOCAL_MAX_CONCURRENT_JOBS": str(SLOTS)}
        with service(Path(folder, "home"), **variables) as running:
            submissions = Submissions(total)
            with _run_clients(running, submissions, running.upload()):
                kills_during_submissions = _kill_and_start(running, submissions, kills)
                wait_until(lambda: submissions.all_answered, MAX_LIFETIME_S * 3, description="the last answer")
            if submissions.rejections:
                raise CampaignError(f"a submission was rejected: {submissions.rejections[0]}")
            _repeat_all(running, submissions)
            stuck = _wait_until_final(running, MAX_SETTLE_S[size])
            attempt_log = read_attempt_log(Path(folder, "trainer", "attempt.log"))
            return _collect_outcome(running, submissions, attempt_log, kills, kills_during_submissions, stuck)


@contextmanager
def _open_store(name: str) -> Iterator[dict[str, str]]:
    """The settings of a service on that store."""
    if name == "SQLite":
        yield {"TUNESMITH_JOB_STORE": "sqlite"}
        return
    with run_firestore_emulator() as host:
        yield {"TUNESMITH_JOB_STORE": "firestore", "FIRESTORE_EMULATOR_HOST": host, "PROJECT_ID": "chaos"}


def _kill_and_start(running: Service, submissions: Submissions, kills: int) -> int:
    """Kill at a random moment: while the service starts, writes or answers. Returns how often submissions were in flight."""
    rng = random.Random(4)
    released = kills_during_submissions = 0
    for kill in range(kills):
        kills_left = kills - kill
        count = rng.randint(1, max(1, 2 * (submissions.total - released) // kills_left - 1))
        count = min(count, submissions.total - released - kills_left)  # leave one submission for each later kill
        submissions.permits.release(count)
        released += count
        _wait_for_answers(submissions, released - rng.randint(0, count), rng)
        kills_during_submissions += not submissions.all_answered
        running.kill()
        running.start()
    submissions.permits.release(submissions.total + CLIENTS)
    return kills_during_submissions


def _wait_for_answers(submissions: Submissions, answered: int, rng: random.Random) -> None:
    """Wait for that many answers and a random moment longer."""
    wait_until(lambda: len(submissions.answered) >= answered, MAX_LIFETIME_S, description=f"{answered} answers", interval_s=0.001)
    time.sleep(rng.choice((0.0, rng.uniform(0, 0.02), rng.uniform(0, 0.2))))


@contextmanager
def _run_clients(running: Service, submissions: Submissions, dataset_id: str) -> Iterator[None]:
    threads = [threading.Thread(target=_run_client, args=(running, submissions, dataset_id), daemon=True) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        submissions.stopped.set()
        submissions.permits.release(submissions.total + CLIENTS)
        for thread in threads:
            thread.join(30)


def _run_client(running: Service, submissions: Submissions, dataset_id: str) -> None:
    with httpx2.Client(base_url=running.url, headers=running.headers, timeout=10) as http:
        while (key := submissions.next_key()) is not None:
            while not submissions.stopped.is_set() and not _submit(http, submissions, dataset_id, key):
                time.sleep(RETRY_S)


def _submit(http: httpx2.Client, submissions: Submissions, dataset_id: str, key: str) -> bool:
    """Submit once; return whether there was an answer. Without one, the caller repeats the request."""
    submissions.count_try()
    try:
        response = http.post("/train", json=make_train_request(dataset_id, job_name=key), headers={"Idempotency-Key": key})
    except httpx2.TransportError:
        return False
    if response.status_code == 201:
        submissions.record_answer(key, response.json()["job_id"])
    elif response.status_code < 500:
        submissions.rejections.append(response.text)
    return response.status_code == 201


def _repeat_all(running: Service, submissions: Submissions) -> None:
    """Send every request once more, as if its answer had been lost: it must return the same job."""
    dataset_id = running.request("GET", "/datasets").json()["datasets"][0]["processed_dataset_id"]
    with httpx2.Client(base_url=running.url, headers=running.headers, timeout=30) as http:
        for key in list(submissions.answered):
            _submit(http, submissions, dataset_id, key)


def _wait_until_final(running: Service, timeout_s: float) -> int:
    """Wait; return how many jobs are still not final."""
    deadline = time.monotonic() + timeout_s
    while (open_jobs := sum(job["status"] not in ("completed", "failed", "cancelled") for job in running.jobs())) > 0:
        if time.monotonic() > deadline:
            break
        time.sleep(0.5)
    return open_jobs


def _collect_outcome(
    running: Service, submissions: Submissions, attempt_log: AttemptLog, kills: int, kills_during_submissions: int, stuck: int
) -> Outcome:
    statuses = {job["job_id"]: job["status"] for job in running.jobs()}
    acknowledged = set(submissions.answered.values())
    claimed_job_ids = [name.rpartition(".")[0] for name in attempt_log.claimed.elements()]
    return Outcome(
        kills=kills,
        kills_during_submissions=kills_during_submissions,
        tries=submissions.tries,
        acknowledged=len(submissions.answered),
        lost=len(acknowledged - statuses.keys()),
        duplicate_jobs=len(statuses) - len(acknowledged) + submissions.conflicting_answers,
        launched_twice=len(claimed_job_ids) - len(set(claimed_job_ids)),
        refused_claims=attempt_log.started.total() - attempt_log.claimed.total(),
        stuck=stuck,
        failed=sum(status in ("failed", "cancelled") for status in statuses.values()),
        corrupt=find_corruption(running.home / "tunesmith.db") if "sqlite" in running.variables.values() else "",
    )

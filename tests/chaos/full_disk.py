"""The disk is full, a folder is read-only, or another program locks the database, while clients submit jobs.

The service uses its own file system in a mount namespace (`unshare`), so that the disk is really full and the folder is
read-only even for root. Where namespaces are forbidden, a file in place of the folder and a limit on file sizes (RLIMIT_FSIZE)
replace them, and the row says so.
"""

import argparse
import json
import os
import resource
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx2

from tests.chaos.campaign import CampaignError, Row, Size
from tests.chaos.service import SOURCE, Service, find_corruption, make_light_trainer, make_train_request, service

CLIENTS = 8
PAUSE_S = 0.5  # between two rounds of a client: every accepted job runs afterwards
DISK_BYTES = 64 << 20
DURATIONS_S: dict[Size, tuple[float, float]] = {"full": (10.0, 30.0), "short": (2.0, 5.0)}  # disk and folder; database
MAX_RESPONSE_S = 5.0
MAX_UPLOAD_RESPONSE_S = 20.0  # uploads wait for their turn, each as long as the database may be busy
MAX_RECOVERY_S = 60.0
NAMESPACE_COMMANDS = ("unshare", "-Urm"), ("unshare", "-m")  # the second works for root where user namespaces are disabled
OK = range(200, 300)


def run(size: Size) -> Row:
    """Inject the three faults one after the other into one service."""
    namespace_command = next((candidate for candidate in NAMESPACE_COMMANDS if _can_mount(candidate)), ())
    with tempfile.TemporaryDirectory(prefix="chaos-disk-") as folder:
        command = [sys.executable, "-m", "tests.chaos.full_disk", folder, "--size", size, *(["--can-mount"] if namespace_command else [])]
        done = subprocess.run(
            [*namespace_command, *command], cwd=SOURCE, env=os.environ | {"PYTHONPATH": str(SOURCE)}, capture_output=True, text=True
        )
    if done.returncode != 0:
        raise CampaignError(done.stderr.strip().rpartition("\n")[2])
    outcomes = [FaultOutcome(**fields) for fields in json.loads(done.stdout.splitlines()[-1])]
    disk_s, database_s = DURATIONS_S[size]
    method = (
        "a full tmpfs and a read-only mount" if namespace_command else "RLIMIT_FSIZE and a file in the folder's place: no namespaces here"
    )
    return Row(
        fault="disk full, folder read-only, database busy",
        injected=f"for {disk_s:.0f}, {disk_s:.0f} and {database_s:.0f} s under {CLIENTS} clients ({method})",
        expected=f"nothing corrupt, 503/507 typed within {MAX_RESPONSE_S:.0f} s (uploads {MAX_UPLOAD_RESPONSE_S:.0f} s), recovers alone",
        observed="; ".join(map(str, outcomes)),
        passed=all(outcome.passed for outcome in outcomes),
    )


@dataclass
class FaultOutcome:
    """The result of one fault."""

    fault: str
    status_counts: dict[str, int] = field(default_factory=dict[str, int])
    bad_responses: list[str] = field(default_factory=list[str])  # unexpected responses
    slowest_s: float = 0.0
    lost: int = 0  # acknowledged jobs that are missing
    unfinished: int = 0  # acknowledged jobs that did not complete after the fault
    corrupt: str = ""
    recovered_s: float | None = None

    @property
    def passed(self) -> bool:
        rejected = any(int(status) in (503, 507) for status in self.status_counts)  # otherwise the fault had no effect
        return (
            (self.bad_responses, self.lost, self.unfinished, self.corrupt) == ([], 0, 0, "") and self.recovered_s is not None and rejected
        )

    def __str__(self) -> str:
        statuses = ", ".join(f"{count}× {status}" for status, count in sorted(self.status_counts.items()))
        problems = (
            f"; {len(self.bad_responses)} bad responses, such as {', '.join(sorted(set(self.bad_responses))[:3])}"
            if self.bad_responses
            else ""
        )
        damage = f"{self.lost} lost, {self.unfinished} unfinished, database {self.corrupt or 'intact'}"
        recovery = f"recovered after {self.recovered_s:.1f} s" if self.recovered_s is not None else "did not recover"
        return f"{self.fault}: {statuses}, slowest {self.slowest_s:.1f} s, {damage}, {recovery}{problems}"


def main() -> int:
    """Inside the namespace, where this process may mount: inject the faults, count and print the outcomes as JSON."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.full_disk")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=("full", "short"), required=True)
    parser.add_argument("--can-mount", action="store_true", help="this process may mount")
    options = parser.parse_args()
    home = options.folder / "home"
    home.mkdir()
    if options.can_mount:
        _mount("-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(home))
    trainer = make_light_trainer(options.folder / "trainer", real_one_in=10)
    disk_s, database_s = DURATIONS_S[options.size]
    with service(home, TUNESMITH_LOCAL_MAX_CONCURRENT_JOBS="8", **trainer) as running:
        dataset_id = running.upload()
        disk_full = _fill_disk(home) if options.can_mount else _limit_file_size(running)
        faults = {"disk full": (disk_full, disk_s), "objects read-only": (_make_read_only(home / "objects", options.can_mount), disk_s)}
        faults["database busy"] = (_lock_database(home / "tunesmith.db"), database_s)
        outcomes = [_run_fault(running, dataset_id, name, fault, duration_s) for name, (fault, duration_s) in faults.items()]
    print(json.dumps([asdict(outcome) for outcome in outcomes]))
    return 0


# --- faults ----------------------------------------------------------------------------------------------------------


@contextmanager
def _fill_disk(home: Path) -> Iterator[None]:
    """Fill the disk to the last byte, and keep it full when something is deleted."""
    filler = home / "filler"
    stopped = threading.Event()

    def fill() -> None:
        with filler.open("wb", buffering=0) as stream:
            while not stopped.wait(0.01):
                try:
                    while stream.write(bytes(4096)):
                        pass
                except OSError:
                    pass

    filling = threading.Thread(target=fill)
    filling.start()
    try:
        yield
    finally:
        stopped.set()
        filling.join()
        filler.unlink()


@contextmanager
def _limit_file_size(running: Service) -> Iterator[None]:
    """Limit every file of the service to a few bytes."""
    assert running.process is not None
    before = resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, (16, before[1]))
    try:
        yield
    finally:
        resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, before)


@contextmanager
def _make_read_only(folder: Path, can_mount: bool) -> Iterator[None]:
    if not can_mount:
        moved = folder.rename(folder.with_name("moved"))
        folder.touch()
        try:
            yield
        finally:
            folder.unlink()
            moved.rename(folder)
        return
    _mount("--bind", str(folder), str(folder))
    _mount("-o", "remount,bind,ro", str(folder))
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@contextmanager
def _lock_database(database: Path) -> Iterator[None]:
    """Hold a write lock on the database, as another program would."""
    with sqlite3.connect(database, isolation_level=None) as connection:
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        finally:
            connection.execute("ROLLBACK")
    connection.close()


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


def _can_mount(command: tuple[str, ...]) -> bool:
    """Whether this machine allows a namespace with mounts of its own."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return subprocess.run([*command, "mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True).returncode == 0
        except FileNotFoundError:
            return False


# --- outcomes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TimedResponse:
    """A response and its duration."""

    request: str
    status: int
    duration_s: float
    headers: httpx2.Headers
    body: Any  # any JSON


def _run_fault(running: Service, dataset_id: str, name: str, fault: Any, duration_s: float) -> FaultOutcome:
    """Let clients submit, read and upload during the fault and afterwards until the service has recovered."""
    outcome = FaultOutcome(name)
    with fault:
        until = time.monotonic() + duration_s
        with ThreadPoolExecutor(CLIENTS) as pool:
            clients = [partial(_run_client, running, dataset_id, f"{name}-{number}", until) for number in range(CLIENTS)]
            responses = [response for future in [pool.submit(client) for client in clients] for response in future.result()]
    outcome.bad_responses = [problem for response in responses if (problem := _describe_problem(response))]
    for response in responses:
        outcome.status_counts[str(response.status)] = outcome.status_counts.get(str(response.status), 0) + 1
    outcome.slowest_s = max(response.duration_s for response in responses)
    outcome.recovered_s = _measure_recovery_s(running, dataset_id, name)
    acknowledged = {response.body["job_id"] for response in responses if response.request == "POST /train" and response.status in OK}
    outcome.lost, outcome.unfinished = _count_lost_and_unfinished(running, acknowledged)
    outcome.corrupt = find_corruption(running.home / "tunesmith.db")
    return outcome


def _run_client(running: Service, dataset_id: str, name: str, deadline: float) -> list[TimedResponse]:
    """Repeat: submit a job, upload a dataset, list jobs."""
    responses: list[TimedResponse] = []
    number = 0
    with httpx2.Client(base_url=running.url, headers=running.headers, timeout=60) as http:
        while time.monotonic() < deadline:
            number += 1
            key = {"Idempotency-Key": f"{name}-{number}".replace(" ", "-")}
            responses.append(
                _request(http, "POST", "/train", json=make_train_request(dataset_id, job_name=f"{name} {number}"), headers=key)
            )
            responses.append(_request(http, "POST", "/datasets", files={"file": ("rows.jsonl", _rows(name, number))}))
            responses.append(_request(http, "GET", "/jobs"))
            time.sleep(PAUSE_S)
    return responses


def _rows(name: str, number: int) -> str:
    """About 100 kB of rows that differ from all earlier uploads."""
    return (
        json.dumps({"messages": [{"role": "user", "content": f"{name} {number}"}, {"role": "assistant", "content": "x" * 100_000}]}) + "\n"
    )


def _request(http: httpx2.Client, method: str, path: str, **options: Any) -> TimedResponse:
    began = time.monotonic()
    try:
        response = http.request(method, path, **options)
    except httpx2.TransportError as error:
        return TimedResponse(f"{method} {path}", 0, time.monotonic() - began, httpx2.Headers(), f"{type(error).__name__}: {error}")
    body = response.json() if "json" in response.headers.get("content-type", "") else None
    return TimedResponse(f"{method} {path}", response.status_code, time.monotonic() - began, response.headers, body)


def _describe_problem(response: TimedResponse) -> str:
    """Describe what is wrong with a response; empty for a success and for a typed, timely rejection with Retry-After."""
    request = f"{response.request} {response.status}"
    if response.duration_s > (MAX_UPLOAD_RESPONSE_S if response.request == "POST /datasets" else MAX_RESPONSE_S):
        return f"{request} after {response.duration_s:.1f} s"
    if response.status in OK:
        return ""
    if response.status not in (HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.INSUFFICIENT_STORAGE):
        return request if response.status else f"{response.request} without a response ({response.body})"
    if response.status == HTTPStatus.SERVICE_UNAVAILABLE and "retry-after" not in response.headers:
        return f"{request} without Retry-After"
    error = response.body.get("error", {}) if isinstance(response.body, dict) else {}
    return "" if error.get("code") and error.get("message") else f"{request} without a typed error: {response.body}"


def _measure_recovery_s(running: Service, dataset_id: str, name: str) -> float | None:
    """Seconds until every request works again without intervention."""
    began = time.monotonic()
    with httpx2.Client(base_url=running.url, headers=running.headers, timeout=60) as http:
        while time.monotonic() - began < MAX_RECOVERY_S:
            key = {"Idempotency-Key": f"after-{name}".replace(" ", "-")}
            requests: list[Callable[[], TimedResponse]] = [
                partial(_request, http, "POST", "/train", json=make_train_request(dataset_id), headers=key),
                partial(_request, http, "POST", "/datasets", files={"file": ("rows.jsonl", _rows("after", 0))}),
            ]
            if all(send().status in OK for send in requests):
                return time.monotonic() - began
            time.sleep(0.1)
    return None


def _count_lost_and_unfinished(running: Service, acknowledged: set[str]) -> tuple[int, int]:
    """Count the jobs that are missing and those that do not complete."""
    deadline = time.monotonic() + MAX_RECOVERY_S
    while True:
        status = {job["job_id"]: job["status"] for job in running.jobs()}
        unfinished = sum(status.get(job_id) != "completed" for job_id in acknowledged)
        if unfinished == 0 or time.monotonic() > deadline:
            return len(acknowledged - status.keys()), unfinished
        time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main())

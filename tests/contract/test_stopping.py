"""How a service stops: on Ctrl-C it says what it saves and ends its streams in order, a second Ctrl-C does not wait; and when idle."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Semaphore, Thread

import httpx2
import pytest

from schema.job import Status
from service.adapters.jobstores.sqlite import SqliteJobStore
from service.server import describe_stop
from tests.factories import make_dataset, make_job
from tests.local_token import local_headers
from tests.real_server import SOURCE
from tests.waiting import wait_until

# Saves for so long after SIGTERM that a second Ctrl-C comes in between; "ready" says that it handles the signal.
SLOW_ATTEMPT = """
import pathlib, signal, sys, time
def stop(*_):
    time.sleep(2)
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
pathlib.Path("ready").touch()
time.sleep(60)
"""


class Service:
    """A service in a process of its own, whose errors are collected."""

    def __init__(self, home: Path, *arguments: str) -> None:
        self.home = home
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TUNESMITH_")}
        with (home / "stderr").open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "service", "--port", "0", *arguments],
                env=environment | {"TUNESMITH_HOME": str(home), "HF_HUB_OFFLINE": "1"},
                cwd=SOURCE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()

    @property
    def printed(self) -> str:
        return (self.home / "stderr").read_text()

    def get(self, path: str) -> httpx2.Response:
        return httpx2.get(self.url + path, headers=local_headers(self.home), timeout=20)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home with a paused job, whose streams end only when the service does."""
    store = SqliteJobStore(tmp_path / "tunesmith.db")
    store.create_dataset(make_dataset())
    store.create_job(make_job(job_id="paused", tenant_id="local", status=Status.PAUSED))
    store.close()
    return tmp_path


@contextmanager
def run_service(home: Path, *arguments: str, waits: bool = True) -> Iterator[Service]:
    """A service; with `waits`, one that answers."""
    service = Service(home, *arguments)
    try:
        if waits:
            wait_until(lambda: service.get("/health").status_code == 200)
        yield service
    finally:
        service.process.kill()
        service.process.communicate(timeout=20)


@contextmanager
def run_attempt(home: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that is an attempt of that home to the service."""
    folder = home / "attempts/paused.1"
    (folder / "jobs").mkdir(parents=True)
    (folder / "jobs/run.py").write_text(SLOW_ATTEMPT)
    command = [sys.executable, "-m", "jobs.run", "--name", "paused.1"]
    variables = {"JOB_WORKDIR": str(folder), "PYTHONPATH": str(folder)}
    with subprocess.Popen(command, cwd=folder, env=os.environ | variables, start_new_session=True) as process:
        wait_until(lambda: (folder / "ready").exists())
        Thread(target=process.wait, daemon=True).start()  # or it would be a zombie, for which the service would wait
        try:
            yield process
        finally:
            process.kill()


def test_ctrl_c_ends_streams_in_order(home: Path) -> None:
    with run_service(home) as service, ThreadPoolExecutor(3) as pool:
        connected = Semaphore(0)

        def follow(path: str) -> bytes:
            headers = local_headers(home) | ({} if "follow" in path else {"Accept": "text/event-stream"})
            with httpx2.stream("GET", service.url + path, headers=headers, timeout=20) as response:
                assert response.status_code == 200
                connected.release()
                return response.read()  # raises for a stream that does not end in order

        streams = [pool.submit(follow, f"/jobs/paused/{rest}") for rest in ("events", "logs", "logs?follow=true")]
        for _ in streams:
            assert connected.acquire(timeout=20)
        service.process.send_signal(signal.SIGINT)
        assert service.process.wait(60) == 130
        assert b"done" not in b"".join(stream.result(20) for stream in streams)  # the job has not ended
        assert "ASGI callable" not in service.printed
        assert "Cancel" not in service.printed
        assert service.printed.count("stopping: no attempt is running here\n") == 1


def test_ctrl_c_tells_that_attempts_are_saved(home: Path) -> None:
    with run_attempt(home) as attempt, run_service(home) as service:
        service.process.send_signal(signal.SIGINT)
        assert service.process.wait(60) == 130
        assert attempt.wait(60) == 0
        assert service.printed.count(describe_stop(1) + "\n") == 1
    assert not (home / "service.json").exists()


def test_second_ctrl_c_does_not_wait_for_attempts(home: Path) -> None:
    with run_attempt(home) as attempt, run_service(home) as service:
        service.process.send_signal(signal.SIGINT)
        wait_until(lambda: "stopping: " in service.printed)
        service.process.send_signal(signal.SIGINT)
        assert service.process.wait(60) == 130
        assert attempt.poll() is None
        assert service.printed.count("stopped without waiting: ") == 1
    assert not (home / "service.json").exists()
    with run_service(home) as service:  # what was left in the home does no harm
        assert service.get("/jobs/paused").status_code == 200


def test_service_stops_by_itself_when_idle(home: Path) -> None:
    with run_service(home, "--exit-when-idle", "0.5", waits=False) as service:
        assert service.process.wait(60) == 0
    assert not (home / "service.json").exists()


def test_queued_job_keeps_an_idle_service(home: Path) -> None:
    store = SqliteJobStore(home / "tunesmith.db")
    store.create_job(make_job(job_id="queued", tenant_id="local"))
    store.close()
    with run_service(home, "--exit-when-idle", "0.1") as service:
        time.sleep(0.6)
        assert service.process.poll() is None
        httpx2.post(f"{service.url}/jobs/queued/cancel", headers=local_headers(home), timeout=20).raise_for_status()
        assert service.process.wait(60) == 0


def test_number_of_saved_attempts_is_told() -> None:
    assert describe_stop(1).startswith("stopping: 1 running attempt is saved and continues at the next start;")
    assert describe_stop(3).startswith("stopping: 3 running attempts are saved and continue at the next start;")

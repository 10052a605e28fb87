"""`python -m jobs.run` as a launcher starts it: a process, an environment, a service, an object store."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from schema.result import Result
from schema.spec import manifest_key, result_key, spec_key
from tests.jobs.conftest import a_spec
from tests.jobs.fake_service import TOKEN, FakeService

HF_TOKEN = "hf_aVeryS3cretToken"
LONGEST_S = 90


@dataclass
class Process:
    """An attempt at work."""

    child: subprocess.Popen[bytes]
    store: Path
    workdir: Path
    job_id: str

    def wait(self) -> int:
        return self.child.wait(LONGEST_S)

    @property
    def log(self) -> str:
        return (self.workdir / "log").read_text()

    @property
    def result(self) -> Result | None:
        path = self.store / result_key(self.job_id, 1)
        return Result.load(path.read_bytes()) if path.exists() else None


Start = Callable[..., Process]


@pytest.fixture
def start(store: Path, service: FakeService, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Start]:
    """Starts an attempt at the job of `a_spec`, changed by what is passed."""
    started: list[Process] = []

    def start(*, environment: dict[str, str] | None = None, **changes: Any) -> Process:
        spec = a_spec(store, job_id=f"job-{abs(hash(request.node.name))}", **changes)
        path = store / spec_key(spec.job_id)
        path.parent.mkdir(exist_ok=True)
        path.write_text(spec.model_dump_json())
        told = {
            "JOB_ID": spec.job_id,
            "JOB_ATTEMPT": "1",
            "JOB_TOKEN": TOKEN,
            "JOB_SPEC_STORE_URL": f"file://{store}",
            "JOB_WORKDIR": str(tmp_path),
            "JOB_REPORT_INTERVAL_S": "0.2",
            "SERVICE_URL": service.url,
        }
        libraries = {"PYTHONPATH": ".", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path), "PATH": os.environ["PATH"]}
        with (tmp_path / "log").open("wb") as log:
            child = subprocess.Popen(
                [sys.executable, "-m", "jobs.run", "--name", f"{spec.job_id}.1"],
                env=told | libraries | (environment or {}),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        started.append(Process(child, store, tmp_path, spec.job_id))
        return started[-1]

    yield start
    for process in started:
        if process.child.poll() is None:
            os.killpg(process.child.pid, signal.SIGKILL)
        process.child.wait()


def wait_for(true: Callable[[], Any], process: Process) -> None:
    deadline = time.monotonic() + LONGEST_S
    while not true():
        assert process.child.poll() is None, process.log
        assert time.monotonic() < deadline, process.log
        time.sleep(0.01)


def phases(service: FakeService) -> list[str]:
    return [told["event"]["phase"] for told in service.events if told["event"]["type"] == "phase"]


def left_alive(process: Process) -> list[str]:
    """What still runs in the attempt's process group."""
    listed = subprocess.run(["ps", "-eo", "pgid=,stat=,args="], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in listed if line.split()[0] == str(process.child.pid) and not line.split()[1].startswith("Z")]


def test_an_attempt_trains_exports_and_says_its_last_word_everywhere(start: Start, service: FakeService) -> None:
    service.secrets = {"hf_token": HF_TOKEN}
    process = start(wandb_config={"mode": "offline"}, environment={"WANDB_MODE": "offline"})
    assert process.wait() == 0, process.log
    assert "attempt started" in process.log.splitlines()[0]
    result = process.result
    assert result is not None
    assert (result.outcome, result.attempt, result.claimant) == ("completed", 1, service.claims[0])
    assert [artifact.name for artifact in result.artifacts] == ["adapter"]
    assert result.metrics is not None
    assert result.base_metrics is not None
    assert result.train_rows == 24
    assert [Result.model_validate(told) for told in service.results] == [result]
    assert (process.store / manifest_key(process.job_id)).exists()
    assert phases(service)[:4] == ["downloading", "tokenizing", "evaluating", "training"]
    assert {"metrics", "evaluation", "decision", "artifact", "tracker"} <= {told["event"]["type"] for told in service.events}
    assert len(service.claims) == 1
    assert service.authorizations == {f"Bearer {TOKEN}"}
    assert not left_alive(process)
    written = [path for path in process.workdir.rglob("*") if path.is_file()]
    written += [path for path in process.store.rglob("*") if path.is_file() and process.job_id in str(path)]
    assert not [path for path in written if HF_TOKEN.encode() in path.read_bytes() or TOKEN.encode() in path.read_bytes()]
    assert HF_TOKEN not in json.dumps(service.batches) + json.dumps(service.results)


def test_a_second_process_is_told_and_touches_nothing(start: Start, service: FakeService) -> None:
    service.claim_status = 409
    process = start()
    assert process.wait() == 0
    assert process.result is None
    assert service.batches == service.results == []
    assert [path.name for path in process.workdir.iterdir()] == ["log"]


@pytest.mark.parametrize("status", [401, 403, 404])
def test_an_attempt_that_the_service_does_not_know_fails_and_touches_nothing(start: Start, service: FakeService, status: int) -> None:
    service.claim_status = status
    process = start()
    assert process.wait() == 1
    assert process.result is None
    assert str(status) in process.log
    assert "Traceback" not in process.log


def test_a_claim_waits_for_a_service_that_is_away(start: Start, service: FakeService) -> None:
    service.claim_status = 503
    process = start()
    wait_for(lambda: len(service.claims) >= 2, process)
    service.claim_status = 409
    assert process.wait() == 0
    assert len(set(service.claims)) == 1  # the same claimant: a claim whose answer was lost is not somebody else's


def test_what_only_the_job_can_know_fails_it_within_seconds_with_a_hint(start: Start, service: FakeService) -> None:
    process = start(base_model_id="nobody/nothing")
    assert process.wait() == 1
    assert process.result is not None
    assert process.result.outcome == "failed"
    assert process.result.failure is not None
    assert process.result.failure.code == "invalid_config"
    assert "nobody/nothing" in process.result.failure.message
    assert process.result.failure.hint
    assert process.result.failure.attempt == 1
    assert service.results[0]["outcome"] == "failed"


def test_a_result_counts_even_if_the_service_does_not_hear_it(start: Start, service: FakeService) -> None:
    service.result_status = 503
    process = start(base_model_id="nobody/nothing")
    assert process.wait() == 1
    assert process.result is not None
    assert process.result.outcome == "failed"


def test_a_cancel_while_libraries_are_imported_is_over_in_two_seconds(start: Start, service: FakeService) -> None:
    process = start()
    wait_for(lambda: "tokenizing" in phases(service) or "downloading" in phases(service), process)
    service.directive = "cancel"
    began = time.monotonic()
    assert process.wait() == 10, process.log
    assert time.monotonic() - began < 2
    assert process.result is not None
    assert process.result.outcome == "cancelled"
    assert service.results[0]["outcome"] == "cancelled"


ENDLESS = {"max_steps": 1, "batch_size": 24, "max_seq_length": 2048}


@pytest.mark.parametrize("way", ["directive", "signal"])
def test_a_cancel_inside_a_long_step_is_over_in_two_seconds(start: Start, service: FakeService, way: str) -> None:
    rows = [{"text": "it returns a list of files " * 300}] * 24  # one step of half a minute
    process = start(train=rows, held_out=[], dataset_type="text", hyperparameters=ENDLESS)
    wait_for(lambda: "training" in phases(service), process)
    time.sleep(1.5)  # well inside the step
    began = time.monotonic()
    if way == "signal":
        process.child.send_signal(signal.SIGTERM)
    else:
        service.directive = "cancel"
    assert process.wait() == 10, process.log
    assert time.monotonic() - began < 2
    assert process.result is not None
    assert process.result.outcome == "cancelled"
    assert not left_alive(process)


def test_an_attempt_that_was_given_up_ends_at_once_and_writes_nothing_more(start: Start, service: FakeService) -> None:
    rows = [{"text": "it returns a list of files " * 300}] * 24
    process = start(train=rows, held_out=[], dataset_type="text", hyperparameters=ENDLESS)
    wait_for(lambda: "downloading" in phases(service), process)
    service.events_status = 409
    began = time.monotonic()
    assert process.wait() == 11, process.log
    assert time.monotonic() - began < 2
    assert process.result is None
    assert service.results == []


def test_a_time_limit_fails_the_attempt_with_timeout(start: Start, service: FakeService) -> None:
    process = start(environment={"JOB_TIME_LIMIT_S": "1"})
    assert process.wait() == 1
    assert process.result is not None
    assert process.result.failure is not None
    assert process.result.failure.code == "timeout"
    assert process.result.failure.hint


def test_events_that_never_arrived_do_not_fail_a_training(start: Start, service: FakeService) -> None:
    service.events_status = 503
    process = start(held_out=[], hyperparameters={"max_steps": 1})
    assert process.wait() == 0, process.log
    assert service.events == []
    assert process.result is not None
    assert process.result.outcome == "completed"

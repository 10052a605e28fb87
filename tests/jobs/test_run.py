"""`python -m jobs.run` as a launcher starts it: a process, an environment, a service, an object store."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from schema.result import Result
from schema.spec import JobSpec, manifest_key, result_key, spec_key
from tests.jobs.conftest import a_spec, saved
from tests.jobs.fake_service import TOKEN, FakeService

HF_TOKEN = "hf_aVeryS3cretToken"
LONGEST_S = 90


@dataclass
class Process:
    """An attempt at work."""

    child: subprocess.Popen[bytes]
    store: Path
    workdir: Path
    spec: JobSpec
    attempt: int

    def wait(self) -> int:
        return self.child.wait(LONGEST_S)

    @property
    def log(self) -> str:
        return (self.workdir / "log").read_text()

    @property
    def result(self) -> Result | None:
        path = self.store / result_key(self.job_id, self.attempt)
        return Result.load(path.read_bytes()) if path.exists() else None

    @property
    def last_word(self) -> Result:
        assert self.result is not None, self.log
        return self.result

    @property
    def job_id(self) -> str:
        return self.spec.job_id


Start = Callable[..., Process]


@pytest.fixture
def start(store: Path, service: FakeService, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Start]:
    """Starts an attempt at the job of `a_spec`, changed by what is passed."""
    started: list[Process] = []

    def start(
        *, attempt: int = 1, program: Sequence[str] = ("-m", "jobs.run"), environment: dict[str, str] | None = None, **changes: Any
    ) -> Process:
        spec = a_spec(store, job_id=f"job-{abs(hash(request.node.name))}", **changes)
        path = store / spec_key(spec.job_id)
        path.parent.mkdir(exist_ok=True)
        path.write_text(spec.model_dump_json())
        workdir = tmp_path / f"attempt-{attempt}"
        workdir.mkdir()
        told = {
            "JOB_ID": spec.job_id,
            "JOB_ATTEMPT": str(attempt),
            "JOB_TOKEN": TOKEN,
            "JOB_SPEC_STORE_URL": f"file://{store}",
            "JOB_WORKDIR": str(workdir),
            "JOB_REPORT_INTERVAL_S": "0.2",
            "SERVICE_URL": service.url,
        }
        libraries = {"PYTHONPATH": ".", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path), "PATH": os.environ["PATH"]}
        with (workdir / "log").open("wb") as log:
            child = subprocess.Popen(
                [sys.executable, *program, "--name", f"{spec.job_id}.{attempt}"],
                env=told | libraries | (environment or {}),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        started.append(Process(child, store, workdir, spec, attempt))
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
    result = process.last_word
    assert (result.outcome, result.attempt, result.claimant) == ("completed", 1, service.claims[0])
    assert (result.saved_step, result.resumed_step, result.yielded_because) == (4, None, None)
    assert [artifact.name for artifact in result.artifacts] == ["adapter"]
    assert result.metrics is not None
    assert result.base_metrics is not None
    assert result.train_rows == 24
    assert [Result.model_validate(told) for told in service.results] == [result]
    assert all("/attempt-1/" in artifact.key for artifact in result.artifacts)
    assert not (process.store / manifest_key(process.job_id)).exists()  # the service writes it: only it knows which attempt counts
    assert phases(service)[:4] == ["downloading", "tokenizing", "evaluating", "training"]
    assert {"metrics", "evaluation", "decision", "artifact", "tracker", "checkpoint"} <= {told["event"]["type"] for told in service.events}
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


@pytest.mark.parametrize(("directive", "code", "outcome"), [("cancel", 10, "cancelled"), ("pause", 12, "paused")])
def test_what_the_service_wants_by_the_time_of_the_claim_is_done_at_once(
    start: Start, service: FakeService, directive: str, code: int, outcome: str
) -> None:
    service.claim_directive = directive
    process = start()
    assert process.wait() == code, process.log
    assert process.last_word.outcome == service.results[0]["outcome"] == outcome
    assert service.batches == []


STOPS = [("pause", 12, "paused", None), (signal.SIGTERM, 13, "yielded", "preempted"), (signal.SIGINT, 10, "cancelled", None)]


def ask(process: Process, service: FakeService, way: str | signal.Signals) -> None:
    if isinstance(way, signal.Signals):
        process.child.send_signal(way)
    else:
        service.directive = way


@pytest.mark.parametrize(("way", "code", "outcome", "because"), STOPS)
def test_before_anything_is_trained_a_stop_is_over_in_two_seconds(
    start: Start, service: FakeService, way: str | signal.Signals, code: int, outcome: str, because: str | None
) -> None:
    process = start()
    wait_for(lambda: "downloading" in phases(service), process)
    ask(process, service, way)
    began = time.monotonic()
    assert process.wait() == code, process.log
    assert time.monotonic() - began < 2
    result = process.last_word
    assert (result.outcome, result.yielded_because, result.saved_step, result.failure) == (outcome, because, None, None)
    assert service.results[0]["outcome"] == outcome
    assert not left_alive(process)


def test_a_stop_before_the_claim_leaves_the_attempt_to_whom_it_belongs(start: Start, service: FakeService) -> None:
    service.claim_status = 503
    process = start()
    wait_for(lambda: service.claims, process)
    process.child.send_signal(signal.SIGTERM)
    assert process.wait() == 13, process.log
    assert process.result is None
    assert service.results == []


# --- in a training ---------------------------------------------------------------------------------------------------

FOR_EVER = {"max_steps": 100_000, "logging_steps": 1}


def step(service: FakeService) -> int:
    """The newest step that was reported."""
    return max((told["event"]["step"] for told in service.events if told["event"]["type"] == "metrics"), default=0)


@pytest.mark.parametrize(
    ("way", "code", "outcome", "because", "reason"),
    [("pause", 12, "paused", None, "pause"), (signal.SIGTERM, 13, "yielded", "preempted", "preempted")],
)
def test_a_training_that_is_stopped_saves_its_step_and_the_next_attempt_goes_on_from_it(
    start: Start, service: FakeService, way: str | signal.Signals, code: int, outcome: str, because: str | None, reason: str
) -> None:
    process = start(hyperparameters=FOR_EVER)
    wait_for(lambda: step(service) >= 3, process)
    ask(process, service, way)
    assert process.wait() == code, process.log
    result, checkpoint = process.last_word, saved(process.spec)[-1]
    assert (result.outcome, result.yielded_because, result.resumed_step) == (outcome, because, None)
    assert result.saved_step == checkpoint.step >= 3
    assert (checkpoint.reason, checkpoint.attempt) == (reason, 1)
    assert step(service) == checkpoint.step  # every point arrived: nothing is left out of the curve, and nothing is in it twice
    assert not left_alive(process)

    service.directive, service.events = "continue", []
    process = start(attempt=2, hyperparameters=FOR_EVER)
    wait_for(lambda: step(service) > checkpoint.step, process)
    resumed = [told["event"] for told in service.events if told["event"]["type"] == "resumed"]
    assert [(event["step"], event["from_attempt"]) for event in resumed] == [(checkpoint.step, 1)]
    process.child.send_signal(signal.SIGINT)
    assert process.wait() == 10, process.log
    assert process.last_word.resumed_step == checkpoint.step


ENDLESS = {"max_steps": 1, "batch_size": 24, "max_seq_length": 2048}
LONG_ROWS = [{"text": "it returns a list of files " * 300}] * 24  # one step of half a minute


@pytest.mark.parametrize("way", ["cancel", signal.SIGINT])
def test_a_cancel_inside_a_long_step_is_over_in_two_seconds(start: Start, service: FakeService, way: str | signal.Signals) -> None:
    process = start(train=LONG_ROWS, held_out=[], dataset_type="text", hyperparameters=ENDLESS)
    wait_for(lambda: "training" in phases(service), process)
    time.sleep(1.5)  # well inside the step
    began = time.monotonic()
    ask(process, service, way)
    assert process.wait() == 10, process.log
    assert time.monotonic() - began < 2
    assert process.last_word.outcome == "cancelled"
    assert not left_alive(process)


def test_inside_a_long_step_a_machine_that_is_taken_away_gets_its_last_word_before_it_is_gone(start: Start, service: FakeService) -> None:
    process = start(train=LONG_ROWS, held_out=[], dataset_type="text", hyperparameters=ENDLESS)
    wait_for(lambda: "training" in phases(service), process)
    time.sleep(1.5)
    began = time.monotonic()
    process.child.send_signal(signal.SIGTERM)
    assert process.wait() == 13, process.log
    assert time.monotonic() - began < 10
    assert (process.last_word.outcome, process.last_word.yielded_because) == ("yielded", "preempted")
    assert service.results[0]["outcome"] == "yielded"


def test_a_sigterm_that_turns_out_to_be_a_cancel_saves_nothing(start: Start, service: FakeService) -> None:
    process = start(train=LONG_ROWS, held_out=[], dataset_type="text", hyperparameters=ENDLESS, environment={"JOB_REPORT_INTERVAL_S": "60"})
    wait_for(lambda: "training" in phases(service), process)
    service.directive = "cancel"
    began = time.monotonic()
    process.child.send_signal(signal.SIGTERM)
    assert process.wait() == 10, process.log
    assert time.monotonic() - began < 2
    assert process.last_word.outcome == "cancelled"


def test_an_attempt_that_was_given_up_ends_at_once_and_writes_nothing_more(start: Start, service: FakeService) -> None:
    process = start(train=LONG_ROWS, held_out=[], dataset_type="text", hyperparameters=ENDLESS)
    wait_for(lambda: "downloading" in phases(service), process)
    service.events_status = 409
    began = time.monotonic()
    assert process.wait() == 11, process.log
    assert time.monotonic() - began < 2
    assert process.result is None
    assert service.results == []


def test_an_attempt_that_runs_into_its_time_limit_yields_before_it(start: Start, service: FakeService) -> None:
    began = time.monotonic()
    process = start(environment={"JOB_TIME_LIMIT_S": "1"})
    assert process.wait() == 13
    assert time.monotonic() - began < 10  # most of it to start
    result = process.last_word
    assert (result.outcome, result.yielded_because, result.failure) == ("yielded", "time_slice", None)
    assert service.results[0]["outcome"] == "yielded"


ALL_BUT_DONE = """
import sys, time
from jobs.attempt import Attempt
from jobs.settings import read_settings

class Slow:
    name, run_id = "slow", None
    def finish(self, *, succeeded, patience_s):
        print("finishing", flush=True)
        time.sleep(60)

attempt = Attempt(read_settings())
attempt.claim()
attempt._trackers.append(Slow())
sys.exit(attempt.end("completed"))
"""


def test_a_job_that_is_done_is_done_also_when_it_is_cancelled_while_a_tracker_is_waited_for(start: Start, service: FakeService) -> None:
    process = start(program=["-c", ALL_BUT_DONE])
    wait_for(lambda: "finishing" in process.log, process)
    began = time.monotonic()
    process.child.send_signal(signal.SIGINT)
    assert process.wait() == 0, process.log
    assert time.monotonic() - began < 2
    assert process.last_word.outcome == service.results[0]["outcome"] == "completed"


def test_events_that_never_arrived_do_not_fail_a_training(start: Start, service: FakeService) -> None:
    service.events_status = 503
    process = start(held_out=[], hyperparameters={"max_steps": 1})
    assert process.wait() == 0, process.log
    assert service.events == []
    assert process.result is not None
    assert process.result.outcome == "completed"

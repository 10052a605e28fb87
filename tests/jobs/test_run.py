"""`python -m jobs.run` as a launcher starts it: a process with an environment, a service and an object store."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from schema.result import Result
from schema.spec import JobSpec, claimant_id, manifest_key, result_key, spec_key
from tests.jobs.conftest import load_saved_checkpoints, make_spec
from tests.jobs.fake_service import CLAIM_TOKEN, TOKEN, FakeService
from tests.waiting import wait_until

HF_TOKEN = "hf_aVeryS3cretToken"
TIMEOUT_S = 90
SOURCE = Path(__file__).resolve().parents[2]


@dataclass
class AttemptProcess:
    """A running attempt."""

    child: subprocess.Popen[bytes]
    store: Path
    workdir: Path
    spec: JobSpec
    attempt: int

    def wait(self) -> int:
        return self.child.wait(TIMEOUT_S)

    @property
    def log(self) -> str:
        return (self.workdir / "log").read_text()

    @property
    def result(self) -> Result | None:
        path = self.store / result_key(self.job_id, self.attempt)
        return Result.load(path.read_bytes()) if path.exists() else None

    @property
    def final_result(self) -> Result:
        assert self.result is not None, self.log
        return self.result

    @property
    def job_id(self) -> str:
        return self.spec.job_id


Start = Callable[..., AttemptProcess]


@pytest.fixture
def start(store: Path, service: FakeService, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Start]:
    """Starts an attempt of the job of `make_spec`; arguments change the job."""
    started: list[AttemptProcess] = []

    def start(
        *,
        attempt: int = 1,
        program: Sequence[str] = ("-m", "jobs.run"),
        environment: dict[str, str] | None = None,
        source: Path = SOURCE,
        **changes: Any,
    ) -> AttemptProcess:
        spec = make_spec(store, job_id=f"job-{abs(hash(request.node.name))}", **changes)
        path = store / spec_key(spec.job_id)
        path.parent.mkdir(exist_ok=True)
        path.write_text(spec.model_dump_json())
        workdir = tmp_path / f"attempt-{attempt}"
        workdir.mkdir()
        settings = {
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
                env=settings | libraries | (environment or {}),
                cwd=source,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        started.append(AttemptProcess(child, store, workdir, spec, attempt))
        return started[-1]

    yield start
    for process in started:
        if process.child.poll() is None:
            os.killpg(process.child.pid, signal.SIGKILL)
        process.child.wait()


def wait_for(condition: Callable[[], Any], process: AttemptProcess) -> None:
    """Wait until the condition holds; fails at once if the process ends before that."""

    def holds_while_running() -> bool:
        assert process.child.poll() is None, process.log
        return bool(condition())

    wait_until(holds_while_running, TIMEOUT_S, description=lambda: process.log)


def phases(service: FakeService) -> list[str]:
    return [reported["event"]["phase"] for reported in service.events if reported["event"]["type"] == "phase"]


def find_remaining_processes(process: AttemptProcess) -> list[str]:
    """Processes of the attempt's process group that still run."""
    listed = subprocess.run(["ps", "-eo", "pgid=,stat=,args="], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in listed if line.split()[0] == str(process.child.pid) and not line.split()[1].startswith("Z")]


def test_attempt_trains_exports_and_reports_result(start: Start, service: FakeService) -> None:
    service.secrets = {"hf_token": HF_TOKEN}
    process = start(wandb_config={"mode": "offline"}, environment={"WANDB_MODE": "offline"})
    assert process.wait() == 0, process.log
    assert "attempt started" in process.log.splitlines()[0]
    result = process.final_result
    assert (result.outcome, result.attempt, result.claimant) == ("completed", 1, claimant_id(service.claims[0]))
    assert (result.last_checkpoint_step, result.resumed_step, result.yield_reason) == (4, None, None)
    assert [artifact.name for artifact in result.artifacts] == ["adapter"]
    assert result.metrics is not None
    assert result.base_metrics is not None
    assert result.train_rows == 24
    assert [Result.model_validate(body) for body in service.results] == [result]
    assert all("/attempt-1/" in artifact.key for artifact in result.artifacts)
    # Only the service knows which attempt counts, so only the service writes the manifest.
    assert not (process.store / manifest_key(process.job_id)).exists()
    assert phases(service)[:4] == ["downloading", "tokenizing", "training", "evaluating"]
    assert {"metrics", "evaluation", "decision", "artifact", "tracker", "checkpoint_saved"} <= {
        reported["event"]["type"] for reported in service.events
    }
    assert len(service.claims) == 1
    assert service.authorizations == {f"Bearer {TOKEN}", f"Bearer {CLAIM_TOKEN}"}
    assert service.claimants == {service.claims[0]}
    assert not find_remaining_processes(process)
    written = [path for path in process.workdir.rglob("*") if path.is_file()]
    written += [path for path in process.store.rglob("*") if path.is_file() and process.job_id in str(path)]
    secrets = (HF_TOKEN, TOKEN, CLAIM_TOKEN, service.claims[0])
    assert not [path for path in written if any(secret.encode() in path.read_bytes() for secret in secrets)]
    assert HF_TOKEN not in json.dumps(service.batches) + json.dumps(service.results)


def test_attempt_needs_only_runtime_and_family_packages(start: Start, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for name in ("schema", "storage", "jobs/runtime", "jobs/llm"):
        shutil.copytree(SOURCE / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("jobs/__init__.py", "jobs/run.py"):
        shutil.copy(SOURCE / name, tree / name)
    importing = subprocess.run(
        [sys.executable, "-c", "import service"], cwd=tree, env={"PYTHONPATH": "."}, capture_output=True, check=False
    )
    assert importing.returncode != 0  # the tree has no other package of the project

    process = start(source=tree, held_out=[], hyperparameters={"max_steps": 1})
    assert process.wait() == 0, process.log
    assert [artifact.name for artifact in process.final_result.artifacts] == ["adapter"]


def test_importing_the_runtime_imports_no_family_and_no_ml_library() -> None:
    config = tomllib.loads((SOURCE / "pyproject.toml").read_text())
    heavy = set(config["tool"]["ruff"]["lint"]["flake8-tidy-imports"]["banned-module-level-imports"])
    code = (
        "import pkgutil, sys, jobs.runtime\n"
        "for module in pkgutil.walk_packages(jobs.runtime.__path__, 'jobs.runtime.'): __import__(module.name)\n"
        "print(*sys.modules)"
    )
    imported = subprocess.check_output([sys.executable, "-c", code], cwd=SOURCE, env={"PYTHONPATH": "."}, text=True).split()
    assert "jobs.runtime.trackers.trackio_process" in imported
    assert not [name for name in imported if name.partition(".")[0] in heavy]
    assert {name.split(".")[1] for name in imported if name.startswith("jobs.")} == {"runtime"}


def test_second_claimant_exits_without_changes(start: Start, service: FakeService) -> None:
    service.claim_status = 409
    process = start()
    assert process.wait() == 0
    assert process.result is None
    assert service.batches == service.results == []
    assert [path.name for path in process.workdir.iterdir()] == ["log"]


@pytest.mark.parametrize("status", [401, 403, 404])
def test_unknown_attempt_fails_without_changes(start: Start, service: FakeService, status: int) -> None:
    service.claim_status = status
    process = start()
    assert process.wait() == 1
    assert process.result is None
    assert str(status) in process.log
    assert "Traceback" not in process.log


def test_claim_waits_for_unavailable_service(start: Start, service: FakeService) -> None:
    service.claim_status = 503
    process = start()
    wait_for(lambda: len(service.claims) >= 2, process)
    service.claim_status = 409
    assert process.wait() == 0
    assert len(set(service.claims)) == 1  # the same claimant each time, so a claim whose response was lost can be repeated


def test_config_error_fails_quickly_with_hint(start: Start, service: FakeService) -> None:
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


def test_result_is_stored_when_service_is_unavailable(start: Start, service: FakeService) -> None:
    service.result_status = 503
    process = start(base_model_id="nobody/nothing")
    assert process.wait() == 1
    assert process.result is not None
    assert process.result.outcome == "failed"


def test_cancel_during_imports_ends_within_two_seconds(start: Start, service: FakeService) -> None:
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
def test_directive_of_claim_response_is_obeyed(start: Start, service: FakeService, directive: str, code: int, outcome: str) -> None:
    service.claim_directive = directive
    process = start()
    assert process.wait() == code, process.log
    assert process.final_result.outcome == service.results[0]["outcome"] == outcome
    assert service.batches == []


STOP_CASES = [("pause", 12, "paused", None), (signal.SIGTERM, 13, "yielded", "preempted"), (signal.SIGINT, 10, "cancelled", None)]


def request_stop(process: AttemptProcess, service: FakeService, method: str | signal.Signals) -> None:
    if isinstance(method, signal.Signals):
        process.child.send_signal(method)
    else:
        service.directive = method


@pytest.mark.parametrize(("method", "code", "outcome", "yield_reason"), STOP_CASES)
def test_stop_before_training_ends_within_two_seconds(
    start: Start, service: FakeService, method: str | signal.Signals, code: int, outcome: str, yield_reason: str | None
) -> None:
    process = start()
    wait_for(lambda: "downloading" in phases(service), process)
    request_stop(process, service, method)
    began = time.monotonic()
    assert process.wait() == code, process.log
    assert time.monotonic() - began < 2
    result = process.final_result
    assert (result.outcome, result.yield_reason, result.last_checkpoint_step, result.failure) == (outcome, yield_reason, None, None)
    assert service.results[0]["outcome"] == outcome
    assert not find_remaining_processes(process)


def test_stop_before_claim_reports_nothing(start: Start, service: FakeService) -> None:
    service.claim_status = 503
    process = start()
    wait_for(lambda: service.claims, process)
    process.child.send_signal(signal.SIGTERM)
    assert process.wait() == 13, process.log
    assert process.result is None
    assert service.results == []


# --- during training -------------------------------------------------------------------------------------------------

ENDLESS_TRAINING = {"max_steps": 100_000, "logging_steps": 1}


def latest_step(service: FakeService) -> int:
    """The latest step that was reported."""
    return max((reported["event"]["step"] for reported in service.events if reported["event"]["type"] == "metrics"), default=0)


@pytest.mark.parametrize(
    ("method", "code", "outcome", "yield_reason", "reason"),
    [("pause", 12, "paused", None, "pause"), (signal.SIGTERM, 13, "yielded", "preempted", "preempted")],
)
def test_stopped_training_saves_and_next_attempt_resumes(
    start: Start, service: FakeService, method: str | signal.Signals, code: int, outcome: str, yield_reason: str | None, reason: str
) -> None:
    process = start(hyperparameters=ENDLESS_TRAINING)
    wait_for(lambda: latest_step(service) >= 3, process)
    request_stop(process, service, method)
    assert process.wait() == code, process.log
    result, checkpoint = process.final_result, load_saved_checkpoints(process.spec)[-1]
    assert (result.outcome, result.yield_reason, result.resumed_step) == (outcome, yield_reason, None)
    assert result.last_checkpoint_step == checkpoint.step >= 3
    assert (checkpoint.reason, checkpoint.attempt) == (reason, 1)
    assert latest_step(service) == checkpoint.step  # the metrics of every step up to the checkpoint arrived
    assert not find_remaining_processes(process)

    service.directive, service.events = "continue", []
    process = start(attempt=2, hyperparameters=ENDLESS_TRAINING)
    wait_for(lambda: latest_step(service) > checkpoint.step, process)
    resumed = [reported["event"] for reported in service.events if reported["event"]["type"] == "checkpoint_restored"]
    assert [(event["step"], event["from_attempt"]) for event in resumed] == [(checkpoint.step, 1)]
    process.child.send_signal(signal.SIGINT)
    assert process.wait() == 10, process.log
    assert process.final_result.resumed_step == checkpoint.step


ONE_LONG_STEP = {"max_steps": 1, "batch_size": 24, "max_seq_length": 2048}
LONG_ROWS = [{"text": "it returns a list of files " * 300}] * 24  # one step takes half a minute


@pytest.mark.parametrize("method", ["cancel", signal.SIGINT])
def test_cancel_during_long_step_ends_within_two_seconds(start: Start, service: FakeService, method: str | signal.Signals) -> None:
    process = start(train=LONG_ROWS, held_out=[], dataset_type="text", hyperparameters=ONE_LONG_STEP)
    wait_for(lambda: "training" in phases(service), process)
    time.sleep(1.5)  # well inside the step
    began = time.monotonic()
    request_stop(process, service, method)
    assert process.wait() == 10, process.log
    assert time.monotonic() - began < 2
    assert process.final_result.outcome == "cancelled"
    assert not find_remaining_processes(process)


def test_preemption_during_long_step_still_reports_result(start: Start, service: FakeService) -> None:
    process = start(train=LONG_ROWS, held_out=[], dataset_type="text", hyperparameters=ONE_LONG_STEP)
    wait_for(lambda: "training" in phases(service), process)
    time.sleep(1.5)
    began = time.monotonic()
    process.child.send_signal(signal.SIGTERM)
    assert process.wait() == 13, process.log
    assert time.monotonic() - began < 10
    assert (process.final_result.outcome, process.final_result.yield_reason) == ("yielded", "preempted")
    assert service.results[0]["outcome"] == "yielded"


def test_sigterm_with_cancel_directive_saves_nothing(start: Start, service: FakeService) -> None:
    process = start(
        train=LONG_ROWS, held_out=[], dataset_type="text", hyperparameters=ONE_LONG_STEP, environment={"JOB_REPORT_INTERVAL_S": "60"}
    )
    wait_for(lambda: "training" in phases(service), process)
    service.directive = "cancel"
    began = time.monotonic()
    process.child.send_signal(signal.SIGTERM)
    assert process.wait() == 10, process.log
    assert time.monotonic() - began < 2
    assert process.final_result.outcome == "cancelled"


def test_superseded_attempt_exits_without_writing(start: Start, service: FakeService) -> None:
    process = start(train=LONG_ROWS, held_out=[], dataset_type="text", hyperparameters=ONE_LONG_STEP)
    wait_for(lambda: "downloading" in phases(service), process)
    service.events_status = 409
    began = time.monotonic()
    assert process.wait() == 11, process.log
    assert time.monotonic() - began < 2
    assert process.result is None
    assert service.results == []


def test_attempt_yields_before_its_time_limit(start: Start, service: FakeService) -> None:
    began = time.monotonic()
    process = start(environment={"JOB_TIME_LIMIT_S": "1"})
    assert process.wait() == 13
    assert time.monotonic() - began < 10  # most of it is startup
    result = process.final_result
    assert (result.outcome, result.yield_reason, result.failure) == ("yielded", "time_slice", None)
    assert service.results[0]["outcome"] == "yielded"


SLOW_TRACKER_SCRIPT = """
import sys, time
from jobs.runtime.attempt import Attempt
from jobs.runtime.settings import read_settings

class Slow:
    name, run_id = "slow", None
    def finish(self, *, succeeded, timeout_s):
        print("finishing", flush=True)
        time.sleep(60)

attempt = Attempt(read_settings())
attempt.claim()
attempt._trackers.append(Slow())
sys.exit(attempt.finish("completed"))
"""


def test_cancel_during_tracker_shutdown_keeps_completed_result(start: Start, service: FakeService) -> None:
    process = start(program=["-c", SLOW_TRACKER_SCRIPT])
    wait_for(lambda: "finishing" in process.log, process)
    began = time.monotonic()
    process.child.send_signal(signal.SIGINT)
    assert process.wait() == 0, process.log
    assert time.monotonic() - began < 2
    assert process.final_result.outcome == service.results[0]["outcome"] == "completed"


def test_undelivered_events_do_not_fail_training(start: Start, service: FakeService) -> None:
    service.events_status = 503
    process = start(held_out=[], hyperparameters={"max_steps": 1})
    assert process.wait() == 0, process.log
    assert service.events == []
    assert process.result is not None
    assert process.result.outcome == "completed"

"""The Cloud Run launcher beyond the contract: the exact request, and the meaning of everything that Cloud Run may answer.

The client library is the real one; it talks to the emulator, or the tests build the messages.
"""

# The library's operations are typed as if they might have no result.
# pyright: reportOptionalMemberAccess=false

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from google.cloud import run_v2
from google.rpc import code_pb2, status_pb2
from google.rpc.error_details_pb2 import ErrorInfo, QuotaFailure
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.loopback.cloud_run.executions import CANCELLED, EXIT_ERROR, MEMORY_LIMIT, TIMEOUT
from infra.loopback.cloud_run.server import CloudRun
from infra.loopback.proxy import Proxy
from service.adapters.launchers.cloud_run.exit_reasons import classify_exit
from service.adapters.launchers.cloud_run.launcher import CloudRunLauncher
from service.adapters.launchers.cloud_run.render import Deployment, attempt_time_limit_s, build_run_job_request
from service.core.errors import LaunchFailed, Unavailable
from service.core.ports import ExitReason, LaunchRequest
from storage.deadline import deadline

GOLDEN = Path(__file__).parent / "golden/run_job_request.json"
JOB = "projects/demo/locations/here/jobs/tunesmith-cpu"
CODE = grpc.StatusCode
# Prints its environment, then behaves as BEHAVIOR and EXIT say.
ATTEMPT_SCRIPT = """
import json, os, sys, time
print(json.dumps(dict(os.environ)), *sys.argv[1:], flush=True)
behavior = os.environ.get("BEHAVIOR", "end")
if behavior == "sleep": time.sleep(60)
sys.exit(int(os.environ.get("EXIT", "0")))
"""


@pytest.fixture
def cloud_run(tmp_path: Path) -> Iterator[CloudRun]:
    with CloudRun(tmp_path, {"llm": [sys.executable, "-c", ATTEMPT_SCRIPT]}, environment={"INHERITED": "yes"}, grace_s=0.2) as cloud_run:
        cloud_run.create_job(JOB, "llm")
        yield cloud_run


@pytest.fixture
def launcher(cloud_run: CloudRun) -> Iterator[CloudRunLauncher]:
    launcher = make_launcher(cloud_run.host)
    yield launcher
    launcher.close()


def make_launcher(emulator_host: str | None, **changes: Any) -> CloudRunLauncher:
    options = {"time_limit_s": 600, "profiles": ("cpu",), "max_concurrent_jobs": 2, "service_audience": None}
    where = {"project_id": "demo", "region": "here", "service_url": "https://tunesmith.example"}
    return CloudRunLauncher(**where, **options | changes, emulator_host=emulator_host)


def make_launch_request(name: str = "job-1.1", hardware: str | None = None, **environment: str) -> LaunchRequest:
    defaults = {"JOB_ID": "job-1", "JOB_ATTEMPT": "1", "JOB_TOKEN": "a token of this attempt", "JOB_SPEC_STORE_URL": "gs://demo-configs"}
    return LaunchRequest(name=name, job_id="job-1", attempt=1, environment=defaults | environment, profile=hardware)


def make_deployment(**changes: Any) -> Deployment:
    facts = {
        "project_id": "demo",
        "region": "europe-west4",
        "default_profile": "l4",
        "service_url": "https://tunesmith.example",
        "service_audience": "https://tunesmith.example",
        "time_limit_s": 3600,
    }
    return Deployment(**facts | changes)


def wait_until(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not hold in time"
        time.sleep(0.01)


# --- the request ----------------------------------------------------------------------------------------------------


def test_run_job_request_matches_golden_file() -> None:
    assert render(build_run_job_request(make_launch_request(), make_deployment())) == json.loads(GOLDEN.read_text())


def test_environment_order_does_not_change_request() -> None:
    launch_request = make_launch_request()
    environment = dict(reversed(list(launch_request.environment.items())))
    reversed_order = replace(launch_request, environment=environment)
    assert build_run_job_request(launch_request, make_deployment()) == build_run_job_request(reversed_order, make_deployment())


def test_hardware_selects_cloud_run_job() -> None:
    request = build_run_job_request(make_launch_request(hardware="rtx-pro-6000"), make_deployment())
    assert request.name == "projects/demo/locations/europe-west4/jobs/tunesmith-rtx-pro-6000"


def test_no_audience_sets_no_audience_variable() -> None:
    request = build_run_job_request(make_launch_request(), make_deployment(service_audience=None))
    assert "SERVICE_AUDIENCE" not in {variable.name for variable in request.overrides.container_overrides[0].env}


@pytest.mark.parametrize(("limit_s", "own_s"), [(3600, 3480), (43_200, 43_080), (600, 540), (120, 108)])
def test_attempt_time_limit_is_shorter_than_cloud_run_timeout(limit_s: int, own_s: int) -> None:
    assert attempt_time_limit_s(limit_s) == own_s


def test_unknown_profile_is_rejected() -> None:
    with pytest.raises(ValueError, match="no hardware profile h100; known: l4, rtx-pro-6000, cpu"):
        make_launcher("127.0.0.1:1", profiles=("l4", "h100"))


def render(request: run_v2.RunJobRequest) -> Any:
    return json.loads(run_v2.RunJobRequest.to_json(request, always_print_fields_with_no_presence=False))


# --- launching ----------------------------------------------------------------------------------------


def test_handle_is_full_execution_name(launcher: CloudRunLauncher) -> None:
    handle = launcher.launch(make_launch_request())
    assert handle.startswith(f"{JOB}/executions/tunesmith-cpu-")


def test_launch_on_removed_profile_fails(launcher: CloudRunLauncher) -> None:
    with pytest.raises(LaunchFailed, match="hardware 'l4' is no longer available"):
        launcher.launch(make_launch_request(hardware="l4"))


def test_lost_launch_response_is_unavailable_and_attempt_is_found(launcher: CloudRunLauncher, cloud_run: CloudRun) -> None:
    cloud_run.drop_next_response("RunJob")
    with pytest.raises(Unavailable):
        launcher.launch(make_launch_request(BEHAVIOR="sleep"))
    assert cloud_run.calls.count("RunJob") == 1  # the library does not retry
    handle = cloud_run.executions()[0].name
    assert launcher.find_handle("job-1.1") == handle
    assert launcher.check(handle) == "running"


def test_find_prefers_running_execution_of_same_name(launcher: CloudRunLauncher) -> None:
    working = launcher.launch(make_launch_request(BEHAVIOR="sleep"))
    ended = launcher.launch(make_launch_request(BEHAVIOR="end"))
    wait_until(lambda: launcher.check(ended) == "ended")
    assert launcher.find_handle("job-1.1") == working


def test_find_searches_later_pages(launcher: CloudRunLauncher, cloud_run: CloudRun) -> None:
    cloud_run.create_job(JOB, "a missing image")  # so that no process is started
    oldest = launcher.launch(make_launch_request("job-0.1"))
    for number in range(1, 103):
        launcher.launch(make_launch_request(f"job-{number}.1"))
    assert launcher.find_handle("job-0.1") == oldest
    assert cloud_run.calls.count("ListExecutions") == 2


def test_profile_without_cloud_run_job_has_no_executions(cloud_run: CloudRun) -> None:
    launcher = make_launcher(cloud_run.host, profiles=("l4", "cpu"))
    handle = launcher.launch(make_launch_request(hardware="cpu", BEHAVIOR="sleep"))
    assert launcher.find_handle("job-1.1") == handle
    launcher.close()


def test_many_threads_share_one_connection(launcher: CloudRunLauncher) -> None:
    together = threading.Barrier(8)

    def launch(number: int) -> str:
        together.wait()
        return launcher.launch(make_launch_request(f"job-{number}.1"))

    with ThreadPoolExecutor(8) as pool:
        handles = list(pool.map(launch, range(8)))
    assert len(set(handles)) == 8


def test_close_keeps_attempts_running(launcher: CloudRunLauncher) -> None:
    handle = launcher.launch(make_launch_request(BEHAVIOR="sleep"))
    launcher.close()
    assert launcher.check(handle) == "running"


def test_close_releases_connection(launcher: CloudRunLauncher, cloud_run: CloudRun) -> None:
    port = int(cloud_run.host.partition(":")[2])

    def connections() -> int:
        return sum(1 for line in psutil.Process().net_connections("tcp") if line.raddr and line.raddr.port == port)

    launcher.launch(make_launch_request())
    assert connections() == 1
    launcher.close()
    wait_until(lambda: connections() == 0)


# --- launch errors --------------------------------------------------------------------------------------------------------

QUOTA = QuotaFailure(violations=[QuotaFailure.Violation(quota_id="NvidiaL4GpuAllocNoZonalRedundancyPerProjectRegion", quota_value=0)])
NO_PERMISSION = ErrorInfo(reason="IAM_PERMISSION_DENIED", domain="iam.googleapis.com", metadata={"permission": "run.jobs.run"})
DISABLED = ErrorInfo(reason="SERVICE_DISABLED", domain="googleapis.com", metadata={"service": "run.googleapis.com"})
NO_GPU_QUOTA = "spec.template.spec.parallelism: You do not have quota for using GPUs without zonal redundancy."
MEMORY_QUOTA = "Max instances must be 0.\n\nQuota violated:\nMemAllocPerProjectRegion requested: 85899345920 allowed: 42949672960"
REFUSALS = {
    "role": (
        (CODE.PERMISSION_DENIED, f"Permission 'run.jobs.runWithOverrides' denied on resource '{JOB}' (or resource may not exist)."),
        (LaunchFailed, "run.jobs.runWithOverrides", "roles/run.jobsExecutorWithOverrides", "gcloud run jobs add-iam-policy-binding"),
    ),
    "role, in the details": (
        (CODE.PERMISSION_DENIED, "The caller does not have permission", NO_PERMISSION),
        (LaunchFailed, "run.jobs.run", "roles/run.jobsExecutorWithOverrides"),
    ),
    "acting as the job's account": (
        (
            CODE.PERMISSION_DENIED,
            "Permission 'iam.serviceaccounts.actAs' denied on service account tunesmith-job@demo.",
        ),
        (LaunchFailed, "roles/iam.serviceAccountUser", "gcloud iam service-accounts add-iam-policy-binding tunesmith-job@demo"),
    ),
    "api, in the details": (
        (CODE.PERMISSION_DENIED, "Cloud Run Admin API has been disabled", DISABLED),
        (LaunchFailed, "gcloud services enable run.googleapis.com --project=demo"),
    ),
    "api, in the message": (
        (CODE.PERMISSION_DENIED, "Cloud Run Admin API has not been used in project 123 before or it is disabled. Enable it by visiting …"),
        (LaunchFailed, "gcloud services enable run.googleapis.com"),
    ),
    "billing": ((CODE.PERMISSION_DENIED, "…", ErrorInfo(reason="BILLING_DISABLED")), (LaunchFailed, "billing account")),
    "wrong project": ((CODE.PERMISSION_DENIED, "…", ErrorInfo(reason="CONSUMER_INVALID")), (LaunchFailed, "no project demo", "PROJECT_ID")),
    "no job": ((CODE.NOT_FOUND, "Resource 'tunesmith-cpu' of kind 'JOB' does not exist."), (LaunchFailed, "tunesmith-cpu", "make deploy")),
    "bad argument": ((CODE.INVALID_ARGUMENT, "timeout is too long"), (LaunchFailed, "timeout is too long", "infra/terraform")),
    "quota, in the details": (
        (CODE.RESOURCE_EXHAUSTED, "Quota exceeded", QUOTA),
        (
            Unavailable,
            "NvidiaL4GpuAllocNoZonalRedundancyPerProjectRegion",
            "https://console.cloud.google.com/iam-admin/quotas?project=demo",
        ),
    ),
    "quota, in the message": ((CODE.FAILED_PRECONDITION, MEMORY_QUOTA), (Unavailable, "MemAllocPerProjectRegion", "quotas?project=demo")),
    "quota, as a bad argument": ((CODE.INVALID_ARGUMENT, NO_GPU_QUOTA), (Unavailable, "CpuAllocPerProjectRegion", "zonal redundancy")),
    "quota of requests": (
        (CODE.RESOURCE_EXHAUSTED, "…", ErrorInfo(reason="RATE_LIMIT_EXCEEDED", metadata={"quota_limit": "RunRequestsPerMinute"})),
        (Unavailable, "RunRequestsPerMinute"),
    ),
    "unknown caller": ((CODE.UNAUTHENTICATED, "invalid credentials"), (Unavailable, "gcloud auth application-default login")),
    "precondition": ((CODE.FAILED_PRECONDITION, "the job is being updated"), (Unavailable, "being updated")),
    "unavailable": ((CODE.UNAVAILABLE, "try again"), (Unavailable, "try again")),
    "internal": ((CODE.INTERNAL, "oops"), (Unavailable, "oops")),
    "aborted": ((CODE.ABORTED, "another change is under way"), (Unavailable, "another change")),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_launch_error_names_cause_and_fix(case: str, cloud_run: CloudRun, launcher: CloudRunLauncher) -> None:
    answer, (kind, *words) = REFUSALS[case]
    cloud_run.fail_next("RunJob", *answer)  # type: ignore[arg-type]
    with pytest.raises((LaunchFailed, Unavailable)) as refusal:
        launcher.launch(make_launch_request())
    assert type(refusal.value) is kind
    text = f"{refusal.value.message} {refusal.value.hint}"
    assert not [word for word in words if str(word) not in text], text
    assert "\n" not in text
    assert "a token of this attempt" not in text
    assert cloud_run.executions() == []


def test_missing_cloud_run_job_fails_launch(cloud_run: CloudRun) -> None:
    launcher = make_launcher(cloud_run.host, profiles=("l4",))
    with pytest.raises(LaunchFailed, match="no Cloud Run job tunesmith-l4 in project demo, region here"):
        launcher.launch(make_launch_request())
    launcher.close()


def test_missing_credentials_error_names_login_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "nowhere.json"))
    launcher = make_launcher(None)
    with pytest.raises(Unavailable) as refusal:
        launcher.launch(make_launch_request())
    assert "gcloud auth application-default login" in refusal.value.hint
    assert launcher.check(f"{JOB}/executions/x") == "unknown"


@pytest.mark.parametrize(
    ("method", "ask"),
    [
        ("ListExecutions", lambda launcher: launcher.find_handle("job-1.1")),
        ("CancelExecution", lambda launcher: launcher.cancel(f"{JOB}/executions/x", force=True)),
        ("GetExecution", lambda launcher: launcher.get_exit_reason(f"{JOB}/executions/x")),
    ],
)
def test_missing_role_outside_launch_is_retryable(
    method: str, ask: Callable[[CloudRunLauncher], object], cloud_run: CloudRun, launcher: CloudRunLauncher
) -> None:
    cloud_run.fail_next(method, CODE.PERMISSION_DENIED, "The caller does not have permission")
    with pytest.raises(Unavailable) as refusal:
        ask(launcher)
    assert "add-iam-policy-binding tunesmith-cpu" in refusal.value.hint
    assert "roles/run." in refusal.value.hint


# --- no answer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["cut", "hang", "reset"])
def test_unresponsive_api_is_unavailable_within_deadline_not_ended(fault: str, cloud_run: CloudRun) -> None:
    with Proxy("127.0.0.1", int(cloud_run.host.partition(":")[2])) as line:
        launcher = make_launcher(line.address)
        handle = launcher.launch(make_launch_request(BEHAVIOR="sleep"))
        getattr(line, fault)()
        for ask in (
            lambda: launcher.launch(make_launch_request("job-2.1")),
            lambda: launcher.find_handle("job-1.1"),
            lambda: launcher.cancel(handle, force=False),
            lambda: launcher.get_exit_reason(handle),
        ):
            began = time.monotonic()
            with deadline(0.2), pytest.raises(Unavailable):
                ask()
            assert time.monotonic() - began < 1
        with deadline(0.2):
            assert launcher.check(handle) == "unknown"
        line.restore()
        wait_until(lambda: launcher.check(handle) == "running", 10)
        launcher.close()


@pytest.mark.parametrize("code", [CODE.UNAVAILABLE, CODE.INTERNAL, CODE.DEADLINE_EXCEEDED, CODE.PERMISSION_DENIED, CODE.UNAUTHENTICATED])
def test_api_error_is_unknown_not_ended(code: grpc.StatusCode, cloud_run: CloudRun, launcher: CloudRunLauncher) -> None:
    handle = launcher.launch(make_launch_request(BEHAVIOR="sleep"))
    cloud_run.fail_next("GetExecution", code, "…")
    assert launcher.check(handle) == "unknown"


def test_missing_execution_counts_as_ended(launcher: CloudRunLauncher) -> None:
    gone = f"{JOB}/executions/tunesmith-cpu-xxxxx"
    assert launcher.check(gone) == "ended"
    assert launcher.get_exit_reason(gone) is None
    launcher.cancel(gone, force=True)


def test_foreign_handle_counts_as_ended(cloud_run: CloudRun, launcher: CloudRunLauncher) -> None:
    assert launcher.check("4711@12.50") == "ended"
    assert launcher.get_exit_reason("4711@12.50") is None
    launcher.cancel("4711@12.50", force=True)
    assert "4711" in launcher.log_location("4711@12.50")
    assert cloud_run.calls == []


def test_cancel_is_idempotent(launcher: CloudRunLauncher) -> None:
    handle = launcher.launch(make_launch_request(BEHAVIOR="sleep"))
    launcher.cancel(handle, force=False)
    launcher.cancel(handle, force=True)
    wait_until(lambda: launcher.check(handle) == "ended")
    launcher.cancel(handle, force=True)


def test_log_location_names_execution(launcher: CloudRunLauncher) -> None:
    location = launcher.log_location(f"{JOB}/executions/tunesmith-cpu-abcde")
    assert """labels."run.googleapis.com/execution_name"="tunesmith-cpu-abcde"' --project=demo""" in location
    assert "https://console.cloud.google.com/run/jobs/executions/details/here/tunesmith-cpu-abcde/tasks?project=demo" in location


# --- exit reasons ----------------------------------------------------------------------------------------------------

State, Common, Reason = run_v2.Condition.State, run_v2.Condition.CommonReason, run_v2.Condition.ExecutionReason
FAILED = State.CONDITION_FAILED


def make_execution(message: str = "", state: int = FAILED, **reasons: Any) -> run_v2.Execution:
    """A finished execution with one condition."""
    counts = {name: reasons.pop(name) for name in ("cancelled_count", "delete_time") if name in reasons}
    condition = run_v2.Condition(type_="Completed", state=state, message=message, **reasons)
    return run_v2.Execution(name=f"{JOB}/executions/x", completion_time=datetime.now(UTC), conditions=[condition], **counts)


def make_task(exit_code: int = 0, term_signal: int = 0, code: int = 0, message: str = "") -> run_v2.Task:
    status = status_pb2.Status(code=code, message=message)
    return run_v2.Task(last_attempt_result=run_v2.TaskAttemptResult(exit_code=exit_code, term_signal=term_signal, status=status))


def task_failure_message(words: str) -> str:
    """Cloud Run's message for a failed task."""
    return f"Task tunesmith-l4-abcde-task0 failed with message: {words}"


NON_ZERO_EXIT = Reason.NON_ZERO_EXIT_CODE
EXIT_CASES: dict[str, tuple[run_v2.Execution, run_v2.Task | None, str, bool]] = {
    "exit code": (
        make_execution(task_failure_message(EXIT_ERROR), execution_reason=NON_ZERO_EXIT),
        make_task(exit_code=3),
        "internal",
        False,
    ),
    "exit code, task not seen": (make_execution(task_failure_message(EXIT_ERROR), execution_reason=NON_ZERO_EXIT), None, "internal", False),
    "exit code with a status": (
        make_execution(task_failure_message(EXIT_ERROR)),
        make_task(exit_code=1, code=code_pb2.INTERNAL),
        "internal",
        False,
    ),
    "crash": (
        make_execution(task_failure_message(EXIT_ERROR), execution_reason=NON_ZERO_EXIT),
        make_task(term_signal=11),
        "internal",
        False,
    ),
    "crash, by exit code": (
        make_execution(task_failure_message(EXIT_ERROR), execution_reason=NON_ZERO_EXIT),
        make_task(exit_code=139),
        "internal",
        False,
    ),
    "memory": (make_execution(task_failure_message(MEMORY_LIMIT)), make_task(), "out_of_memory", False),
    "memory, as gcloud shows it": (
        make_execution(f"Task x-task0 failed with exit code: 0 and message:\n{MEMORY_LIMIT}"),
        None,
        "out_of_memory",
        False,
    ),
    "memory, by exit code": (
        make_execution(task_failure_message(EXIT_ERROR), execution_reason=NON_ZERO_EXIT),
        make_task(exit_code=137),
        "out_of_memory",
        False,
    ),
    "memory, by signal": (make_execution(task_failure_message(EXIT_ERROR)), make_task(term_signal=9), "out_of_memory", False),
    "timeout": (make_execution(task_failure_message(TIMEOUT)), make_task(term_signal=9), "timeout", False),
    "timeout, by status": (make_execution("…"), make_task(code=code_pb2.DEADLINE_EXCEEDED), "timeout", False),
    "timeout, as the log says": (
        make_execution("Terminating task because it has reached the maximum timeout of 3600 seconds."),
        None,
        "timeout",
        False,
    ),
    "cancelled": (make_execution(CANCELLED, execution_reason=Reason.CANCELLED), make_task(term_signal=9), "lost", False),
    "cancelled, by count": (make_execution("", cancelled_count=1), make_task(term_signal=15), "lost", False),
    "deleted": (make_execution("", execution_reason=Reason.DELETED), None, "lost", False),
    "deleted, by time": (make_execution("", delete_time=datetime.now(UTC)), None, "lost", False),
    "image missing": (make_execution("", reason=Common.CONTAINER_MISSING), None, "launch_failed", False),
    "image missing, in the message": (
        make_execution("Image 'eu.pkg.dev/demo/llm@sha256:0' not found."),
        None,
        "launch_failed",
        False,
    ),
    "image not readable": (make_execution("", reason=Common.CONTAINER_PERMISSION_DENIED), None, "launch_failed", False),
    "image not readable, in the message": (
        make_execution("Google Cloud Run Service Agent must have permission to read the image, llm."),
        None,
        "launch_failed",
        False,
    ),
    "image forbidden": (make_execution("", reason=Common.CONTAINER_IMAGE_UNAUTHORIZED), None, "launch_failed", False),
    "image not checked": (make_execution("", reason=Common.CONTAINER_IMAGE_AUTHORIZATION_CHECK_FAILED), None, "launch_failed", False),
    "secret": (make_execution("", reason=Common.SECRETS_ACCESS_CHECK_FAILED), None, "launch_failed", False),
    "key": (make_execution("", reason=Common.ENCRYPTION_KEY_PERMISSION_DENIED), None, "launch_failed", False),
    "key missing": (make_execution("", reason=Common.ENCRYPTION_KEY_CHECK_FAILED), None, "launch_failed", False),
    "network": (make_execution("", reason=Common.VPC_NETWORK_NOT_FOUND), None, "launch_failed", False),
    "quota": (make_execution("Quota exceeded for total allowable count of GPUs per project per region."), None, "launch_failed", True),
    "quota, by status": (make_execution(""), make_task(code=code_pb2.RESOURCE_EXHAUSTED), "launch_failed", True),
    "did not start in time": (make_execution("", reason=Common.PROGRESS_DEADLINE_EXCEEDED), None, "launch_failed", True),
    "maintenance, by signal": (
        make_execution(task_failure_message(EXIT_ERROR), execution_reason=NON_ZERO_EXIT),
        make_task(term_signal=15),
        "preempted",
        True,
    ),
    "maintenance, by exit code": (
        make_execution(task_failure_message(EXIT_ERROR), execution_reason=NON_ZERO_EXIT),
        make_task(exit_code=143),
        "preempted",
        True,
    ),
    "maintenance, in the message": (
        make_execution(task_failure_message("The instance was terminated for maintenance.")),
        None,
        "preempted",
        True,
    ),
    "internal": (make_execution("", reason=Common.INTERNAL), None, "preempted", True),
    "internal, by status": (make_execution(""), make_task(code=code_pb2.INTERNAL), "preempted", True),
    "internal, of polling": (make_execution("", execution_reason=Reason.JOB_STATUS_SERVICE_POLLING_ERROR), None, "preempted", True),
    "unknown message": (make_execution("The moon is in the wrong phase."), make_task(), "lost", False),
}


@pytest.mark.parametrize("case", EXIT_CASES)
def test_exit_cases_map_to_failure_codes(case: str) -> None:
    execution, task, code, preempted = EXIT_CASES[case]
    ended = classify_exit(execution, task)
    assert ended is not None
    assert (ended.failure.code, ended.preempted) == (code, preempted), ended
    assert ended.failure.hint
    assert "\n" not in ended.failure.message


def test_unknown_cloud_run_message_is_kept() -> None:
    ended = classify_exit(make_execution("The moon is in the wrong phase."), None)
    assert ended
    assert "The moon is in the wrong phase." in ended.failure.message


@pytest.mark.parametrize(
    "execution",
    [
        make_execution("Execution completed successfully.", State.CONDITION_SUCCEEDED),
        make_execution(),  # failed without a reason
        run_v2.Execution(conditions=[run_v2.Condition(type_="Completed", state=State.CONDITION_RECONCILING)]),
        run_v2.Execution(),
    ],
    ids=["succeeded", "no reason", "running", "new"],
)
def test_execution_without_failure_details_has_no_exit_reason(execution: run_v2.Execution) -> None:
    assert classify_exit(execution, make_task()) is None


def condition_strategy() -> st.SearchStrategy[run_v2.Condition]:
    """Any condition, including those of a later API version."""
    number = st.integers(0, 40)
    texts = st.sampled_from([EXIT_ERROR, MEMORY_LIMIT, TIMEOUT, CANCELLED, "", "quota", "maintenance"]) | st.text(max_size=20)
    why = st.sampled_from(["reason", "execution_reason", "revision_reason"])
    return st.builds(make_condition, st.sampled_from(["Completed", "Started", ""]), number, texts, why, number)


def make_condition(kind: str, state: int, message: str, why: str, number: int) -> run_v2.Condition:
    condition = run_v2.Condition.pb(run_v2.Condition(type_=kind, message=message))
    condition.state = state
    setattr(condition, why, number)
    return run_v2.Condition.wrap(condition)


@given(
    conditions=st.lists(condition_strategy(), max_size=4),
    of_task=st.lists(condition_strategy(), max_size=2),
    exit_code=st.integers(-(2**31), 2**31 - 1),
    term_signal=st.integers(-(2**31), 2**31 - 1),
    code=st.integers(0, 40),
    over=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_arbitrary_conditions_are_classified(
    conditions: list[run_v2.Condition], of_task: list[run_v2.Condition], exit_code: int, term_signal: int, code: int, over: bool
) -> None:
    execution = run_v2.Execution(conditions=conditions)
    if over:
        execution.completion_time = datetime.now(UTC)  # type: ignore[assignment]  # the library accepts Python's times
    task = make_task(exit_code, term_signal, code)
    task.conditions = of_task
    ended = classify_exit(execution, task)
    assert ended is None or (ended.failure.message and "\n" not in ended.failure.message)


def run_until_ended(launcher: CloudRunLauncher, launch_request: LaunchRequest) -> ExitReason | None:
    handle = launcher.launch(launch_request)
    wait_until(lambda: launcher.check(handle) == "ended")
    return launcher.get_exit_reason(handle)


def test_clean_exit_has_no_exit_reason(launcher: CloudRunLauncher) -> None:
    assert run_until_ended(launcher, make_launch_request()) is None


def test_exit_code_is_reported(launcher: CloudRunLauncher) -> None:
    ended = run_until_ended(launcher, make_launch_request(EXIT="3"))
    assert ended
    assert ended.failure.code == "internal"
    assert "code 3" in ended.failure.message


def test_exit_reason_falls_back_to_execution_without_task_access(launcher: CloudRunLauncher, cloud_run: CloudRun) -> None:
    cloud_run.fail_next("ListTasks", CODE.PERMISSION_DENIED, "…")
    ended = run_until_ended(launcher, make_launch_request(EXIT="3"))
    assert ended
    assert ended.failure.code == "internal"


def test_time_limit_ends_attempt(cloud_run: CloudRun) -> None:
    launcher = make_launcher(cloud_run.host, time_limit_s=0)
    ended = run_until_ended(launcher, make_launch_request(BEHAVIOR="sleep"))
    assert ended
    assert ended.failure.code == "timeout"
    launcher.close()


def test_missing_image_is_reported(launcher: CloudRunLauncher, cloud_run: CloudRun) -> None:
    cloud_run.create_job(JOB, "europe-west4-docker.pkg.dev/demo/tunesmith/llm")
    ended = run_until_ended(launcher, make_launch_request())
    assert ended
    assert ended.failure.code == "launch_failed"
    assert "make deploy" in ended.failure.hint


@pytest.mark.parametrize(("number", "code", "preempted"), [(signal.SIGTERM, "preempted", True), (signal.SIGKILL, "out_of_memory", False)])
def test_platform_signal_is_reported(launcher: CloudRunLauncher, cloud_run: CloudRun, number: int, code: str, preempted: bool) -> None:
    handle = launcher.launch(make_launch_request(BEHAVIOR="sleep"))
    wait_until(cloud_run.output_path(handle).exists)
    wait_until(lambda: cloud_run.output_path(handle).stat().st_size > 0)
    cloud_run.signal_execution(handle, number)
    wait_until(lambda: launcher.check(handle) == "ended")
    ended = launcher.get_exit_reason(handle)
    assert ended
    assert (ended.failure.code, ended.preempted) == (code, preempted)


def test_external_cancel_is_reported(launcher: CloudRunLauncher) -> None:
    handle = launcher.launch(make_launch_request(BEHAVIOR="sleep"))
    launcher.cancel(handle, force=False)
    wait_until(lambda: launcher.check(handle) == "ended")
    ended = launcher.get_exit_reason(handle)
    assert ended
    assert ended.failure.code == "lost"
    assert "cancelled in Cloud Run" in ended.failure.message


# --- the emulator ----------------------------------------------------------------------------------------------------


def test_child_environment_holds_only_given_variables(launcher: CloudRunLauncher, cloud_run: CloudRun) -> None:
    handle = launcher.launch(make_launch_request())
    wait_until(lambda: launcher.check(handle) == "ended")
    execution = cloud_run.executions()[0]
    shown = {variable.name: variable.value for variable in execution.template.containers[0].env}
    assert shown["JOB_WORKDIR"] == "/tmp/attempt"
    seen, _, arguments = cloud_run.output_path(handle).read_text().rpartition("}")
    environment = json.loads(seen + "}")
    assert arguments.split() == ["--name", "job-1.1"]
    platform = {"CLOUD_RUN_JOB", "CLOUD_RUN_EXECUTION", "CLOUD_RUN_TASK_INDEX", "CLOUD_RUN_TASK_ATTEMPT", "CLOUD_RUN_TASK_COUNT"}
    assert set(environment) - {"LC_CTYPE"} == set(shown) | platform | {"INHERITED"}
    assert environment["CLOUD_RUN_EXECUTION"] == handle.rpartition("/")[2]
    assert environment["JOB_WORKDIR"] != "/tmp/attempt"  # all executions share /tmp here


def test_emulator_supports_job_create_update_delete(cloud_run: CloudRun) -> None:
    from google.cloud.run_v2.services.jobs.transports import JobsGrpcTransport

    with grpc.insecure_channel(cloud_run.host) as channel:
        client = run_v2.JobsClient(transport=JobsGrpcTransport(channel=channel))
        container = run_v2.Container(name="attempt", image="llm")
        job = run_v2.Job(template=run_v2.ExecutionTemplate(template=run_v2.TaskTemplate(containers=[container], max_retries=1)))
        parent = JOB.rpartition("/jobs/")[0]
        made = client.create_job(parent=parent, job=job, job_id="another").result()
        made.labels = {"profile": "another"}
        client.update_job(job=made).result()
        assert client.get_job(name=made.name).labels == {"profile": "another"}
        assert {job.name for job in client.list_jobs(parent=parent)} == {JOB, made.name}
        env = [run_v2.EnvVar(name="EXIT", value="1")]
        override = run_v2.RunJobRequest.Overrides.ContainerOverride(name="attempt", env=env)
        request = run_v2.RunJobRequest(name=made.name, overrides={"container_overrides": [override]})
        execution = client.run_job(request).metadata.name
        wait_until(lambda: "completion_time" in cloud_run.executions()[0])
        assert cloud_run.executions()[0].retried_count == 1
        assert cloud_run.executions()[0].name == execution
        client.delete_job(name=made.name).result()
        assert [job.name for job in client.list_jobs(parent=parent)] == [JOB]


def test_stopping_emulator_ends_children(tmp_path: Path) -> None:
    with CloudRun(tmp_path, {"llm": [sys.executable, "-c", ATTEMPT_SCRIPT]}, environment={}) as cloud_run:
        cloud_run.create_job(JOB, "llm")
        launcher = make_launcher(cloud_run.host)
        handle = launcher.launch(make_launch_request(BEHAVIOR="sleep"))
        wait_until(lambda: cloud_run.output_path(handle).exists() and cloud_run.output_path(handle).stat().st_size > 0)
        launcher.close()
        began = time.monotonic()
    assert time.monotonic() - began < 5
    assert "completion_time" in cloud_run.executions()[0]


def test_emulator_command_serves_until_sigterm(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs/__init__.py").touch()
    (tmp_path / "jobs/run.py").write_text(f"import os, pathlib\npathlib.Path('pid').write_text(str(os.getpid()))\n{ATTEMPT_SCRIPT}")
    options = ["--folder", str(tmp_path / "run"), "--python", sys.executable, "--source", str(tmp_path)]
    options += ["--job", "tunesmith-cpu", "--project", "demo", "--region", "here", "--env", "GREETING=hello"]
    with subprocess.Popen([sys.executable, "-m", "infra.loopback.cloud_run", *options], stdout=subprocess.PIPE, text=True) as served:
        assert served.stdout is not None
        host = next(word.rstrip(":") for word in served.stdout.readline().split() if word.startswith("127."))
        launcher = make_launcher(host)
        handle = launcher.launch(make_launch_request(BEHAVIOR="sleep"))
        output = tmp_path / "run" / f"{handle.rpartition('/')[2]}.log"
        wait_until(lambda: output.exists() and "GREETING" in output.read_text())
        launcher.close()
        served.send_signal(signal.SIGTERM)
        assert served.wait(10) == 0
    assert not Path("/proc", (tmp_path / "pid").read_text()).exists()

"""Why a Cloud Run execution ended: the failure for every condition, exit code and signal that Cloud Run may report."""

import signal
from datetime import UTC, datetime
from typing import Any

import grpc
import pytest
from google.cloud import run_v2
from google.rpc import code_pb2, status_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.loopback.cloud_run.executions import CANCELLED, EXIT_ERROR, MEMORY_LIMIT, TIMEOUT
from infra.loopback.cloud_run.server import CloudRun
from service.adapters.launchers.cloud_run.exit_reasons import classify_exit
from service.adapters.launchers.cloud_run.launcher import CloudRunLauncher
from service.core.ports import ExitReason, LaunchRequest
from tests.contract.cloud_run_fixture import JOB, make_launch_request, make_launcher
from tests.waiting import wait_until

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


def task_failure_message(message: str) -> str:
    """Cloud Run's message for a failed task."""
    return f"Task tunesmith-l4-abcde-task0 failed with message: {message}"


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
    reason = classify_exit(execution, task)
    assert reason is not None
    assert (reason.failure.code, reason.preempted) == (code, preempted), reason
    assert reason.failure.hint
    assert "\n" not in reason.failure.message


def test_unknown_cloud_run_message_is_kept() -> None:
    reason = classify_exit(make_execution("The moon is in the wrong phase."), None)
    assert reason
    assert "The moon is in the wrong phase." in reason.failure.message


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
    reason_field = st.sampled_from(["reason", "execution_reason", "revision_reason"])
    return st.builds(make_condition, st.sampled_from(["Completed", "Started", ""]), number, texts, reason_field, number)


def make_condition(kind: str, state: int, message: str, reason_field: str, number: int) -> run_v2.Condition:
    condition = run_v2.Condition.pb(run_v2.Condition(type_=kind, message=message))
    condition.state = state
    setattr(condition, reason_field, number)
    return run_v2.Condition.wrap(condition)


@given(
    conditions=st.lists(condition_strategy(), max_size=4),
    task_conditions=st.lists(condition_strategy(), max_size=2),
    exit_code=st.integers(-(2**31), 2**31 - 1),
    term_signal=st.integers(-(2**31), 2**31 - 1),
    code=st.integers(0, 40),
    is_finished=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_arbitrary_conditions_are_classified(
    conditions: list[run_v2.Condition],
    task_conditions: list[run_v2.Condition],
    exit_code: int,
    term_signal: int,
    code: int,
    is_finished: bool,
) -> None:
    execution = run_v2.Execution(conditions=conditions)
    if is_finished:
        execution.completion_time = datetime.now(UTC)  # type: ignore[assignment]  # the library accepts Python's times
    task = make_task(exit_code, term_signal, code)
    task.conditions = task_conditions
    reason = classify_exit(execution, task)
    assert reason is None or (reason.failure.message and "\n" not in reason.failure.message)


def run_until_ended(launcher: CloudRunLauncher, launch_request: LaunchRequest) -> ExitReason | None:
    handle = launcher.launch(launch_request)
    wait_until(lambda: launcher.check(handle) == "ended")
    return launcher.get_exit_reason(handle)


def test_clean_exit_has_no_exit_reason(launcher: CloudRunLauncher) -> None:
    assert run_until_ended(launcher, make_launch_request()) is None


def test_exit_code_is_reported(launcher: CloudRunLauncher) -> None:
    reason = run_until_ended(launcher, make_launch_request(EXIT="3"))
    assert reason
    assert reason.failure.code == "internal"
    assert "code 3" in reason.failure.message


def test_exit_reason_falls_back_to_execution_without_task_access(launcher: CloudRunLauncher, cloud_run: CloudRun) -> None:
    cloud_run.fail_next("ListTasks", grpc.StatusCode.PERMISSION_DENIED, "…")
    reason = run_until_ended(launcher, make_launch_request(EXIT="3"))
    assert reason
    assert reason.failure.code == "internal"


def test_time_limit_ends_attempt(cloud_run: CloudRun) -> None:
    launcher = make_launcher(cloud_run.host, time_limit_s=0)
    reason = run_until_ended(launcher, make_launch_request(BEHAVIOR="sleep"))
    assert reason
    assert reason.failure.code == "timeout"
    launcher.close()


def test_missing_image_is_reported(launcher: CloudRunLauncher, cloud_run: CloudRun) -> None:
    cloud_run.create_job(JOB, "europe-west4-docker.pkg.dev/demo/tunesmith/llm")
    reason = run_until_ended(launcher, make_launch_request())
    assert reason
    assert reason.failure.code == "launch_failed"
    assert "make deploy" in reason.failure.hint


@pytest.mark.parametrize(("number", "code", "preempted"), [(signal.SIGTERM, "preempted", True), (signal.SIGKILL, "out_of_memory", False)])
def test_platform_signal_is_reported(launcher: CloudRunLauncher, cloud_run: CloudRun, number: int, code: str, preempted: bool) -> None:
    handle = launcher.launch(make_launch_request(BEHAVIOR="sleep"))
    wait_until(cloud_run.output_path(handle).exists)
    wait_until(lambda: cloud_run.output_path(handle).stat().st_size > 0)
    cloud_run.signal_execution(handle, number)
    wait_until(lambda: launcher.check(handle) == "ended")
    reason = launcher.get_exit_reason(handle)
    assert reason
    assert (reason.failure.code, reason.preempted) == (code, preempted)


def test_external_cancel_is_reported(launcher: CloudRunLauncher) -> None:
    handle = launcher.launch(make_launch_request(BEHAVIOR="sleep"))
    launcher.cancel(handle, force=False)
    wait_until(lambda: launcher.check(handle) == "ended")
    reason = launcher.get_exit_reason(handle)
    assert reason
    assert reason.failure.code == "lost"
    assert "canceled in Cloud Run" in reason.failure.message

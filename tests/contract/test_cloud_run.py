"""The Cloud Run launcher beyond the contract: the exact request, launching, and every error that Cloud Run may return."""

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from google.cloud import run_v2
from google.rpc.error_details_pb2 import ErrorInfo, QuotaFailure

from infra.loopback.cloud_run.server import CloudRun
from infra.loopback.proxy import Proxy
from service.adapters.launchers.cloud_run.launcher import CloudRunLauncher
from service.adapters.launchers.cloud_run.render import Deployment, attempt_time_limit_s, build_run_job_request
from service.core.errors import LaunchFailed, NoCapacity, Unavailable
from storage.deadline import deadline
from tests.contract.cloud_run_fixture import JOB, make_launch_request, make_launcher
from tests.waiting import wait_until

GOLDEN = Path(__file__).parent / "golden/run_job_request.json"
CODE = grpc.StatusCode


def make_deployment(**changes: Any) -> Deployment:
    fields = {
        "project_id": "demo",
        "region": "europe-west4",
        "service_url": "https://tunesmith.example",
        "service_audience": "https://tunesmith.example",
        "time_limit_s": 3600,
    }
    return Deployment(**fields | changes)


# --- the request -----------------------------------------------------------------------------------------------------


def test_run_job_request_matches_golden_file() -> None:
    assert render(build_run_job_request(make_launch_request(hardware="l4"), make_deployment())) == json.loads(GOLDEN.read_text())


def test_environment_order_does_not_change_request() -> None:
    launch_request = make_launch_request()
    reversed_order = replace(launch_request, variables=dict(reversed(list(launch_request.variables.items()))))
    assert build_run_job_request(launch_request, make_deployment()) == build_run_job_request(reversed_order, make_deployment())


def test_hardware_selects_cloud_run_job() -> None:
    request = build_run_job_request(make_launch_request(hardware="rtx-pro-6000"), make_deployment())
    assert request.name == "projects/demo/locations/europe-west4/jobs/tunesmith-rtx-pro-6000"
    request = build_run_job_request(make_launch_request(hardware="l4", environment="vision"), make_deployment())
    assert request.name == "projects/demo/locations/europe-west4/jobs/tunesmith-vision-l4"


def test_no_audience_sets_no_audience_variable() -> None:
    request = build_run_job_request(make_launch_request(), make_deployment(service_audience=None))
    assert "SERVICE_AUDIENCE" not in {variable.name for variable in request.overrides.container_overrides[0].env}


@pytest.mark.parametrize(("timeout_s", "attempt_limit_s"), [(3600, 3480), (43_200, 43_080), (600, 540), (120, 108)])
def test_attempt_time_limit_is_shorter_than_cloud_run_timeout(timeout_s: int, attempt_limit_s: int) -> None:
    assert attempt_time_limit_s(timeout_s) == attempt_limit_s


def test_unknown_profile_is_rejected() -> None:
    with pytest.raises(ValueError, match="no hardware profile h100; known: l4, rtx-pro-6000, cpu"):
        make_launcher("127.0.0.1:1", profiles=("l4", "h100"))


def render(request: run_v2.RunJobRequest) -> Any:
    return json.loads(run_v2.RunJobRequest.to_json(request, always_print_fields_with_no_presence=False))


# --- launching -------------------------------------------------------------------------------------------------------


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
    running = launcher.launch(make_launch_request(BEHAVIOR="sleep"))
    ended = launcher.launch(make_launch_request(BEHAVIOR="end"))
    wait_until(lambda: launcher.check(ended) == "ended")
    assert launcher.find_handle("job-1.1") == running


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
    barrier = threading.Barrier(8)

    def launch(number: int) -> str:
        barrier.wait()
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
        return sum(1 for connection in psutil.Process().net_connections("tcp") if connection.raddr and connection.raddr.port == port)

    launcher.launch(make_launch_request())
    assert connections() == 1
    launcher.close()
    wait_until(lambda: connections() == 0)


# --- launch errors ---------------------------------------------------------------------------------------------------

QUOTA = QuotaFailure(violations=[QuotaFailure.Violation(quota_id="NvidiaL4GpuAllocNoZonalRedundancyPerProjectRegion", quota_value=0)])
NO_PERMISSION = ErrorInfo(reason="IAM_PERMISSION_DENIED", domain="iam.googleapis.com", metadata={"permission": "run.jobs.run"})
DISABLED = ErrorInfo(reason="SERVICE_DISABLED", domain="googleapis.com", metadata={"service": "run.googleapis.com"})
NO_GPU_QUOTA = "spec.template.spec.parallelism: You do not have quota for using GPUs without zonal redundancy."
MEMORY_QUOTA = "Max instances must be 0.\n\nQuota violated:\nMemAllocPerProjectRegion requested: 85899345920 allowed: 42949672960"
LAUNCH_ERRORS = {
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
            NoCapacity,
            "NvidiaL4GpuAllocNoZonalRedundancyPerProjectRegion",
            "https://console.cloud.google.com/iam-admin/quotas?project=demo",
        ),
    ),
    "quota, in the message": ((CODE.FAILED_PRECONDITION, MEMORY_QUOTA), (NoCapacity, "MemAllocPerProjectRegion", "quotas?project=demo")),
    "quota, as a bad argument": ((CODE.INVALID_ARGUMENT, NO_GPU_QUOTA), (NoCapacity, "CpuAllocPerProjectRegion", "zonal redundancy")),
    "quota of requests": (
        (CODE.RESOURCE_EXHAUSTED, "…", ErrorInfo(reason="RATE_LIMIT_EXCEEDED", metadata={"quota_limit": "RunRequestsPerMinute"})),
        (NoCapacity, "RunRequestsPerMinute"),
    ),
    "unknown caller": ((CODE.UNAUTHENTICATED, "invalid credentials"), (Unavailable, "gcloud auth application-default login")),
    "precondition": ((CODE.FAILED_PRECONDITION, "the job is being updated"), (Unavailable, "being updated")),
    "unavailable": ((CODE.UNAVAILABLE, "try again"), (Unavailable, "try again")),
    "internal": ((CODE.INTERNAL, "oops"), (Unavailable, "oops")),
    "aborted": ((CODE.ABORTED, "another change is under way"), (Unavailable, "another change")),
}


@pytest.mark.parametrize("case", LAUNCH_ERRORS)
def test_launch_error_names_cause_and_fix(case: str, cloud_run: CloudRun, launcher: CloudRunLauncher) -> None:
    error, (kind, *messages) = LAUNCH_ERRORS[case]
    cloud_run.fail_next("RunJob", *error)  # type: ignore[arg-type]
    with pytest.raises((LaunchFailed, Unavailable)) as excinfo:
        launcher.launch(make_launch_request())
    assert type(excinfo.value) is kind
    text = f"{excinfo.value.message} {excinfo.value.hint}"
    assert not [message for message in messages if str(message) not in text], text
    assert "\n" not in text
    assert "a token of this attempt" not in text
    assert cloud_run.executions() == []


def test_missing_cloud_run_job_fails_launch(cloud_run: CloudRun) -> None:
    launcher = make_launcher(cloud_run.host, profiles=("l4",))
    with pytest.raises(LaunchFailed, match="no Cloud Run job tunesmith-l4 in project demo, region here"):
        launcher.launch(make_launch_request(hardware="l4"))
    launcher.close()


def test_missing_credentials_error_names_login_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "nowhere.json"))
    launcher = make_launcher(None)
    with pytest.raises(Unavailable) as excinfo:
        launcher.launch(make_launch_request())
    assert "gcloud auth application-default login" in excinfo.value.hint
    assert launcher.check(f"{JOB}/executions/x") == "unknown"


@pytest.mark.parametrize(
    ("method", "call"),
    [
        ("ListExecutions", lambda launcher: launcher.find_handle("job-1.1")),
        ("CancelExecution", lambda launcher: launcher.cancel(f"{JOB}/executions/x", force=True)),
        ("GetExecution", lambda launcher: launcher.get_exit_reason(f"{JOB}/executions/x")),
    ],
)
def test_missing_role_outside_launch_is_retryable(
    method: str, call: Callable[[CloudRunLauncher], object], cloud_run: CloudRun, launcher: CloudRunLauncher
) -> None:
    cloud_run.fail_next(method, CODE.PERMISSION_DENIED, "The caller does not have permission")
    with pytest.raises(Unavailable) as excinfo:
        call(launcher)
    assert "add-iam-policy-binding tunesmith-cpu" in excinfo.value.hint
    assert "roles/run." in excinfo.value.hint


# --- no response -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["cut", "hang", "reset"])
def test_unresponsive_api_is_unavailable_within_deadline_not_ended(fault: str, cloud_run: CloudRun) -> None:
    with Proxy("127.0.0.1", int(cloud_run.host.partition(":")[2])) as proxy:
        launcher = make_launcher(proxy.address)
        handle = launcher.launch(make_launch_request(BEHAVIOR="sleep"))
        getattr(proxy, fault)()
        for call in (
            lambda: launcher.launch(make_launch_request("job-2.1")),
            lambda: launcher.find_handle("job-1.1"),
            lambda: launcher.cancel(handle, force=False),
            lambda: launcher.get_exit_reason(handle),
        ):
            started_at_s = time.monotonic()
            with deadline(0.2), pytest.raises(Unavailable):
                call()
            assert time.monotonic() - started_at_s < 1
        with deadline(0.2):
            assert launcher.check(handle) == "unknown"
        proxy.restore()
        wait_until(lambda: launcher.check(handle) == "running", 10)
        launcher.close()


@pytest.mark.parametrize("code", [CODE.UNAVAILABLE, CODE.INTERNAL, CODE.DEADLINE_EXCEEDED, CODE.PERMISSION_DENIED, CODE.UNAUTHENTICATED])
def test_api_error_is_unknown_not_ended(code: grpc.StatusCode, cloud_run: CloudRun, launcher: CloudRunLauncher) -> None:
    handle = launcher.launch(make_launch_request(BEHAVIOR="sleep"))
    cloud_run.fail_next("GetExecution", code, "…")
    assert launcher.check(handle) == "unknown"


def test_missing_execution_counts_as_ended(launcher: CloudRunLauncher) -> None:
    missing = f"{JOB}/executions/tunesmith-cpu-xxxxx"
    assert launcher.check(missing) == "ended"
    assert launcher.get_exit_reason(missing) is None
    launcher.cancel(missing, force=True)


def test_foreign_handle_is_unknown_and_left_alone(cloud_run: CloudRun, launcher: CloudRunLauncher) -> None:
    assert launcher.check("4711@12.50") == "unknown"
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

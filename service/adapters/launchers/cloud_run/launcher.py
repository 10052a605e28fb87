"""Attempts as executions of Cloud Run jobs: one job resource per hardware profile, created by Terraform, run with overrides.

Attempts outlive the service; the next service process finds them by the name in their arguments.
Retries are off in Cloud Run (`max_retries = 0` in the job resource) and in the client library: the core decides on every attempt.
"""

# The client library is generated, and loosely typed where it wraps protocol buffers and gRPC.
# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import logging
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Self

from google.api_core.exceptions import Aborted, FailedPrecondition, GoogleAPICallError, NotFound, PermissionDenied
from google.auth.exceptions import GoogleAuthError
from google.cloud import run_v2

from schema.capabilities import EnvironmentManifest
from service.adapters.launchers import LauncherDeployment
from service.adapters.launchers.cloud_run.client import Connection
from service.adapters.launchers.cloud_run.errors import translate_call_error, translate_errors, translate_launch_error
from service.adapters.launchers.cloud_run.exit_reasons import classify_exit, is_finished
from service.adapters.launchers.cloud_run.profiles import PROFILES
from service.adapters.launchers.cloud_run.render import DEFAULT_ENVIRONMENT, Deployment, build_run_job_request
from service.adapters.launchers.cloud_run.settings import CloudRunSettings
from service.adapters.launchers.manifests import list_manifests
from service.core.errors import LaunchFailed, Unavailable
from service.core.limits import Limits
from service.core.ports import ExecutionState, ExitReason, LaunchRequest
from storage.deadline import remaining_s

log = logging.getLogger(__name__)

CALL_TIMEOUT_S = 10.0  # RunJob answers in a second or two; API requests set shorter deadlines
PING_INTERVAL_S = 30.0
PING_TIMEOUT_S = 3.0
FIND_PAGE_SIZE = 100
MAX_FIND_PAGES = 10  # a region runs at most 1000 executions at once, so an execution beyond these pages has ended
EXECUTION_NAME = re.compile(r"projects/(?P<project>[^/]+)/locations/(?P<region>[^/]+)/jobs/(?P<job>[^/]+)/executions/(?P<execution>[^/]+)")

# Every call crosses a network, an execution is listed seconds after it was started, and each check is billed.
LIMITS = Limits(
    heartbeat_timeout=timedelta(seconds=120),
    cancel_grace=timedelta(seconds=20),
    kill_grace=timedelta(seconds=40),
    launch_lookup_delay=timedelta(seconds=60),
    start_timeout=timedelta(minutes=60),  # an execution may wait for a GPU
    lease=timedelta(minutes=10),
    lease_grace=timedelta(minutes=5),
)


class CloudRunLauncher:
    """Executions of the Cloud Run jobs `tunesmith-<profile>`. Handles are full execution names."""

    name = "cloud-run"
    polling_is_free = False
    limits = LIMITS

    def __init__(
        self,
        *,
        project_id: str,
        region: str,
        profiles: Sequence[str],
        environments: Path,
        service_url: str,
        service_audience: str | None,
        max_concurrent_jobs: int,
        time_limit_s: int,
        emulator_host: str | None = None,
    ) -> None:
        unknown = [name for name in profiles if name not in PROFILES]
        if unknown or not profiles:
            raise ValueError(f"no hardware profile {', '.join(unknown) or 'given'}; known: {', '.join(PROFILES)}")
        self.profiles = {name: PROFILES[name].with_time_limit(time_limit_s) for name in profiles}
        self._environments = environments
        self._deployment = Deployment(
            project_id=project_id,
            region=region,
            service_url=service_url,
            service_audience=service_audience,
            time_limit_s=time_limit_s,
        )
        self._max_concurrent_jobs = max_concurrent_jobs
        self._connection = Connection(emulator_host)
        self._answered_at = -PING_INTERVAL_S  # when Cloud Run last answered a ping, by the monotonic clock

    @classmethod
    def from_environment(cls, deployment: LauncherDeployment) -> Self:
        """The launcher with the settings in the environment. Raises ValueError for a setting that is missing or not valid."""
        settings = CloudRunSettings()  # pyright: ignore[reportCallIssue]  # pydantic fills them from the environment
        if deployment.public_url is None:
            raise ValueError("cloud-run needs TUNESMITH_PUBLIC_URL, to which attempts report")
        return cls(
            project_id=settings.project_id or "",
            region=settings.region or "",
            profiles=settings.profiles,
            environments=settings.environments,
            service_url=deployment.public_url,
            service_audience=deployment.service_audience,
            max_concurrent_jobs=settings.max_concurrent_jobs,
            time_limit_s=settings.time_limit_s,
            emulator_host=settings.emulator_host,
        )

    # --- Launcher ----------------------------------------------------------------------------------------------------

    def list_environments(self) -> Mapping[str, EnvironmentManifest]:
        """The environments whose images this deployment has built. Raises Unavailable without any."""
        manifests = list_manifests(self._environments)
        if not manifests:
            message = f"there is no manifest of an image in {self._environments}, so nothing can be trained"
            raise Unavailable(message, hint="`make deploy` builds the images with their manifests")
        return manifests

    def launch(self, launch_request: LaunchRequest) -> str:
        """Start an execution. A lost answer raises Unavailable: the core looks for the attempt's name before it retries."""
        profile, environment = launch_request.profile, launch_request.environment
        if profile not in self.profiles:
            raise LaunchFailed(f"hardware {profile!r} is no longer available", hint=f"this deployment has: {', '.join(self.profiles)}")
        request = build_run_job_request(launch_request, self._deployment)
        with translate_errors(lambda error: translate_launch_error(error, profile, environment, self._deployment)):
            operation = self._connection.open().jobs.run_job(request, retry=None, timeout=remaining_s(CALL_TIMEOUT_S))
            execution = operation.metadata
        if not isinstance(execution, run_v2.Execution) or not execution.name:
            raise Unavailable(f"Cloud Run started {launch_request.name} without returning the execution's name")
        return execution.name

    def find_handle(self, name: str) -> str | None:
        """The execution launched under the name; of several, one that is still running. Raises Unavailable."""
        for parent in self._cloud_run_jobs():
            for executions in self._iter_execution_pages(parent):
                if matching := [execution for execution in executions if _container_args(execution) == ["--name", name]]:
                    return min(matching, key=is_finished).name
        return None

    def check(self, handle: str) -> ExecutionState:
        if not EXECUTION_NAME.fullmatch(handle):
            return "unknown"  # not one of this launcher's
        try:
            return "ended" if is_finished(self._get_execution(handle)) else "running"
        except NotFound:
            return "ended"
        except (GoogleAPICallError, GoogleAuthError) as error:
            log.warning("execution could not be read", extra={"handle": handle, "error": str(error)})
            return "unknown"

    def cancel(self, handle: str, *, force: bool) -> None:  # noqa: ARG002
        """Cancel the execution. Cloud Run sends SIGTERM and, 10 s later, SIGKILL in any case, so `force` changes nothing.

        To an attempt a SIGTERM alone means preemption. It learns of the cancel from the answer to its next report; if that answer
        does not arrive, it may save a checkpoint and end with `yielded`, which the core accepts as the end of a job being cancelled.
        """
        if not EXECUTION_NAME.fullmatch(handle):
            return
        request = run_v2.CancelExecutionRequest(name=handle)
        with translate_errors(lambda error: translate_call_error(error, "run.executions.cancel", handle, self._deployment)):
            try:
                self._connection.open().executions.cancel_execution(request, retry=None, timeout=remaining_s(CALL_TIMEOUT_S))
            except (FailedPrecondition, NotFound, Aborted):
                log.info("execution has ended already or is being canceled", extra={"handle": handle})

    def count_free_slots(self, active_jobs: int) -> int:
        """Counts the active jobs of the records, which include launches that Cloud Run does not list yet."""
        return self._max_concurrent_jobs - active_jobs

    def ping(self) -> None:
        """Ask for one execution, at most every PING_INTERVAL_S: the call is billed, and health is asked for often."""
        if time.monotonic() - self._answered_at < PING_INTERVAL_S:
            return
        parent = next(self._cloud_run_jobs())
        request = run_v2.ListExecutionsRequest(parent=parent, page_size=1)
        with translate_errors(lambda error: translate_call_error(error, "run.executions.list", parent, self._deployment)):
            self._connection.open().executions.list_executions(request, retry=None, timeout=remaining_s(PING_TIMEOUT_S))
        self._answered_at = time.monotonic()

    def close(self) -> None:
        """Close the connection. Attempts go on: they report to whichever instance of the service is running."""
        self._connection.close()

    # --- ExitReasonReader, LogLocator --------------------------------------------------------------------------------

    def get_exit_reason(self, handle: str) -> ExitReason | None:
        if not EXECUTION_NAME.fullmatch(handle):
            return None
        with translate_errors(lambda error: translate_call_error(error, "run.executions.get", handle, self._deployment)):
            try:
                return classify_exit(self._get_execution(handle), self._get_task(handle))
            except NotFound:
                return None

    def log_location(self, handle: str) -> str:
        match = EXECUTION_NAME.fullmatch(handle)
        if match is None:
            return f"no Cloud Run execution is called {handle!r}"
        project, region, execution = match["project"], match["region"], match["execution"]
        entries = f'resource.type="cloud_run_job" AND labels."run.googleapis.com/execution_name"="{execution}"'
        command = f"gcloud logging read '{entries}' --project={project} --order=asc --freshness=30d --limit=1000"
        url = f"https://console.cloud.google.com/run/jobs/executions/details/{region}/{execution}/tasks?project={project}"
        return f"the output is in Cloud Logging: {command} --format='value(textPayload,jsonPayload.message)' or {url}"

    # --- calls -------------------------------------------------------------------------------------------------------

    def _cloud_run_jobs(self) -> Iterator[str]:
        """The Cloud Run jobs that this deployment may have launched attempts with."""
        environments = dict.fromkeys([DEFAULT_ENVIRONMENT, *list_manifests(self._environments)])
        for profile in self.profiles:
            for environment in environments:
                yield self._deployment.cloud_run_job_name(profile, environment)

    def _iter_execution_pages(self, parent: str) -> Iterator[Sequence[run_v2.Execution]]:
        """The executions of a Cloud Run job, newest first, page by page; none when there is no such job."""
        token = ""
        for _ in range(MAX_FIND_PAGES):
            request = run_v2.ListExecutionsRequest(parent=parent, page_size=FIND_PAGE_SIZE, page_token=token)
            with translate_errors(lambda error: translate_call_error(error, "run.executions.list", parent, self._deployment)):
                try:
                    pager = self._connection.open().executions.list_executions(request, retry=None, timeout=remaining_s(CALL_TIMEOUT_S))
                except NotFound:
                    return
            page = next(iter(pager.pages))  # only the first: each page gets a timeout of its own
            yield page.executions
            token = page.next_page_token
            if not token:
                return

    def _get_execution(self, handle: str) -> run_v2.Execution:
        request = run_v2.GetExecutionRequest(name=handle)
        return self._connection.open().executions.get_execution(request, retry=None, timeout=remaining_s(CALL_TIMEOUT_S))

    def _get_task(self, handle: str) -> run_v2.Task | None:
        """The execution's only task, which knows the exit code. None when the service may not read it: the execution alone is enough."""
        request = run_v2.ListTasksRequest(parent=handle, page_size=1)
        try:
            pager = self._connection.open().tasks.list_tasks(request, retry=None, timeout=remaining_s(CALL_TIMEOUT_S))
        except (NotFound, PermissionDenied):
            return None
        return next(iter(pager.tasks), None)


def _container_args(execution: run_v2.Execution) -> list[str]:
    return [argument for container in execution.template.containers for argument in container.args]

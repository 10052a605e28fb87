"""Attempts as executions of Cloud Run jobs: one job resource per hardware profile, made beforehand, run with overrides.

*Render, then send*: `run_job_request` is all that is sent to start an attempt, as a value. What comes back is read by two
more pure functions: `refused_launch` says why an attempt was not taken, `ended_of` why one ended.

Attempts outlive the service; the next one finds them by the name in their arguments. Handles are full execution names.
Retries are off in Cloud Run (`max_retries = 0` in the job resource) and in the client: attempts are the core's affair.
"""
# The client libraries are generated, and loosely typed where they wrap protocol buffers and gRPC.
# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import logging
import re
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from signal import SIGKILL, SIGTERM, Signals
from typing import get_args

import google.auth
import grpc
from google.api_core.exceptions import (
    Aborted,
    FailedPrecondition,
    GoogleAPICallError,
    InvalidArgument,
    NotFound,
    OutOfRange,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
)
from google.auth.exceptions import GoogleAuthError
from google.cloud import run_v2
from google.cloud.run_v2.services.executions.transports import ExecutionsGrpcTransport
from google.cloud.run_v2.services.jobs.transports import JobsGrpcTransport
from google.cloud.run_v2.services.tasks.transports import TasksGrpcTransport
from google.rpc.error_details_pb2 import QuotaFailure

from schema.job import Failure, FailureCode
from schema.training import TRAINER_TYPES
from schema.types import Modality
from service.core.errors import LaunchFailed, TunesmithError, Unavailable, Unsupported
from service.core.ports import ExecutionState, ExitReason, LaunchRequest, RuntimeCapabilities
from storage.deadline import remaining_s

log = logging.getLogger(__name__)

CONTAINER = "attempt"
WORKDIR = "/tmp/attempt"  # noqa: S108  # a container has a /tmp of its own, in memory
SHUTDOWN_RESERVE_S = 120  # of an execution's time, what an attempt is not told of: its container starts, and it ends a little late
CALL_TIMEOUT_S = 10.0  # RunJob answers in a second or two; a caller of the API has less patience than this
FIND_PAGE_SIZE = 100
MAX_FIND_PAGES = 10  # a region runs at most 1000 executions: one that is further back has ended long ago
MAX_RECONNECT_BACKOFF_MS = 2000  # left to itself gRPC waits up to two minutes before it dials again

COMPLETED = "Completed"  # the condition that speaks of the whole execution
EXECUTION_NAME = re.compile(r"projects/(?P<project>[^/]+)/locations/(?P<region>[^/]+)/jobs/(?P<job>[^/]+)/executions/(?P<execution>[^/]+)")


# --- hardware --------------------------------------------------------------------------------------------------------

# What jobs/environments/llm/requirements.txt brings into the image; a test compares the two.
IMAGE_PACKAGES = {"bitsandbytes": True, "onnx": True, "lm_eval": False, "unsloth": False}
NOTES = {
    "provider": "unsloth is not in the image: it pins its own versions of what the image holds",
    "use_fa2": "flash-attn is not in the image; the GPU could run it",
    "lm_eval_tasks": "lm_eval is not in the image",
}


@dataclass(frozen=True)
class HardwareProfile:
    """A kind of compute that a job may ask for. Its Cloud Run job is `tunesmith-<name>`, sized in infra/terraform."""

    name: str
    device: str
    device_name: str
    quota: str  # the quota of Cloud Run that is short first
    notes: dict[str, str] = field(default_factory=lambda: dict(NOTES))

    @property
    def capabilities(self) -> RuntimeCapabilities:
        """What an attempt can do there: what the image holds, for everybody the same."""
        return RuntimeCapabilities(
            device=self.device,
            device_name=self.device_name,
            methods=("LoRA", "QLoRA", "Full"),
            providers=("huggingface",),
            modalities=get_args(Modality),
            trainer_types=tuple(TRAINER_TYPES),
            flash_attention_2=False,
            gguf=True,
            onnx=IMAGE_PACKAGES["onnx"],
            lm_eval=IMAGE_PACKAGES["lm_eval"],
            notes=self.notes,
        )


PROFILES = {
    profile.name: profile
    for profile in (
        HardwareProfile("l4", "cuda", "NVIDIA L4, 24 GB", "NvidiaL4GpuAllocNoZonalRedundancyPerProjectRegion"),
        HardwareProfile(
            "rtx-pro-6000", "cuda", "NVIDIA RTX PRO 6000 Blackwell, 96 GB", "NvidiaRtxPro6000GpuAllocNoZonalRedundancyPerProjectRegion"
        ),
        HardwareProfile(
            "cpu", "cpu", "Cloud Run CPU", "CpuAllocPerProjectRegion", {**NOTES, "use_fa2": "FlashAttention 2 needs an Ampere or newer GPU"}
        ),
    )
}


# --- rendering -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Deployment:
    """Where the job resources are, and what every attempt is told."""

    project_id: str
    region: str
    default_profile: str
    service_url: str
    service_audience: str | None  # set where only known identities may call the service
    time_limit_s: int

    def cloud_run_job_name(self, profile: str) -> str:
        """The full name of a profile's job resource."""
        return f"projects/{self.project_id}/locations/{self.region}/jobs/{cloud_run_job_id(profile)}"


def cloud_run_job_id(profile: str) -> str:
    """The job resource of a hardware profile."""
    return f"tunesmith-{profile}"


def build_run_job_request(launch_request: LaunchRequest, deployment: Deployment) -> run_v2.RunJobRequest:
    """All that is sent to start an attempt. The image's entry point is `python -m jobs.run`; these are its arguments.

    Who may read executions (`run.executions.get`) sees this environment, JOB_TOKEN with it. It is no secret of a user: it
    expires, is fenced with its attempt, and lets its holder report for that one attempt. What users trust us with never comes
    here; the attempt fetches it with the token, once, when it claims.
    """
    overrides = run_v2.RunJobRequest.Overrides(
        container_overrides=[
            run_v2.RunJobRequest.Overrides.ContainerOverride(
                name=CONTAINER,
                args=["--name", launch_request.name],
                env=[
                    run_v2.EnvVar(name=name, value=value) for name, value in sorted(_build_environment(launch_request, deployment).items())
                ],
            )
        ],
        task_count=1,
        timeout=timedelta(seconds=deployment.time_limit_s),
    )
    return run_v2.RunJobRequest(
        name=deployment.cloud_run_job_name(launch_request.profile or deployment.default_profile), overrides=overrides
    )


def _build_environment(launch_request: LaunchRequest, deployment: Deployment) -> dict[str, str]:
    audience = {"SERVICE_AUDIENCE": deployment.service_audience} if deployment.service_audience else {}
    return {
        **launch_request.environment,
        **audience,
        "SERVICE_URL": deployment.service_url,
        "JOB_WORKDIR": WORKDIR,
        "JOB_TIME_LIMIT_S": str(attempt_time_limit_s(deployment.time_limit_s)),
    }


def attempt_time_limit_s(time_limit_s: int) -> int:
    """How long an attempt may take, from its first line to its last word. It saves and yields before that by itself.

    Cloud Run, at its own limit, leaves it only 10 s after a SIGTERM.
    """
    return time_limit_s - min(SHUTDOWN_RESERVE_S, time_limit_s // 10)


# --- the launcher ----------------------------------------------------------------------------------------------------


class CloudRunLauncher:
    """Executions of the Cloud Run jobs `tunesmith-<profile>`. Handles are full execution names."""

    name = "cloud-run"
    polling_is_free = False

    def __init__(
        self,
        *,
        project_id: str,
        region: str,
        profiles: Sequence[str],
        service_url: str,
        service_audience: str | None,
        max_concurrent_jobs: int,
        time_limit_s: int,
        emulator_host: str | None = None,
    ) -> None:
        unknown = [name for name in profiles if name not in PROFILES]
        if unknown or not profiles:
            raise ValueError(f"no hardware profile {', '.join(unknown) or 'given'}; known: {', '.join(PROFILES)}")
        self.profiles = tuple(profiles)
        self._deployment = Deployment(
            project_id=project_id,
            region=region,
            default_profile=self.profiles[0],
            service_url=service_url,
            service_audience=service_audience,
            time_limit_s=time_limit_s,
        )
        self._max_concurrent_jobs = max_concurrent_jobs
        self._connection = _Connection(emulator_host)

    # --- Launcher ----------------------------------------------------------------------------------------------------

    def launch(self, launch_request: LaunchRequest) -> str:
        """Start an execution. An answer that does not come is Unavailable: the core looks for the name before it tries again."""
        profile = launch_request.profile or self.profiles[0]
        if profile not in self.profiles:
            raise LaunchFailed(f"no hardware {profile!r} any more", hint=f"this deployment has: {', '.join(self.profiles)}")
        request = build_run_job_request(launch_request, self._deployment)
        with _translate_errors(lambda error: translate_launch_error(error, profile, self._deployment)):
            operation = self._connection.open().jobs.run_job(request, retry=None, timeout=remaining_s(CALL_TIMEOUT_S))
            execution = operation.metadata
        if not isinstance(execution, run_v2.Execution) or not execution.name:
            raise Unavailable(f"Cloud Run took {launch_request.name} and did not say under which name")
        return execution.name

    def find_handle(self, name: str) -> str | None:
        """The execution that was given the name; if there are two, the one that is at work. Raises Unavailable."""
        for profile in self.profiles:
            for executions in self._iter_execution_pages(profile):
                if namesakes := [execution for execution in executions if _container_args(execution) == ["--name", name]]:
                    return min(namesakes, key=_is_finished).name
        return None

    def check(self, handle: str) -> ExecutionState:
        if not EXECUTION_NAME.fullmatch(handle):
            return "ended"  # another launcher's: nothing of that name runs here
        try:
            return "ended" if _is_finished(self._get_execution(handle)) else "running"
        except NotFound:
            return "ended"
        except (GoogleAPICallError, GoogleAuthError) as error:
            log.warning("an execution could not be looked at", extra={"handle": handle, "error": str(error)})
            return "unknown"

    def cancel(self, handle: str, *, force: bool) -> None:  # noqa: ARG002
        """Have Cloud Run send SIGTERM, and SIGKILL 10 s later: it insists by itself, so `force` asks for nothing more.

        A SIGTERM alone says that the machine is taken away. That it is a cancel the attempt hears in the answer to the report
        which it then makes; one that does not may still save, and says `yielded`: of a job that is being cancelled, that is an end.
        """
        if not EXECUTION_NAME.fullmatch(handle):
            return
        request = run_v2.CancelExecutionRequest(name=handle)
        with _translate_errors(lambda error: self._translate_call_error(error, "run.executions.cancel", handle)):
            try:
                self._connection.open().executions.cancel_execution(request, retry=None, timeout=remaining_s(CALL_TIMEOUT_S))
            except (FailedPrecondition, NotFound, Aborted):
                log.info("nothing to cancel: the execution has ended, or is being cancelled", extra={"handle": handle})

    def count_free_slots(self, active_jobs: int) -> int:
        """Counted by the records, which know of launches that Cloud Run has not made visible yet."""
        return self._max_concurrent_jobs - active_jobs

    def get_capabilities(self, profile: str | None = None) -> RuntimeCapabilities:
        name = profile or self.profiles[0]
        if name not in self.profiles:
            raise Unsupported(f"no hardware {name!r}; this deployment has: {', '.join(self.profiles)}", param="hardware")
        return PROFILES[name].capabilities

    def close(self) -> None:
        """Let go of connections. Attempts go on: they report to whichever instance of the service is there."""
        self._connection.close()

    # --- EndSource, LogsElsewhere ------------------------------------------------------------------------------------

    def get_exit_reason(self, handle: str) -> ExitReason | None:
        if not EXECUTION_NAME.fullmatch(handle):
            return None
        with _translate_errors(lambda error: self._translate_call_error(error, "run.executions.get", handle)):
            try:
                return classify_exit(self._get_execution(handle), self._get_task(handle))
            except NotFound:
                return None

    def log_location(self, handle: str) -> str:
        named = EXECUTION_NAME.fullmatch(handle)
        if named is None:
            return f"no Cloud Run execution is called {handle!r}"
        project, region, execution = named["project"], named["region"], named["execution"]
        entries = f'resource.type="cloud_run_job" AND labels."run.googleapis.com/execution_name"="{execution}"'
        command = f"gcloud logging read '{entries}' --project={project} --order=asc --freshness=30d --limit=1000"
        address = f"https://console.cloud.google.com/run/jobs/executions/details/{region}/{execution}/tasks?project={project}"
        return f"the output is in Cloud Logging: {command} --format='value(textPayload,jsonPayload.message)' or {address}"

    # --- helpers -----------------------------------------------------------------------------------------------------

    def _iter_execution_pages(self, profile: str) -> Iterator[Sequence[run_v2.Execution]]:
        """The executions of a profile's job, newest first, by the page; a job that is not there has none."""
        parent, token = self._deployment.cloud_run_job_name(profile), ""
        for _ in range(MAX_FIND_PAGES):
            request = run_v2.ListExecutionsRequest(parent=parent, page_size=FIND_PAGE_SIZE, page_token=token)
            with _translate_errors(lambda error: self._translate_call_error(error, "run.executions.list", parent)):
                try:
                    pager = self._connection.open().executions.list_executions(request, retry=None, timeout=remaining_s(CALL_TIMEOUT_S))
                except NotFound:
                    return
            page = next(iter(pager.pages))  # the first only: the next has its own patience
            yield page.executions
            token = page.next_page_token
            if not token:
                return

    def _get_execution(self, handle: str) -> run_v2.Execution:
        request = run_v2.GetExecutionRequest(name=handle)
        return self._connection.open().executions.get_execution(request, retry=None, timeout=remaining_s(CALL_TIMEOUT_S))

    def _get_task(self, handle: str) -> run_v2.Task | None:
        """The one task of the execution, which knows the exit code; None when it may not be seen: the execution says much itself."""
        request = run_v2.ListTasksRequest(parent=handle, page_size=1)
        try:
            pager = self._connection.open().tasks.list_tasks(request, retry=None, timeout=remaining_s(CALL_TIMEOUT_S))
        except (NotFound, PermissionDenied):
            return None
        return next(iter(pager.tasks), None)

    def _translate_call_error(self, error: GoogleAPICallError, permission: str, resource: str) -> Unavailable:
        """Why something other than a launch failed: it can always be tried again."""
        if isinstance(error, PermissionDenied):
            permission = _missing_permission(error) or permission
            job = resource.partition("/executions/")[0].rpartition("/")[2]
            hint = _grant_command(permission, job, self._deployment)
            return Unavailable(f"the service may not do that in Cloud Run: it lacks {permission} on {job}", hint=hint)
        if isinstance(error, Unauthenticated):
            return no_credentials_error(error)
        return Unavailable(f"Cloud Run does not answer: {_single_line(error.message)}")


# --- the connection --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Clients:
    channel: grpc.Channel
    jobs: run_v2.JobsClient
    executions: run_v2.ExecutionsClient
    tasks: run_v2.TasksClient


class _Connection:
    """One channel for three clients, opened when it is first needed; safe for threads."""

    def __init__(self, emulator_host: str | None) -> None:
        self._emulator_host = emulator_host
        self._lock = threading.Lock()
        self._clients: _Clients | None = None

    def open(self) -> _Clients:
        """The clients. Raises GoogleAuthError when nobody says who the service is."""
        with self._lock:
            if self._clients is None:
                channel = _channel(self._emulator_host)
                self._clients = _Clients(
                    channel=channel,
                    jobs=run_v2.JobsClient(transport=JobsGrpcTransport(channel=channel)),
                    executions=run_v2.ExecutionsClient(transport=ExecutionsGrpcTransport(channel=channel)),
                    tasks=run_v2.TasksClient(transport=TasksGrpcTransport(channel=channel)),
                )
            return self._clients

    def close(self) -> None:
        with self._lock:
            if self._clients is not None:
                self._clients.channel.close()
            self._clients = None


def _channel(emulator_host: str | None) -> grpc.Channel:
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_reconnect_backoff_ms", MAX_RECONNECT_BACKOFF_MS)]
    if emulator_host:
        return grpc.insecure_channel(emulator_host, options=options)
    credentials, _ = google.auth.default(scopes=["https://www.googleapis.com/auth/cloud-platform"])
    return JobsGrpcTransport.create_channel(credentials=credentials, options=options)


@contextmanager
def _translate_errors(translate: Callable[[GoogleAPICallError], TunesmithError]) -> Generator[None]:
    """Errors of the client library become ours."""
    try:
        yield
    except GoogleAPICallError as error:
        raise translate(error) from error
    except GoogleAuthError as error:
        raise no_credentials_error(error) from error


# --- why an attempt was not taken ------------------------------------------------------------------------------------

EXECUTOR_ROLE = "roles/run.jobsExecutorWithOverrides"
ROLE_BY_PERMISSION = {
    "run.jobs.run": EXECUTOR_ROLE,
    "run.jobs.runwithoverrides": EXECUTOR_ROLE,
    "run.executions.cancel": EXECUTOR_ROLE,
    "iam.serviceaccounts.actas": "roles/iam.serviceAccountUser",
}
VIEWER_ROLE = "roles/run.viewer"
QUOTA_NAME = re.compile(r"\b\w+PerProjectRegion\b")
API_DISABLED = re.compile(r"SERVICE_DISABLED|has not been used in project|API .*is disabled", re.IGNORECASE)


def translate_launch_error(error: GoogleAPICallError, profile: str, deployment: Deployment) -> LaunchFailed | Unavailable:
    """What the refusal of an attempt means. LaunchFailed is for ever, so only for what does not heal by waiting."""
    where, said = f"project {deployment.project_id}, region {deployment.region}", _single_line(error.message)
    if cause := _project_error(error, deployment):
        return cause
    if _is_quota_error(error):
        return _quota_error(error, PROFILES[profile], deployment)
    match error:
        case PermissionDenied():
            permission = _missing_permission(error) or "run.jobs.runWithOverrides"
            message = f"the service may not run the Cloud Run job {cloud_run_job_id(profile)}: it lacks {permission}"
            return LaunchFailed(message, hint=_grant_command(permission, cloud_run_job_id(profile), deployment))
        case NotFound():
            hint = f"make deploy PROJECT_ID={deployment.project_id} REGION={deployment.region} creates a job for every hardware profile"
            return LaunchFailed(f"there is no Cloud Run job {cloud_run_job_id(profile)} in {where}", hint=hint)
        case InvalidArgument() | OutOfRange():
            return LaunchFailed(
                f"Cloud Run refused the attempt: {said}", hint=f"compare the job {cloud_run_job_id(profile)} with infra/terraform"
            )
        case Unauthenticated():
            return no_credentials_error(error)
        case _:
            return Unavailable(f"Cloud Run did not take the attempt: {said}")


def no_credentials_error(error: Exception) -> Unavailable:
    """Nobody says who the service is, or Google does not believe it."""
    return Unavailable(
        f"Cloud Run does not know who asks: {_single_line(str(error))}",
        hint="run `gcloud auth application-default login`; on Cloud Run, give the service the service account tunesmith-api",
    )


def _project_error(error: GoogleAPICallError, deployment: Deployment) -> LaunchFailed | None:
    project = deployment.project_id
    if error.reason == "SERVICE_DISABLED" or API_DISABLED.search(error.message):
        hint = f"gcloud services enable run.googleapis.com --project={project}"
        return LaunchFailed(f"the Cloud Run API is not enabled in project {project}", hint=hint)
    if error.reason == "BILLING_DISABLED":
        hint = f"link a billing account: https://console.cloud.google.com/billing/linkedaccount?project={project}"
        return LaunchFailed(f"project {project} has no billing account", hint=hint)
    if error.reason == "CONSUMER_INVALID":
        return LaunchFailed(f"there is no project {project}", hint="set PROJECT_ID to the id, not the name, of a project")
    return None


def _is_quota_error(error: GoogleAPICallError) -> bool:
    """Also where it comes in disguise: a GPU quota of zero is an invalid argument to Cloud Run."""
    disguised = isinstance(error, InvalidArgument | FailedPrecondition) and "quota" in error.message.lower()
    return disguised or isinstance(error, ResourceExhausted)


def _quota_error(error: GoogleAPICallError, profile: HardwareProfile, deployment: Deployment) -> Unavailable:
    quota = ", ".join(_exhausted_quotas(error)) or profile.quota
    page = f"https://console.cloud.google.com/iam-admin/quotas?project={deployment.project_id}"
    return Unavailable(
        f"the quota {quota} of project {deployment.project_id} in {deployment.region} is used up: {_single_line(error.message)}",
        hint=f"the job waits and is tried again; ask for more at {page} (service Cloud Run Admin API), or use other hardware",
    )


def _exhausted_quotas(error: GoogleAPICallError) -> list[str]:
    """The names of the quotas that are short, from wherever Google put them."""
    violations = [violation for detail in error.details if isinstance(detail, QuotaFailure) for violation in detail.violations]
    named = [violation.quota_id or violation.quota_metric or violation.subject for violation in violations]
    metadata = error.metadata or {}
    named += [metadata.get("quota_limit") or metadata.get("quota_metric") or ""]
    return list(dict.fromkeys(filter(None, [*named, *QUOTA_NAME.findall(error.message)])))


def _missing_permission(error: GoogleAPICallError) -> str | None:
    told = (error.metadata or {}).get("permission")
    named = re.search(r"[Pp]ermission '([\w.]+)'", error.message)
    return told or (named and named[1])


def _grant_command(permission: str, job: str, deployment: Deployment) -> str:
    """The command that gives the service what it lacks."""
    project = deployment.project_id
    member = f"--member=serviceAccount:tunesmith-api@{project}.iam.gserviceaccount.com"
    role = ROLE_BY_PERMISSION.get(permission.lower(), VIEWER_ROLE)
    if permission.lower().startswith("iam.serviceaccounts."):
        account = f"tunesmith-job@{project}.iam.gserviceaccount.com"
        return f"gcloud iam service-accounts add-iam-policy-binding {account} --project={project} {member} --role={role}"
    return f"gcloud run jobs add-iam-policy-binding {job} --project={project} --region={deployment.region} {member} --role={role}"


def _single_line(text: str) -> str:
    """Google's words on one line, not too long."""
    return " ".join(text.split())[:400]


# --- why an attempt ended --------------------------------------------------------------------------------------------

Common = run_v2.Condition.CommonReason
Reason = run_v2.Condition.ExecutionReason
State = run_v2.Condition.State


@dataclass(frozen=True)
class ExitEvidence:
    """What an execution and its task tell about their end."""

    cancelled: bool
    deleted: bool
    reasons: frozenset[int]  # CommonReason
    execution_reasons: frozenset[int]  # ExecutionReason
    messages: tuple[str, ...]
    exit_code: int  # 0 also when there is none
    signal: int
    status_code: int  # of google.rpc.Code

    def matches(self, pattern: str) -> bool:
        """Whether any of the words match."""
        return any(re.search(pattern, message, re.IGNORECASE) for message in self.messages)

    @property
    def message_suffix(self) -> str:
        """The first words that were said, in brackets; empty when nothing was."""
        return f" ({_single_line(self.messages[0])})" if self.messages else ""


def classify_exit(execution: run_v2.Execution, task: run_v2.Task | None) -> ExitReason | None:
    """Why an execution ended, in our words; None when it did not fail, or gives no reason."""
    if not _is_finished(execution) or _completion_state(execution) == State.CONDITION_SUCCEEDED:
        return None
    signs = _collect_evidence(execution, task)
    return next((ended for rule in EXIT_RULES if (ended := rule(signs)) is not None), None)


def _cancelled(evidence: ExitEvidence) -> ExitReason | None:
    if evidence.deleted:
        return _exit_reason("lost", "the execution was deleted in Cloud Run", "send the job again")
    if evidence.cancelled:
        return _exit_reason(
            "lost", "the execution was cancelled in Cloud Run, not through this service", "send the job again; cancel jobs here"
        )
    return None


def _timed_out(evidence: ExitEvidence) -> ExitReason | None:
    if not evidence.matches(r"timeout was reached|maximum timeout") and evidence.status_code != grpc.StatusCode.DEADLINE_EXCEEDED.value[0]:
        return None
    hint = "raise TUNESMITH_ATTEMPT_TIME_LIMIT_S, or lower epochs or max_steps"
    return _exit_reason(
        "timeout", f"Cloud Run ended the attempt at its time limit, and it could not say a last word{evidence.message_suffix}", hint
    )


def _out_of_memory(evidence: ExitEvidence) -> ExitReason | None:
    """SIGKILL comes from nobody else: Cloud Run's own kills, after a cancel or a timeout, are told apart above."""
    if not evidence.matches(r"memory limit|out of memory|oom.?kill") and evidence.signal != SIGKILL:
        return None
    hint = "files count as memory there: ask for hardware with more of it, a smaller base model, or fewer exports at a time"
    return _exit_reason("out_of_memory", f"the attempt used more memory than its Cloud Run job has{evidence.message_suffix}", hint)


def _image_unavailable(evidence: ExitEvidence) -> ExitReason | None:
    if evidence.reasons & {Common.CONTAINER_PERMISSION_DENIED} or evidence.matches(r"permission to read the image"):
        hint = "grant roles/artifactregistry.reader on the repository tunesmith to Cloud Run's service agent"
        return _exit_reason("launch_failed", f"Cloud Run may not pull the image{evidence.message_suffix}", hint)
    if evidence.reasons & {Common.CONTAINER_IMAGE_UNAUTHORIZED, Common.CONTAINER_IMAGE_AUTHORIZATION_CHECK_FAILED}:
        hint = "see the Binary Authorization policy of the project"
        return _exit_reason("launch_failed", f"a policy of the project forbids the image{evidence.message_suffix}", hint)
    missing = r"image .*not found|ImagePull|pull(ing)? .*image|image import failed|manifest unknown"
    if Common.CONTAINER_MISSING in evidence.reasons or evidence.matches(missing):
        return _exit_reason(
            "launch_failed", f"Cloud Run cannot pull the image{evidence.message_suffix}", "`make deploy` builds and pushes it"
        )
    return None


def _access_denied(evidence: ExitEvidence) -> ExitReason | None:
    kinds = {
        Common.SECRETS_ACCESS_CHECK_FAILED: ("a secret of the job resource", "grant roles/secretmanager.secretAccessor to tunesmith-job"),
        Common.ENCRYPTION_KEY_PERMISSION_DENIED: ("its encryption key", "grant the key to Cloud Run's service agent"),
        Common.ENCRYPTION_KEY_CHECK_FAILED: ("its encryption key", "see that the key exists and is enabled"),
        Common.VPC_NETWORK_NOT_FOUND: ("its network", "see vpc_access of the job resource"),
    }
    for reason in sorted(evidence.reasons & kinds.keys()):
        what, hint = kinds[Common(reason)]
        return _exit_reason("launch_failed", f"the Cloud Run job cannot use {what}{evidence.message_suffix}", hint)
    return None


def _no_capacity(evidence: ExitEvidence) -> ExitReason | None:
    """Accepted, and then there was no compute: through no fault of the job, and not for ever."""
    exhausted = evidence.status_code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    late = Common.PROGRESS_DEADLINE_EXCEEDED in evidence.reasons
    if not (exhausted or late or evidence.matches(r"quota|capacity|resources? (is |are )?(exhausted|unavailable)|no available instance")):
        return None
    hint = "ask for more of the quota, or use other hardware or another region"
    return _exit_reason("launch_failed", f"Cloud Run had no compute for the attempt{evidence.message_suffix}", hint, preempted=True)


def _preempted(evidence: ExitEvidence) -> ExitReason | None:
    """Tasks with a GPU are not migrated when their machine is maintained: they are ended, with SIGTERM."""
    broken = Common.INTERNAL in evidence.reasons or Reason.JOB_STATUS_SERVICE_POLLING_ERROR in evidence.execution_reasons
    told = evidence.matches(r"maintenance|preempt|evict|internal (system )?error|stopped unexpectedly")
    if not (broken or told or evidence.signal == SIGTERM):
        return None
    hint = "nothing to do: the attempt is made again"
    return _exit_reason("preempted", f"Cloud Run took the attempt's machine away{evidence.message_suffix}", hint, preempted=True)


def _crashed(evidence: ExitEvidence) -> ExitReason | None:
    if evidence.signal:
        return _exit_reason("internal", f"the attempt crashed with {_signal_name(evidence.signal)}", "see its output in Cloud Logging")
    if evidence.exit_code:
        return _exit_reason(
            "internal", f"the attempt exited with code {evidence.exit_code} and left no result", "see its output in Cloud Logging"
        )
    if Reason.NON_ZERO_EXIT_CODE in evidence.execution_reasons or evidence.matches(r"container exited with an error"):
        return _exit_reason(
            "internal", f"the attempt failed and left no result{evidence.message_suffix}", "see its output in Cloud Logging"
        )
    return None


def _platform_error(evidence: ExitEvidence) -> ExitReason | None:
    """Judged after the exit code: a container that fails by itself may carry such a status as well."""
    codes = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED)
    if evidence.status_code not in {code.value[0] for code in codes}:
        return None
    return _exit_reason(
        "preempted", f"Cloud Run lost the attempt{evidence.message_suffix}", "nothing to do: the attempt is made again", preempted=True
    )


def _unknown(evidence: ExitEvidence) -> ExitReason | None:
    return (
        _exit_reason("lost", f"the execution failed{evidence.message_suffix}", "see its output in Cloud Logging")
        if evidence.messages
        else None
    )


# In this order: a kill is explained by what led to it before it is taken for a lack of memory.
EXIT_RULES = (
    *(_cancelled, _timed_out, _out_of_memory, _image_unavailable, _access_denied),
    *(_no_capacity, _preempted, _crashed, _platform_error, _unknown),
)


def _exit_reason(code: FailureCode, message: str, hint: str, *, preempted: bool = False) -> ExitReason:
    return ExitReason(Failure(code=code, message=message, hint=hint), preempted=preempted)


def _signal_name(number: int) -> str:
    try:
        return Signals(number).name
    except ValueError:
        return f"signal {number}"


# --- reading messages ------------------------------------------------------------------------------------------------


def _is_finished(execution: run_v2.Execution) -> bool:
    over = (State.CONDITION_FAILED, State.CONDITION_SUCCEEDED)
    return "completion_time" in execution or "delete_time" in execution or _completion_state(execution) in over


def _completion_state(execution: run_v2.Execution) -> int:
    """The state of the whole."""
    states = [_enum_value(condition, "state") for condition in execution.conditions if condition.type_ == COMPLETED]
    return states[0] if states else State.STATE_UNSPECIFIED


def _container_args(execution: run_v2.Execution) -> list[str]:
    return [argument for container in execution.template.containers for argument in container.args]


def _collect_evidence(execution: run_v2.Execution, task: run_v2.Task | None) -> ExitEvidence:
    conditions = [*execution.conditions, *(task.conditions if task else ())]
    failed = [condition for condition in conditions if _enum_value(condition, "state") == State.CONDITION_FAILED]
    result = task.last_attempt_result if task else run_v2.TaskAttemptResult()
    status, code = run_v2.TaskAttemptResult.pb(result).status, result.exit_code
    execution_reasons = frozenset(_enum_value(condition, "execution_reason") for condition in conditions)
    return ExitEvidence(
        cancelled=execution.cancelled_count > 0 or bool(execution_reasons & {Reason.CANCELLED, Reason.CANCELLING}),
        deleted="delete_time" in execution or Reason.DELETED in execution_reasons,
        reasons=frozenset(_enum_value(condition, "reason") for condition in failed),
        execution_reasons=execution_reasons,
        messages=_non_empty([*(condition.message for condition in failed), status.message]),
        exit_code=code,
        signal=result.term_signal or (code - 128 if 128 < code <= 128 + max(Signals) else 0),
        status_code=status.code,
    )


def _non_empty(messages: Iterable[str]) -> tuple[str, ...]:
    return tuple(message for message in messages if message.strip())


def _enum_value(condition: run_v2.Condition, name: str) -> int:
    """A number, also where Google has a newer word than this library: asked for it, the library warns."""
    return int(getattr(run_v2.Condition.pb(condition), name))

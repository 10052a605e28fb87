"""Cloud Run's errors translated into the service's, each with the command that fixes it."""

# The client library is generated, and loosely typed where it wraps gRPC.
# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import re
from collections.abc import Callable, Generator
from contextlib import contextmanager

from google.api_core.exceptions import (
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
from google.rpc.error_details_pb2 import QuotaFailure

from service.adapters.launchers.cloud_run.profiles import PROFILES
from service.adapters.launchers.cloud_run.render import Deployment, cloud_run_job_id
from service.core.errors import LaunchFailed, NoCapacity, TunesmithError, Unavailable

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


@contextmanager
def translate_errors(translate: Callable[[GoogleAPICallError], TunesmithError]) -> Generator[None]:
    """Raise errors of the client library as errors of the service."""
    try:
        yield
    except GoogleAPICallError as error:
        raise translate(error) from error
    except GoogleAuthError as error:
        raise no_credentials_error(error) from error


def translate_launch_error(error: GoogleAPICallError, profile: str, environment: str, deployment: Deployment) -> LaunchFailed | Unavailable:
    """The error for a launch that Cloud Run refused. LaunchFailed is permanent; Unavailable, such as NoCapacity, is worth a retry."""
    if project_error := _project_error(error, deployment):
        return project_error
    if _is_quota_error(error):
        return _quota_error(error, profile, deployment)
    message, job = single_line(error.message), cloud_run_job_id(profile, environment)
    match error:
        case PermissionDenied():
            permission = _missing_permission(error) or "run.jobs.runWithOverrides"
            return LaunchFailed(
                f"the service may not run the Cloud Run job {job}: it lacks {permission}", hint=_grant_command(permission, job, deployment)
            )
        case NotFound():
            return LaunchFailed(
                f"there is no Cloud Run job {job} in project {deployment.project_id}, region {deployment.region}",
                hint=f"make deploy PROJECT_ID={deployment.project_id} REGION={deployment.region} creates a job for every hardware profile",
            )
        case InvalidArgument() | OutOfRange():
            return LaunchFailed(f"Cloud Run refused the attempt: {message}", hint=f"compare the job {job} with infra/terraform")
        case Unauthenticated():
            return no_credentials_error(error)
        case _:
            return Unavailable(f"Cloud Run did not start the attempt: {message}")


def translate_call_error(error: GoogleAPICallError, permission: str, resource: str, deployment: Deployment) -> Unavailable:
    """The error for a failed call other than a launch, which can always be retried. `permission` is the one that the call needs."""
    if isinstance(error, PermissionDenied):
        permission = _missing_permission(error) or permission
        job = resource.partition("/executions/")[0].rpartition("/")[2]
        hint = _grant_command(permission, job, deployment)
        return Unavailable(f"the service may not use the Cloud Run job {job}: it lacks {permission}", hint=hint)
    if isinstance(error, Unauthenticated):
        return no_credentials_error(error)
    return Unavailable(f"Cloud Run does not answer: {single_line(error.message)}")


def no_credentials_error(error: Exception) -> Unavailable:
    """The error for missing credentials, or credentials that Google rejects."""
    return Unavailable(
        f"Cloud Run rejected the service's credentials: {single_line(str(error))}",
        hint="run `gcloud auth application-default login`; on Cloud Run, give the service the service account tunesmith-api",
    )


def single_line(text: str) -> str:
    """A message of Google's on one line, cut to 400 characters."""
    return " ".join(text.split())[:400]


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
    """Cloud Run reports a GPU quota of zero as an invalid argument, so the message counts as well."""
    mentions_quota = isinstance(error, InvalidArgument | FailedPrecondition) and "quota" in error.message.lower()
    return mentions_quota or isinstance(error, ResourceExhausted)


def _quota_error(error: GoogleAPICallError, profile: str, deployment: Deployment) -> NoCapacity:
    quota = ", ".join(_exhausted_quotas(error)) or PROFILES[profile].quota
    page = f"https://console.cloud.google.com/iam-admin/quotas?project={deployment.project_id}"
    return NoCapacity(
        f"the quota {quota} of project {deployment.project_id} in {deployment.region} is used up: {single_line(error.message)}",
        hint=f"the job stays queued and is retried; request more at {page} (service Cloud Run Admin API), or use other hardware",
    )


def _exhausted_quotas(error: GoogleAPICallError) -> list[str]:
    """The names of the exhausted quotas, from the error's details, its metadata and its text: Google uses any of the three."""
    violations = [violation for detail in error.details if isinstance(detail, QuotaFailure) for violation in detail.violations]
    names = [violation.quota_id or violation.quota_metric or violation.subject for violation in violations]
    metadata = error.metadata or {}
    names += [metadata.get("quota_limit") or metadata.get("quota_metric") or ""]
    return list(dict.fromkeys(filter(None, [*names, *QUOTA_NAME.findall(error.message)])))


def _missing_permission(error: GoogleAPICallError) -> str | None:
    match = re.search(r"[Pp]ermission '([\w.]+)'", error.message)
    return (error.metadata or {}).get("permission") or (match and match[1])


def _grant_command(permission: str, job: str, deployment: Deployment) -> str:
    """The command that grants the service a missing permission."""
    project = deployment.project_id
    member = f"--member=serviceAccount:tunesmith-api@{project}.iam.gserviceaccount.com"
    role = ROLE_BY_PERMISSION.get(permission.lower(), VIEWER_ROLE)
    if permission.lower().startswith("iam.serviceaccounts."):
        account = f"tunesmith-job@{project}.iam.gserviceaccount.com"
        return f"gcloud iam service-accounts add-iam-policy-binding {account} --project={project} {member} --role={role}"
    return f"gcloud run jobs add-iam-policy-binding {job} --project={project} --region={deployment.region} {member} --role={role}"

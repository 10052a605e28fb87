"""The RunJob request that starts an attempt, built as a pure value. A test compares it with a golden file."""

# The client library is generated, and loosely typed where it wraps protocol buffers.
# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false

from dataclasses import dataclass
from datetime import timedelta

from google.cloud import run_v2

from service.core.ports import LaunchRequest

CONTAINER = "attempt"
DEFAULT_ENVIRONMENT = "llm"  # its jobs are named by their profile alone
WORKDIR = "/tmp/attempt"  # noqa: S108  # each container has its own in-memory /tmp
SHUTDOWN_RESERVE_S = 120  # the part of an execution's time for starting the container and for an attempt that ends a little late


@dataclass(frozen=True)
class Deployment:
    """Where the Cloud Run jobs are, and the settings that every attempt receives."""

    project_id: str
    region: str
    service_url: str
    service_audience: str | None  # set where the service requires an identity token
    time_limit_s: int

    def cloud_run_job_name(self, profile: str, environment: str) -> str:
        """The full resource name of the Cloud Run job of a profile and an environment."""
        return f"projects/{self.project_id}/locations/{self.region}/jobs/{cloud_run_job_id(profile, environment)}"


def cloud_run_job_id(profile: str, environment: str) -> str:
    """The id of the Cloud Run job that runs the image of an environment on a profile."""
    return f"tunesmith-{profile}" if environment == DEFAULT_ENVIRONMENT else f"tunesmith-{environment}-{profile}"


def build_run_job_request(launch_request: LaunchRequest, deployment: Deployment) -> run_v2.RunJobRequest:
    """The complete request that starts an attempt. The image's entry point is `python -m jobs.run`; `args` are its arguments.

    Anyone with `run.executions.get` can read this environment, including JOB_TOKEN. The token is not a user's secret: it expires, it
    is fenced with its attempt, and it only allows reporting for that attempt. User secrets are never put here; the attempt fetches
    them with the token, once, when it claims.
    """
    variables = {
        **launch_request.variables,
        **({"SERVICE_AUDIENCE": deployment.service_audience} if deployment.service_audience else {}),
        "SERVICE_URL": deployment.service_url,
        "JOB_WORKDIR": WORKDIR,
        "JOB_TIME_LIMIT_S": str(attempt_time_limit_s(deployment.time_limit_s)),
    }
    container = run_v2.RunJobRequest.Overrides.ContainerOverride(
        name=CONTAINER,
        args=["--name", launch_request.name],
        env=[run_v2.EnvVar(name=name, value=value) for name, value in sorted(variables.items())],
    )
    return run_v2.RunJobRequest(
        name=deployment.cloud_run_job_name(launch_request.profile, launch_request.environment),
        overrides=run_v2.RunJobRequest.Overrides(
            container_overrides=[container], task_count=1, timeout=timedelta(seconds=deployment.time_limit_s)
        ),
    )


def attempt_time_limit_s(time_limit_s: int) -> int:
    """How long an attempt may take, from its first line of code to its result. It saves a checkpoint and yields before this limit.

    Shorter than Cloud Run's own timeout, which leaves only 10 s after SIGTERM.
    """
    return time_limit_s - min(SHUTDOWN_RESERVE_S, time_limit_s // 10)

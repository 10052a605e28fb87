"""Puts the parts of this folder together, each with the ports it needs. The parts hold no state of their own."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime

from service.core.jobs.attempts import Attempts
from service.core.jobs.control import JobControl
from service.core.jobs.deletion import Deletion
from service.core.jobs.export import Exports
from service.core.jobs.launch import AttemptStarter
from service.core.jobs.limits import Limits
from service.core.jobs.queries import JobQueries
from service.core.jobs.reconcile import Reconciliation
from service.core.jobs.repository import JobRepository
from service.core.jobs.submit import Submission
from service.core.jobs.trackers import DeploymentTrackers
from service.core.ports import Buckets, Hub, JobStore, Launcher, SecretStore, UrlSigner, Wake
from service.core.tokens import TokenSigner
from service.core.validation.hub import NoHub


@dataclass(frozen=True)
class JobServices:
    """What can be done with jobs, by who asks: callers, attempts, the reconciler."""

    repository: JobRepository
    submission: Submission
    control: JobControl
    exports: Exports
    queries: JobQueries
    deletion: Deletion
    attempts: Attempts
    reconciliation: Reconciliation


def build_job_services(
    *,
    store: JobStore,
    secrets: SecretStore,
    buckets: Buckets,
    launcher: Launcher,
    url_signer: UrlSigner,
    tokens: TokenSigner,
    clock: Callable[[], datetime],
    random_suffix: Callable[[], str],
    wake: Wake = lambda _: None,
    limits: Limits | None = None,
    hub: Hub | None = None,
    trackers: DeploymentTrackers | None = None,
    attempt_environment: Mapping[str, str] | None = None,
) -> JobServices:
    """Build the parts. `wake` is called with a job's id whenever its next step can be taken."""
    hub, trackers, limits = hub or NoHub(), trackers or DeploymentTrackers(), limits or Limits()
    models = buckets.models
    repository = JobRepository(store, secrets, clock)
    control = JobControl(repository, launcher=launcher, trackers=trackers, wake=wake)
    attempts = Attempts(repository, models=models, wake=wake)
    starter = AttemptStarter(repository, launcher=launcher, buckets=buckets, tokens=tokens, attempt_environment=attempt_environment or {})
    return JobServices(
        repository=repository,
        submission=Submission(
            repository, launcher=launcher, models=models, hub=hub, trackers=trackers, random_suffix=random_suffix, wake=wake
        ),
        control=control,
        exports=Exports(repository, launcher=launcher, models=models, hub=hub, random_suffix=random_suffix, wake=wake),
        queries=JobQueries(repository, launcher=launcher, models=models, url_signer=url_signer, limits=limits, wake=wake),
        deletion=Deletion(repository, control=control, launcher=launcher, buckets=buckets, hub=hub),
        attempts=attempts,
        reconciliation=Reconciliation(
            repository, launcher=launcher, starter=starter, attempts=attempts, buckets=buckets, limits=limits, wake=wake
        ),
    )

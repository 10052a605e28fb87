"""Puts the parts of this folder together, each with the ports it needs. The parts hold no state of their own."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from service.core.jobs.attempts import Attempts
from service.core.jobs.budget import Budget
from service.core.jobs.control import JobControl
from service.core.jobs.credentials import DeploymentCredentials
from service.core.jobs.deletion import Deletion
from service.core.jobs.export import Exports
from service.core.jobs.ingestions import Ingestions
from service.core.jobs.launch import AttemptStarter
from service.core.jobs.metrics import JobMetrics
from service.core.jobs.ownership import JobMarks
from service.core.jobs.preparation import DEFAULT_PREPARATION_LIMIT, PreparationLimit
from service.core.jobs.queries import JobQueries
from service.core.jobs.reconcile import Reconciliation
from service.core.jobs.repository import JobRepository
from service.core.jobs.retention import CheckpointRetention
from service.core.jobs.source_rights import SourceRules
from service.core.jobs.storage_usage import StorageQueries
from service.core.jobs.submit import Submission
from service.core.jobs.trackers import DeploymentTrackers
from service.core.launchers import LauncherPool
from service.core.links import UrlSigner
from service.core.ports import Buckets, Hub, JobStore, SecretStore, Wake
from service.core.quotas import QuotaChecks, Quotas
from service.core.store_credentials import CredentialIssuer
from service.core.tokens import TokenSigner
from service.core.validation.egress import EgressCheck
from service.core.validation.hub import NoHub


@dataclass(frozen=True)
class JobServices:
    """What can be done with jobs, by who asks: callers, attempts, the reconciler."""

    repository: JobRepository
    submission: Submission
    control: JobControl
    exports: Exports
    ingestions: Ingestions
    queries: JobQueries
    metrics: JobMetrics
    deletion: Deletion
    attempts: Attempts
    reconciliation: Reconciliation
    retention: CheckpointRetention
    storage: StorageQueries


def build_job_services(
    *,
    store: JobStore,
    secrets: SecretStore,
    buckets: Buckets,
    launchers: LauncherPool,
    url_signer: UrlSigner,
    tokens: TokenSigner,
    deployment_id: str,
    clock: Callable[[], datetime],
    random_suffix: Callable[[], str],
    wake: Wake = lambda _: None,
    hub: Hub | None = None,
    trackers: DeploymentTrackers | None = None,
    attempt_variables: Mapping[str, str] | None = None,
    credentials: CredentialIssuer | None = None,
    preparation_limit: timedelta = DEFAULT_PREPARATION_LIMIT,
    checkpoint_retention: timedelta | None = None,
    quotas: QuotaChecks | None = None,
    egress: EgressCheck | None = None,
    source_rules: SourceRules | None = None,
    traceparent: Callable[[], str | None] = lambda: None,
) -> JobServices:
    """Build the parts.

    `deployment_id` names the deployment in the object stores. `wake` is called with a job's id whenever its next step can be taken.
    `traceparent` returns the trace context of the request that is being handled.
    """
    hub, trackers = hub or NoHub(), trackers or DeploymentTrackers()
    models = buckets.models
    marks = JobMarks(models, deployment_id)
    repository = JobRepository(store, secrets, clock, traceparent)
    budget = Budget(repository, launchers, quotas or QuotaChecks(store, Quotas.model_validate({}), clock))
    control = JobControl(repository, launchers=launchers, budget=budget, trackers=trackers, wake=wake)
    attempts = Attempts(
        repository, budget=budget, buckets=buckets, tokens=tokens, credentials=credentials or DeploymentCredentials(), wake=wake
    )
    starter = AttemptStarter(repository, buckets=buckets, marks=marks, tokens=tokens, attempt_variables=attempt_variables or {}, wake=wake)
    deletion = Deletion(repository, control=control, launchers=launchers, buckets=buckets, marks=marks, hub=hub)
    return JobServices(
        repository=repository,
        submission=Submission(
            repository,
            launchers=launchers,
            budget=budget,
            models=models,
            datasets=buckets.datasets,
            hub=hub,
            trackers=trackers,
            egress=egress or EgressCheck(),
            random_suffix=random_suffix,
            wake=wake,
        ),
        control=control,
        ingestions=Ingestions(
            repository,
            launchers=launchers,
            budget=budget,
            egress=egress or EgressCheck(),
            rules=source_rules or SourceRules(),
            random_suffix=random_suffix,
            wake=wake,
        ),
        exports=Exports(repository, launchers=launchers, budget=budget, models=models, hub=hub, random_suffix=random_suffix, wake=wake),
        queries=JobQueries(repository, launchers=launchers, budget=budget, models=models, url_signer=url_signer, wake=wake),
        metrics=JobMetrics(repository),
        deletion=deletion,
        attempts=attempts,
        reconciliation=Reconciliation(
            repository,
            launchers=launchers,
            starter=starter,
            attempts=attempts,
            budget=budget,
            buckets=buckets,
            preparation_limit=PreparationLimit(repository, preparation_limit, wake),
            wake=wake,
        ),
        retention=CheckpointRetention(repository, models, checkpoint_retention),
        storage=StorageQueries(repository, buckets=buckets, launchers=launchers, deletion=deletion),
    )

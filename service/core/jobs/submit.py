"""Submitting a job: everything that can be refused before compute is rented is refused here, then the record is written."""

import re
from collections.abc import Callable

from schema.dataset import WeightedDataset
from schema.job import EarlierModel, Job, Status
from schema.placement import Placement
from schema.requests import CloneRequest, TrainRequest
from schema.training import TrainingConfig
from service.core.errors import InvalidRequest, NotFound
from service.core.jobs.budget import Budget
from service.core.jobs.clone import clone_request
from service.core.jobs.continuation import resolve_earlier_model
from service.core.jobs.kinds import training_of
from service.core.jobs.repository import JobRepository, compute_digest
from service.core.jobs.secrets import HF_SECRET, extract_request_secrets, redact
from service.core.jobs.trackers import DeploymentTrackers, add_deployment_trackers, deployment_tracker_secrets, deployment_trackers_of
from service.core.launchers import LauncherPool
from service.core.ports import Hub, Wake
from service.core.principals import Principal, Scope
from service.core.problems import Problems
from service.core.spending import check_cost_cap
from service.core.validation import check_job
from service.core.validation.base_models import check_base_model
from service.core.validation.egress import EgressCheck
from service.core.validation.hub import check_hub, check_token
from service.core.validation.placement import place
from storage import ObjectStore


class Submission:
    """Creates jobs from requests: `submit` from a whole request, `clone` from another job and the changes to it."""

    def __init__(
        self,
        repository: JobRepository,
        *,
        launchers: LauncherPool,
        budget: Budget,
        models: ObjectStore,
        hub: Hub,
        trackers: DeploymentTrackers,
        egress: EgressCheck,
        random_suffix: Callable[[], str],
        wake: Wake,
    ) -> None:
        self._repository = repository
        self._launchers = launchers
        self._budget = budget
        self._models = models
        self._hub = hub
        self._trackers = trackers
        self._egress = egress
        self._random_suffix = random_suffix
        self._wake = wake

    def submit(self, principal: Principal, request: TrainRequest, idempotency_key: str | None = None) -> Job:
        """Create a job: its record is durable when this returns, and it is launched soon after.

        Raises NotFound, InvalidRequest, Unsupported, QuotaExceeded, IdempotencyConflict before anything is stored.
        """
        principal.require(Scope.JOBS_WRITE)
        return self._create(principal, request, idempotency_key, _request_digest(request))

    def clone(self, principal: Principal, job_id: str, patch: CloneRequest, idempotency_key: str | None = None) -> Job:
        """Create a job from another job's request with changes.

        Raises ValidationError when the changed request is not valid, and what `submit` raises.
        """
        principal.require(Scope.JOBS_WRITE)
        source = self._repository.find(principal, job_id)
        if source.export_of:
            hint = f"export again: POST /jobs/{source.export_of.job_id}/export"
            raise InvalidRequest(f"{job_id} trained nothing; it exported a checkpoint of {source.export_of.job_id}", hint=hint)
        training_of(source)
        request = clone_request(
            source,
            patch,
            deployment_trackers=frozenset(deployment_trackers_of(source.training_config, self._trackers)),
            deployment_secrets=frozenset(deployment_tracker_secrets(source.training_config, self._trackers)),
        )
        digest = compute_digest({"clone_of": job_id, "request": _request_digest(request)})
        return self._create(principal, request, idempotency_key, digest, cloned_from=job_id)

    def _create(
        self, principal: Principal, request: TrainRequest, idempotency_key: str | None, digest: str, cloned_from: str | None = None
    ) -> Job:
        config, earlier_model, placements = self._check(principal, request)
        # The deployment's trackers come after the checks: a caller need not send a token for them.
        request = request.model_copy(update={"training_config": add_deployment_trackers(config, self._trackers)})
        secrets = extract_request_secrets(request)
        if earlier := self._budget.check_new_job(principal.tenant_id, placements, idempotency_key, digest):
            return earlier
        now = self._repository.clock()
        job = Job(
            job_id=make_job_id(request.shares[0].processed_dataset_id, config.summarize().base_model_id, self._random_suffix()),
            tenant_id=principal.tenant_id,
            created_by=principal.subject,
            project_id=request.project_id,
            job_name=request.job_name,
            metadata=request.metadata,
            processed_dataset_id=request.shares[0].processed_dataset_id,
            datasets=request.shares if request.datasets else (),
            training_config=redact(request.training_config),
            secret_names=tuple(sorted(secrets)),
            placements=placements,
            earlier_model=earlier_model,
            cloned_from=cloned_from,
            max_gpu_seconds=request.max_gpu_seconds,
            max_cost_usd=request.max_cost_usd,
            status=Status.QUEUED,
            created_at=now,
            updated_at=now,
            status_changed_at=now,
        )
        stored = self._repository.create(job, secrets, idempotency_key, digest)
        self._wake(stored.job_id)
        return stored

    def _check(self, principal: Principal, request: TrainRequest) -> tuple[TrainingConfig, EarlierModel | None, tuple[Placement, ...]]:
        """The configuration with its original base, the model to start from, and the placements.

        Raises InvalidRequest or NotFound with every problem that independent checks found, in the order in which they are listed here.
        """
        problems, config, earlier_model, placements = Problems(), request.training_config, None, ()
        with problems.collect():
            config, earlier_model = resolve_earlier_model(self._repository, principal, config)
        is_base_known = not problems
        with problems.collect():
            placements = place(config, request.hardware, self._launchers, is_new=True)
            check_cost_cap(request.max_cost_usd, placements)
        with problems.collect():
            check_job(config, self._find_datasets(request, principal.tenant_id), self._models)
        with problems.collect():
            self._egress.check(config)
        token = extract_request_secrets(request).get(HF_SECRET)
        with problems.collect():
            check_token(config, token)
        reads_base = is_base_known and (earlier_model is None or earlier_model.needs_base)
        can_have_base = False
        with problems.collect():
            check_base_model(config, token, self._hub, self._models, reads_base=reads_base)
            can_have_base = reads_base
        with problems.collect():
            check_hub(config, token, self._hub, self._models, reads_base=can_have_base)
        problems.raise_found()
        return config, earlier_model, placements

    def _find_datasets(self, request: TrainRequest, tenant_id: str) -> list[WeightedDataset]:
        """The datasets that the request names. Raises NotFound that names the field."""
        found, problems = list[WeightedDataset](), Problems()
        for index, share in enumerate(request.shares):
            try:
                dataset = self._repository.find_dataset(share.processed_dataset_id, tenant_id)
            except NotFound as error:
                param = error.param if request.datasets is None else f"datasets.{index}.processed_dataset_id"
                problems.add(NotFound(error.message, hint=error.hint, param=param))
            else:
                found.append(WeightedDataset(dataset=dataset, weight=share.weight))
        problems.raise_found()
        return found


def make_job_id(dataset_id: str, base_model_id: str, suffix: str) -> str:
    """A readable id, training_<dataset>_<model>_<suffix>, without empty parts. The suffix is random: no two jobs share an id."""
    dataset = dataset_id.removeprefix("dataset_")
    model = base_model_id.rpartition("/")[2]
    readable = [re.sub(r"[^A-Za-z0-9-]+", "-", part)[:40].strip("-") for part in (dataset, model)]
    return "_".join(["training", *filter(None, readable), suffix])


def _request_digest(request: TrainRequest) -> str:
    """The digest of everything but the secrets, which a caller may renew between two tries."""
    return compute_digest(request.model_dump(mode="json", exclude={"hf_token"}))

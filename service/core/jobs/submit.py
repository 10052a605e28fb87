"""Submitting a job: everything that can be refused before compute is rented is refused here, then the record is written."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from schema.dataset import Dataset, WeightedDataset
from schema.dry_run import DryRunResponse
from schema.job import EarlierModel, Job, Status
from schema.placement import AUTO_HARDWARE, MAX_CANDIDATES, Placement
from schema.requests import CloneRequest, TrainRequest
from schema.training import TrainingConfig
from schema.training.resolved import ResolvedValue
from service.core.dry_run.facts import JobFacts, read_token_lengths
from service.core.dry_run.planner import Resolution, choose_hardware, complete_plan, find_planner, require_planner
from service.core.errors import InvalidRequest, NotFound
from service.core.jobs.budget import Budget
from service.core.jobs.clone import clone_request
from service.core.jobs.continuation import resolve_earlier_model
from service.core.jobs.kinds import training_of
from service.core.jobs.repository import JobRepository, compute_digest
from service.core.jobs.secrets import HF_SECRET, extract_request_secrets, redact
from service.core.jobs.trackers import DeploymentTrackers, add_deployment_trackers, deployment_tracker_secrets, deployment_trackers_of
from service.core.launchers import LauncherPool
from service.core.models.sizes import BaseSizes
from service.core.ports import Hub, Wake
from service.core.principals import Principal, Scope
from service.core.problems import Problems
from service.core.spending import check_cost_cap
from service.core.validation import check_job
from service.core.validation.base_models import check_base_model
from service.core.validation.egress import EgressCheck
from service.core.validation.hub import check_hub, check_token
from service.core.validation.placement import list_supporting, place
from storage import ObjectStore


@dataclass(frozen=True)
class CheckedRequest:
    """A request that may become a job: with its original base, the model to start from, and every "auto" resolved."""

    config: TrainingConfig
    earlier_model: EarlierModel | None = None
    placements: tuple[Placement, ...] = ()
    resolved: tuple[ResolvedValue, ...] = ()
    facts: JobFacts = field(default_factory=lambda: JobFacts(None, (), ()))


class Submission:
    """Creates jobs from requests: `submit` from a whole request, `clone` from another job and the changes to it. `dry_run` creates none."""

    def __init__(
        self,
        repository: JobRepository,
        *,
        launchers: LauncherPool,
        budget: Budget,
        models: ObjectStore,
        datasets: ObjectStore,
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
        self._bases = BaseSizes(models)
        self._datasets = datasets
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

    def dry_run(self, principal: Principal, request: TrainRequest) -> DryRunResponse:
        """What `submit` would create, with its needs, time and price. Raises what `submit` raises; stores, launches and charges nothing."""
        principal.require(Scope.JOBS_WRITE)
        planner = require_planner(request.training_config)
        checked = self._check(principal, request, reads_lengths=True)
        config = add_deployment_trackers(checked.config, self._trackers)
        self._budget.check_new_job(principal.tenant_id, checked.placements, None, "")
        offers = self._launchers.list_offers(config.environment)
        supporting = {offer.placement.hardware for offer in list_supporting(config, self._launchers)}
        plan = planner.plan(config, checked.facts, offers, [offer.placement.hardware in supporting for offer in offers])
        return complete_plan(plan, request, redact(config), checked.facts, checked.placements, checked.earlier_model, checked.resolved)

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
        checked = self._check(principal, request)
        config, placements = checked.config, checked.placements
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
            earlier_model=checked.earlier_model,
            cloned_from=cloned_from,
            resolved=checked.resolved,
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

    def _check(self, principal: Principal, request: TrainRequest, *, reads_lengths: bool = False) -> CheckedRequest:
        """The checked request. `reads_lengths`: its facts have the token lengths of the datasets, also where nothing is left to choose.

        Raises InvalidRequest or NotFound with every problem that independent checks found, in the order in which they are listed here.
        """
        problems, config, earlier_model, placements = Problems(), request.training_config, None, ()
        with problems.collect():
            config, earlier_model = resolve_earlier_model(self._repository, principal, config)
        is_base_known = not problems
        data_problems, datasets = Problems(), list[WeightedDataset]()
        with data_problems.collect():
            datasets = self._find_datasets(request, principal.tenant_id)
        facts = self._read_facts(config, datasets, is_base_known=is_base_known, reads_lengths=reads_lengths or _has_auto(config, request))
        choice = Resolution(config, request.hardware)
        with problems.collect():
            choice = self._resolve(request, config, facts, has_rows=bool(datasets))
            config = choice.config
            placements = place(config, choice.hardware, self._launchers, is_new=True, base=facts.base)
            check_cost_cap(request.max_cost_usd, placements)
        with problems.collect():
            data_problems.raise_found()
            check_job(config, datasets, self._models)
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
        return CheckedRequest(config, earlier_model, placements, choice.resolved, facts)

    def _read_facts(
        self, config: TrainingConfig, datasets: Sequence[WeightedDataset], *, is_base_known: bool, reads_lengths: bool
    ) -> JobFacts:
        """What is known of the base and the rows. Token lengths are read where they are needed only: most jobs are just submitted."""
        name = config.hub_model_id if is_base_known else None
        base = self._bases.find(name) if name else None
        reads_lengths = reads_lengths and name is not None
        lengths = read_token_lengths(self._datasets, datasets, name or "") if reads_lengths else (None,) * len(datasets)
        return JobFacts(base, tuple(datasets), lengths)

    def _resolve(self, request: TrainRequest, config: TrainingConfig, facts: JobFacts, *, has_rows: bool) -> Resolution:
        """The configuration and hardware without any "auto". Raises DoesNotFit, Unsupported, InvalidRequest, Unavailable."""
        planner, is_free = find_planner(config), request.hardware == AUTO_HARDWARE
        if planner is None or not (is_free or planner.has_auto(config)):
            return Resolution(config, self._name_default(config) if is_free else request.hardware)
        if not has_rows:  # the request is refused; its other fields are checked with usual numbers
            return Resolution(planner.set_defaults(config), None if is_free else request.hardware)
        if is_free:
            return choose_hardware(planner, config, facts, list_supporting(planner.set_defaults(config), self._launchers))
        offers = self._launchers.resolve(request.hardware, config.environment)
        chosen, resolved = planner.choose_numbers(config, facts, offers)
        return Resolution(chosen, request.hardware, resolved)

    def _name_default(self, config: TrainingConfig) -> list[str]:
        """The hardware of a family that is not estimated: all that can run the job, the deployment's first one first."""
        return [offer.placement.hardware for offer in list_supporting(config, self._launchers)][:MAX_CANDIDATES]

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
                if dataset.status != "ready":
                    problems.add(_not_ready(dataset, "processed_dataset_id" if request.datasets is None else f"datasets.{index}"))
                    continue
                found.append(WeightedDataset(dataset=dataset, weight=share.weight))
        problems.raise_found()
        return found


def _has_auto(config: TrainingConfig, request: TrainRequest) -> bool:
    planner = find_planner(config)
    return planner is not None and (request.hardware == AUTO_HARDWARE or planner.has_auto(config))


def _not_ready(dataset: Dataset, param: str) -> InvalidRequest:
    name = dataset.processed_dataset_id
    if dataset.status == "failed":
        hint = f"GET /datasets/{name} says why; upload the rows again"
        return InvalidRequest(f"{name} has no rows: making it failed", hint=hint, param=param)
    return InvalidRequest(f"{name} is still being made", hint=f"wait until GET /datasets/{name} says that it is ready", param=param)


def make_job_id(dataset_id: str, base_model_id: str, suffix: str) -> str:
    """A readable id, training_<dataset>_<model>_<suffix>, without empty parts. The suffix is random: no two jobs share an id."""
    dataset = dataset_id.removeprefix("dataset_")
    model = base_model_id.rpartition("/")[2]
    readable = [re.sub(r"[^A-Za-z0-9-]+", "-", part)[:40].strip("-") for part in (dataset, model)]
    return "_".join(["training", *filter(None, readable), suffix])


def _request_digest(request: TrainRequest) -> str:
    """The digest of everything but the secrets, which a caller may renew between two tries."""
    return compute_digest(request.model_dump(mode="json", exclude={"hf_token"}))

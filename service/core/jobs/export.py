"""Exporting a checkpoint of a job again, without training: each export is a job of its own."""

from collections.abc import Callable, Sequence

from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from schema.job import EarlierModel, ExportSource, Job, Status
from schema.placement import Placement
from schema.requests import ExportRequest, ReexportRequest
from schema.training import TrainingConfig
from service.core.errors import InvalidRequest, NotFound
from service.core.jobs.budget import Budget
from service.core.jobs.checkpoints import StoredCheckpoint, describe_deletion, list_checkpoints
from service.core.jobs.kinds import training_of
from service.core.jobs.repository import JobRepository, compute_digest
from service.core.jobs.secrets import HF_SECRET
from service.core.jobs.submit import make_job_id
from service.core.jobs.trackers import DeploymentTrackers
from service.core.launchers import LauncherPool
from service.core.ports import Hub, Wake
from service.core.principals import Principal, Scope
from service.core.problems import Problems
from service.core.spending import check_cost_cap
from service.core.validation import choose_exports
from service.core.validation.hub import check_hub, check_token
from service.core.validation.placement import place
from storage import ObjectStore


class Exports:
    """Creates jobs that export a stored checkpoint of another job."""

    def __init__(
        self,
        repository: JobRepository,
        *,
        launchers: LauncherPool,
        budget: Budget,
        models: ObjectStore,
        hub: Hub,
        random_suffix: Callable[[], str],
        wake: Wake,
    ) -> None:
        self._repository = repository
        self._launchers = launchers
        self._budget = budget
        self._models = models
        self._hub = hub
        self._random_suffix = random_suffix
        self._wake = wake

    def export(self, principal: Principal, job_id: str, step: int, request: ExportRequest, idempotency_key: str | None = None) -> Job:
        """Create a job that exports the checkpoint of one step. Raises NotFound, Unsupported, InvalidRequest, QuotaExceeded."""
        principal.require(Scope.JOBS_WRITE)
        source = self._repository.find(principal, job_id)
        training_of(source)
        stored = _pick_checkpoint(list_checkpoints(self._models, source), source, step, request.attempt)
        secrets = {HF_SECRET: request.hf_token.get_secret_value()} if request.hf_token else {}
        config, placements = self._check(source, request, secrets.get(HF_SECRET))
        # The body of a ReexportRequest overrides `step` with the step it asked for, which may be none: the newest checkpoint
        # changes while a job trains, and the same request must stay the same request.
        digest = compute_digest({"export_of": job_id, "step": step, **request.model_dump(mode="json", exclude={"hf_token"})})
        if earlier := self._budget.check_new_job(principal.tenant_id, placements, idempotency_key, digest):
            return earlier
        now = self._repository.clock()
        job = Job(
            job_id=make_job_id(source.processed_dataset_id, config.summarize().base_model_id, self._random_suffix()),
            tenant_id=source.tenant_id,
            created_by=principal.subject,
            project_id=source.project_id,
            job_name=request.job_name or f"{source.job_name[:100]} at step {step}",
            metadata=source.metadata if request.metadata is None else request.metadata,
            processed_dataset_id=source.processed_dataset_id,
            datasets=source.datasets,
            training_config=config,
            secret_names=tuple(sorted(secrets)),
            placements=placements,
            earlier_model=source.earlier_model,
            export_of=ExportSource(job_id=job_id, attempt=stored.checkpoint.attempt, step=step, key=stored.key),
            max_gpu_seconds=request.max_gpu_seconds,
            max_cost_usd=request.max_cost_usd,
            status=Status.QUEUED,
            created_at=now,
            updated_at=now,
            status_changed_at=now,
        )
        created = self._repository.create(job, secrets, idempotency_key, digest)
        self._wake(created.job_id)
        return created

    def _check(self, source: Job, request: ExportRequest, token: str | None) -> tuple[TrainingConfig, tuple[Placement, ...]]:
        """The configuration of the export and its placements. Raises InvalidRequest, Unsupported or NotFound with every problem."""
        problems, config, placements = Problems(), training_of(source), ()
        with problems.collect():
            config = _make_export_config(config, request, source.earlier_model)
            with problems.collect():
                hardware = request.hardware or [placement.hardware for placement in source.placements]
                placements = place(config, hardware, self._launchers)
                check_cost_cap(request.max_cost_usd, placements)
            with problems.collect():
                check_token(config, token)
            reads_base = source.earlier_model is None or source.earlier_model.needs_base
            check_hub(config, token, self._hub, self._models, reads_base=reads_base)
        with problems.collect():
            self._repository.find_datasets(source)
        problems.raise_found()
        return config, placements

    def reexport(self, principal: Principal, job_id: str, request: ReexportRequest, idempotency_key: str | None = None) -> Job:
        """Export a job's model again; without a step, the published checkpoint if it is stored, else the newest. Raises as `export`."""
        principal.require(Scope.JOBS_WRITE)
        source = self._repository.find(principal, job_id)
        training_of(source)
        stored = list_checkpoints(self._models, source)
        if not stored:
            raise _no_checkpoint_error(source)
        steps = [each.checkpoint.step for each in stored if request.attempt in (None, each.checkpoint.attempt)]
        step = request.step
        if step is None:
            step = source.published_step if source.published_step in steps else next(iter(steps), stored[0].checkpoint.step)
        return self.export(principal, job_id, step, request, idempotency_key)


def _make_export_config(config: TrainingConfig, request: ExportRequest, earlier_model: EarlierModel | None = None) -> TrainingConfig:
    """The source's configuration with the requested export, no tracker and no gate. Raises InvalidRequest when they do not fit."""
    changes = {"eval_config": config.eval_config.for_export(), **dict.fromkeys(DeploymentTrackers.model_fields)}
    try:
        # Only what was sent, read by the job's own class: the defaults of another family's are not the job's.
        export = type(config.export_config).model_validate(request.export_config.model_dump(exclude_unset=True))
        changed = config.model_copy(update=changes | {"export_config": export})
        changed.reject_unused_export()
        if earlier_model:
            changed = choose_exports(changed, earlier_model, "export_config")
        return type(config).model_validate(changed.model_dump())
    except PydanticCustomError as error:
        raise InvalidRequest(error.message(), param=(error.context or {}).get("field")) from error
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidRequest(first["msg"], param=first.get("ctx", {}).get("field")) from error


def _pick_checkpoint(stored: Sequence[StoredCheckpoint], job: Job, step: int, attempt: int | None) -> StoredCheckpoint:
    """The checkpoint of a step, the newest attempt's unless one is named. Raises NotFound that lists what there is."""
    for each in stored:
        if each.checkpoint.step == step and attempt in (None, each.checkpoint.attempt):
            return each
    known = ", ".join(str(each.checkpoint.step) for each in stored) or "none"
    of_attempt = f" of attempt {attempt}" if attempt else ""
    message = f"{job.job_id} has no checkpoint{of_attempt} at step {step}; it has: {known}"
    raise NotFound(f"{message}{describe_deletion(job)}", param="attempt" if attempt else "step")


def _no_checkpoint_error(job: Job) -> NotFound:
    """Why there is no checkpoint, and what would help."""
    if job.export_of:
        hint = f"POST /jobs/{job.export_of.job_id}/export exports it again"
        return NotFound(f"{job.job_id} trained nothing; it exported a checkpoint of {job.export_of.job_id}", hint=hint)
    if job.status.is_final:
        message = f"no checkpoint of {job.job_id} is kept{describe_deletion(job)}"
        start = f"; base_model_id job:{job.job_id} starts a job from its published model" if job.artifacts else ""
        return NotFound(message, hint=f"POST /jobs/{job.job_id}/clone trains it again{start}")
    return NotFound(f"{job.job_id} is {job.status} and has no checkpoint yet", hint="POST /jobs/{id}/pause saves one")

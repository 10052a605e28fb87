"""Cancel, pause, resume, retry: what a caller can do with an existing job. Each call can be repeated without harm."""

from datetime import datetime

from pydantic import ValidationError

from schema.job import Job, Status
from schema.placement import Placement
from schema.requests import ContinuationOptions, ResumeRequest, RetryRequest
from schema.training import JobConfig
from service.core import lifecycle
from service.core.errors import InvalidRequest
from service.core.jobs.budget import Budget
from service.core.jobs.repository import JobRepository
from service.core.jobs.secrets import HF_SECRET, WANDB_SECRET, resent_secrets
from service.core.jobs.trackers import DeploymentTrackers, deployment_tracker_secrets
from service.core.launchers import LauncherPool
from service.core.ports import Wake
from service.core.principals import Principal, Scope
from service.core.problems import Problems
from service.core.spending import change_caps, check_cost_cap
from service.core.validation.placement import place


class JobControl:
    """Changes what a job is to do next. The record changes first; then the reconciler is woken to act on it."""

    def __init__(
        self, repository: JobRepository, *, launchers: LauncherPool, budget: Budget, trackers: DeploymentTrackers, wake: Wake
    ) -> None:
        self._repository = repository
        self._launchers = launchers
        self._budget = budget
        self._trackers = trackers
        self._wake = wake

    def cancel(self, principal: Principal, job_id: str) -> Job:
        """Stop a job: its attempt gets the directive first, and is killed if it does not stop. Raises Conflict, NotFound."""
        principal.require(Scope.JOBS_WRITE)
        self._repository.find(principal, job_id)
        job = self._repository.change(job_id, lifecycle.request_cancel)
        if job.status.is_final:
            self._repository.destroy_secrets(job)
        self._wake(job_id)
        return job

    def pause(self, principal: Principal, job_id: str) -> Job:
        """Free the compute and keep the progress: the attempt saves a checkpoint and ends. Raises Conflict, NotFound."""
        principal.require(Scope.JOBS_WRITE)
        self._repository.find(principal, job_id)
        job = self._repository.change(job_id, lifecycle.request_pause)
        self._wake(job_id)
        return job

    def resume(self, principal: Principal, job_id: str, request: ResumeRequest) -> Job:
        """Continue a paused job from its checkpoint, on other hardware or for longer if requested.

        Raises Conflict, InvalidRequest, Unsupported, QuotaExceeded, NotFound.
        """
        principal.require(Scope.JOBS_WRITE)
        before = self._repository.find(principal, job_id)
        placements = self._check_request(before, request)
        if before.status is Status.PAUSED:
            self._check_room(before, request, placements)
            self._refresh_secrets(before, request)

        def request_resume(job: Job, now: datetime) -> Job:
            config, capped = _extend_training(job.training_config, request), _change_caps(job, request, now)
            return lifecycle.request_resume(capped, now, training_config=config, placements=placements)

        job = self._repository.change(job_id, request_resume)
        self._wake(job_id)
        return job

    def retry(self, principal: Principal, job_id: str, request: RetryRequest) -> Job:
        """Continue a failed or cancelled job from its last good checkpoint.

        Raises Conflict, InvalidRequest, Unsupported, QuotaExceeded, NotFound.
        """
        principal.require(Scope.JOBS_WRITE)
        before = self._repository.find(principal, job_id)
        placements = self._check_request(before, request)
        if before.status in (Status.FAILED, Status.CANCELLED):
            self._repository.find_datasets(before)
            self._check_room(before, request, placements)
            self._refresh_secrets(before, request)

        def request_retry(job: Job, now: datetime) -> Job:
            config, capped = _extend_training(job.training_config, request), _change_caps(job, request, now)
            return lifecycle.request_retry(capped, now, from_start=request.from_start, training_config=config, placements=placements)

        job = self._repository.change(job_id, request_retry)
        self._wake(job_id)
        return job

    def _check_request(self, job: Job, request: ContinuationOptions) -> tuple[Placement, ...] | None:
        """The placements of the requested hardware. Raises what can be said of the request whatever the job's state is."""
        problems, placements = Problems(), None
        with problems.collect():
            placements = self._resolve_placements(job, request)
        with problems.collect():
            _extend_training(job.training_config, request)
        problems.raise_found()
        return placements

    def _check_room(self, job: Job, request: ContinuationOptions, placements: tuple[Placement, ...] | None) -> None:
        """Raise Conflict, InvalidRequest or QuotaExceeded unless the caps and the tenant's quotas let the job continue."""
        _change_caps(job, request, self._repository.clock())
        self._budget.check_continuation(job.tenant_id, placements or job.placements)

    def _refresh_secrets(self, job: Job, request: ContinuationOptions) -> None:
        """Store the secrets that were sent again beside those still stored. Raises InvalidRequest when one that the job had is missing."""
        renewed, problems = resent_secrets(request), Problems()
        for name in sorted(renewed.keys() - set(job.secret_names)):
            message = f"{job.job_id} was created without {name} and continues without it"
            problems.add(InvalidRequest(message, hint="leave it out", param=_secret_param(name)))
        problems.raise_found()
        if not job.secret_names:
            return
        stored = self._repository.secrets.read(job.job_id)
        known = deployment_tracker_secrets(job.training_config, self._trackers) | stored | renewed
        for name in job.secret_names:
            if name not in known:
                hint = "secrets are destroyed when a job ends, and expire after 30 days"
                message = f"{name} is needed again to continue {job.job_id}; send it in the body"
                problems.add(InvalidRequest(message, hint=hint, param=_secret_param(name)))
        problems.raise_found()
        if known != stored:
            self._repository.secrets.put(job.job_id, known)

    def _resolve_placements(self, job: Job, request: ContinuationOptions) -> tuple[Placement, ...] | None:
        """The placements of the requested hardware; None without a request. Raises InvalidRequest, Unsupported, Unavailable."""
        placements = place(job.training_config, request.hardware, self._launchers) if request.hardware else None
        param = "max_cost_usd" if request.max_cost_usd else "hardware"
        if request.max_cost_usd or placements:
            check_cost_cap(request.max_cost_usd or job.max_cost_usd, placements or job.placements, param)
        return placements


def _change_caps(job: Job, request: ContinuationOptions, now: datetime) -> Job:
    """The job with the caps that the request sends. One that does not wait to be continued needs no room without them."""
    is_sent = request.max_gpu_seconds is not None or request.max_cost_usd is not None
    can_change = job.status in (Status.QUEUED, Status.PREPARING, Status.TRAINING)
    if job.status not in (Status.PAUSED, Status.FAILED, Status.CANCELLED) and not (is_sent and can_change):
        return job
    return change_caps(job, now, max_gpu_seconds=request.max_gpu_seconds, max_cost_usd=request.max_cost_usd)


def _extend_training(config: JobConfig, request: ContinuationOptions) -> JobConfig:
    """Raises InvalidRequest for fewer epochs or steps than before, and for the unit that the job's length is not given in."""
    hyperparameters = config.hyperparameters
    changes, problems = dict[str, int](), Problems()
    for name, requested in (("epochs", request.epochs), ("max_steps", request.max_steps)):
        if requested is None or requested == getattr(hyperparameters, name, None):
            continue
        unit = config.length_unit
        if unit is None:
            message, hint = f"the length of this job cannot change: it has trainer_type {config.trainer_type!r}", f"leave {name} out"
        elif name != unit:
            message, hint = f"the length of this job is counted in {unit}; {name} would not be used", f"raise {unit}"
        elif requested < (planned := getattr(hyperparameters, name)):
            message = f"{name} can only grow: the job was planned with {planned} and may already be past {requested}"
            hint = "an earlier checkpoint can be exported instead"
        else:
            changes[name] = requested
            continue
        problems.add(InvalidRequest(message, hint=hint, param=name))
    problems.raise_found()
    if not changes:
        return config
    try:
        extended = type(hyperparameters).model_validate(hyperparameters.model_dump() | changes)
    except ValidationError as error:  # of the rules between the length and other fields
        [mistake] = error.errors()
        raise InvalidRequest(mistake["msg"], hint="send another number", param=next(iter(changes))) from error
    return config.model_copy(update={"hyperparameters": extended})


def _secret_param(secret_name: str) -> str:
    """The field of a request in which the secret is sent again."""
    return secret_name if secret_name in (HF_SECRET, WANDB_SECRET) else f"secrets.{secret_name}"

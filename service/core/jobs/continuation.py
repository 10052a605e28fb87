"""Starting from the model of an earlier job: which job may be named, and what the new one keeps of it."""

from schema.job import EarlierModel, Job, Status
from schema.training import TrainingConfig
from service.core.errors import InvalidRequest, NotFound
from service.core.jobs.kinds import training_of
from service.core.jobs.repository import JobRepository
from service.core.principals import Principal
from service.core.validation import start_from_model

BASE_PARAM = "training_config.base_model_id"


def resolve_earlier_model(
    repository: JobRepository, principal: Principal, config: TrainingConfig
) -> tuple[TrainingConfig, EarlierModel | None]:
    """The configuration with the earlier job's original base, and the model to start from; None where the request names no job.

    Raises NotFound, also for a job of another tenant, and InvalidRequest for a job without a model to start from.
    """
    if config.earlier_job_id is None:
        return config, None
    earlier = repository.find_or_none(principal, config.earlier_job_id)
    if earlier is None:
        hint = "base_model_id names a job of yours, as GET /jobs lists them, or a model of the Hub"
        raise NotFound(f"no job {config.earlier_job_id!r}", hint=hint, param=BASE_PARAM)
    training_of(earlier, BASE_PARAM)
    _check_completed(earlier)
    return start_from_model(config, earlier)


def _check_completed(earlier: Job) -> None:
    """Raise InvalidRequest for a job that has no model, or will soon have none."""
    if earlier.deletion_started_at is not None:
        raise InvalidRequest(f"{earlier.job_id} is being deleted", hint="name another job or a model of the Hub", param=BASE_PARAM)
    if earlier.status is not Status.COMPLETED:
        hint = "wait until it is completed" if not earlier.status.is_final else f"POST /jobs/{earlier.job_id}/retry continues it"
        message = f"{earlier.job_id} is {earlier.status}; a job can start from the model of a completed job only"
        raise InvalidRequest(message, hint=hint, param=BASE_PARAM)
    if earlier.gate and not earlier.gate.passed and not earlier.artifacts:
        message = f"{earlier.job_id} published nothing because it did not pass its promotion gate"
        hint = f"POST /jobs/{earlier.job_id}/export exports it anyway; then name the job that exports it"
        raise InvalidRequest(message, hint=hint, param=BASE_PARAM)

"""What a job makes: a model, or a dataset. Only some requests fit both."""

from schema.job import Job
from schema.training import IngestConfig, TrainingConfig
from service.core.errors import InvalidRequest


def training_of(job: Job, param: str | None = None) -> TrainingConfig:
    """The configuration of a job that trains. Raises InvalidRequest for one that makes a dataset."""
    config = job.training_config
    if isinstance(config, IngestConfig):
        hint = f"name a job that trains, such as one on {job.processed_dataset_id}; POST /datasets makes another dataset"
        raise InvalidRequest(f"{job.job_id} makes the dataset {job.processed_dataset_id}, and trains no model", hint=hint, param=param)
    return config

"""Launching an attempt: the record says so first, then the spec is written, then the launcher is called, then the handle is stored.

A process may die between any two of these lines; `reconcile.py` finds out from the record where it stopped.
"""

import logging
from collections.abc import Mapping

from schema.checkpoint import checkpoints_prefix
from schema.job import Failure, Job
from schema.spec import JobSpec, StoreUrls, attempt_name, spec_key
from service.core import lifecycle
from service.core.errors import LaunchFailed, NotFound, StaleRevision, Unavailable
from service.core.jobs.repository import JobRepository
from service.core.ports import Buckets, Launcher, LaunchRequest
from service.core.tokens import TokenSigner
from storage import StorageError

log = logging.getLogger(__name__)


class AttemptStarter:
    """Starts attempts. The record's compare-and-set decides which of several processes calls the launcher."""

    def __init__(
        self,
        repository: JobRepository,
        *,
        launcher: Launcher,
        buckets: Buckets,
        tokens: TokenSigner,
        attempt_environment: Mapping[str, str],
    ) -> None:
        self._repository = repository
        self._launcher = launcher
        self._buckets = buckets
        self._tokens = tokens
        self._attempt_environment = attempt_environment

    def start_next(self, job: Job) -> Job:
        """Give a queued job its next attempt, and launch it."""
        return self._start(job, lifecycle.begin_attempt(job, self._launcher.name, self._repository.clock()))

    def start_again(self, job: Job, number: int) -> Job:
        """Launch an attempt that was recorded but never started, which the caller has verified with the launcher."""
        return self._start(job, lifecycle.relaunch(job, number, self._repository.clock()))

    def _start(self, before: Job, after: Job) -> Job:
        try:
            job = self._repository.replace(before, after)
        except StaleRevision:
            return before  # another process changed the record first: it launches the attempt
        attempt = job.attempt
        assert attempt is not None
        try:
            spec = self._render_spec(job)
            self._buckets.configs.write(spec_key(job.job_id), spec.model_dump_json(indent=1).encode())
            handle = self._launcher.launch(self._render_launch_request(job, attempt.number))
        except (Unavailable, StorageError) as error:
            reason = f"{error.message} {error.hint}".strip() if isinstance(error, Unavailable) else str(error)
            log.warning("launch delayed", extra={"job_id": job.job_id, "attempt": attempt.number, "error": reason})
            return self._repository.change(job.job_id, lambda job, now: lifecycle.delay_launch(job, attempt.number, reason, now))
        except (LaunchFailed, NotFound) as error:
            failure = Failure(code="launch_failed", message=error.message, hint=error.hint)
            job = self._repository.change(job.job_id, lambda job, now: lifecycle.mark_launch_failed(job, attempt.number, failure, now))
            self._repository.destroy_secrets(job)
            return job
        return self._repository.change(job.job_id, lambda job, now: lifecycle.mark_launched(job, attempt.number, handle, now))

    def _render_spec(self, job: Job) -> JobSpec:
        """The spec of the current attempt. Raises NotFound when the dataset is gone."""
        return JobSpec(
            job_id=job.job_id,
            job_name=job.job_name,
            tenant_id=job.tenant_id,
            project_id=job.project_id,
            training_config=job.training_config,
            dataset=self._repository.find_dataset(job.processed_dataset_id, job.tenant_id),
            stores=StoreUrls(datasets=self._buckets.datasets.url, models=self._buckets.models.url, configs=self._buckets.configs.url),
            checkpoints_prefix=checkpoints_prefix(job.job_id, job.project_id),
            resume_from_attempt=job.resume_from_attempt,
            export_of=job.export_of,
        )

    def _render_launch_request(self, job: Job, number: int) -> LaunchRequest:
        environment = {
            **self._attempt_environment,
            "JOB_ID": job.job_id,
            "JOB_ATTEMPT": str(number),
            "JOB_TOKEN": self._tokens.sign_attempt_token(job.job_id, number),
            "JOB_SPEC_STORE_URL": self._buckets.configs.url,
        }
        name = attempt_name(job.job_id, number)
        return LaunchRequest(name=name, job_id=job.job_id, attempt=number, environment=environment, profile=job.hardware)

"""Launching an attempt: the record says so first, then the spec is written, then the launcher is called, then the handle is stored.

A process may die between any two of these lines; `reconcile.py` finds out from the record where it stopped. A launcher that refuses
passes the attempt on to the next placement of its job.
"""

import logging
from collections.abc import Mapping
from typing import cast

from schema.checkpoint import checkpoints_prefix
from schema.job import Attempt, Failure, Job
from schema.placement import Placement
from schema.spec import JobSpec, StoreUrls, attempt_name, spec_key
from schema.training import SpecConfig
from service.core import lifecycle
from service.core.errors import LaunchFailed, NoCapacity, NotFound, StaleRevision, TunesmithError, Unavailable, UnreadableRecord
from service.core.jobs.ownership import JobMarks
from service.core.jobs.repository import JobRepository
from service.core.ports import Buckets, Launcher, LaunchRequest, Wake
from service.core.spending import set_rate
from service.core.tokens import TokenSigner
from storage import StorageError

log = logging.getLogger(__name__)


class AttemptStarter:
    """Starts attempts. The record's compare-and-set decides which of several processes calls the launcher."""

    def __init__(
        self,
        repository: JobRepository,
        *,
        buckets: Buckets,
        marks: JobMarks,
        tokens: TokenSigner,
        attempt_variables: Mapping[str, str],
        wake: Wake,
    ) -> None:
        self._repository = repository
        self._buckets = buckets
        self._marks = marks
        self._tokens = tokens
        self._attempt_variables = attempt_variables
        self._wake = wake

    def start_next(self, launcher: Launcher, job: Job, placement: Placement) -> Job:
        """Give a queued job its next attempt at one of its placements, and launch it."""
        return self._start(launcher, job, lifecycle.begin_attempt(job, placement, self._repository.clock()))

    def start_again(self, launcher: Launcher, job: Job, number: int) -> Job:
        """Launch an attempt that was recorded but never started, which the caller has verified with the launcher."""
        return self._start(launcher, job, lifecycle.relaunch(job, number, self._repository.clock()))

    def _start(self, launcher: Launcher, before: Job, after: Job) -> Job:
        try:
            job = self._repository.replace(before, set_rate(after, launcher))
        except StaleRevision:
            return before  # another process changed the record first: it launches the attempt
        attempt = job.attempt
        assert attempt is not None
        number = attempt.number
        try:
            spec = self._render_spec(job)
            self._mark(job)
            self._buckets.configs.write(spec_key(job.job_id), spec.model_dump_json(indent=1).encode())
            handle = launcher.launch(self._render_launch_request(job, attempt))
        except (LaunchFailed, NoCapacity) as error:
            return self._pass_on(job, attempt, error)
        except (NotFound, UnreadableRecord) as error:  # the dataset is gone, or its record is damaged
            failure = _launch_failure(error)
            job = self._repository.change(job.job_id, lambda job, now: lifecycle.mark_launch_failed(job, number, failure, now))
            self._repository.destroy_secrets(job)
            return job
        except (Unavailable, StorageError) as error:
            reason = f"{error.message} {error.hint}".strip() if isinstance(error, Unavailable) else str(error)
            log.warning("launch delayed", extra={"job_id": job.job_id, "attempt": number, "error": reason})
            return self._repository.change(job.job_id, lambda job, now: lifecycle.delay_launch(job, number, reason, now))
        return self._repository.change(job.job_id, lambda job, now: lifecycle.mark_launched(job, number, handle, now))

    def _mark(self, job: Job) -> None:
        """Say in the model bucket whose job this is. Without it a cleanup leaves the job's files alone, so it is not worth the launch."""
        try:
            self._marks.write(job.job_id, self._repository.clock())
        except StorageError as error:
            log.warning("job could not be marked", extra={"job_id": job.job_id, "error": str(error)})

    def _pass_on(self, job: Job, attempt: Attempt, error: LaunchFailed | NoCapacity) -> Job:
        """The launcher refused the attempt and started nothing: the next placement takes it, or it waits, or it fails."""
        failure, permanent = _launch_failure(error), isinstance(error, LaunchFailed)
        log.warning(
            "launch refused",
            extra={"job_id": job.job_id, "attempt": attempt.number, "hardware": attempt.placement.hardware, "error": error.message},
        )
        job = self._repository.change(
            job.job_id, lambda job, now: lifecycle.refuse_launch(job, attempt.number, failure, now, permanent=permanent)
        )
        if job.status.is_final:
            self._repository.destroy_secrets(job)
        elif job.attempt and job.attempt.launch_started_at is None:
            self._wake(job.job_id)
        return job

    def _render_spec(self, job: Job) -> JobSpec:
        """The spec of the current attempt. Raises NotFound when a dataset is gone."""
        datasets = self._repository.find_datasets(job)
        return JobSpec(
            job_id=job.job_id,
            job_name=job.job_name,
            tenant_id=job.tenant_id,
            project_id=job.project_id,
            training_config=cast(SpecConfig, job.training_config),
            dataset=datasets[0].dataset,
            mixed_datasets=datasets if job.datasets else (),
            stores=StoreUrls(datasets=self._buckets.datasets.url, models=self._buckets.models.url, configs=self._buckets.configs.url),
            checkpoints_prefix=checkpoints_prefix(job.job_id, job.project_id),
            resume_from_attempt=job.resume_from_attempt,
            export_of=job.export_of,
            earlier_model=job.earlier_model,
        )

    def _render_launch_request(self, job: Job, attempt: Attempt) -> LaunchRequest:
        variables = {
            **self._attempt_variables,
            "JOB_ID": job.job_id,
            "JOB_ATTEMPT": str(attempt.number),
            "JOB_TOKEN": self._tokens.sign_launch_token(job.job_id, attempt.number),
            "JOB_SPEC_STORE_URL": self._buckets.configs.url,
            **({"TRACEPARENT": job.traceparent} if job.traceparent else {}),
        }
        return LaunchRequest(
            name=attempt_name(job.job_id, attempt),
            job_id=job.job_id,
            attempt=attempt.number,
            profile=attempt.placement.profile,
            environment=attempt.placement.environment,
            variables=variables,
        )


def _launch_failure(error: TunesmithError) -> Failure:
    return Failure(code="launch_failed", message=error.message, hint=error.hint)

"""What an attempt calls with its own token: claim, report, finish. An attempt that is over is fenced at each of them."""

from datetime import datetime

from schema.events import Directive, EventBatch, EventBatchResponse
from schema.job import Job, Status
from schema.result import Result
from schema.spec import AttemptCredentials, ClaimResponse
from service.core import lifecycle
from service.core.errors import Forbidden
from service.core.jobs.budget import Budget
from service.core.jobs.credentials import find_attempt_access
from service.core.jobs.ingestions import delete_used_upload, publish_dataset
from service.core.jobs.manifest import write_manifest
from service.core.jobs.reported import check_batch, check_result
from service.core.jobs.repository import JobRepository
from service.core.ports import Buckets, Wake
from service.core.principals import Principal, Scope, attempt_subject
from service.core.store_credentials import CredentialIssuer
from service.core.stored_json import MAX_RECORD_BYTES_BY_EVENTS, MAX_RESULT_BYTES, dump_record
from service.core.tokens import TokenSigner


class Attempts:
    """Takes what attempts report, and answers with the directive that the job's status gives."""

    def __init__(
        self,
        repository: JobRepository,
        *,
        budget: Budget,
        buckets: Buckets,
        tokens: TokenSigner,
        credentials: CredentialIssuer,
        wake: Wake,
    ) -> None:
        self._repository = repository
        self._budget = budget
        self._buckets = buckets
        self._models = buckets.models
        self._credentials = credentials
        self._tokens = tokens
        self._wake = wake

    def claim(self, principal: Principal, job_id: str, number: int, claimant: str) -> ClaimResponse:
        """Give the attempt to one process, with the job's secrets and a token for its later calls.

        `claimant` is the id of the process, as in every method here. Raises Fenced for a second process, Forbidden, NotFound.
        """
        _require_attempt(principal, job_id, number)
        job = self._repository.change(job_id, lambda job, now: lifecycle.claim_attempt(job, number, claimant, now))
        secrets = self._repository.secrets.read(job_id) if job.secret_names else {}
        return ClaimResponse(secrets=secrets, directive=_directive_for(job), token=self._tokens.sign_attempt_token(job_id, number))

    def renew_token(self, principal: Principal, job_id: str, number: int, claimant: str) -> str:
        """A new token for the process that owns the attempt. Raises Fenced for another one, and when the attempt is over."""
        self.check_owner(principal, job_id, number, claimant)
        return self._tokens.sign_attempt_token(job_id, number)

    def issue_credentials(self, principal: Principal, job_id: str, number: int, claimant: str) -> AttemptCredentials:
        """Credentials for the object stores. Raises Fenced for another process, and when the attempt is over; Unavailable."""
        job = self.check_owner(principal, job_id, number, claimant)
        datasets = [each.dataset for each in self._repository.find_datasets(job)]
        return self._credentials.issue(find_attempt_access(job, datasets, self._buckets))

    def check_owner(self, principal: Principal, job_id: str, number: int, claimant: str) -> Job:
        """The job, if the attempt is its current one and belongs to that process. Raises Fenced, Forbidden, NotFound."""
        _require_attempt(principal, job_id, number)
        job = self._repository.get(job_id)
        lifecycle.check_claimant(job, number, claimant)
        lifecycle.check_current(job, number)
        return job

    def report(self, principal: Principal, job_id: str, number: int, batch: EventBatch, claimant: str) -> EventBatchResponse:
        """Store a batch of events; most change only the heartbeat, not the record.

        Raises Fenced for another process than the owner and for an attempt that is over, InvalidRequest, Forbidden, NotFound.
        """
        job = self.check_owner(principal, job_id, number, claimant)
        now = self._repository.clock()
        batch = check_batch(job, number, batch, self._models.url)
        next_seq = self._repository.store.append_events(job_id, number, batch, now)
        if _apply_batch(job, number, batch, now) is not job:
            job = self._repository.change(job_id, lambda job, _: _apply_batch(job, number, batch, now), MAX_RECORD_BYTES_BY_EVENTS)
        return EventBatchResponse(directive=_directive_for(self._budget.enforce(job)), next_seq=next_seq)

    def finish(self, principal: Principal, result: Result) -> Job:
        """Apply the result that an attempt sends. It may be sent again without harm. Raises as `apply_result`, TooLarge and Forbidden."""
        _require_attempt(principal, result.job_id, result.attempt)
        dump_record(result, MAX_RESULT_BYTES)
        return self.apply_result(result.job_id, result)

    def apply_result(self, job_id: str, result: Result) -> Job:
        """Apply a result that an attempt sent or left in the bucket. Raises Fenced, InvalidRequest, NotFound."""
        result = self._publish_dataset(job_id, self.check_result(job_id, result))
        job = self._repository.change(job_id, lambda job, now: lifecycle.apply_result(job, result, now))
        if job.status.is_final:
            self._repository.destroy_secrets(job)
        delete_used_upload(job, self._buckets.datasets)
        self._wake(job_id)
        return write_manifest(self._repository, self._models, job)

    def _publish_dataset(self, job_id: str, result: Result) -> Result:
        """Before the job is complete: write the record of the dataset that the attempt has made. A late result changes nothing."""
        job = self._repository.get(job_id)
        if result.ingested is None or job.attempts[result.attempt - 1].ended_at is not None:
            return result
        lifecycle.check_current(job, result.attempt)
        return publish_dataset(self._repository, job, result, self._buckets.datasets)

    def check_result(self, job_id: str, result: Result) -> Result:
        """The result, if its owner made it and it publishes only what is the attempt's. Raises Fenced, InvalidRequest, NotFound."""
        job = self._repository.get(job_id)
        lifecycle.check_claimant(job, result.attempt, result.claimant)
        return check_result(job, result, self._models.url)


def _require_attempt(principal: Principal, job_id: str, number: int) -> None:
    """Raise Forbidden unless the principal is that attempt."""
    principal.require(Scope.ATTEMPT)
    if principal.subject != attempt_subject(job_id, number):
        raise Forbidden(f"{principal.subject} is not attempt {number} of {job_id}")


def _apply_batch(job: Job, number: int, batch: EventBatch, now: datetime) -> Job:
    job = lifecycle.clear_suspicion(job, number, now)
    for reported in batch.events:
        job = lifecycle.apply_event(job, number, reported.event, now)
    return job


def _directive_for(job: Job) -> Directive:
    """What the current attempt should do."""
    match job.status:
        case Status.CANCELLING:
            return "cancel"
        case Status.PAUSING:
            return "pause"
        case _:
            return "continue"

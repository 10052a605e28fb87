"""Datasets made by jobs: from sources that are large, or lie elsewhere.

The record of the dataset comes first, in status `processing`, then the job that makes it. The attempt writes files below its own prefix and
reports what it found. The service then writes the record of the ready dataset, and after that completes the job: a process that dies
in between leaves a job that is not complete, so the result is applied again.
"""

import json
import logging
import re
from collections.abc import Callable, Mapping
from typing import cast

from schema.dataset import Dataset, Split
from schema.ingestion import MAX_REPORTED_PROBLEMS, IngestLimits, IngestOptions, IngestOutcome, RowProblem, WrittenSplit
from schema.job import Failure, Job, Status
from schema.placement import Hardware, Placement
from schema.result import Ingested, Result
from schema.sources import INCOMING_PREFIX, InvalidSource, Source, WebSource, parse_source
from schema.spec import ingestion_prefix, problems_key
from schema.training import IngestConfig
from service.core.datasets.ingestion import complete_dataset
from service.core.errors import InvalidRequest, TunesmithError, Unavailable
from service.core.jobs.budget import Budget
from service.core.jobs.repository import JobRepository, compute_digest
from service.core.jobs.source_rights import OPTIONS, SourceRules, choose_rights
from service.core.launchers import LauncherPool, Offer
from service.core.ports import Wake
from service.core.principals import Principal, Scope
from service.core.problems import Problems
from service.core.spending import make_rate
from service.core.validation.egress import EgressCheck
from service.core.validation.placement import place
from storage import ObjectStore, StorageError

log = logging.getLogger(__name__)

CREDENTIALS_SECRET = "source_credentials"  # a JSON object of secrets and options
URL_SECRET = "source_url"  # an https URL with its query
NO_SECRETS: Mapping[str, str] = {}
MAX_PROBLEMS_BYTES = 4 << 20
UPLOADED = re.compile(rf"{INCOMING_PREFIX}([^/]+/)?uploads/.+")  # for one dataset alone; other files stay with whoever put them there


class Ingestions:
    """Creates jobs that make datasets."""

    def __init__(
        self,
        repository: JobRepository,
        *,
        launchers: LauncherPool,
        budget: Budget,
        egress: EgressCheck,
        rules: SourceRules,
        random_suffix: Callable[[], str],
        wake: Wake,
    ) -> None:
        self._repository = repository
        self._launchers = launchers
        self._budget = budget
        self._egress = egress
        self._rules = rules
        self._random_suffix = random_suffix
        self._wake = wake

    def start(
        self,
        principal: Principal,
        dataset: Dataset,
        *,
        source: str,
        options: IngestOptions,
        limits: IngestLimits,
        secrets: Mapping[str, str] = NO_SECRETS,
        hardware: Hardware | None = None,
        idempotency_key: str | None = None,
    ) -> Job:
        """Store the record of the dataset, in status `processing`, and the job that makes it: both, or neither.

        `secrets` are the caller's for the source: `hf_token`, and `source_credentials` as JSON. A key below incoming/ must be the
        caller's, which is not checked here. With an idempotency key the answer may be an earlier job, whose `processed_dataset_id` counts.
        Raises InvalidRequest, Unsupported, QuotaExceeded, IdempotencyConflict, Unavailable.
        """
        principal.require(Scope.DATASETS_WRITE)
        config, secrets, placements = self._check(principal, source, options, limits, secrets, hardware)
        digest = compute_digest({"dataset": dataset.name, "project_id": dataset.project_id, "config": config.model_dump(mode="json")})
        if earlier := self._budget.check_new_job(principal.tenant_id, placements, idempotency_key, digest):
            return earlier
        now = self._repository.clock()
        job = Job(
            job_id=f"ingestion_{dataset.processed_dataset_id.removeprefix('dataset_')}_{self._random_suffix()}",
            tenant_id=principal.tenant_id,
            created_by=principal.subject,
            project_id=dataset.project_id,
            job_name=f"dataset {dataset.name}"[:128],
            processed_dataset_id=dataset.processed_dataset_id,
            training_config=config,
            secret_names=tuple(sorted(secrets)),
            placements=placements,
            status=Status.QUEUED,
            created_at=now,
            updated_at=now,
            status_changed_at=now,
        )
        # The query of a URL may be a signature, which no record shows.
        shown = config.source if URL_SECRET in secrets else dataset.source
        facts: dict[str, object] = {"status": "processing", "job_id": job.job_id, "source": shown}
        stored = self._create(dataset.model_copy(update=facts), job, secrets, idempotency_key, digest)
        self._wake(stored.job_id)
        return stored

    def _create(self, dataset: Dataset, job: Job, secrets: Mapping[str, str], idempotency_key: str | None, digest: str) -> Job:
        """Store both records. A dataset whose job was not stored is deleted again."""
        store = self._repository.store
        store.create_dataset(dataset)
        try:
            stored = self._repository.create(job, secrets, idempotency_key, digest)
        except Unavailable:
            raise  # the job may have been written all the same; without it, the dataset is shown as failed and can be deleted
        except TunesmithError:
            store.delete_dataset(dataset.processed_dataset_id)
            raise
        if stored.job_id != job.job_id:
            store.delete_dataset(dataset.processed_dataset_id)
        return stored

    def _check(
        self,
        principal: Principal,
        text: str,
        options: IngestOptions,
        limits: IngestLimits,
        sent: Mapping[str, str],
        hardware: Hardware | None,
    ) -> tuple[IngestConfig, dict[str, str], tuple[Placement, ...]]:
        """The configuration, the secrets to keep, and where it may run. Raises InvalidRequest with every problem, Unsupported."""
        source, credentials, problems = _parse(text), _read_credentials(sent), Problems()
        rights, placements = "anonymous", ()
        with problems.collect():
            rights = choose_rights(source, credentials, principal.tenant_id, self._rules)
        settings = {name: credentials.pop(name) for name in OPTIONS.get(source.kind, ()) if name in credentials}
        with problems.collect():
            self._check_urls(source, settings.get("endpoint_url"))
        config = IngestConfig(
            source=source.without_query if isinstance(source, WebSource) else text,
            options=options,
            limits=limits,
            rights=rights,
            endpoint_url=settings.get("endpoint_url"),
            region=settings.get("region"),
        )
        if config.source != text:
            credentials[URL_SECRET] = text
        with problems.collect():
            placements = place(config, hardware or self._choose_cheapest(config.environment), self._launchers)
        problems.raise_found()
        return config, credentials, placements

    def _check_urls(self, source: Source, endpoint_url: str | None) -> None:
        if isinstance(source, WebSource):
            self._egress.check_url("source", source.url)
        if endpoint_url is not None:
            self._egress.check_url("source_credentials.endpoint_url", endpoint_url)

    def _choose_cheapest(self, environment: str) -> str:
        """The cheapest profile without a GPU that has the environment. Raises Unsupported, Unavailable."""

        def rank(offer: Offer) -> tuple[bool, float]:
            launcher = self._launchers.get(offer.placement.launcher)
            return offer.profile.device != "cpu", make_rate(launcher, offer.placement).usd_per_hour or 0.0

        return min(self._launchers.list_offers(environment), key=rank).placement.hardware


def publish_dataset(repository: JobRepository, job: Job, result: Result, datasets: ObjectStore) -> Result:
    """Write the record of the dataset that an attempt has made; returns the result to apply. Can be repeated.

    `result` has been checked: it is of the current attempt. Raises Unavailable, StorageError.
    """
    ingested, job_config = result.ingested, job.training_config
    assert isinstance(job_config, IngestConfig)
    if result.outcome != "completed" or ingested is None:
        return result
    dataset = repository.find_dataset(job.processed_dataset_id, job.tenant_id)
    problem = _find_damage(job, result.attempt, ingested, datasets)
    if problem is not None:
        return result.model_copy(update={"outcome": "failed", "failure": Failure(code="internal", message=problem)})
    rows = ingested.outcome.rows
    assert rows is not None
    prefix = ingestion_prefix(dataset.processed_dataset_id, result.attempt)
    splits = {name: _make_split(prefix, written) for name, written in rows.splits.items()}
    ready = complete_dataset(dataset, ingested.outcome, rows, splits)
    # An upload keeps the name that its caller gave the file.
    source = dataset.source if dataset.source and job_config.source.startswith(INCOMING_PREFIX) else ingested.source
    repository.store.replace_dataset(ready.model_copy(update={"source": source}))
    return result


def read_problems(job: Job, datasets: ObjectStore) -> tuple[RowProblem, ...]:
    """The rows for which a job has refused its source; none of a job that did not. Raises StorageError."""
    if job.failure is None or job.failure.code != "invalid_data" or not isinstance(job.training_config, IngestConfig):
        return ()
    key = problems_key(job.processed_dataset_id, job.failure.attempt or len(job.attempts))
    stored = datasets.stat(key)
    if stored is None or stored.size_bytes > MAX_PROBLEMS_BYTES:
        return ()
    try:
        return IngestOutcome.load(datasets.read(key)).problems[:MAX_REPORTED_PROBLEMS]
    except ValueError as error:
        log.warning("problems are not readable", extra={"job_id": job.job_id, "error": str(error).partition("\n")[0]})
        return ()


def delete_used_upload(job: Job, datasets: ObjectStore) -> None:
    """Delete the file that was uploaded for the dataset of a completed job alone. What cannot be deleted stays."""
    config = job.training_config
    if not isinstance(config, IngestConfig) or job.status is not Status.COMPLETED or not UPLOADED.fullmatch(config.source):
        return
    try:
        datasets.delete(config.source)
    except StorageError as error:
        log.warning("an uploaded file could not be deleted", extra={"job_id": job.job_id, "error": str(error)})


def _make_split(prefix: str, written: WrittenSplit) -> Split:
    index_key = None if written.index_file is None else prefix + written.index_file
    return Split(rows=written.rows, size_bytes=written.size_bytes, sha256=written.sha256, key=prefix + written.file, index_key=index_key)


def _find_damage(job: Job, attempt: int, ingested: Ingested, datasets: ObjectStore) -> str | None:
    """Why the files that an attempt names cannot be a dataset; None if they can."""
    assert ingested.outcome.rows is not None
    for written in ingested.outcome.rows.splits.values():
        key = ingestion_prefix(job.processed_dataset_id, attempt) + written.file
        stored = datasets.stat(key)
        if stored is None or stored.size_bytes != written.size_bytes:
            return f"the attempt reported {written.file} with {written.size_bytes} bytes, which is not what it stored"
    return None


def _parse(text: str) -> Source:
    try:
        return parse_source(text)
    except InvalidSource as error:
        raise InvalidRequest(f"source is refused: {error}", hint=error.hint, param="source") from error


def _read_credentials(sent: Mapping[str, str]) -> dict[str, str]:
    """The caller's secrets and options by name, of which some come as one JSON object. Raises InvalidRequest."""
    credentials = {name: value for name, value in sent.items() if name != CREDENTIALS_SECRET}
    if CREDENTIALS_SECRET in sent:
        try:
            parsed: object = json.loads(sent[CREDENTIALS_SECRET])
        except ValueError:
            parsed = None
        values = cast(dict[str, object], parsed) if isinstance(parsed, dict) else {"": None}
        if not all(isinstance(value, str | None) for value in values.values()) or "" in values:
            hint = 'write {"google_access_token": "…"}, or {"access_key_id": "…", "secret_access_key": "…"}'
            raise InvalidRequest("source_credentials is not a JSON object of strings", hint=hint, param=CREDENTIALS_SECRET)
        credentials |= {name: value for name, value in values.items() if isinstance(value, str)}
    return credentials

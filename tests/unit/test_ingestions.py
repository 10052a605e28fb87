"""Jobs that make datasets: what is refused, where they run, with whose rights, and how a result becomes a dataset."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from schema.capabilities import FamilyCapabilities
from schema.dataset import Dataset
from schema.events import PhaseChanged
from schema.ingestion import IngestedRows, IngestLimits, IngestOptions, IngestOutcome, RowProblem, WrittenSplit
from schema.job import Job, Status
from schema.requests import CloneRequest, ExportRequest, ResumeRequest, RetryRequest
from schema.result import Ingested, Result
from schema.sources import parse_source
from schema.spec import JobSpec, ingestion_prefix, problems_key, spec_key
from schema.training import IngestConfig
from service.core.errors import Fenced, IdempotencyConflict, InvalidRequest, NotFound, QuotaExceeded, Unavailable, Unsupported
from service.core.jobs.credentials import find_attempt_access
from service.core.jobs.ingestions import read_problems
from service.core.jobs.source_rights import SourceRules, choose_rights
from service.core.ports import Buckets
from service.core.principals import attempt_principal
from service.core.quotas import Quotas
from storage.registry import open_store
from tests.factories import START, make_dataset, make_manifest, make_profile
from tests.fakes import FakeLauncher
from tests.unit.jobs_harness import PRINCIPAL, JobsHarness, make_batch, make_reexport_request

OPTIONS = IngestOptions.model_validate({})
DATA = make_manifest(FamilyCapabilities(trainer_types=("ingest",)), "data").model_copy(
    update={"families": {"ingest": FamilyCapabilities(trainer_types=("ingest",))}}
)


def make_launcher(name: str = "fake", **profiles: str) -> FakeLauncher:
    """A launcher with the environment `data`, and profiles with these devices."""
    launcher = FakeLauncher(name, list(profiles) or ["fake"])
    launcher.profiles = {profile: make_profile(profile, device=device) for profile, device in (profiles or {"fake": "cpu"}).items()}
    launcher.manifests = {"llm": make_manifest(), "data": DATA}
    return launcher


@pytest.fixture
def harness(tmp_path: Path) -> JobsHarness:
    return JobsHarness(tmp_path, launchers=[make_launcher()])


def make_processing(dataset_id: str = "dataset_2") -> Dataset:
    return make_dataset(dataset_id, name="chats", splits={}, digest="", rows_uploaded=0, dataset_type="unknown", source="chats.jsonl")


def start(harness: JobsHarness, source: str = "gs://bucket/rows.jsonl", **options: Any) -> Job:
    dataset = options.pop("dataset", make_processing())
    return harness.jobs.ingestions.start(PRINCIPAL, dataset, source=source, options=OPTIONS, limits=IngestLimits(), **options)


def claim(harness: JobsHarness, job: Job, attempt: int = 1) -> None:
    harness.reconcile()
    harness.claim(job, attempt, "p")


def make_ingested(harness: JobsHarness, job: Job, attempt: int = 1, **changes: Any) -> Ingested:
    """What an attempt reports that has uploaded its files."""
    prefix = ingestion_prefix(job.processed_dataset_id, attempt)
    for name in ("train.jsonl", "eval.jsonl"):
        harness.objects.write(prefix + name, b"{}\n")
    splits = {
        name: WrittenSplit(file=f"{name}.jsonl", rows=rows, size_bytes=3, sha256="a" * 64) for name, rows in (("train", 3), ("eval", 1))
    }
    rows = IngestedRows(dataset_type="messages", splits=splits, prompt_form="messages", has_tools=True, duplicates_dropped=2)
    outcome = IngestOutcome(rows_read=6, rows=rows.model_copy(update=changes))
    return Ingested(outcome=outcome, source="gs://bucket/rows.jsonl")


def finish(harness: JobsHarness, job: Job, attempt: int = 1, **fields: Any) -> Job:
    body = {"job_id": job.job_id, "attempt": attempt, "claimant": "p", "outcome": "completed", "started_at": START, "finished_at": START}
    return harness.finish(Result.model_validate(body | fields))


def test_job_and_dataset_are_stored_together(harness: JobsHarness) -> None:
    job = start(harness)
    dataset = harness.store.find_dataset("dataset_2")
    assert dataset is not None
    assert (dataset.status, dataset.job_id, job.processed_dataset_id) == ("processing", job.job_id, "dataset_2")
    assert (job.job_name, job.training_config.trainer_type, job.placements[0].environment) == ("dataset chats", "ingest", "data")
    harness.reconcile()
    spec = JobSpec.load(harness.objects.read(spec_key(job.job_id)))
    assert spec.dataset == dataset
    assert isinstance(spec.training_config, IngestConfig)
    assert harness.launcher.launched[f"{job.job_id}.1"].environment == "data"


def test_refused_job_leaves_no_dataset(tmp_path: Path) -> None:
    harness = JobsHarness(tmp_path, launchers=[make_launcher()], quotas=Quotas.model_validate({"default": {"max_queued_jobs": 0}}))
    with pytest.raises(QuotaExceeded):
        start(harness)
    assert harness.store.find_dataset("dataset_2") is None


def test_repeated_request_makes_one_dataset(harness: JobsHarness) -> None:
    first = start(harness, idempotency_key="k")
    again = start(harness, idempotency_key="k", dataset=make_processing("dataset_3"))
    assert again.job_id == first.job_id
    assert harness.store.find_dataset("dataset_3") is None
    with pytest.raises(IdempotencyConflict):
        start(harness, "gs://bucket/other.jsonl", idempotency_key="k", dataset=make_processing("dataset_3"))
    assert harness.store.find_dataset("dataset_3") is None


def test_dataset_of_a_job_that_may_have_been_stored_is_kept(harness: JobsHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose_answer(*_: object) -> Job:
        raise Unavailable("the answer was lost")

    monkeypatch.setattr(harness.store, "create_job", lose_answer)
    with pytest.raises(Unavailable):
        start(harness)
    assert harness.store.find_dataset("dataset_2") is not None


def test_cheapest_profile_without_gpu_is_the_default(tmp_path: Path) -> None:
    box = make_launcher("box", gpu="cuda")
    cloud = make_launcher("cloud", l4="cuda", cpu="cpu")
    harness = JobsHarness(tmp_path, launchers=[box, cloud])
    assert [placement.hardware for placement in start(harness).placements] == ["cloud/cpu"]
    chosen = start(harness, dataset=make_processing("dataset_3"), hardware="box/gpu")
    assert [placement.hardware for placement in chosen.placements] == ["box/gpu"]


def test_deployment_without_the_environment_says_what_installs_it(tmp_path: Path) -> None:
    harness = JobsHarness(tmp_path, launchers=[FakeLauncher()])
    with pytest.raises(Unsupported, match="environment 'data'") as refused:
        start(harness)
    assert "make setup-data" in refused.value.hint


@pytest.mark.parametrize(
    ("source", "secrets", "param", "message"),
    [
        ("ftp://host/x", {}, "source", "is no source"),
        ("gs://bucket", {}, "source", "is no path in gs://bucket"),
        ("gs://bucket/a/../b", {}, "source", "is no path"),
        ("gs://x_Y/a", {}, "source", "no name of a bucket"),
        ("hf://a/b/c/d", {}, "source", "names no dataset"),
        ("https://user:pw@host/x", {}, "source", "user name or a password"),
        ("https://169.254.169.254/x", {}, "source", "metadata address"),
        ("http://example.com/x", {}, "source", "only for servers that the operator allows"),
        ("gs://bucket/a", {"hf_token": "hf_x"}, "hf_token", "does not use hf_token"),
        ("s3://bucket/a", {"access_key_id": "x"}, "source_credentials", "needs secret_access_key too"),
        ("s3://bucket/a", {"endpoint_url": "http://10.0.0.1:9000"}, "source_credentials.endpoint_url", "private address"),
        ("hf://a/b", {"region": "eu"}, "source_credentials.region", "does not use region"),
        ("incoming/a", {"google_access_token": "x"}, "source_credentials.google_access_token", "does not use"),
    ],
)
def test_source_is_refused_with_its_field(harness: JobsHarness, source: str, secrets: Mapping[str, str], param: str, message: str) -> None:
    given = {name: value for name, value in secrets.items() if name == "hf_token"}
    others = {name: value for name, value in secrets.items() if name != "hf_token"}
    with pytest.raises(InvalidRequest, match=message) as refused:
        start(harness, source, secrets=given | ({"source_credentials": json.dumps(others)} if others else {}))
    assert refused.value.param == param
    assert harness.store.find_dataset("dataset_2") is None
    assert harness.store.list_queued_jobs(None, 10) == []


@pytest.mark.parametrize("text", ["", "[]", '{"access_key_id": 5}', '"x"', '{"": "x"}'])
def test_malformed_credentials_are_one_error(harness: JobsHarness, text: str) -> None:
    with pytest.raises(InvalidRequest, match="not a JSON object of strings"):
        start(harness, "s3://bucket/a", secrets={"source_credentials": text})


RULES = SourceRules(prefixes={"acme": ["gs://acme/data", "hf://acme"], "local": ["s3://bbb"]})


@pytest.mark.parametrize(
    ("source", "tenant", "allowed"),
    [
        ("gs://acme/data/rows.jsonl", "acme", True),
        ("gs://acme/data/2026/*.jsonl", "acme", True),
        ("gs://acme/data/", "acme", True),
        ("gs://acme/data*", "acme", False),
        ("gs://acme/data2/rows.jsonl", "acme", False),
        ("gs://acme/*/rows.jsonl", "acme", False),
        ("gs://acme2/data/rows.jsonl", "acme", False),
        ("gs://acme/data/rows.jsonl", "other", False),
        ("s3://acme/data/rows.jsonl", "acme", False),
        ("hf://acme/chats:default@main", "acme", True),
        ("hf://acme2/chats", "acme", False),
        ("https://acme.com/data", "acme", False),
        ("s3://bbb/x", "local", True),
        ("s3://ccc/x", "local", False),
    ],
)
def test_deployment_reads_with_its_own_rights_only_what_the_operator_lists(source: str, tenant: str, allowed: bool) -> None:
    assert choose_rights(parse_source(source), {}, tenant, RULES) == ("deployment" if allowed else "anonymous")


def test_owner_of_a_local_service_reads_with_its_own_rights() -> None:
    rules = SourceRules(owner_is_local=True)
    assert choose_rights(parse_source("gs://any/x"), {}, "local", rules) == "deployment"
    assert choose_rights(parse_source("gs://any/x"), {}, "other", rules) == "anonymous"
    # The keys of the machine are not for an endpoint that somebody names.
    assert choose_rights(parse_source("s3://any/x"), {"endpoint_url": "https://e.com"}, "local", rules) == "anonymous"
    assert choose_rights(parse_source("gs://any/x"), {"google_access_token": "t"}, "local", rules) == "caller"


def test_credentials_are_secrets_and_no_part_of_the_record(harness: JobsHarness) -> None:
    credentials = json.dumps({"access_key_id": "an-id", "secret_access_key": "s3cret", "region": "eu-west-1"})
    job = start(harness, "s3://bucket/rows.jsonl", secrets={"source_credentials": credentials})
    assert job.secret_names == ("access_key_id", "secret_access_key")
    assert "s3cret" not in job.model_dump_json()
    assert isinstance(job.training_config, IngestConfig)
    assert (job.training_config.rights, job.training_config.region) == ("caller", "eu-west-1")
    harness.reconcile()
    assert harness.claim(job, 1, "p").secrets == {"access_key_id": "an-id", "secret_access_key": "s3cret"}


def test_signature_in_a_url_is_a_secret(harness: JobsHarness) -> None:
    job = start(harness, "https://example.com/rows.csv?signature=s3cret")
    dataset = harness.store.find_dataset("dataset_2")
    assert dataset is not None
    assert dataset.source == "https://example.com/rows.csv"
    assert "s3cret" not in job.model_dump_json()
    harness.reconcile()
    assert harness.claim(job, 1, "p").secrets == {"source_url": "https://example.com/rows.csv?signature=s3cret"}


def test_retry_needs_the_credentials_again(harness: JobsHarness) -> None:
    job = start(harness, "gs://bucket/a", secrets={"source_credentials": '{"google_access_token": "t"}'})
    harness.jobs.control.cancel(PRINCIPAL, job.job_id)
    with pytest.raises(InvalidRequest, match="google_access_token is needed again"):
        harness.jobs.control.retry(PRINCIPAL, job.job_id, RetryRequest.model_validate({}))
    retried = harness.jobs.control.retry(
        PRINCIPAL, job.job_id, RetryRequest.model_validate_json('{"secrets": {"google_access_token": "t2"}}')
    )
    assert retried.status is Status.QUEUED


def test_completed_attempt_makes_the_dataset(harness: JobsHarness) -> None:
    job = start(harness)
    claim(harness, job)
    harness.report(job, 1, make_batch(PhaseChanged(phase="reading")))
    assert harness.find_job(job).status is Status.PREPARING
    done = finish(harness, job, ingested=make_ingested(harness, job))
    assert done.status is Status.COMPLETED
    dataset = harness.store.find_dataset("dataset_2")
    assert dataset is not None
    assert (dataset.status, dataset.rows, dataset.rows_uploaded, dataset.has_tools) == ("ready", 4, 6, True)
    assert (dataset.name, dataset.job_id, dataset.source) == ("chats", job.job_id, "gs://bucket/rows.jsonl")
    assert dataset.splits["train"].key == "datasets/dataset_2/attempt-1/train.jsonl"
    assert harness.store.list_jobs_using_dataset("dataset_2") == []


def test_dataset_is_ready_before_its_job_is_complete(harness: JobsHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    job = start(harness)
    claim(harness, job)
    ingested = make_ingested(harness, job)

    def fail(*_: object) -> Job:
        raise Unavailable("the database does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(harness.store, "replace_job", fail)
        with pytest.raises(Unavailable):
            finish(harness, job, ingested=ingested)
    harness.write_result(job, ingested=ingested)  # the attempt has left it in the bucket
    harness.reconcile()
    assert harness.find_job(job).status is Status.COMPLETED
    dataset = harness.store.find_dataset("dataset_2")
    assert dataset is not None
    assert dataset.status == "ready"


def test_upload_of_a_completed_job_is_deleted_and_its_name_kept(harness: JobsHarness) -> None:
    uploaded, kept = "incoming/uploads/abc/rows.jsonl", "incoming/rows.jsonl"
    for number, key in enumerate((uploaded, kept), 2):
        harness.objects.write(key, b"{}\n")
        job = start(harness, key, dataset=make_processing(f"dataset_{number}"))
        claim(harness, job)
        finish(harness, job, ingested=make_ingested(harness, job).model_copy(update={"source": key}))
    assert harness.objects.stat(uploaded) is None
    assert harness.objects.stat(kept) is not None
    dataset = harness.store.find_dataset("dataset_2")
    assert dataset is not None
    assert dataset.source == "chats.jsonl"


def test_result_of_a_lost_attempt_changes_no_dataset(harness: JobsHarness) -> None:
    job = start(harness)
    claim(harness, job)
    ingested = make_ingested(harness, job)
    harness.launcher.states[f"handle of {job.job_id}.1"] = "ended"
    harness.clock.advance(3600)
    harness.reconcile()
    harness.reconcile()
    with pytest.raises(Fenced):
        harness.jobs.attempts.check_owner(attempt_principal(job.job_id, 1), job.job_id, 1, "p")
    finish(harness, job, ingested=ingested)  # too late
    dataset = harness.store.find_dataset("dataset_2")
    assert dataset is not None
    assert dataset.status == "processing"


@pytest.mark.parametrize(
    "rows",
    [
        {"splits": {}},
        {"splits": {"train": WrittenSplit(file="../../other/train.jsonl", rows=1, size_bytes=3, sha256="a" * 64)}},
        {"splits": {"train": WrittenSplit(file="a/b", rows=1, size_bytes=3, sha256="a" * 64)}},
        {"splits": {"train": WrittenSplit(file="a", rows=1, size_bytes=3, sha256="a" * 64, index_file="../x")}},
        {"splits": {"train": WrittenSplit(file="a", rows=0, size_bytes=3, sha256="a" * 64)}},
        {"splits": {"train": WrittenSplit(file="a", rows=1, size_bytes=3, sha256="x")}},
        {"splits": {"other": WrittenSplit(file="a", rows=1, size_bytes=3, sha256="a" * 64)}},
    ],
)
def test_attempt_publishes_only_well_formed_files_below_its_own_prefix(harness: JobsHarness, rows: dict[str, object]) -> None:
    job = start(harness)
    claim(harness, job)
    with pytest.raises(InvalidRequest):
        finish(harness, job, ingested=make_ingested(harness, job, **rows))
    assert not harness.find_job(job).status.is_final


def test_files_that_were_not_stored_fail_the_job(harness: JobsHarness) -> None:
    job = start(harness)
    claim(harness, job)
    ingested = make_ingested(harness, job)
    harness.objects.delete("datasets/dataset_2/attempt-1/train.jsonl")
    failed = finish(harness, job, ingested=ingested)
    assert failed.failure is not None
    assert "not what it stored" in failed.failure.message
    dataset = harness.store.find_dataset("dataset_2")
    assert dataset is not None
    assert dataset.status == "processing"


def test_problems_of_a_refused_source_are_read_from_beside_it(harness: JobsHarness) -> None:
    job = start(harness)
    claim(harness, job)
    assert read_problems(harness.find_job(job), harness.objects) == ()
    problem = RowProblem(line=4, field="completion", reason="is empty", code="empty")
    outcome = IngestOutcome(rows_read=5, problems=(problem,), problem_count=1)
    harness.objects.write(problems_key("dataset_2", 1), outcome.model_dump_json().encode())
    failure = {"code": "invalid_data", "message": "a row is not valid", "attempt": 1}
    failed = finish(harness, job, outcome="failed", failure=failure)
    assert read_problems(failed, harness.objects) == (problem,)
    harness.objects.write(problems_key("dataset_2", 1), b"not JSON")
    assert read_problems(failed, harness.objects) == ()
    harness.objects.delete(problems_key("dataset_2", 1))
    assert read_problems(failed, harness.objects) == ()


def test_only_a_completed_ingestion_reports_rows(harness: JobsHarness) -> None:
    training = harness.start_training()
    with pytest.raises(InvalidRequest, match="completed ingestion"):
        finish(harness, training, ingested=make_ingested(harness, training))
    job = start(harness)
    claim(harness, job)
    with pytest.raises(InvalidRequest, match="completed ingestion"):
        finish(harness, job)


def test_paused_ingestion_starts_again(harness: JobsHarness) -> None:
    job = start(harness)
    claim(harness, job)
    harness.jobs.control.pause(PRINCIPAL, job.job_id)
    assert finish(harness, job, outcome="paused").status is Status.PAUSED
    harness.launcher.states[f"handle of {job.job_id}.1"] = "ended"
    harness.jobs.control.resume(PRINCIPAL, job.job_id, ResumeRequest.model_validate({}))
    claim(harness, job, 2)
    finish(harness, job, 2, ingested=make_ingested(harness, job, 2))
    dataset = harness.store.find_dataset("dataset_2")
    assert dataset is not None
    assert dataset.splits["eval"].key == "datasets/dataset_2/attempt-2/eval.jsonl"


def test_job_that_makes_a_dataset_is_neither_cloned_nor_exported_nor_started_from(harness: JobsHarness) -> None:
    job = start(harness)
    with pytest.raises(InvalidRequest, match="makes the dataset dataset_2, and trains no model"):
        harness.jobs.submission.clone(PRINCIPAL, job.job_id, CloneRequest.model_validate({}))
    with pytest.raises(InvalidRequest, match="trains no model"):
        harness.jobs.exports.reexport(PRINCIPAL, job.job_id, make_reexport_request())
    with pytest.raises(InvalidRequest, match="trains no model"):
        harness.jobs.exports.export(PRINCIPAL, job.job_id, 1, ExportRequest.model_validate({}))
    with pytest.raises(InvalidRequest, match="trains no model") as refused:
        harness.submit(training_config={"base_model_id": f"job:{job.job_id}"})
    assert refused.value.param == "training_config.base_model_id"
    with pytest.raises(InvalidRequest, match="length of this job cannot change"):
        harness.jobs.control.retry(PRINCIPAL, job.job_id, RetryRequest.model_validate({"epochs": 3}))


def test_attempt_reaches_its_source_and_its_own_prefix_only(harness: JobsHarness, tmp_path: Path) -> None:
    stores = [open_store((tmp_path / name).as_uri()) for name in ("configs", "datasets", "models")]
    buckets = Buckets(*stores)
    job = start(harness, "incoming/rows.jsonl")
    claim(harness, job)
    running = harness.find_job(job)
    access = {each.url.rpartition("/")[2]: each for each in find_attempt_access(running, [], buckets)}
    assert access["datasets"].readable == ("incoming/rows.jsonl",)
    assert access["datasets"].writable == ("datasets/dataset_2/attempt-1/",)
    assert access["models"].writable == ()
    assert isinstance(running.training_config, IngestConfig)
    config = running.training_config.model_copy(update={"source": "gs://theirs/a/*.csv", "rights": "deployment"})
    listed = find_attempt_access(running.model_copy(update={"training_config": config}), [], buckets)
    assert [each.readable for each in listed if each.url == "gs://theirs"] == [("a/",)]
    anonymous = config.model_copy(update={"rights": "anonymous"})
    listed = find_attempt_access(running.model_copy(update={"training_config": anonymous}), [], buckets)
    assert all(each.url != "gs://theirs" for each in listed)


class ReservingLauncher(FakeLauncher):
    """Keeps slots for the environment `data`."""

    reserved_environments = ("data",)
    reserved = 1

    def _count(self, *, ingestions: bool) -> int:
        running = [name for name, request in self.launched.items() if (request.environment == "data") is ingestions]
        return sum(self.states[f"handle of {name}"] == "running" for name in running)

    def count_free_slots(self, active_jobs: int) -> int:
        return self.slots - self._count(ingestions=False)

    def count_free_reserved_slots(self, environment: str) -> int:
        assert environment == "data"
        return self.reserved - self._count(ingestions=True)


def test_ingestion_does_not_wait_behind_a_training(tmp_path: Path) -> None:
    launcher = ReservingLauncher(slots=1)
    launcher.manifests = {"llm": make_manifest(), "data": DATA}
    harness = JobsHarness(tmp_path, launchers=[launcher])
    trainings = [harness.submit() for _ in range(30)]
    ingestions = [start(harness, dataset=make_processing(f"dataset_{number}")) for number in (2, 3)]
    harness.reconcile()
    assert sorted(launcher.launched) == sorted([f"{trainings[0].job_id}.1", f"{ingestions[0].job_id}.1"])
    harness.reconcile()
    assert len(launcher.launched) == 2  # the second ingestion waits for the first
    harness.claim(ingestions[0], 1, "p")
    finish(harness, ingestions[0], ingested=make_ingested(harness, ingestions[0]))
    launcher.states[f"handle of {ingestions[0].job_id}.1"] = "ended"
    harness.reconcile()
    assert f"{ingestions[1].job_id}.1" in launcher.launched
    assert len(launcher.launched) == 3


def test_ingestion_takes_no_slot_of_a_training(tmp_path: Path) -> None:
    launcher = ReservingLauncher(slots=1)
    launcher.manifests = {"llm": make_manifest(), "data": DATA}
    harness = JobsHarness(tmp_path, launchers=[launcher])
    start(harness)
    harness.reconcile()
    training = harness.submit()
    harness.reconcile()
    assert f"{training.job_id}.1" in launcher.launched


def test_foreign_dataset_of_a_job_is_not_replaced(harness: JobsHarness) -> None:
    job = start(harness)
    claim(harness, job)
    ingested = make_ingested(harness, job)
    harness.store.delete_dataset("dataset_2")
    harness.store.create_dataset(make_processing().model_copy(update={"tenant_id": "other"}))
    with pytest.raises(NotFound):
        finish(harness, job, ingested=ingested)
    stolen = harness.store.find_dataset("dataset_2")
    assert stolen is not None
    assert (stolen.tenant_id, stolen.splits) == ("other", {})

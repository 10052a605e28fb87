"""`python -m jobs.run` for a job that makes a dataset: a real attempt and its child, a service and an object store."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from jobs.ingest.family import estimate_progress
from schema.dataset import Dataset
from schema.ingestion import IngestLimits, IngestOptions, IngestOutcome, IngestProgress
from schema.result import Result
from schema.spec import JobSpec, StoreUrls, ingestion_prefix, problems_key, result_key, spec_key
from schema.training import IngestConfig
from tests.factories import START
from tests.jobs.fake_service import TOKEN, FakeService
from tests.waiting import wait_until

SOURCE_ROOT = Path(__file__).resolve().parents[2]
JOB_ID, DATASET_ID = "ingestion_rows_1", "dataset_rows"
KEY = "incoming/uploads/x/rows.jsonl"
TIMEOUT_S = 90


def make_rows(count: int) -> bytes:
    return b"".join(json.dumps({"prompt": f"what is {n}", "completion": f"it is {n}"}).encode() + b"\n" for n in range(count))


@dataclass
class IngestionAttempt:
    """Starts attempts of one job."""

    folder: Path
    service: FakeService

    @property
    def objects(self) -> Path:
        return self.folder / "objects"

    def write(self, content: bytes, source: str = KEY, **options: Any) -> None:
        """Store the source and the spec."""
        url = self.objects.as_uri()
        config = IngestConfig(source=source, options=IngestOptions.model_validate(options), limits=IngestLimits())
        dataset = Dataset(
            processed_dataset_id=DATASET_ID,
            tenant_id="local",
            name="rows",
            dataset_type="unknown",
            splits={},
            digest="",
            rows_uploaded=0,
            status="processing",
            job_id=JOB_ID,
            created_at=START,
        )
        spec = JobSpec.model_validate(
            {"job_id": JOB_ID, "job_name": "dataset rows", "tenant_id": "local", "training_config": config, "dataset": dataset}
            | {"stores": StoreUrls(datasets=url, models=url, configs=url), "checkpoints_prefix": f"checkpoints/test-jobs/job_{JOB_ID}/"}
        )
        for key, stored in ((KEY, content), (spec_key(JOB_ID), spec.model_dump_json().encode())):
            path = self.objects / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(stored)

    def start(self, attempt: int = 1) -> "subprocess.Popen[bytes]":
        workdir = self.folder / f"attempt-{attempt}"
        workdir.mkdir()
        variables = {
            **{name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "TMPDIR")},
            "PYTHONPATH": str(SOURCE_ROOT),
            "JOB_ID": JOB_ID,
            "JOB_ATTEMPT": str(attempt),
            "JOB_TOKEN": TOKEN,
            "JOB_SPEC_STORE_URL": self.objects.as_uri(),
            "JOB_WORKDIR": str(workdir),
            "JOB_REPORT_INTERVAL_S": "0.1",
            "SERVICE_URL": self.service.url,
        }
        with (workdir / "log").open("wb") as log:
            return subprocess.Popen([sys.executable, "-m", "jobs.run"], cwd=SOURCE_ROOT, env=variables, stdout=log, stderr=log)

    def run(self, attempt: int = 1) -> Result:
        self.start(attempt).wait(TIMEOUT_S)
        return self.read_result(attempt)

    def read_result(self, attempt: int = 1) -> Result:
        path = self.objects / result_key(JOB_ID, attempt)
        assert path.exists(), (self.folder / f"attempt-{attempt}/log").read_text()
        return Result.load(path.read_bytes())

    def list_files(self, attempt: int = 1) -> dict[str, bytes]:
        folder = self.objects / ingestion_prefix(DATASET_ID, attempt)
        return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}

    @property
    def phases(self) -> list[str]:
        return [event["event"]["phase"] for event in self.service.events if event["event"]["type"] == "phase"]


@pytest.fixture
def attempt(tmp_path: Path) -> Iterator[IngestionAttempt]:
    with FakeService() as service:
        yield IngestionAttempt(tmp_path, service)


def test_attempt_uploads_the_splits_and_reports_what_it_found(attempt: IngestionAttempt) -> None:
    attempt.write(make_rows(50_000))
    result = attempt.run()
    assert result.outcome == "completed"
    assert result.ingested is not None
    rows = result.ingested.outcome.rows
    assert rows is not None
    assert {name: split.rows for name, split in rows.splits.items()} == {"train": 45_000, "eval": 5_000}
    files = attempt.list_files()
    assert len(files["train.jsonl"]) == rows.splits["train"].size_bytes
    assert {split.index_file for split in rows.splits.values()} <= {*files, None}
    assert result.ingested.outcome.samples == ()
    assert result.ingested.outcome.detected is not None
    assert attempt.phases[:2] == ["downloading", "reading"]
    assert attempt.phases[-1] == "uploading"
    steps = [batch["progress"]["step"] for batch in attempt.service.batches if batch.get("progress")]
    assert steps == sorted(steps)
    assert steps[-1] >= 20_000
    assert not (attempt.folder / "attempt-1/output").exists()
    assert (attempt.objects / KEY).exists()  # the service deletes it, once the job is complete


def test_refused_rows_fail_the_job_and_are_listed_beside(attempt: IngestionAttempt) -> None:
    rows = make_rows(10).splitlines(keepends=True)
    attempt.write(b"".join([*rows[:3], b'{"prompt": "x", "completion": ""}\n', b"not JSON\n", *rows[3:]]))
    result = attempt.run()
    assert (result.outcome, result.ingested) == ("failed", None)
    assert result.failure is not None
    assert result.failure.code == "invalid_data"
    assert result.failure.message.startswith("2 of 12 rows are not valid: line 4: completion ")
    assert "; line 5: " in result.failure.message
    outcome = IngestOutcome.load((attempt.objects / problems_key(DATASET_ID, 1)).read_bytes())
    assert [problem.line for problem in outcome.problems] == [4, 5]
    assert set(attempt.list_files()) == {"problems.json"}


def test_dropped_rows_are_listed_beside_the_files(attempt: IngestionAttempt) -> None:
    attempt.write(make_rows(10) + b"not JSON\n", on_invalid="drop")
    result = attempt.run()
    assert result.ingested is not None
    assert result.ingested.outcome.problems == ()
    assert result.ingested.outcome.problem_count == 1
    assert {"problems.json", "train.jsonl"} <= set(attempt.list_files())


def test_unreadable_source_says_why(attempt: IngestionAttempt) -> None:
    attempt.write(b"")
    result = attempt.run()
    assert result.failure is not None
    assert result.failure.code == "invalid_data"
    attempt.write(make_rows(3), source="incoming/other.jsonl")
    missing = attempt.run(2)
    assert missing.failure is not None
    assert missing.failure.message == "incoming/other.jsonl names no file that exists"


def test_base_model_that_is_not_stored_says_what_helps(attempt: IngestionAttempt) -> None:
    attempt.write(make_rows(3), base_model_id="some/model")
    failure = attempt.run().failure
    assert failure is not None
    assert "the model store does not have some/model" in failure.message


@pytest.mark.parametrize(("directive", "outcome"), [("cancel", "cancelled"), ("pause", "paused")])
def test_stopped_attempt_ends_its_child_and_publishes_nothing(attempt: IngestionAttempt, directive: str, outcome: str) -> None:
    attempt.write(make_rows(400_000))
    process = attempt.start()
    wait_until(lambda: any(batch.get("phase") == "reading" for batch in attempt.service.batches))
    attempt.service.directive = directive
    process.wait(TIMEOUT_S)
    assert attempt.read_result().outcome == outcome
    assert attempt.list_files() == {}
    assert not any(str(attempt.folder) in command for command in list_commands())


def list_commands() -> list[str]:
    import psutil

    return [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]


def test_number_of_rows_is_estimated_from_the_bytes() -> None:
    half = estimate_progress(IngestProgress(rows=1000, bytes_read=50, total_bytes=100), 10.0)
    assert (half.step, half.total_steps, half.epoch, half.eta_s) == (1000, 2000, 0.5, 10.0)
    unknown = estimate_progress(IngestProgress(rows=1000, bytes_read=0, total_bytes=0), 10.0)
    assert (unknown.step, unknown.total_steps, unknown.eta_s) == (1000, 1000, None)
    done = estimate_progress(IngestProgress(rows=1000, bytes_read=50, total_bytes=100, phase="reporting"), 10.0)
    assert (done.total_steps, done.epoch) == (1000, 1.0)

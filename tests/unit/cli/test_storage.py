"""`tunesmith du` and `tunesmith prune`, and what `tunesmith delete` removes from this machine."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
import pytest

from cli.errors import CliError
from cli.settings import Settings
from cli.storage import parse_age, remove_local_copies
from tests.unit.cli.fake_service import CONNECTION_LOST, FakeReply
from tests.unit.cli.test_commands import run_command


def test_local_copies_of_a_job_are_removed_and_no_others(tmp_path: Path) -> None:
    for name in ("job-1", "job-2"):
        (tmp_path / "downloads" / name / "gguf").mkdir(parents=True)
        (tmp_path / "downloads" / name / "gguf/model.gguf").write_bytes(b"x" * 10)

    assert remove_local_copies(Settings(home=tmp_path), "job-1") == 10

    assert [path.name for path in (tmp_path / "downloads").iterdir()] == ["job-2"]
    assert remove_local_copies(Settings(home=tmp_path), "job-1") == 0


def test_a_name_that_leaves_the_downloads_removes_nothing(tmp_path: Path) -> None:
    (tmp_path / "downloads").mkdir()
    (tmp_path / "objects").mkdir()

    for name in ("..", ".", "../objects", ""):
        assert remove_local_copies(Settings(home=tmp_path), name) == 0

    assert (tmp_path / "objects").is_dir()
    assert (tmp_path / "downloads").is_dir()


def reply(body: object, status: int = 200) -> FakeReply:
    return httpx2.Response(status, json=body)


def storage_reply(*jobs: dict[str, Any]) -> FakeReply:
    total = {"datasets": 1000, "checkpoints": 3_200_000_000, "artifacts": 0, "logs": 0}
    shared = {"base_model_bytes": 536_000_000, "orphan_bytes": None, "checkpoint_retention_days": 7.0}
    return reply({"total_bytes": 1, "bytes": total, "jobs": jobs, "complete": True} | shared)


def job_row(job_id: str, status: str, checkpoints: int = 10, finished_at: str = "2026-01-01T00:00:00+00:00") -> dict[str, Any]:
    stored = {"checkpoints": checkpoints, "artifacts": 2, "logs": 3}
    row = {"job_id": job_id, "job_name": "a job", "status": status, "finished_at": finished_at}
    return row | {"total_bytes": checkpoints + 5, "bytes": stored}


NOT_FOUND = reply({"error": {"code": "not_found", "message": "no job", "hint": "", "param": "job_id"}}, 404)


def test_du_shows_the_service_and_this_machine(tmp_path: Path) -> None:
    (tmp_path / "downloads/job-1").mkdir(parents=True)
    (tmp_path / "downloads/job-1/model.gguf").write_bytes(b"x" * 5000)
    variables = {"TUNESMITH_HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done, _ = run_command("du", replies=[storage_reply(job_row("job-1", "completed", 3_200_000_000))], environment=variables)
    for text in ("3.2 GB", "536 MB", "job-1", "5.0 kB", "downloads"):
        assert text in done.output
    done, _ = run_command("du", "--json", replies=[storage_reply()], environment=variables)
    assert json.loads(done.stdout)["local"]["downloads"] == 5000


def test_du_without_a_service_shows_this_machine(tmp_path: Path) -> None:
    done, _ = run_command("du", "--json", replies=[CONNECTION_LOST], environment={"TUNESMITH_HOME": str(tmp_path)})
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["service"] is None


def test_prune_asks_before_anything_is_deleted(tmp_path: Path) -> None:
    would_free = reply({"job_id": "job-1", "freed_bytes": 7, "deleted_steps": [1], "kept_step": 2})
    replies = [storage_reply(job_row("job-1", "completed"), job_row("job-2", "training"), job_row("job-3", "failed", 0)), would_free]
    variables = {"TUNESMITH_HOME": str(tmp_path)}
    done, requests = run_command("prune", replies=replies, environment=variables)
    assert isinstance(done.exception, CliError)
    assert "--yes" in done.exception.hint
    assert [request.url.query for request in requests if request.method == "DELETE"] == [b"keep=published&dry_run=true"]

    done, requests = run_command("prune", "--yes", "--json", replies=replies, environment=variables)
    assert json.loads(done.stdout) == {"freed_bytes": 7, "jobs": {"job-1": 7}, "local": {}}
    deleted = [request.url for request in requests if request.method == "DELETE"]
    assert [url.path for url in deleted] == ["/jobs/job-1/checkpoints"] * 2
    assert deleted[1].query == b"keep=published"


def test_prune_skips_young_jobs_and_those_in_use(tmp_path: Path) -> None:
    used = reply({"error": {"code": "conflict", "message": "export_1 is not finished", "hint": "", "param": None}}, 409)
    young = job_row("young", "completed", finished_at=datetime.now(UTC).isoformat())
    rows = storage_reply(young, job_row("used", "completed"))
    words, variables = ["prune", "--older-than", "7d", "--yes"], {"TUNESMITH_HOME": str(tmp_path)}
    done, _ = run_command(*words, replies=[rows, used], environment=variables)
    assert done.exit_code == 0, done.output
    assert "skipped used: export_1 is not finished" in done.output
    assert "nothing to free" in done.output


def test_prune_deletes_copies_of_jobs_that_do_not_exist(tmp_path: Path) -> None:
    for name in ("gone", "kept"):
        (tmp_path / "downloads" / name).mkdir(parents=True)
        (tmp_path / "downloads" / name / "model.gguf").write_bytes(b"x")
    variables = {"TUNESMITH_HOME": str(tmp_path)}
    done, _ = run_command("prune", "--yes", replies=[storage_reply(), NOT_FOUND, reply({"job_id": "kept"})], environment=variables)
    assert done.exit_code == 0, done.output
    assert [path.name for path in (tmp_path / "downloads").iterdir()] == ["kept"]
    done, _ = run_command("prune", "--yes", "--downloads", replies=[storage_reply()], environment=variables)
    assert list((tmp_path / "downloads").iterdir()) == []


@pytest.mark.parametrize(("text", "hours"), [(None, 0), ("12h", 12), ("7d", 168), ("1.5d", 36), ("2w", 336)])
def test_durations_are_read(text: str | None, hours: float) -> None:
    assert parse_age(text) == timedelta(hours=hours)


@pytest.mark.parametrize("text", ["a week", "99999999999999d"])
def test_an_unreadable_duration_says_what_would_work(text: str) -> None:
    with pytest.raises(CliError) as refused:
        parse_age(text)
    assert "7d" in refused.value.hint

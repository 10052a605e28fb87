"""Lines that break between the service and Firestore, Cloud Storage, Secret Manager and Cloud Run.

What is promised: an answer within five seconds, or 503 with Retry-After; no duplicate; nothing lost; nothing launched twice.
"""

import grpc
import pytest

from tests.cloud.conftest import Cloud

# Emulators forget what they hold when they end, so durability is shown by cutting them off.
AWAY = ["cut", "hang", "reset"]


def is_told_to_come_again(answer: object) -> bool:
    return answer.status_code == 503 and int(answer.headers["Retry-After"]) > 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("how", AWAY)
def test_without_firestore_every_call_is_told_to_come_again(cloud: Cloud, how: str) -> None:
    job_id = cloud.submitted()
    getattr(cloud.firestore, how)()
    assert is_told_to_come_again(cloud.get("/jobs"))
    assert is_told_to_come_again(cloud.get(f"/jobs/{job_id}"))
    assert is_told_to_come_again(cloud.train(key="another"))
    assert cloud.get("/health").status_code == 503
    cloud.firestore.restore()
    assert cloud.job(job_id)["status"] == "preparing"
    assert cloud.executions() == 1


def test_a_submission_whose_answer_from_firestore_was_lost_is_one_job(cloud: Cloud) -> None:
    assert cloud.get("/jobs").json()["jobs"] == []
    cloud.firestore.drop_answers()
    first = cloud.train(hf_token="hf_x")
    cloud.firestore.restore()
    second = cloud.train(hf_token="hf_x")
    assert second.status_code == 201
    assert first.status_code == 503 or first.json() == second.json()
    assert [job["job_id"] for job in cloud.get("/jobs").json()["jobs"]] == [second.json()["job_id"]]
    cloud.a_minute_later()
    assert cloud.executions() == 1


def test_reports_whose_answers_were_lost_are_kept_once(cloud: Cloud) -> None:
    job_id = cloud.submitted()
    token = cloud.client.app.state.parts.tokens.attempt_token(job_id, 1)  # type: ignore[attr-defined]
    address, shown = f"/internal/jobs/{job_id}/attempts/1", {"Authorization": f"Bearer {token}"}
    assert cloud.post(f"{address}/claim", {"claimant": "p"}, **shown).status_code == 200
    batch = {
        "first_seq": 0,
        "events": [{"at": "2026-01-01T00:00:00Z", "event": {"type": "metrics", "step": n, "values": {"loss": 1.0}}} for n in range(5)],
    }
    cloud.firestore.drop_answers()
    assert cloud.post(f"{address}/events", batch, **shown).status_code in (200, 503)
    cloud.firestore.restore()
    assert cloud.post(f"{address}/events", batch, **shown).json()["next_seq"] == 5
    events = cloud.get(f"/jobs/{job_id}/events").json()["events"]
    assert [row["event"]["step"] for row in events if row["event"]["type"] == "metrics"] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("how", AWAY)
def test_without_the_config_bucket_a_job_is_kept_and_launched_once_it_is_back(cloud: Cloud, how: str) -> None:
    assert cloud.get("/health").status_code == 200
    getattr(cloud.storage, how)()
    job_id = cloud.submitted()
    assert cloud.executions() == 0
    assert cloud.get("/health").status_code == 503
    cloud.storage.restore()
    cloud.a_minute_later()
    assert cloud.executions() == 1
    assert cloud.job(job_id)["attempts"][0]["delay"] is None


@pytest.mark.parametrize("how", AWAY)
def test_without_cloud_run_a_job_is_kept_and_launched_once_it_is_back(cloud: Cloud, how: str) -> None:
    getattr(cloud.run_line, how)()
    job_id = cloud.submitted()
    assert cloud.executions() == 0
    assert cloud.job(job_id)["attempts"][0]["delay"]
    cloud.run_line.restore()
    cloud.until_launched()
    cloud.a_minute_later()
    assert cloud.executions() == 1
    job = cloud.job(job_id)
    assert len(job["attempts"]) == 1
    assert job["attempts"][0]["delay"] is None


def test_a_launch_that_was_carried_out_and_not_answered_is_found_and_not_made_again(cloud: Cloud) -> None:
    cloud.cloud_run.lose_next_answer("RunJob")
    job_id = cloud.submitted()
    assert cloud.executions() == 1
    cloud.a_minute_later()
    cloud.a_minute_later()
    assert cloud.executions() == 1
    assert len(cloud.job(job_id)["attempts"]) == 1


def test_a_line_that_swallows_the_answer_to_a_launch_does_not_launch_twice(cloud: Cloud) -> None:
    first = cloud.submitted()  # the channel is open now
    cloud.run_line.drop_answers()
    second = cloud.train(key="second").json()["job_id"]
    cloud.run_line.restore()
    cloud.a_minute_later()
    cloud.a_minute_later()
    names = sorted(container.args[1] for execution in cloud.cloud_run.executions() for container in execution.template.containers)
    assert names == sorted([f"{first}.1", f"{second}.1"])


def test_slow_lines_are_waited_for(cloud: Cloud) -> None:
    cloud.firestore.delay(0.1)
    cloud.storage.delay(0.1)
    cloud.run_line.delay(0.1)
    job_id = cloud.submitted()
    assert cloud.job(job_id)["status"] == "preparing"
    assert cloud.executions() == 1


@pytest.mark.parametrize("how", AWAY)
def test_without_the_secret_store_a_job_with_a_token_is_not_taken(cloud: Cloud, how: str) -> None:
    getattr(cloud.secrets, how)()
    assert is_told_to_come_again(cloud.train(hf_token="hf_x"))
    assert cloud.get("/jobs").json()["jobs"] == []
    assert cloud.train().status_code == 201  # one that needs no secret is
    assert cloud.executions() == 1


def test_a_missing_role_fails_the_job_with_the_command_that_mends_it(cloud: Cloud) -> None:
    cloud.cloud_run.refuse_next("RunJob", grpc.StatusCode.PERMISSION_DENIED, "Permission 'run.jobs.runWithOverrides' denied on resource")
    failure = cloud.job(cloud.submitted())["failure"]
    assert failure["code"] == "launch_failed"
    assert "run.jobs.runWithOverrides" in failure["message"]
    assert failure["hint"].startswith("gcloud run jobs add-iam-policy-binding tunesmith-cpu")


def test_a_used_up_quota_delays_the_job_and_says_which(cloud: Cloud) -> None:
    quota = "Quota exceeded for NvidiaL4GpuAllocNoZonalRedundancyPerProjectRegion"
    cloud.cloud_run.refuse_next("RunJob", grpc.StatusCode.RESOURCE_EXHAUSTED, quota)
    job_id = cloud.submitted()
    job = cloud.job(job_id)
    assert job["status"] == "preparing"
    assert "NvidiaL4GpuAllocNoZonalRedundancyPerProjectRegion" in job["attempts"][0]["delay"]
    cloud.a_minute_later()
    assert cloud.executions() == 1
    assert cloud.job(job_id)["attempts"][0]["delay"] is None


@pytest.mark.parametrize("cloud", [{"configs_url": "gs://nowhere"}], indirect=True)
def test_a_bucket_that_is_not_there_delays_the_job_and_says_how_to_make_it(cloud: Cloud) -> None:
    job = cloud.job(cloud.submitted())
    assert job["status"] == "preparing"
    assert "gcloud storage buckets create gs://nowhere" in job["attempts"][0]["delay"]
    health = cloud.get("/health")
    assert health.status_code == 503
    assert "nowhere does not exist" in health.json()["checks"]["object_store gs://nowhere"]
    cloud.a_minute_later()
    assert cloud.executions() == 0
    assert cloud.client.post(f"/jobs/{job['job_id']}/cancel").status_code == 202
    cloud.a_minute_later()
    assert cloud.job(job["job_id"])["status"] == "cancelled"


def test_a_job_resource_that_is_not_there_is_named(cloud: Cloud) -> None:
    cloud.cloud_run.delete_jobs()
    failure = cloud.job(cloud.submitted())["failure"]
    assert failure["code"] == "launch_failed"
    assert "tunesmith-cpu" in failure["message"]
    assert "make deploy" in failure["hint"]

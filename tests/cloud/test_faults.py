"""Failing connections between the service and Firestore, Cloud Storage, Secret Manager and Cloud Run.

The service responds within five seconds, if need be with 503 and Retry-After; nothing is duplicated, lost or launched twice.
"""

import grpc
import pytest

from tests.cloud.conftest import CloudDeployment

# Emulators lose their data when they stop, so the tests interrupt connections instead.
OUTAGES = ["cut", "hang", "reset"]


def is_retryable(response: object) -> bool:
    return response.status_code == 503 and int(response.headers["Retry-After"]) > 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("outage", OUTAGES)
def test_firestore_outage_returns_503_with_retry_after(cloud: CloudDeployment, outage: str) -> None:
    job_id = cloud.submit()
    getattr(cloud.firestore_proxy, outage)()
    assert is_retryable(cloud.get("/jobs"))
    assert is_retryable(cloud.get(f"/jobs/{job_id}"))
    assert is_retryable(cloud.train(key="another"))
    assert cloud.get("/health").status_code == 503
    cloud.firestore_proxy.restore()
    assert cloud.get_job(job_id)["status"] == "preparing"
    assert cloud.count_executions() == 1


def test_lost_firestore_response_to_submit_creates_one_job(cloud: CloudDeployment) -> None:
    assert cloud.get("/jobs").json()["jobs"] == []
    cloud.firestore_proxy.drop_responses()
    first = cloud.train(hf_token="hf_x")
    cloud.firestore_proxy.restore()
    second = cloud.train(hf_token="hf_x")
    assert second.status_code == 201
    assert first.status_code == 503 or first.json() == second.json()
    assert [job["job_id"] for job in cloud.get("/jobs").json()["jobs"]] == [second.json()["job_id"]]
    cloud.advance_one_minute()
    assert cloud.count_executions() == 1


def test_retried_report_after_lost_response_is_stored_once(cloud: CloudDeployment) -> None:
    job_id = cloud.submit()
    token = cloud.client.app.state.services.tokens.sign_launch_token(job_id, 1)  # type: ignore[attr-defined]
    path = f"/internal/jobs/{job_id}/attempts/1"
    claim = cloud.post(f"{path}/claim", {"claimant": "p"}, Authorization=f"Bearer {token}").json()
    headers = {"Authorization": f"Bearer {claim['token']}", "X-Claimant": "p"}
    batch = {
        "first_seq": 0,
        "events": [{"at": "2026-01-01T00:00:00Z", "event": {"type": "metrics", "step": n, "values": {"loss": 1.0}}} for n in range(5)],
    }
    cloud.firestore_proxy.drop_responses()
    assert cloud.post(f"{path}/events", batch, **headers).status_code in (200, 503)
    cloud.firestore_proxy.restore()
    assert cloud.post(f"{path}/events", batch, **headers).json()["next_seq"] == 5
    events = cloud.get(f"/jobs/{job_id}/events").json()["events"]
    assert [row["event"]["step"] for row in events if row["event"]["type"] == "metrics"] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("outage", OUTAGES)
def test_job_launches_after_config_bucket_recovers(cloud: CloudDeployment, outage: str) -> None:
    assert cloud.get("/health").status_code == 200
    getattr(cloud.storage_proxy, outage)()
    job_id = cloud.submit()
    assert cloud.count_executions() == 0
    assert cloud.get("/health").status_code == 503
    cloud.storage_proxy.restore()
    cloud.advance_one_minute()
    assert cloud.count_executions() == 1
    assert cloud.get_job(job_id)["attempts"][0]["pending_reason"] is None


@pytest.mark.parametrize("outage", OUTAGES)
def test_job_launches_after_cloud_run_recovers(cloud: CloudDeployment, outage: str) -> None:
    getattr(cloud.cloud_run_proxy, outage)()
    job_id = cloud.submit()
    assert cloud.count_executions() == 0
    assert cloud.get_job(job_id)["attempts"][0]["pending_reason"]
    cloud.cloud_run_proxy.restore()
    cloud.wait_until_launched()
    cloud.advance_one_minute()
    assert cloud.count_executions() == 1
    job = cloud.get_job(job_id)
    assert len(job["attempts"]) == 1
    assert job["attempts"][0]["pending_reason"] is None


def test_launch_with_lost_response_is_found_not_repeated(cloud: CloudDeployment) -> None:
    cloud.cloud_run.drop_next_response("RunJob")
    job_id = cloud.submit()
    assert cloud.count_executions() == 1
    cloud.advance_one_minute()
    cloud.advance_one_minute()
    assert cloud.count_executions() == 1
    assert len(cloud.get_job(job_id)["attempts"]) == 1


def test_dropped_launch_response_does_not_launch_twice(cloud: CloudDeployment) -> None:
    first = cloud.submit()  # opens the gRPC channel
    cloud.cloud_run_proxy.drop_responses()
    second = cloud.train(key="second").json()["job_id"]
    cloud.cloud_run_proxy.restore()
    cloud.advance_one_minute()
    cloud.advance_one_minute()
    names = sorted(container.args[1] for execution in cloud.cloud_run.executions() for container in execution.template.containers)
    assert names == sorted([f"{first}.1", f"{second}.1"])


def test_slow_connections_still_succeed(cloud: CloudDeployment) -> None:
    cloud.firestore_proxy.delay(0.1)
    cloud.storage_proxy.delay(0.1)
    cloud.cloud_run_proxy.delay(0.1)
    job_id = cloud.submit()
    assert cloud.get_job(job_id)["status"] == "preparing"
    # On a busy machine the delays may use up the time of the request. The launch is then left to the scheduler's next step.
    cloud.wait_until_launched()
    assert cloud.count_executions() == 1
    assert len(cloud.get_job(job_id)["attempts"]) == 1


@pytest.mark.parametrize("outage", OUTAGES)
def test_secret_store_outage_rejects_job_with_token(cloud: CloudDeployment, outage: str) -> None:
    getattr(cloud.secret_manager_proxy, outage)()
    assert is_retryable(cloud.train(hf_token="hf_x"))
    assert cloud.get("/jobs").json()["jobs"] == []
    assert cloud.train().status_code == 201  # a job that needs no secret is accepted
    assert cloud.count_executions() == 1


def test_missing_role_fails_job_with_fix_command(cloud: CloudDeployment) -> None:
    cloud.cloud_run.fail_next("RunJob", grpc.StatusCode.PERMISSION_DENIED, "Permission 'run.jobs.runWithOverrides' denied on resource")
    failure = cloud.get_job(cloud.submit())["failure"]
    assert failure["code"] == "launch_failed"
    assert "run.jobs.runWithOverrides" in failure["message"]
    assert failure["hint"].startswith("gcloud run jobs add-iam-policy-binding tunesmith-cpu")


def test_exhausted_quota_delays_job_and_names_quota(cloud: CloudDeployment) -> None:
    quota = "Quota exceeded for NvidiaL4GpuAllocNoZonalRedundancyPerProjectRegion"
    cloud.cloud_run.fail_next("RunJob", grpc.StatusCode.RESOURCE_EXHAUSTED, quota)
    job_id = cloud.submit()
    job = cloud.get_job(job_id)
    assert job["status"] == "preparing"
    assert "NvidiaL4GpuAllocNoZonalRedundancyPerProjectRegion" in job["attempts"][0]["pending_reason"]
    cloud.advance_one_minute()
    assert cloud.count_executions() == 1
    assert cloud.get_job(job_id)["attempts"][0]["pending_reason"] is None


@pytest.mark.parametrize("cloud", [{"configs_url": "gs://nowhere"}], indirect=True)
def test_missing_bucket_delays_job_with_create_command(cloud: CloudDeployment) -> None:
    job = cloud.get_job(cloud.submit())
    assert job["status"] == "preparing"
    assert "gcloud storage buckets create gs://nowhere" in job["attempts"][0]["pending_reason"]
    health = cloud.get("/health")
    assert health.status_code == 503
    assert "nowhere does not exist" in health.json()["checks"]["object_store gs://nowhere"]
    cloud.advance_one_minute()
    assert cloud.count_executions() == 0
    assert cloud.client.post(f"/jobs/{job['job_id']}/cancel").status_code == 202
    cloud.advance_one_minute()
    assert cloud.get_job(job["job_id"])["status"] == "cancelled"


def test_missing_cloud_run_job_is_named(cloud: CloudDeployment) -> None:
    cloud.cloud_run.delete_jobs()
    failure = cloud.get_job(cloud.submit())["failure"]
    assert failure["code"] == "launch_failed"
    assert "tunesmith-cpu" in failure["message"]
    assert "make deploy" in failure["hint"]

"""A local service that stores its files in an S3 bucket, as teams with MinIO or R2 do."""

from collections.abc import Iterator
from pathlib import Path

import boto3
import httpx2
import pytest

from infra.loopback.s3 import run_s3
from tests.e2e.conftest import BASE, Service

BUCKET = "team"
SECRET_KEY = "aws-secret-canary-1f2e"


@pytest.fixture
def service(tmp_path: Path, tiny_gemma: Path) -> Iterator[Service]:
    (tmp_path / "home").mkdir()
    service = Service(tmp_path / "home")
    with run_s3(buckets=[BUCKET]) as url:
        credentials = {"AWS_ACCESS_KEY_ID": "an-id", "AWS_SECRET_ACCESS_KEY": SECRET_KEY, "AWS_REGION": "auto"}
        client = boto3.client(
            "s3",
            endpoint_url=url,
            region_name="auto",
            aws_access_key_id="an-id",
            aws_secret_access_key=credentials["AWS_SECRET_ACCESS_KEY"],
        )
        for file in tiny_gemma.iterdir():
            client.upload_file(str(file), BUCKET, f"tunesmith/pretrained_weights/huggingface/{BASE}/{file.name}")
        client.close()
        service.environment |= credentials | {"AWS_ENDPOINT_URL_S3": url, "TUNESMITH_OBJECTS_URL": f"s3://{BUCKET}/tunesmith"}
        service.start()
        yield service
        service.stop()
        service.http.close()


def test_job_runs_on_s3_bucket_with_presigned_downloads(service: Service) -> None:
    export = {"export_config": {"format": "merged", "include_gguf": True, "gguf_quantization": "q8_0"}}
    job_id = service.train(service.upload(), config=export)
    job = service.wait_until_final(job_id)
    assert job["status"] == "completed", f"{job['failure']}\n{service.log(job_id)}"
    assert job["gguf_path"].startswith(f"s3://{BUCKET}/tunesmith/gguf_models/{job_id}/")
    response = service.http.get(f"/jobs/download/{job_id}").json()
    assert "X-Amz-Signature" in response["download_url"]
    assert httpx2.get(response["download_url"]).content[:4] == b"GGUF"
    assert not (service.home / "objects").exists()
    assert SECRET_KEY not in service.log(job_id) + (service.home / "service.log").read_text()
    assert service.http.delete(f"/jobs/{job_id}").json()["deleted"]
    assert httpx2.get(response["download_url"]).is_client_error

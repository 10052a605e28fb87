"""What an attempt may say: everything else in a result or an event is refused, over HTTP and in the bucket."""

import json
from typing import Any

import pytest

from schema.events import ArtifactUploaded
from schema.job import Status
from schema.spec import attempt_name, result_key
from service.core.errors import Fenced, InvalidRequest
from tests.factories import START
from tests.unit.jobs_harness import JobsHarness, make_artifact, make_batch

OTHER_URL = "https://evil.example/x"


def change_artifact(**changes: Any) -> Any:
    return lambda artifact: artifact | changes


def change_file(**changes: Any) -> Any:
    return lambda artifact: artifact | {"files": [artifact["files"][0] | changes]}


def make_single_file(artifact: dict[str, Any], *paths: str) -> dict[str, Any]:
    files = [artifact["files"][0] | {"path": path} for path in paths]
    return artifact | {"key": "trained_adapters/{job}/attempt-1/a.bin", "files": files}


REFUSED = {
    "a dataset": change_artifact(key="datasets/dataset_1/"),
    "another job": change_artifact(key="trained_adapters/other/attempt-1/"),
    "another attempt": change_artifact(key="trained_adapters/{job}/attempt-2/"),
    "an attempt whose number begins the same": change_artifact(key="trained_adapters/{job}/attempt-11/"),
    "the folder of another kind": change_artifact(key="merged_models/{job}/attempt-1/"),
    "the whole bucket": change_artifact(key=""),
    "up": change_artifact(key="trained_adapters/{job}/attempt-1/../../other/"),
    "encoded up": change_artifact(key="trained_adapters/{job}/attempt-1/%2e%2e/%2e%2e/other/"),
    "empty part": change_artifact(key="trained_adapters/{job}/attempt-1//a/"),
    "leading slash": change_artifact(key="/trained_adapters/{job}/attempt-1/"),
    "dot": change_artifact(key="trained_adapters/{job}/attempt-1/./"),
    "control character": change_artifact(key="trained_adapters/{job}/attempt-1/a\n/"),
    "backslash": change_artifact(key="trained_adapters/{job}/attempt-1/..\\x/"),
    "long key": change_artifact(key="trained_adapters/{job}/attempt-1/" + "x" * 2000 + "/"),
    "unknown kind": change_artifact(kind="trojan"),
    "name that is a path": change_artifact(name="../adapter"),
    "name of two lines": change_artifact(name="a\nb"),
    "negative size": change_artifact(size_bytes=-1),
    "two files of one path": lambda artifact: artifact | {"files": artifact["files"] * 2},
    "no file for a key of one file": change_artifact(key="trained_adapters/{job}/attempt-1/a.bin"),
    "file above a single file": lambda artifact: make_single_file(artifact, "", "../b.bin"),
    "companion with the file's own name": lambda artifact: make_single_file(artifact, "", "a.bin"),
    "two files without a name": lambda artifact: make_single_file(artifact, "", ""),
    "companion before the file": lambda artifact: make_single_file(artifact, "b.bin", ""),
    "file above the artifact": change_file(path="../adapter_model.safetensors"),
    "absolute file": change_file(path="/etc/passwd"),
    "file without a name": change_file(path=""),
    "negative size of a file": change_file(size_bytes=-5),
    "no digest": change_file(sha256="abc"),
    "upper-case digest": change_file(sha256="A" * 64),
    "unrequested push": change_artifact(hub={"repo_id": "me/model", "revision": "abc", "url": "https://hf.co/me/model/tree/abc"}),
}


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
def test_foreign_or_malformed_artifact_is_refused(harness: JobsHarness, change: Any) -> None:
    job = harness.start_training()
    artifact = change(make_artifact(job))
    artifact["key"] = artifact["key"].replace("{job}", job.job_id)
    result = harness.write_result(job, artifacts=[artifact])
    with pytest.raises(InvalidRequest) as refused:
        harness.finish(result)
    assert refused.value.param is not None
    with pytest.raises(InvalidRequest):
        harness.report(job, 1, make_batch({"type": "artifact", "artifact": artifact}, first_seq=1))
    harness.reconcile()
    assert (harness.find_job(job).status, harness.find_job(job).artifacts) == (Status.TRAINING, ())


def test_files_beside_a_single_file_are_accepted(harness: JobsHarness) -> None:
    job = harness.start_training()
    artifact = make_single_file(make_artifact(job), "", "a.Modelfile")
    artifact["key"] = artifact["key"].replace("{job}", job.job_id)
    harness.finish(harness.write_result(job, artifacts=[artifact]))
    (published,) = harness.find_job(job).artifacts
    assert [published.file_key(file) for file in published.files] == [
        f"trained_adapters/{job.job_id}/attempt-1/{name}" for name in ("a.bin", "a.Modelfile")
    ]


def test_two_artifacts_of_one_name_are_refused(harness: JobsHarness) -> None:
    job = harness.start_training()
    with pytest.raises(InvalidRequest):
        harness.finish(harness.write_result(job, artifacts=[make_artifact(job), make_artifact(job)]))


def test_address_of_an_artifact_is_computed_by_the_service(harness: JobsHarness) -> None:
    job = harness.start_training()
    artifact: dict[str, Any] = make_artifact(job) | {"uri": OTHER_URL}
    harness.report(job, 1, make_batch({"type": "artifact", "artifact": artifact}, first_seq=1))
    [event] = [stored.event for stored in harness.store.list_events(job.job_id) if isinstance(stored.event, ArtifactUploaded)]
    finished = harness.finish(harness.write_result(job, artifacts=[artifact]))
    assert event.artifact.uri == finished.artifacts[0].uri == f"{harness.objects.url}/{artifact['key']}"


@pytest.mark.parametrize(
    ("repo_id", "revision", "url"),
    [
        ("you/model", "abc", "https://huggingface.co/you/model/tree/abc"),
        ("me/model", "../x", "https://huggingface.co/me/model/tree/../x"),
        ("me/model", "abc", "javascript:alert(1)//me/model/tree/abc"),
        ("me/model", "abc", "https://evil.example/"),
    ],
)
def test_push_elsewhere_than_requested_is_refused(harness: JobsHarness, repo_id: str, revision: str, url: str) -> None:
    job = harness.start_pushing_to("me/model")
    hub = {"repo_id": repo_id, "revision": revision, "url": url}
    with pytest.raises(InvalidRequest):
        harness.finish(harness.write_result(job, artifacts=[make_artifact(job) | {"hub": hub}]))


def test_requested_push_is_recorded(harness: JobsHarness) -> None:
    job = harness.start_pushing_to("me/model")
    hub = {"repo_id": "me/model", "revision": "abc", "url": "https://huggingface.co/me/model/tree/abc"}
    finished = harness.finish(harness.write_result(job, artifacts=[make_artifact(job) | {"hub": hub}]))
    assert finished.artifacts[0].hub is not None
    assert finished.artifacts[0].hub.repo_id == "me/model"


@pytest.mark.parametrize(
    "url",
    [
        "javascript:alert(1)",
        "file:///etc/passwd",
        "https://",
        "https://user:password@x.example/",
        "https://x.example/\x1b[2J",
        "https://x.example/a b",
        "https://x.example/" + "x" * 5000,
        "gs://bucket/trackers/other/tensorboard",
        "http://[::1",
    ],
)
def test_unsafe_tracker_address_is_refused(harness: JobsHarness, url: str) -> None:
    job = harness.start_training()
    for result in ({"tracker_urls": {"mlflow": url}}, {"wandb_url": url}):
        with pytest.raises(InvalidRequest):
            harness.finish(harness.write_result(job, **result))
    with pytest.raises(InvalidRequest):
        harness.report(job, 1, make_batch({"type": "tracker", "tracker": "wandb", "url": url}, first_seq=1))


def test_tracker_pages_and_files_of_the_job_are_accepted(harness: JobsHarness) -> None:
    job = harness.start_training()
    urls = {"mlflow": "https://mlflow.example/#/experiments/1", "tensorboard": f"{harness.objects.url}/trackers/{job.job_id}/tensorboard"}
    assert harness.finish(harness.write_result(job, tracker_urls=urls)).tracker_urls == urls


def test_attempt_cannot_write_status_events(harness: JobsHarness) -> None:
    job = harness.start_training()
    with pytest.raises(InvalidRequest):
        harness.report(job, 1, make_batch({"type": "status", "status": "completed", "attempt": 1}, first_seq=1))


def test_result_of_another_process_in_the_bucket_is_ignored(harness: JobsHarness) -> None:
    job = harness.start_training()
    forged = harness.write_result(job, claimant="someone", artifacts=[make_artifact(job)])
    with pytest.raises(Fenced):
        harness.finish(forged)
    harness.reconcile()
    assert harness.find_job(job).status is Status.TRAINING
    harness.launcher.states[f"handle of {attempt_name(job.job_id, 1)}"] = "ended"
    harness.reconcile()
    ended = harness.find_job(job).attempts[0]
    assert (ended.outcome, harness.find_job(job).artifacts) == ("lost", ())


def test_result_in_the_bucket_of_an_attempt_that_nobody_claimed_is_ignored(harness: JobsHarness) -> None:
    job = harness.submit()
    harness.reconcile()
    result = {"job_id": job.job_id, "attempt": 1, "claimant": "p", "outcome": "completed", "started_at": START.isoformat()}
    harness.objects.write(result_key(job.job_id, 1), json.dumps(result | {"finished_at": START.isoformat()}).encode())
    harness.reconcile()
    assert harness.find_job(job).status is Status.PREPARING

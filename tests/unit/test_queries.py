"""Reading jobs: refreshed records, download links, publish manifests."""

from typing import NoReturn

import pytest

from schema.job import Artifact, ArtifactFile, Gate, GateCheck, Status
from schema.result import PublishManifest
from schema.spec import manifest_key
from service.core.errors import Conflict, NotFound
from service.core.jobs.queries import _pick_artifact
from storage import StoreUnavailable
from tests.factories import make_job
from tests.unit.jobs_harness import OTHER_PRINCIPAL, PRINCIPAL, JobsHarness, make_artifact


def test_job_of_other_tenant_is_not_found(harness: JobsHarness) -> None:
    job = harness.submit()
    for read in (harness.jobs.repository.find, harness.jobs.control.cancel, harness.jobs.deletion.delete):
        with pytest.raises(NotFound):
            read(OTHER_PRINCIPAL, job.job_id)


def test_reading_silent_job_reconciles_it(harness: JobsHarness) -> None:
    job = harness.start_training()
    harness.launcher.polling_is_free = False
    harness.on_wake = harness.jobs.reconciliation.reconcile_job
    harness.write_result(job)
    assert harness.jobs.queries.get_refreshed(PRINCIPAL, job.job_id).job.status is Status.TRAINING  # its heartbeat is recent
    harness.clock.advance(61)
    assert harness.jobs.queries.get_refreshed(PRINCIPAL, job.job_id).job.status is Status.COMPLETED


def test_failed_gate_completes_job_but_blocks_download(harness: JobsHarness) -> None:
    job = harness.start_training()
    failed = GateCheck(metric="perplexity", value=12.5, at_most=9.0, passed=False, reason="12.5 is above 9")
    passed = GateCheck(metric="accuracy", value=0.9, at_least=0.5, passed=True)
    gate = Gate(passed=False, checks=(passed, failed))
    harness.finish(harness.write_result(job, gate=gate, published_step=0, tracker_urls={"mlflow": "https://m"}))
    job = harness.find_job(job)
    assert (job.status, job.gate, job.published_step, job.tracker_urls) == (Status.COMPLETED, gate, 0, {"mlflow": "https://m"})
    with pytest.raises(Conflict, match=r"perplexity: 12\.5 is above 9") as excinfo:
        harness.jobs.queries.create_download_links(PRINCIPAL, job.job_id, None)
    assert "accuracy" not in excinfo.value.message
    assert f"POST /jobs/{job.job_id}/export" in excinfo.value.hint


def test_service_writes_publish_manifest(harness: JobsHarness) -> None:
    job = harness.start_training()
    harness.finish(harness.write_result(job, artifacts=[make_artifact(job)]))
    manifest = PublishManifest.load(harness.objects.read(manifest_key(job.job_id)))
    assert (manifest.attempt, [artifact.name for artifact in manifest.artifacts]) == (1, ["adapter"])
    assert harness.find_job(job).manifest_written


def test_unwritten_manifest_is_written_on_next_read(harness: JobsHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    job = harness.start_training()
    result = harness.write_result(job, artifacts=[make_artifact(job)])

    def raise_unavailable(*_: object, **__: object) -> NoReturn:
        raise StoreUnavailable("away")

    with monkeypatch.context() as broken:
        broken.setattr(harness.objects, "write", raise_unavailable)
        assert harness.finish(result).status is Status.COMPLETED
    assert harness.objects.stat(manifest_key(job.job_id)) is None
    harness.jobs.queries.get_refreshed(PRINCIPAL, job.job_id)
    assert harness.objects.stat(manifest_key(job.job_id)) is not None


def test_completed_job_has_download_link(harness: JobsHarness) -> None:
    job = harness.start_training()
    with pytest.raises(Conflict):
        harness.jobs.queries.create_download_links(PRINCIPAL, job.job_id, None)
    file = ArtifactFile(path="", size_bytes=1, sha256="0" * 64)
    gguf = Artifact(name="gguf-q8_0", kind="gguf", uri="u", key=f"gguf_models/{job.job_id}/attempt-1/m.gguf", size_bytes=1, files=[file])
    adapter = gguf.model_copy(update={"name": "adapter", "kind": "adapter", "key": f"trained_adapters/{job.job_id}/attempt-1/a"})
    harness.finish(harness.write_result(job, artifacts=[adapter.model_dump(), gguf.model_dump()]))
    artifact, [(_, link)] = harness.jobs.queries.create_download_links(PRINCIPAL, job.job_id, None)
    assert artifact == gguf.model_copy(update={"uri": f"{harness.objects.url}/{gguf.key}"})
    assert harness.tokens.read_file_token(link.removeprefix("/files/")) == (gguf.key, "m.gguf")
    assert artifact.sha256 == "0" * 64
    with pytest.raises(NotFound, match="it has: adapter, gguf-q8_0"):
        harness.jobs.queries.create_download_links(PRINCIPAL, job.job_id, "gguf-f16")


@pytest.mark.parametrize(
    ("artifacts", "chosen"),
    [
        ({"adapter": False, "gguf-q2_k": True, "gguf-q8_0": False}, "gguf-q8_0"),
        ({"adapter": False, "merged": False, "gguf-q2_k": True, "gguf-mmproj": False, "gguf-usage": False}, "merged"),
        ({"adapter": False, "gguf-q2_k": True}, "adapter"),
        ({"gguf-q2_k": True, "gguf-mmproj": False}, "gguf-q2_k"),
        ({"gguf-q8_0": False, "gguf-f16": False}, "gguf-q8_0"),
    ],
)
def test_default_download_is_not_a_file_that_lost_the_training(artifacts: dict[str, bool], chosen: str) -> None:
    made = tuple(
        Artifact(
            name=name,
            kind=name.partition("-")[0],
            uri="u",
            key="k",
            size_bytes=1,
            files=[ArtifactFile(path="", size_bytes=1, sha256="0" * 64)],
            fidelity={"closer_to_base": closer_to_base},
        )
        for name, closer_to_base in artifacts.items()
    )
    assert _pick_artifact(make_job(artifacts=made), None).name == chosen


def test_files_beside_an_artifact_have_links_of_their_own(harness: JobsHarness) -> None:
    job = harness.start_training()
    files = [ArtifactFile(path=path, size_bytes=1, sha256="0" * 64) for path in ("", "m.Modelfile")]
    gguf = Artifact(name="gguf-q8_0", kind="gguf", uri="u", key=f"gguf_models/{job.job_id}/attempt-1/m.gguf", size_bytes=2, files=files)
    harness.finish(harness.write_result(job, artifacts=[gguf.model_dump()]))
    _, links = harness.jobs.queries.create_download_links(PRINCIPAL, job.job_id, None)
    read = [harness.tokens.read_file_token(link.removeprefix("/files/")) for _, link in links]
    assert read == [(gguf.key, "m.gguf"), (gguf.key.replace("m.gguf", "m.Modelfile"), "m.Modelfile")]

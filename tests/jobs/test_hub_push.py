"""Artifacts are pushed to the Hub in one commit; errors of the Hub are retried or reported with a hint."""

import os
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from infra.loopback.http_faults import Fault, HttpFaultProxy
from infra.loopback.hub import LoopbackHub, Token
from jobs.runtime.artifacts import ExportedArtifact
from jobs.runtime.context import JobContext
from jobs.runtime.errors import JobFailed
from jobs.runtime.http_retry import is_transient_hub_error
from jobs.runtime.hub import check_push, push, repo_creation_denied_reason, repo_files, stale_weights
from jobs.runtime.retry import TRIES
from schema.job import Artifact, HubPush
from tests.jobs.conftest import make_context, make_spec
from tests.jobs.hub_fixture import hub, hub_proxy

__all__ = ["hub", "hub_proxy"]
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # how the Hub client calls httpx
CARD = "---\nlicense: gemma\n---\n# a card\n"
ADAPTER = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"a" * 3000}
MERGED = {"config.json": b"{}", "model.safetensors": b"m" * 5000, "LICENSE": b"terms"}


def skip_sleep(_: float) -> None:
    """Do not sleep."""


@pytest.fixture
def context(tmp_path: Path) -> Callable[..., JobContext]:
    def make(repo_id: str = "ada/tuned", token: str | None = "hf_ada", **export: Any) -> JobContext:
        spec = make_spec(tmp_path / "objects", job_id="job-1", export_config={"destination": "hfhub", "hf_repo_id": repo_id, **export})
        return make_context(spec, tmp_path / "work", secrets={"hf_token": token} if token else {})

    return make


def make_exported_artifact(folder: Path, kind: str, files: dict[str, bytes], hub_folder: str = "") -> ExportedArtifact:
    """An artifact of these files: the folder, or for GGUF its first file."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    path = folder / next(iter(files)) if kind == "gguf" else folder
    return ExportedArtifact(kind, kind, path, "key/", hub_folder=hub_folder)


def make_artifact(name: str = "adapter") -> Artifact:
    return Artifact(name=name, kind="adapter", uri="file:///a", key="a/", size_bytes=1, files=[])


def push_artifacts(context: JobContext, products: list[ExportedArtifact], *, card: str = CARD, run: bytes = b"{}") -> HubPush:
    (artifact,) = push(products, [make_artifact()], card, run, context, sleep=skip_sleep)
    assert artifact.hub is not None
    return artifact.hub


def contents(hub: LoopbackHub, repo_id: str = "ada/tuned") -> dict[str, bytes]:
    return {path: blob.content for path, blob in hub.repos[repo_id].files.items() if path != ".gitattributes"}


def test_adapter_is_pushed_in_one_commit_to_private_repository(
    hub: LoopbackHub, hub_proxy: HttpFaultProxy, context: Callable[..., JobContext], tmp_path: Path
) -> None:
    pushed = push_artifacts(context(), [make_exported_artifact(tmp_path / "a", "adapter", ADAPTER)])
    repo = hub.repos["ada/tuned"]
    assert contents(hub) == {**ADAPTER, "README.md": CARD.encode(), "run.json": b"{}"}
    assert repo.private
    assert [commit.title for commit in repo.commits] == ["initial commit", "Trained by job job-1"]
    assert pushed == HubPush(repo_id="ada/tuned", revision=repo.head.oid, url=f"{hub_proxy.url}/ada/tuned/tree/{repo.head.oid}")


def test_public_repository_is_created_on_request_and_existing_is_kept(
    hub: LoopbackHub, hub_proxy: HttpFaultProxy, context: Callable[..., JobContext], tmp_path: Path
) -> None:
    hub.add_repository("ada/shown", {"notes.md": b"mine"})
    adapter = make_exported_artifact(tmp_path / "a", "adapter", ADAPTER)
    push_artifacts(context("lab/open", hf_private=False), [adapter])
    push_artifacts(context("ada/shown"), [adapter])
    assert not hub.repos["lab/open"].private
    assert not hub.repos["ada/shown"].private
    assert contents(hub, "ada/shown")["notes.md"] == b"mine"


def test_repository_without_owner_uses_token_owner(
    hub: LoopbackHub, hub_proxy: HttpFaultProxy, context: Callable[..., JobContext], tmp_path: Path
) -> None:
    assert push_artifacts(context("tuned"), [make_exported_artifact(tmp_path / "a", "adapter", ADAPTER)]).repo_id == "ada/tuned"
    assert "ada/tuned" in hub.repos


def test_artifact_files_are_in_the_folder_that_its_exporter_gives(tmp_path: Path) -> None:
    adapter, merged = (
        make_exported_artifact(tmp_path / "a", "adapter", ADAPTER, "adapter/"),
        make_exported_artifact(tmp_path / "m", "merged", {**MERGED, "README.md": b"written by a library"}),
    )
    gguf, onnx = (
        make_exported_artifact(tmp_path / "g", "gguf", {"m-q8_0.gguf": b"g"}),
        make_exported_artifact(tmp_path / "o", "onnx", {"model.onnx": b"o"}, "onnx/"),
    )
    assert set(repo_files([adapter, merged, gguf, onnx])) == {
        *MERGED,
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "m-q8_0.gguf",
        "onnx/model.onnx",
    }


def test_companions_are_beside_their_file_in_the_repository(tmp_path: Path) -> None:
    gguf, modelfile = tmp_path / "m-q8_0.gguf", tmp_path / "m-q8_0.Modelfile"
    gguf.write_bytes(b"g")
    modelfile.write_text("FROM ./m-q8_0.gguf")
    exported = ExportedArtifact("gguf-q8_0", "gguf", gguf, "gguf_models/job-1/m-q8_0.gguf", companions=(modelfile,))
    assert repo_files([exported]) == {"m-q8_0.gguf": gguf, "m-q8_0.Modelfile": modelfile}


def test_only_weights_of_earlier_model_are_stale() -> None:
    present = ["adapter_config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "old.gguf", "notes.md"]
    assert stale_weights([*present, "adapter/adapter_model.safetensors"], {"model.safetensors": b"", "config.json": b""}) == present[:3]
    assert stale_weights(present, {"new.gguf": b""}) == []


def test_an_earlier_model_is_replaced_in_the_same_commit(
    hub: LoopbackHub, hub_proxy: HttpFaultProxy, context: Callable[..., JobContext], tmp_path: Path
) -> None:
    hub.add_repository("ada/tuned", {**ADAPTER, "old.gguf": b"g"})
    before = len(hub.repos["ada/tuned"].commits)
    push_artifacts(context(), [make_exported_artifact(tmp_path / "m", "merged", MERGED)])
    assert len(hub.repos["ada/tuned"].commits) == before + 1
    assert set(contents(hub)) == {*MERGED, "old.gguf", "README.md", "run.json"}


def test_repeated_push_sends_nothing_and_returns_same_commit(
    hub: LoopbackHub, hub_proxy: HttpFaultProxy, context: Callable[..., JobContext], tmp_path: Path
) -> None:
    adapter = make_exported_artifact(tmp_path / "a", "adapter", ADAPTER)
    first, again = push_artifacts(context(), [adapter]), push_artifacts(context(), [adapter])
    assert first == again
    assert len(hub.repos["ada/tuned"].commits) == 2
    assert len(hub.uploaded_digests()) == 1
    third = push_artifacts(context(), [adapter], run=b'{"attempt": 2}')  # the next attempt has a different record
    assert third.revision != first.revision
    assert len(hub.uploaded_digests()) == 1


def test_push_retries_outage_and_uploads_each_file_once(
    hub: LoopbackHub, hub_proxy: HttpFaultProxy, context: Callable[..., JobContext], tmp_path: Path
) -> None:
    hub_proxy.set_faults(
        Fault("reject", "POST", "/repos/create", times=2, status=502, body="<html>bad gateway</html>"),
        Fault("reject", "POST", "/validate-yaml", status=502, body="<html>bad gateway</html>"),
        Fault("reject", "POST", "/commit/", times=3),
        Fault("reset", "GET", "/api/models/"),
    )
    push_artifacts(context(), [make_exported_artifact(tmp_path / "a", "adapter", ADAPTER)])
    assert len(hub.repos["ada/tuned"].commits) == 2
    assert hub.uploaded_digests() == [sha256(ADAPTER["adapter_model.safetensors"]).hexdigest()]


def test_permanent_outage_fails_push_with_hint(hub_proxy: HttpFaultProxy, context: Callable[..., JobContext], tmp_path: Path) -> None:
    hub_proxy.set_faults(Fault("reset", times=99))
    code, text = get_failure(lambda: push_artifacts(context(), [make_exported_artifact(tmp_path / "a", "adapter", ADAPTER)]))
    assert code == "upload_failed"
    assert "retry the job" in text
    assert len(hub_proxy.requests) == TRIES


def test_commit_with_lost_response_is_not_repeated(
    hub: LoopbackHub, hub_proxy: HttpFaultProxy, context: Callable[..., JobContext], tmp_path: Path
) -> None:
    hub_proxy.set_faults(Fault("drop response", "POST", "/commit/"))
    pushed = push_artifacts(context(), [make_exported_artifact(tmp_path / "a", "adapter", ADAPTER)])
    assert len(hub.repos["ada/tuned"].commits) == 2
    assert pushed.revision == hub.repos["ada/tuned"].head.oid


def test_conflicting_commit_is_retried(
    hub: LoopbackHub, hub_proxy: HttpFaultProxy, context: Callable[..., JobContext], tmp_path: Path
) -> None:
    hub_proxy.set_faults(Fault("reject", "POST", "/commit/", status=412))
    push_artifacts(context(), [make_exported_artifact(tmp_path / "a", "adapter", ADAPTER)])
    assert len(hub.repos["ada/tuned"].commits) == 2


def test_interrupted_upload_resumes_with_missing_files(
    hub: LoopbackHub, hub_proxy: HttpFaultProxy, context: Callable[..., JobContext], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", skip_sleep)  # the waits of the Hub client between its retries
    monkeypatch.setattr("jobs.runtime.hub.MAX_UPLOAD_THREADS", 1)
    merged = make_exported_artifact(
        tmp_path / "m", "merged", {"a.safetensors": b"first" * 99, "b.safetensors": b"second" * 99, "config.json": b"{}"}
    )
    hub_proxy.set_faults(Fault("truncate request", "PUT", "/lfs/", skip_first=1, times=99))
    with pytest.raises(JobFailed) as failed:
        push_artifacts(context(), [merged])
    assert failed.value.failure.code == "upload_failed"
    assert "not sent again" in failed.value.failure.hint
    assert set(contents(hub)) == set()  # nothing is visible
    hub_proxy.set_faults()
    push_artifacts(context(), [merged])
    assert len(hub.uploaded_digests()) == len(set(hub.uploaded_digests())) == 2
    assert contents(hub)["b.safetensors"] == b"second" * 99


def get_failure(action: Callable[[], object]) -> tuple[str, str]:
    with pytest.raises(JobFailed) as failed:
        action()
    return failed.value.failure.code, f"{failed.value.failure.message} / {failed.value.failure.hint}"


@pytest.mark.parametrize(
    ("repo_id", "token", "expected"),
    [
        ("grace/tuned", "hf_ada", "write access to grace/tuned"),
        ("ada/tuned", "hf_reader", "write access to ada/tuned"),
        ("ada/tuned", "hf_wrong", "401"),
        ("ada/tuned", None, "send the hf_token"),
    ],
)
def test_token_without_write_access_is_rejected_with_hint(
    repo_id: str,
    token: str | None,
    expected: str,
    hub: LoopbackHub,
    hub_proxy: HttpFaultProxy,
    context: Callable[..., JobContext],
    tmp_path: Path,
) -> None:
    code, text = get_failure(lambda: push_artifacts(context(repo_id, token), [make_exported_artifact(tmp_path / "a", "adapter", ADAPTER)]))
    assert code == "auth"
    assert expected in text
    assert hub.repos == {}
    assert not [request for request in hub_proxy.requests if "/lfs/" in request.path]


def test_read_token_is_rejected_before_upload(
    hub: LoopbackHub, hub_proxy: HttpFaultProxy, context: Callable[..., JobContext], tmp_path: Path
) -> None:
    hub.add_repository("ada/tuned", {})
    code, _ = get_failure(lambda: push_artifacts(context(token="hf_reader"), [make_exported_artifact(tmp_path / "a", "adapter", ADAPTER)]))
    assert code == "auth"
    assert hub.uploaded_digests() == []


def test_full_account_fails_with_hub_message(
    hub: LoopbackHub, hub_proxy: HttpFaultProxy, context: Callable[..., JobContext], tmp_path: Path
) -> None:
    hub.quota_bytes = 10
    code, text = get_failure(lambda: push_artifacts(context(), [make_exported_artifact(tmp_path / "a", "adapter", ADAPTER)]))
    assert code == "upload_failed"
    assert "storage limit reached" in text
    assert "free some storage" in text


def test_invalid_repository_name_is_a_config_error(hub_proxy: HttpFaultProxy, context: Callable[..., JobContext], tmp_path: Path) -> None:
    code, text = get_failure(lambda: push_artifacts(context("ada/bad--name"), [make_exported_artifact(tmp_path / "a", "adapter", ADAPTER)]))
    assert code == "invalid_config"
    assert "ada/bad--name" in text


def test_token_is_only_sent_in_api_requests(
    hub: LoopbackHub,
    hub_proxy: HttpFaultProxy,
    context: Callable[..., JobContext],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level("DEBUG")
    push_artifacts(context(), [make_exported_artifact(tmp_path / "a", "adapter", ADAPTER)])
    assert "hf_ada" not in caplog.text + "".join(capfd.readouterr()) + str(dict(os.environ))
    assert {request.headers["authorization"] for request in hub_proxy.requests if "/api/" in request.path} == {"Bearer hf_ada"}


def test_check_push_verifies_access_and_creates_nothing(
    hub: LoopbackHub, hub_proxy: HttpFaultProxy, context: Callable[..., JobContext]
) -> None:
    hub.add_repository("grace/hers", {})
    check_push(context("ada/new"))
    check_push(context("lab/new"))
    for repo_id, token, expected in (
        ("grace/hers", "hf_ada", "grace/hers"),
        ("grace/new", "hf_ada", "ada has no write access to grace"),
        ("ada/new", "hf_reader", "read-only token"),
        ("ada/new", "hf_wrong", "401"),
    ):
        code, text = get_failure(lambda: check_push(context(repo_id, token)))  # noqa: B023  # called at once
        assert code == "auth"
        assert expected in text
    assert set(hub.repos) == {"grace/hers"}


def test_hub_outage_does_not_fail_check_push(hub_proxy: HttpFaultProxy, context: Callable[..., JobContext]) -> None:
    hub_proxy.set_faults(Fault("reject", status=503, times=9))
    check_push(context())
    hub_proxy.set_faults(Fault("reset", times=9))
    check_push(context())


def test_fine_grained_token_follows_its_scopes() -> None:
    def denied_reason(repo_id: str, **permissions: tuple[str, ...]) -> str:
        scopes = {name.replace("__", "/"): granted for name, granted in permissions.items()}
        return repo_creation_denied_reason(repo_id, Token("ada", "fineGrained", orgs={"lab": "read"}, permissions=scopes).whoami())

    assert denied_reason("ada/tuned", ada=("repo.write",)) == ""
    assert denied_reason("ada/tuned", ada__tuned=("repo.write",)) == ""
    assert "scopes" in denied_reason("ada/tuned", ada=("repo.content.read",))
    assert "no write access to lab" in denied_reason("lab/tuned", lab=("repo.write",))


def test_offline_mode_is_not_retried() -> None:
    from huggingface_hub.errors import OfflineModeIsEnabled

    assert not is_transient_hub_error(OfflineModeIsEnabled("HF_HUB_OFFLINE=1"))
    assert is_transient_hub_error(ConnectionResetError())
    assert not is_transient_hub_error(PermissionError("no such luck"))

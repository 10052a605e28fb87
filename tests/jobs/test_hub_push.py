"""What was made is pushed to the Hub in one step, once, privately; and a Hub that stumbles, or says no, is understood."""

import os
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from infra.loopback.http_faults import Fault, HttpFaults
from infra.loopback.hub import LoopbackHub, Token
from jobs.context import JobContext
from jobs.errors import JobFailed
from jobs.hub import check_push, layout, may_pass, push, stale, why_not_create
from jobs.patience import TRIES
from jobs.publish import Product
from schema.job import Artifact, HubPush
from tests.jobs.conftest import a_context, a_spec
from tests.jobs.hub_fixture import hub, line

__all__ = ["hub", "line"]
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own way with httpx
CARD = "---\nlicense: gemma\n---\n# a card\n"
ADAPTER = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"a" * 3000}
MERGED = {"config.json": b"{}", "model.safetensors": b"m" * 5000, "LICENSE": b"terms"}


def never(_: float) -> None:
    """Sleep no time."""


@pytest.fixture
def context(tmp_path: Path) -> Callable[..., JobContext]:
    def make(repo_id: str = "ada/tuned", token: str | None = "hf_ada", **export: Any) -> JobContext:
        spec = a_spec(tmp_path / "objects", job_id="job-1", export_config={"destination": "hfhub", "hf_repo_id": repo_id, **export})
        return a_context(spec, tmp_path / "work", secrets={"hf_token": token} if token else {})

    return make


def product(folder: Path, kind: Any, files: dict[str, bytes]) -> Product:
    """A folder of files; a single one for GGUF."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    path = folder / next(iter(files)) if kind == "gguf" else folder
    return Product(kind, kind, path, "key/")


def an_artifact(name: str = "adapter") -> Artifact:
    return Artifact(name=name, kind="adapter", uri="file:///a", key="a/", size_bytes=1, files=[])


def pushed(context: JobContext, products: list[Product], *, card: str = CARD, run: bytes = b"{}") -> HubPush:
    (artifact,) = push(products, [an_artifact()], card, run, context, sleep=never)
    assert artifact.hub is not None
    return artifact.hub


def contents(hub: LoopbackHub, repo_id: str = "ada/tuned") -> dict[str, bytes]:
    return {path: blob.content for path, blob in hub.repos[repo_id].files.items() if path != ".gitattributes"}


def test_an_adapter_is_pushed_in_one_commit_to_a_private_repository(
    hub: LoopbackHub, line: HttpFaults, context: Callable[..., JobContext], tmp_path: Path
) -> None:
    found = pushed(context(), [product(tmp_path / "a", "adapter", ADAPTER)])
    repo = hub.repos["ada/tuned"]
    assert contents(hub) == {**ADAPTER, "README.md": CARD.encode(), "run.json": b"{}"}
    assert repo.private
    assert [commit.title for commit in repo.commits] == ["initial commit", "Trained by job job-1"]
    assert found == HubPush(repo_id="ada/tuned", revision=repo.head.oid, url=f"{line.url}/ada/tuned/tree/{repo.head.oid}")


def test_a_public_repository_is_made_when_asked_for_and_one_that_exists_stays_as_it_is(
    hub: LoopbackHub, line: HttpFaults, context: Callable[..., JobContext], tmp_path: Path
) -> None:
    hub.add("ada/shown", {"notes.md": b"mine"})
    adapter = product(tmp_path / "a", "adapter", ADAPTER)
    pushed(context("lab/open", hf_private=False), [adapter])
    pushed(context("ada/shown"), [adapter])
    assert not hub.repos["lab/open"].private
    assert not hub.repos["ada/shown"].private
    assert contents(hub, "ada/shown")["notes.md"] == b"mine"


def test_a_repository_named_without_its_owner_is_the_token_s(
    hub: LoopbackHub, line: HttpFaults, context: Callable[..., JobContext], tmp_path: Path
) -> None:
    assert pushed(context("tuned"), [product(tmp_path / "a", "adapter", ADAPTER)]).repo_id == "ada/tuned"
    assert "ada/tuned" in hub.repos


def test_the_merged_model_has_the_root_and_the_adapter_a_folder(tmp_path: Path) -> None:
    adapter, merged = (
        product(tmp_path / "a", "adapter", ADAPTER),
        product(tmp_path / "m", "merged", {**MERGED, "README.md": b"a library's"}),
    )
    gguf, onnx = product(tmp_path / "g", "gguf", {"m-q8_0.gguf": b"g"}), product(tmp_path / "o", "onnx", {"model.onnx": b"o"})
    assert set(layout([adapter])) == set(ADAPTER)
    assert set(layout([adapter, merged, gguf, onnx])) == {
        *MERGED,
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "m-q8_0.gguf",
        "onnx/model.onnx",
    }


def test_weights_of_an_earlier_model_go_and_all_else_stays() -> None:
    present = ["adapter_config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "old.gguf", "notes.md"]
    assert stale([*present, "adapter/adapter_model.safetensors"], {"model.safetensors": b"", "config.json": b""}) == present[:3]
    assert stale(present, {"new.gguf": b""}) == []


def test_an_earlier_model_is_replaced_in_the_same_commit(
    hub: LoopbackHub, line: HttpFaults, context: Callable[..., JobContext], tmp_path: Path
) -> None:
    hub.add("ada/tuned", {**ADAPTER, "old.gguf": b"g"})
    before = len(hub.repos["ada/tuned"].commits)
    pushed(context(), [product(tmp_path / "m", "merged", MERGED)])
    assert len(hub.repos["ada/tuned"].commits) == before + 1
    assert set(contents(hub)) == {*MERGED, "old.gguf", "README.md", "run.json"}


def test_the_same_push_again_sends_nothing_and_records_the_commit_that_is_there(
    hub: LoopbackHub, line: HttpFaults, context: Callable[..., JobContext], tmp_path: Path
) -> None:
    adapter = product(tmp_path / "a", "adapter", ADAPTER)
    first, again = pushed(context(), [adapter]), pushed(context(), [adapter])
    assert first == again
    assert len(hub.repos["ada/tuned"].commits) == 2
    assert len(hub.uploads()) == 1
    third = pushed(context(), [adapter], run=b'{"attempt": 2}')  # of the next attempt: its record is another one
    assert third.revision != first.revision
    assert len(hub.uploads()) == 1


def test_a_hub_that_is_away_is_waited_for_and_gets_every_file_once(
    hub: LoopbackHub, line: HttpFaults, context: Callable[..., JobContext], tmp_path: Path
) -> None:
    line.plan(
        Fault("refuse", "POST", "/repos/create", times=2, status=502, body="<html>bad gateway</html>"),
        Fault("refuse", "POST", "/validate-yaml", status=502, body="<html>bad gateway</html>"),
        Fault("refuse", "POST", "/commit/", times=3),
        Fault("reset", "GET", "/api/models/"),
    )
    pushed(context(), [product(tmp_path / "a", "adapter", ADAPTER)])
    assert len(hub.repos["ada/tuned"].commits) == 2
    assert hub.uploads() == [sha256(ADAPTER["adapter_model.safetensors"]).hexdigest()]


def test_a_hub_that_stays_away_fails_the_push_and_says_what_to_do(
    line: HttpFaults, context: Callable[..., JobContext], tmp_path: Path
) -> None:
    line.plan(Fault("reset", times=99))
    code, text = refusal_of(lambda: pushed(context(), [product(tmp_path / "a", "adapter", ADAPTER)]))
    assert code == "upload_failed"
    assert "retry the job" in text
    assert len(line.passed) == TRIES


def test_a_commit_whose_answer_is_lost_is_found_and_not_made_twice(
    hub: LoopbackHub, line: HttpFaults, context: Callable[..., JobContext], tmp_path: Path
) -> None:
    line.plan(Fault("lose answer", "POST", "/commit/"))
    found = pushed(context(), [product(tmp_path / "a", "adapter", ADAPTER)])
    assert len(hub.repos["ada/tuned"].commits) == 2
    assert found.revision == hub.repos["ada/tuned"].head.oid


def test_a_commit_that_another_one_overtook_is_made_anew_on_top_of_it(
    hub: LoopbackHub, line: HttpFaults, context: Callable[..., JobContext], tmp_path: Path
) -> None:
    line.plan(Fault("refuse", "POST", "/commit/", status=412))
    pushed(context(), [product(tmp_path / "a", "adapter", ADAPTER)])
    assert len(hub.repos["ada/tuned"].commits) == 2


def test_an_upload_that_broke_off_goes_on_in_the_next_attempt_with_what_is_missing(
    hub: LoopbackHub, line: HttpFaults, context: Callable[..., JobContext], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", never)  # the client's own waits between its tries
    monkeypatch.setattr("jobs.hub.UPLOADS_AT_ONCE", 1)
    two = product(tmp_path / "m", "merged", {"a.safetensors": b"first" * 99, "b.safetensors": b"second" * 99, "config.json": b"{}"})
    line.plan(Fault("cut request", "PUT", "/lfs/", after=1, times=99))
    with pytest.raises(JobFailed) as failed:
        pushed(context(), [two])
    assert failed.value.failure.code == "upload_failed"
    assert "not sent again" in failed.value.failure.hint
    assert set(contents(hub)) == set()  # nothing is visible
    line.plan()
    pushed(context(), [two])
    assert len(hub.uploads()) == len(set(hub.uploads())) == 2
    assert contents(hub)["b.safetensors"] == b"second" * 99


def refusal_of(act: Callable[[], object]) -> tuple[str, str]:
    with pytest.raises(JobFailed) as failed:
        act()
    return failed.value.failure.code, f"{failed.value.failure.message} / {failed.value.failure.hint}"


@pytest.mark.parametrize(
    ("repo_id", "token", "told"),
    [
        ("grace/tuned", "hf_ada", "write access to grace/tuned"),
        ("ada/tuned", "hf_reader", "write access to ada/tuned"),
        ("ada/tuned", "hf_wrong", "401"),
        ("ada/tuned", None, "send hf_token"),
    ],
)
def test_a_token_that_may_not_write_is_refused_with_what_would_help(
    repo_id: str, token: str | None, told: str, hub: LoopbackHub, line: HttpFaults, context: Callable[..., JobContext], tmp_path: Path
) -> None:
    code, text = refusal_of(lambda: pushed(context(repo_id, token), [product(tmp_path / "a", "adapter", ADAPTER)]))
    assert code == "auth"
    assert told in text
    assert hub.repos == {}
    assert not [passed for passed in line.passed if "/lfs/" in passed.path]


def test_a_reader_s_token_on_a_repository_that_is_there_is_refused_before_anything_is_sent(
    hub: LoopbackHub, line: HttpFaults, context: Callable[..., JobContext], tmp_path: Path
) -> None:
    hub.add("ada/tuned", {})
    code, _ = refusal_of(lambda: pushed(context(token="hf_reader"), [product(tmp_path / "a", "adapter", ADAPTER)]))
    assert code == "auth"
    assert hub.uploads() == []


def test_a_full_account_fails_the_push_in_the_hub_s_words(
    hub: LoopbackHub, line: HttpFaults, context: Callable[..., JobContext], tmp_path: Path
) -> None:
    hub.quota_bytes = 10
    code, text = refusal_of(lambda: pushed(context(), [product(tmp_path / "a", "adapter", ADAPTER)]))
    assert code == "upload_failed"
    assert "storage limit reached" in text
    assert "free some storage" in text


def test_a_name_that_no_repository_can_have_is_the_config_s_fault(
    line: HttpFaults, context: Callable[..., JobContext], tmp_path: Path
) -> None:
    code, text = refusal_of(lambda: pushed(context("ada/bad--name"), [product(tmp_path / "a", "adapter", ADAPTER)]))
    assert code == "invalid_config"
    assert "ada/bad--name" in text


def test_the_token_stays_in_the_client(
    hub: LoopbackHub,
    line: HttpFaults,
    context: Callable[..., JobContext],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level("DEBUG")
    pushed(context(), [product(tmp_path / "a", "adapter", ADAPTER)])
    assert "hf_ada" not in caplog.text + "".join(capfd.readouterr()) + str(dict(os.environ))
    assert {passed.headers["authorization"] for passed in line.passed if "/api/" in passed.path} == {"Bearer hf_ada"}


def test_access_is_known_before_anything_is_computed_and_nothing_is_made(
    hub: LoopbackHub, line: HttpFaults, context: Callable[..., JobContext]
) -> None:
    hub.add("grace/hers", {})
    check_push(context("ada/new"))
    check_push(context("lab/new"))
    for repo_id, token, told in (
        ("grace/hers", "hf_ada", "grace/hers"),
        ("grace/new", "hf_ada", "ada does not write for grace"),
        ("ada/new", "hf_reader", "it may only read"),
        ("ada/new", "hf_wrong", "401"),
    ):
        code, text = refusal_of(lambda: check_push(context(repo_id, token)))  # noqa: B023  # called at once
        assert code == "auth"
        assert told in text
    assert set(hub.repos) == {"grace/hers"}


def test_a_hub_that_cannot_be_asked_now_does_not_stop_the_job(line: HttpFaults, context: Callable[..., JobContext]) -> None:
    line.plan(Fault("refuse", status=503, times=9))
    check_push(context())
    line.plan(Fault("reset", times=9))
    check_push(context())


def test_a_fine_grained_token_writes_where_its_scopes_say() -> None:
    def why(repo_id: str, **permissions: tuple[str, ...]) -> str:
        named = {name.replace("__", "/"): granted for name, granted in permissions.items()}
        return why_not_create(repo_id, Token("ada", "fineGrained", orgs={"lab": "read"}, permissions=named).whoami())

    assert why("ada/tuned", ada=("repo.write",)) == ""
    assert why("ada/tuned", ada__tuned=("repo.write",)) == ""
    assert "scopes" in why("ada/tuned", ada=("repo.content.read",))
    assert "does not write for lab" in why("lab/tuned", lab=("repo.write",))


def test_a_machine_that_is_told_to_stay_offline_does_not_wait_for_the_hub() -> None:
    from huggingface_hub.errors import OfflineModeIsEnabled

    assert not may_pass(OfflineModeIsEnabled("HF_HUB_OFFLINE=1"))
    assert may_pass(ConnectionResetError())
    assert not may_pass(PermissionError("no such luck"))

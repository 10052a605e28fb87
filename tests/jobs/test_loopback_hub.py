"""The loopback Hub answers the real client as the Hub does, rights and all."""

from hashlib import sha256
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from infra.loopback.http_faults import Fault, HttpFaults
from infra.loopback.hub import LoopbackHub, Token
from tests.jobs.hub_fixture import hub, line

__all__ = ["hub", "line"]
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own way with httpx
WEIGHTS = bytes(range(256)) * 40


def api(line: HttpFaults, token: str | bool = "hf_ada") -> HfApi:
    return HfApi(endpoint=line.url, token=token)


def refused(error: pytest.ExceptionInfo[HfHubHTTPError]) -> int:
    return error.value.response.status_code


def test_what_is_pushed_is_private_comes_back_and_keeps_its_history(hub: LoopbackHub, line: HttpFaults, tmp_path: Path) -> None:
    mine = api(line)
    mine.create_repo("ada/tuned", private=True)
    first = mine.create_commit(
        "ada/tuned", [CommitOperationAdd("model.safetensors", WEIGHTS), CommitOperationAdd("sub/config.json", b"{}")], commit_message="one"
    )
    second = mine.create_commit("ada/tuned", [CommitOperationDelete("sub/")], commit_message="two")
    assert [commit.title for commit in mine.list_repo_commits("ada/tuned")] == ["two", "one", "initial commit"]
    assert mine.model_info("ada/tuned").sha == second.oid == hub.repos["ada/tuned"].head.oid
    assert mine.model_info("ada/tuned").private
    assert hub.uploads() == [sha256(WEIGHTS).hexdigest()]

    at_first = snapshot_download(
        "ada/tuned", revision=first.oid, token="hf_ada", endpoint=line.url, cache_dir=tmp_path / "a", allow_patterns="*.safetensors"
    )
    assert Path(at_first, "model.safetensors").read_bytes() == WEIGHTS
    assert {asked.token for asked in hub.asked if asked.path.startswith("/lfs/")} == {None}  # a token is not for a file store
    tree = mine.list_repo_tree("ada/tuned", revision=first.oid, recursive=True)
    assert [entry.path for entry in tree] == ["sub", ".gitattributes", "model.safetensors", "sub/config.json"]
    with pytest.raises(RevisionNotFoundError):
        mine.model_info("ada/tuned", revision="0" * 40)
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("ada/tuned", "sub/config.json", token="hf_ada", endpoint=line.url, cache_dir=tmp_path / "b")


def test_the_same_files_again_are_no_new_commit_and_are_not_sent(hub: LoopbackHub, line: HttpFaults) -> None:
    api(line).create_repo("ada/tuned")
    oids = [
        api(line)
        .create_commit(
            "ada/tuned", [CommitOperationAdd("w.gguf", WEIGHTS), CommitOperationAdd("README.md", b"---\na: 1\n---\n")], commit_message="one"
        )
        .oid
        for _ in range(2)
    ]
    assert oids[0] == oids[1]
    assert len(hub.uploads()) == 1


def test_a_private_repository_is_not_there_for_others(hub: LoopbackHub, line: HttpFaults) -> None:
    hub.add("ada/private", {"config.json": b"{}"}, private=True)
    for token in (False, "hf_grace"):
        with pytest.raises(RepositoryNotFoundError):
            api(line, token).model_info("ada/private")
    with pytest.raises(HfHubHTTPError, match="Invalid") as error:
        api(line, "hf_unknown").model_info("ada/private")
    assert refused(error) == 401


def test_the_gate_lets_in_whom_the_owner_let_in(hub: LoopbackHub, line: HttpFaults, tmp_path: Path) -> None:
    hub.add("ada/gated", {"config.json": b"{}"}, gated=True, readers={"grace"})
    hub.tokens["hf_eve"] = Token("eve")
    hub.tokens["hf_narrow"] = Token("grace", "fineGrained")
    assert api(line, False).model_info("ada/gated").gated == "manual"  # that it is there is no secret
    for token, status in ((False, 401), ("hf_eve", 403), ("hf_narrow", 403)):
        with pytest.raises(GatedRepoError) as error:
            hf_hub_download("ada/gated", "config.json", token=token, endpoint=line.url, cache_dir=tmp_path / str(token))
        assert refused(error) == status
        with pytest.raises(GatedRepoError):
            api(line, token).auth_check("ada/gated")
    assert Path(hf_hub_download("ada/gated", "config.json", token="hf_grace", endpoint=line.url, cache_dir=tmp_path)).read_bytes() == b"{}"


def test_a_token_writes_where_its_role_lets_it(hub: LoopbackHub, line: HttpFaults) -> None:
    hub.add("ada/tuned", {})
    hub.tokens["hf_narrow"] = Token("ada", "fineGrained", permissions={"ada/tuned": ("repo.write",)})
    assert api(line, "hf_narrow").whoami()["auth"]["accessToken"]["fineGrained"]["scoped"][0]["entity"]["name"] == "ada/tuned"
    assert api(line, "hf_reader").whoami()["auth"]["accessToken"]["role"] == "read"
    api(line, "hf_narrow").auth_check("ada/tuned", write=True)
    api(line).create_repo("lab/shared")  # of an organisation that she writes for
    for token, name in (("hf_narrow", "ada/other"), ("hf_reader", "ada/other"), ("hf_ada", "grace/other")):
        with pytest.raises(HfHubHTTPError, match="rights to create") as error:
            api(line, token).create_repo(name)
        assert refused(error) == 403
    for token in ("hf_reader", "hf_grace"):
        with pytest.raises(HfHubHTTPError) as error:
            api(line, token).create_commit("ada/tuned", [CommitOperationAdd("a", b"a")], commit_message="one")
        assert refused(error) == 403


def test_a_commit_names_what_was_uploaded_and_builds_on_what_is_there(hub: LoopbackHub, line: HttpFaults) -> None:
    api(line).create_repo("ada/tuned")
    initial = hub.repos["ada/tuned"].head.oid
    api(line).create_commit("ada/tuned", [CommitOperationAdd("a", b"a")], commit_message="one", parent_commit=initial)
    with pytest.raises(HfHubHTTPError) as error:
        api(line).create_commit("ada/tuned", [CommitOperationAdd("a", b"b")], commit_message="two", parent_commit=initial)
    assert refused(error) == 412
    lost = CommitOperationAdd("w.gguf", WEIGHTS)
    api(line).preupload_lfs_files("ada/tuned", [lost], free_memory=False)
    hub._large.clear()
    with pytest.raises(BadRequestError, match="does not exist"):
        api(line).create_commit("ada/tuned", [lost], commit_message="three")
    with pytest.raises(EntryNotFoundError):
        api(line).create_commit("ada/tuned", [CommitOperationDelete("nothing")], commit_message="four")


def test_a_full_account_is_told_so(hub: LoopbackHub, line: HttpFaults) -> None:
    hub.quota_bytes = 100
    api(line).create_repo("ada/tuned", private=True)
    with pytest.raises(HfHubHTTPError, match="storage limit") as error:
        api(line).create_commit("ada/tuned", [CommitOperationAdd("w.gguf", WEIGHTS)], commit_message="one")
    assert refused(error) == 403


def test_a_repository_is_deleted_and_can_be_asked_for_a_range(hub: LoopbackHub, line: HttpFaults) -> None:
    import httpx2

    hub.add("ada/tuned", {"w.gguf": WEIGHTS, "config.json": b"0123456789"})
    small = httpx2.get(f"{line.url}/ada/tuned/resolve/main/config.json", headers={"Range": "bytes=3-5"})
    large = httpx2.get(f"{line.url}/ada/tuned/resolve/main/w.gguf", headers={"Range": "bytes=255-"}, follow_redirects=True)
    assert (small.status_code, small.content, small.headers["content-range"]) == (206, b"345", "bytes 3-5/10")
    assert large.content == WEIGHTS[255:]
    assert httpx2.get(f"{line.url}/ada/tuned/resolve/main/config.json", headers={"Range": "bytes=10-"}).status_code == 416
    api(line).delete_repo("ada/tuned")
    with pytest.raises(RepositoryNotFoundError):
        api(line).model_info("ada/tuned")


def test_an_upload_that_is_cut_off_is_sent_again(hub: LoopbackHub, line: HttpFaults) -> None:
    api(line).create_repo("ada/tuned")
    line.plan(Fault("cut request", "PUT", "/lfs/"), Fault("refuse", "POST", "/preupload/"))
    api(line).create_commit("ada/tuned", [CommitOperationAdd("w.gguf", WEIGHTS)], commit_message="one")
    assert hub.repos["ada/tuned"].files["w.gguf"].content == WEIGHTS
    assert len([passed for passed in line.passed if passed.method == "PUT"]) == 2

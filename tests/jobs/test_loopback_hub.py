"""The loopback Hub answers the real client as the real Hub does, including access rights."""

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

from infra.loopback.http_faults import Fault, HttpFaultProxy
from infra.loopback.hub import LoopbackHub, Token
from tests.jobs.hub_fixture import hub, hub_proxy

__all__ = ["hub", "hub_proxy"]
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # how the Hub client calls httpx
WEIGHTS = bytes(range(256)) * 40


def api(hub_proxy: HttpFaultProxy, token: str | bool = "hf_ada") -> HfApi:
    return HfApi(endpoint=hub_proxy.url, token=token)


def get_status_code(error: pytest.ExceptionInfo[HfHubHTTPError]) -> int:
    return error.value.response.status_code


def test_push_is_private_downloadable_and_has_history(hub: LoopbackHub, hub_proxy: HttpFaultProxy, tmp_path: Path) -> None:
    client = api(hub_proxy)
    client.create_repo("ada/tuned", private=True)
    first = client.create_commit(
        "ada/tuned", [CommitOperationAdd("model.safetensors", WEIGHTS), CommitOperationAdd("sub/config.json", b"{}")], commit_message="one"
    )
    second = client.create_commit("ada/tuned", [CommitOperationDelete("sub/")], commit_message="two")
    assert [commit.title for commit in client.list_repo_commits("ada/tuned")] == ["two", "one", "initial commit"]
    assert client.model_info("ada/tuned").sha == second.oid == hub.repos["ada/tuned"].head.oid
    assert client.model_info("ada/tuned").private
    assert hub.uploaded_digests() == [sha256(WEIGHTS).hexdigest()]

    at_first = snapshot_download(
        "ada/tuned", revision=first.oid, token="hf_ada", endpoint=hub_proxy.url, cache_dir=tmp_path / "a", allow_patterns="*.safetensors"
    )
    assert Path(at_first, "model.safetensors").read_bytes() == WEIGHTS
    assert {request.token for request in hub.requests if request.path.startswith("/lfs/")} == {None}  # file storage gets no token
    tree = client.list_repo_tree("ada/tuned", revision=first.oid, recursive=True)
    assert [entry.path for entry in tree] == ["sub", ".gitattributes", "model.safetensors", "sub/config.json"]
    with pytest.raises(RevisionNotFoundError):
        client.model_info("ada/tuned", revision="0" * 40)
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("ada/tuned", "sub/config.json", token="hf_ada", endpoint=hub_proxy.url, cache_dir=tmp_path / "b")


def test_pushing_same_files_creates_no_commit_or_upload(hub: LoopbackHub, hub_proxy: HttpFaultProxy) -> None:
    api(hub_proxy).create_repo("ada/tuned")
    oids = [
        api(hub_proxy)
        .create_commit(
            "ada/tuned", [CommitOperationAdd("w.gguf", WEIGHTS), CommitOperationAdd("README.md", b"---\na: 1\n---\n")], commit_message="one"
        )
        .oid
        for _ in range(2)
    ]
    assert oids[0] == oids[1]
    assert len(hub.uploaded_digests()) == 1


def test_private_repository_is_hidden_from_others(hub: LoopbackHub, hub_proxy: HttpFaultProxy) -> None:
    hub.add_repository("ada/private", {"config.json": b"{}"}, private=True)
    for token in (False, "hf_grace"):
        with pytest.raises(RepositoryNotFoundError):
            api(hub_proxy, token).model_info("ada/private")
    with pytest.raises(HfHubHTTPError, match="Invalid") as error:
        api(hub_proxy, "hf_unknown").model_info("ada/private")
    assert get_status_code(error) == 401


def test_gated_repository_allows_only_approved_readers(hub: LoopbackHub, hub_proxy: HttpFaultProxy, tmp_path: Path) -> None:
    hub.add_repository("ada/gated", {"config.json": b"{}"}, gated=True, readers={"grace"})
    hub.tokens["hf_eve"] = Token("eve")
    hub.tokens["hf_narrow"] = Token("grace", "fineGrained")
    assert api(hub_proxy, False).model_info("ada/gated").gated == "manual"  # its existence is public
    for token, status in ((False, 401), ("hf_eve", 403), ("hf_narrow", 403)):
        with pytest.raises(GatedRepoError) as error:
            hf_hub_download("ada/gated", "config.json", token=token, endpoint=hub_proxy.url, cache_dir=tmp_path / str(token))
        assert get_status_code(error) == status
        with pytest.raises(GatedRepoError):
            api(hub_proxy, token).auth_check("ada/gated")
    assert (
        Path(hf_hub_download("ada/gated", "config.json", token="hf_grace", endpoint=hub_proxy.url, cache_dir=tmp_path)).read_bytes()
        == b"{}"
    )


def test_token_role_limits_writes(hub: LoopbackHub, hub_proxy: HttpFaultProxy) -> None:
    hub.add_repository("ada/tuned", {})
    hub.tokens["hf_narrow"] = Token("ada", "fineGrained", permissions={"ada/tuned": ("repo.write",)})
    assert api(hub_proxy, "hf_narrow").whoami()["auth"]["accessToken"]["fineGrained"]["scoped"][0]["entity"]["name"] == "ada/tuned"
    assert api(hub_proxy, "hf_reader").whoami()["auth"]["accessToken"]["role"] == "read"
    api(hub_proxy, "hf_narrow").auth_check("ada/tuned", write=True)
    api(hub_proxy).create_repo("lab/shared")  # an organization that ada can write to
    for token, name in (("hf_narrow", "ada/other"), ("hf_reader", "ada/other"), ("hf_ada", "grace/other")):
        with pytest.raises(HfHubHTTPError, match="rights to create") as error:
            api(hub_proxy, token).create_repo(name)
        assert get_status_code(error) == 403
    for token in ("hf_reader", "hf_grace"):
        with pytest.raises(HfHubHTTPError) as error:
            api(hub_proxy, token).create_commit("ada/tuned", [CommitOperationAdd("a", b"a")], commit_message="one")
        assert get_status_code(error) == 403


def test_commit_requires_uploaded_files_and_current_parent(hub: LoopbackHub, hub_proxy: HttpFaultProxy) -> None:
    api(hub_proxy).create_repo("ada/tuned")
    initial = hub.repos["ada/tuned"].head.oid
    api(hub_proxy).create_commit("ada/tuned", [CommitOperationAdd("a", b"a")], commit_message="one", parent_commit=initial)
    with pytest.raises(HfHubHTTPError) as error:
        api(hub_proxy).create_commit("ada/tuned", [CommitOperationAdd("a", b"b")], commit_message="two", parent_commit=initial)
    assert get_status_code(error) == 412
    lost = CommitOperationAdd("w.gguf", WEIGHTS)
    api(hub_proxy).preupload_lfs_files("ada/tuned", [lost], free_memory=False)
    hub.lfs_objects.clear()
    with pytest.raises(BadRequestError, match="does not exist"):
        api(hub_proxy).create_commit("ada/tuned", [lost], commit_message="three")
    with pytest.raises(EntryNotFoundError):
        api(hub_proxy).create_commit("ada/tuned", [CommitOperationDelete("nothing")], commit_message="four")


def test_full_account_is_rejected(hub: LoopbackHub, hub_proxy: HttpFaultProxy) -> None:
    hub.quota_bytes = 100
    api(hub_proxy).create_repo("ada/tuned", private=True)
    with pytest.raises(HfHubHTTPError, match="storage limit") as error:
        api(hub_proxy).create_commit("ada/tuned", [CommitOperationAdd("w.gguf", WEIGHTS)], commit_message="one")
    assert get_status_code(error) == 403


def test_range_requests_and_repository_deletion(hub: LoopbackHub, hub_proxy: HttpFaultProxy) -> None:
    import httpx2

    hub.add_repository("ada/tuned", {"w.gguf": WEIGHTS, "config.json": b"0123456789"})
    small = httpx2.get(f"{hub_proxy.url}/ada/tuned/resolve/main/config.json", headers={"Range": "bytes=3-5"})
    large = httpx2.get(f"{hub_proxy.url}/ada/tuned/resolve/main/w.gguf", headers={"Range": "bytes=255-"}, follow_redirects=True)
    assert (small.status_code, small.content, small.headers["content-range"]) == (206, b"345", "bytes 3-5/10")
    assert large.content == WEIGHTS[255:]
    assert httpx2.get(f"{hub_proxy.url}/ada/tuned/resolve/main/config.json", headers={"Range": "bytes=10-"}).status_code == 416
    api(hub_proxy).delete_repo("ada/tuned")
    with pytest.raises(RepositoryNotFoundError):
        api(hub_proxy).model_info("ada/tuned")


def test_interrupted_upload_is_retried(hub: LoopbackHub, hub_proxy: HttpFaultProxy) -> None:
    api(hub_proxy).create_repo("ada/tuned")
    hub_proxy.set_faults(Fault("truncate request", "PUT", "/lfs/"), Fault("reject", "POST", "/preupload/"))
    api(hub_proxy).create_commit("ada/tuned", [CommitOperationAdd("w.gguf", WEIGHTS)], commit_message="one")
    assert hub.repos["ada/tuned"].files["w.gguf"].content == WEIGHTS
    assert len([request for request in hub_proxy.requests if request.method == "PUT"]) == 2

"""The Hub adapter with the real client against the loopback Hub: read and write access, and a Hub that does not respond."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest
from huggingface_hub import constants

from infra.loopback.hub import LoopbackHub, Token
from service.adapters.hub import COOLDOWN_S, HuggingFaceHub
from service.core.errors import InvalidRequest, Unavailable
from service.core.ports import Hub, HubAccount
from service.core.validation.hub import NoHub, check_hub, check_push_access
from storage.deadline import deadline
from storage.registry import open_store
from tests.factories import make_config
from tests.fakes import FakeClock

TOKENS = {
    "hf_ada": Token("ada", orgs={"lab": "write", "press": "read"}),
    "hf_ada_reads": Token("ada", role="read"),
    "hf_ada_fine": Token("ada", role="fineGrained", orgs={"lab": "admin"}, permissions={"lab": ("repo.write",)}),
    "hf_grace": Token("grace"),
}


@pytest.fixture(autouse=True)
def _hub_online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # CI sets the variable so that other tests stay offline


@pytest.fixture
def loopback() -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        hub.tokens.update(TOKENS)
        hub.add_repository("ada/tuned", {"README.md": b"mine"})
        hub.add_repository("ada/hidden", {"config.json": b"{}"}, private=True)
        hub.add_repository("google/gated", {"config.json": b"{}"}, gated=True, readers={"grace"})
        yield hub


@pytest.fixture
def hub(loopback: LoopbackHub) -> Iterator[HuggingFaceHub]:
    hub = HuggingFaceHub(loopback.url)
    yield hub
    hub.close()


@pytest.mark.parametrize(
    ("repo_id", "token", "access"),
    [
        ("ada/tuned", None, "yes"),
        ("ada/tuned", "hf_grace", "yes"),
        ("ada/hidden", None, "absent"),
        ("ada/hidden", "hf_grace", "absent"),
        ("ada/hidden", "hf_ada_reads", "yes"),
        ("google/gated", None, "gated"),
        ("google/gated", "hf_ada", "gated"),
        ("google/gated", "hf_grace", "yes"),
        ("nobody/nothing", "hf_ada", "absent"),
        ("ada/tuned", "hf_revoked", "bad_token"),
    ],
)
def test_read_access(hub: HuggingFaceHub, repo_id: str, token: str | None, access: str) -> None:
    assert hub.check_read_access(repo_id, token) == access


@pytest.mark.parametrize(
    ("repo_id", "token", "access"),
    [
        ("ada/tuned", "hf_ada", "yes"),
        ("ada/tuned", "hf_ada_reads", "refused"),
        ("ada/tuned", "hf_ada_fine", "refused"),
        ("ada/tuned", "hf_grace", "refused"),
        ("ada/new", "hf_ada", "absent"),
        ("ada/tuned", "hf_revoked", "bad_token"),
    ],
)
def test_write_access(hub: HuggingFaceHub, repo_id: str, token: str, access: str) -> None:
    assert hub.check_write_access(repo_id, token) == access


def test_token_account(hub: HuggingFaceHub) -> None:
    assert hub.get_account("hf_ada") == HubAccount("ada", "write", {"lab": "write", "press": "read"})
    assert hub.get_account("hf_ada_fine") == HubAccount("ada", "fineGrained", {"lab": "admin"}, frozenset({"lab"}))
    assert hub.get_account("hf_revoked") is None


@pytest.mark.parametrize("token", list(TOKENS))
@pytest.mark.parametrize("repo_id", ["ada/tuned", "ada/new", "lab/new", "press/new", "grace/new"])
def test_predicted_push_access_matches_hub(hub: HuggingFaceHub, loopback: LoopbackHub, token: str, repo_id: str) -> None:
    access = hub.check_write_access(repo_id, token)
    try:
        check_push_access(repo_id, access, hub.get_account(token))
        predicted = True
    except InvalidRequest:
        predicted = False
    assert predicted == loopback.tokens[token].can_write(repo_id)


def test_local_hf_token_is_never_used(hub: HuggingFaceHub, loopback: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_ada")
    assert hub.check_read_access("ada/hidden", None) == "absent"
    assert {request.token for request in loopback.requests} == {None}


def test_token_access_is_not_cached(hub: HuggingFaceHub, loopback: LoopbackHub) -> None:
    assert hub.check_write_access("ada/tuned", "hf_ada") == "yes"
    del loopback.tokens["hf_ada"]
    assert hub.check_write_access("ada/tuned", "hf_ada") == "bad_token"


def test_repository_commits_and_deletion(hub: HuggingFaceHub, loopback: LoopbackHub) -> None:
    commits = hub.list_commits("ada/tuned", "hf_ada")
    assert commits == [commit.oid for commit in loopback.repos["ada/tuned"].commits]
    assert hub.list_commits("ada/none", "hf_ada") is None
    with pytest.raises(InvalidRequest, match="may not change ada/tuned") as excinfo:
        hub.delete_repository("ada/tuned", "hf_grace")
    assert excinfo.value.param == "X-HF-Token"
    hub.delete_repository("ada/tuned", "hf_ada")
    assert "ada/tuned" not in loopback.repos
    hub.delete_repository("ada/tuned", "hf_ada")  # repeating is harmless


def test_request_check_makes_three_hub_calls(hub: HuggingFaceHub, loopback: LoopbackHub, tmp_path: object) -> None:
    models = open_store(f"file://{tmp_path}")
    config = make_config(base_model_id="google/gated", export_config={"destination": "hfhub", "hf_repo_id": "grace/new"})
    check_hub(config, "hf_grace", hub, models)
    assert [request.path for request in loopback.requests] == [
        "/api/models/google/gated/auth-check",
        "/api/models/grace/new/auth-check/write",
        "/api/whoami-v2",
    ]


# --- no response -----------------------------------------------------------------------------------------------------


@pytest.fixture
def unresponsive_hub_url() -> Iterator[str]:
    """A host that accepts connections and does not respond."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        connections: list[socket.socket] = []

        def accept_connections() -> None:
            while True:
                try:
                    connections.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept_connections, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        for connection in connections:
            connection.close()


def is_unknown(hub: Hub) -> bool:
    return (hub.check_read_access("a/b", None), hub.check_write_access("a/b", "t"), hub.get_account("t")) == ("unknown", "unknown", None)


def test_disabled_hub_reports_unknown() -> None:
    assert is_unknown(NoHub())


def test_unreachable_hub_is_unknown_and_not_retried_for_a_minute() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed_port = server.getsockname()[1]
    clock = FakeClock()
    hub = HuggingFaceHub(f"http://127.0.0.1:{closed_port}", monotonic=lambda: clock.now.timestamp())
    assert is_unknown(hub)
    with pytest.raises(Unavailable, match="a moment ago"):
        hub.list_commits("a/b", "t")
    clock.advance(COOLDOWN_S + 1)
    with pytest.raises(Unavailable, match="does not answer at"), deadline(0.3):  # the client itself would retry
        hub.list_commits("a/b", "t")
    hub.close()


def test_unresponsive_hub_respects_caller_deadline(unresponsive_hub_url: str) -> None:
    hub = HuggingFaceHub(unresponsive_hub_url)
    started_at_s = time.monotonic()
    with deadline(0.3):
        assert hub.check_read_access("a/b", None) == "unknown"
        assert hub.check_write_access("a/b", "t") == "unknown"
    assert time.monotonic() - started_at_s < 2
    hub.close()


def test_offline_mode_reports_unknown(hub: HuggingFaceHub, loopback: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert is_unknown(hub)
    assert loopback.requests == []

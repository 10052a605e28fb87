"""The Hub's adapter against the loopback Hub, by the real client: who may read, who may write, and what silence means."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest
from huggingface_hub import constants

from infra.loopback.hub import LoopbackHub, Token
from service.adapters.hub import AWAY_S, HuggingFaceHub
from service.core.errors import InvalidRequest, Unavailable
from service.core.hub import NoHub, check_hub, refuse_push
from service.core.ports import Hub, HubAccount
from storage import open_store
from storage.patience import patience
from tests.factories import FakeClock, a_config

TOKENS = {
    "hf_ada": Token("ada", orgs={"lab": "write", "press": "read"}),
    "hf_ada_reads": Token("ada", role="read"),
    "hf_ada_fine": Token("ada", role="fineGrained", orgs={"lab": "admin"}, permissions={"lab": ("repo.write",)}),
    "hf_grace": Token("grace"),
}


@pytest.fixture(autouse=True)
def _online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # CI sets the variable, for tests that must not reach out


@pytest.fixture
def loopback() -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        hub.tokens.update(TOKENS)
        hub.add("ada/tuned", {"README.md": b"mine"})
        hub.add("ada/hidden", {"config.json": b"{}"}, private=True)
        hub.add("google/gated", {"config.json": b"{}"}, gated=True, readers={"grace"})
        yield hub


@pytest.fixture
def hub(loopback: LoopbackHub) -> Iterator[HuggingFaceHub]:
    made = HuggingFaceHub(loopback.url)
    yield made
    made.close()


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
def test_who_may_read(hub: HuggingFaceHub, repo_id: str, token: str | None, access: str) -> None:
    assert hub.read_access(repo_id, token) == access


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
def test_who_may_write(hub: HuggingFaceHub, repo_id: str, token: str, access: str) -> None:
    assert hub.write_access(repo_id, token) == access


def test_whose_token_it_is(hub: HuggingFaceHub) -> None:
    assert hub.account("hf_ada") == HubAccount("ada", "write", {"lab": "write", "press": "read"})
    assert hub.account("hf_ada_fine") == HubAccount("ada", "fineGrained", {"lab": "admin"}, frozenset({"lab"}))
    assert hub.account("hf_revoked") is None


@pytest.mark.parametrize("token", list(TOKENS))
@pytest.mark.parametrize("repo_id", ["ada/tuned", "ada/new", "lab/new", "press/new", "grace/new"])
def test_what_is_foretold_is_what_the_hub_does(hub: HuggingFaceHub, loopback: LoopbackHub, token: str, repo_id: str) -> None:
    access = hub.write_access(repo_id, token)
    try:
        refuse_push(repo_id, access, hub.account(token))
        foretold = True
    except InvalidRequest:
        foretold = False
    assert foretold == loopback.tokens[token].may_write(repo_id)


def test_no_token_of_this_machine_is_ever_used(hub: HuggingFaceHub, loopback: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_ada")
    assert hub.read_access("ada/hidden", None) == "absent"
    assert {asked.token for asked in loopback.asked} == {None}


def test_nothing_is_remembered_of_a_token(hub: HuggingFaceHub, loopback: LoopbackHub) -> None:
    assert hub.write_access("ada/tuned", "hf_ada") == "yes"
    del loopback.tokens["hf_ada"]
    assert hub.write_access("ada/tuned", "hf_ada") == "bad_token"


def test_a_repository_is_listed_and_deleted(hub: HuggingFaceHub, loopback: LoopbackHub) -> None:
    commits = hub.commits("ada/tuned", "hf_ada")
    assert commits == [commit.oid for commit in loopback.repos["ada/tuned"].commits]
    assert hub.commits("ada/none", "hf_ada") is None
    with pytest.raises(InvalidRequest, match="may not change ada/tuned") as refused:
        hub.delete_repository("ada/tuned", "hf_grace")
    assert refused.value.param == "X-HF-Token"
    hub.delete_repository("ada/tuned", "hf_ada")
    assert "ada/tuned" not in loopback.repos
    hub.delete_repository("ada/tuned", "hf_ada")  # a repeat is harmless


def test_a_request_is_checked_with_few_questions(hub: HuggingFaceHub, loopback: LoopbackHub, tmp_path: object) -> None:
    models = open_store(f"file://{tmp_path}")
    config = a_config(base_model_id="google/gated", export_config={"destination": "hfhub", "hf_repo_id": "grace/new"})
    check_hub(config, "hf_grace", hub, models)
    assert [asked.path for asked in loopback.asked] == [
        "/api/models/google/gated/auth-check",
        "/api/models/grace/new/auth-check/write",
        "/api/whoami-v2",
    ]


# --- silence ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def silent() -> Iterator[str]:
    """A host that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held: list[socket.socket] = []

        def take() -> None:
            while True:
                try:
                    held.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=take, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        for connection in held:
            connection.close()


def knows_nothing(hub: Hub) -> bool:
    return (hub.read_access("a/b", None), hub.write_access("a/b", "t"), hub.account("t")) == ("unknown", "unknown", None)


def test_a_deployment_without_the_hub_knows_nothing() -> None:
    assert knows_nothing(NoHub())


def test_a_hub_that_is_not_there_is_unknown_and_left_alone_for_a_minute() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    clock = FakeClock()
    hub = HuggingFaceHub(f"http://127.0.0.1:{closed}", monotonic=lambda: clock.now.timestamp())
    assert knows_nothing(hub)
    with pytest.raises(Unavailable, match="a moment ago"):
        hub.commits("a/b", "t")
    clock.advance(AWAY_S + 1)
    with pytest.raises(Unavailable, match="does not answer at"), patience(0.3):  # the client itself would try again
        hub.commits("a/b", "t")
    hub.close()


def test_a_hub_that_says_nothing_takes_no_more_than_the_callers_patience(silent: str) -> None:
    hub = HuggingFaceHub(silent)
    began = time.monotonic()
    with patience(0.3):
        assert hub.read_access("a/b", None) == "unknown"
        assert hub.write_access("a/b", "t") == "unknown"
    assert time.monotonic() - began < 2
    hub.close()


def test_offline_is_unknown(hub: HuggingFaceHub, loopback: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert knows_nothing(hub)
    assert loopback.asked == []

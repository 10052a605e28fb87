"""Rate limits: headers, refusals, and which callers share a limit."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from service.api.rate_limits import RateLimiter, kind_of
from service.core.errors import TooManyRequests
from service.core.principals import LOCAL_PRINCIPAL, Principal, Scope, attempt_principal
from service.core.rate_limits import DEFAULT_RATE_LIMITS, parse_rate_limits
from service.settings import Settings
from tests.local_token import local_headers
from tests.unit.api_harness import ROWS, get_error, run_test_service, upload

ALICE = Principal("team-a", "alice", frozenset({Scope.JOBS_READ, Scope.JOBS_WRITE}))


def make_limiter(rates: str = "read=3/hour,write=1/hour,upload=1/hour,failed_auth=2/hour") -> RateLimiter:
    return RateLimiter(parse_rate_limits(rates))


@pytest.fixture
def limited_client(tmp_path: Path) -> Iterator[TestClient]:
    """A service with low limits, called with an API key."""
    with run_test_service(tmp_path / "home", rate_limits="read=3/hour,write=2/hour,upload=1/hour,failed_auth=2/hour") as client:
        key = client.post("/keys", json={"name": "ci"}).json()["key"]
        client.headers["Authorization"] = f"Bearer {key}"
        yield client


def test_responses_show_the_state_of_the_limit(limited_client: TestClient) -> None:
    for remaining in (2, 1, 0):
        headers = limited_client.get("/jobs").headers
        assert (headers["RateLimit-Limit"], headers["RateLimit-Remaining"]) == ("3", str(remaining))
        assert 3500 < int(headers["RateLimit-Reset"]) <= 3600


def test_request_beyond_the_limit_gets_429_in_the_shape_of_errors(limited_client: TestClient) -> None:
    for _ in range(3):
        limited_client.get("/jobs")
    response = limited_client.get("/jobs")
    error = get_error(response, 429)
    assert error["code"] == "too_many_requests"
    assert error["message"].startswith("too many read requests of ")
    assert error["message"].endswith(": at most 3 in 3600 seconds")
    assert response.headers["Retry-After"] == response.headers["RateLimit-Reset"]
    assert response.headers["RateLimit-Remaining"] == "0"
    assert 3500 < int(response.headers["Retry-After"]) <= 3600
    assert limited_client.post("/jobs/unknown/pause").status_code == 404  # another kind of request has its own limit


def test_refused_request_writes_no_entry_of_the_audit_log(limited_client: TestClient, tmp_path: Path) -> None:
    assert [upload(limited_client, ROWS).status_code for _ in range(3)] == [201, 429, 429]
    entries = limited_client.get("/audit", headers=local_headers(tmp_path / "home")).json()["entries"]
    assert [entry["status"] for entry in entries if entry["action"] == "upload_dataset"] == [201]


def test_too_many_failed_authentications_are_answered_with_429(tmp_path: Path) -> None:
    with run_test_service(tmp_path / "home", rate_limits="failed_auth=2/hour") as client:
        remote = TestClient(client.app, raise_server_exceptions=False, client=("192.0.2.7", 50000), base_url=client.base_url)
        strange = {"Authorization": "Bearer tsk_unknown"}
        assert [remote.get("/jobs", headers=strange).status_code for _ in range(4)] == [401, 401, 429, 429]
        assert remote.get("/jobs", headers=dict(client.headers)).status_code == 200  # a valid caller behind the same address
        assert [client.get("/jobs", headers=strange).status_code for _ in range(4)] == [401] * 4  # from no remote address


def test_refused_requests_do_not_prolong_the_wait() -> None:
    limiter = RateLimiter(parse_rate_limits("read=1/second"))
    limiter.check(ALICE, "read")
    waits: list[int] = []
    for _ in range(50):
        with pytest.raises(TooManyRequests) as excinfo:
            limiter.check(ALICE, "read")
        waits.append(int(excinfo.value.headers["Retry-After"]))
    assert set(waits) == {1}


def test_each_subject_of_each_tenant_has_its_own_limit() -> None:
    limiter = make_limiter()
    for principal in (ALICE, replace(ALICE, subject="bob"), replace(ALICE, tenant_id="team-b")):
        limiter.check(principal, "write")
        with pytest.raises(TooManyRequests):
            limiter.check(principal, "write")


def test_names_that_contain_separators_share_no_limit() -> None:
    limiter = make_limiter()
    limiter.check(replace(ALICE, tenant_id="a/b", subject="c"), "write")
    limiter.check(replace(ALICE, tenant_id="a", subject="b/c"), "write")


def test_local_caller_and_attempts_have_no_limits() -> None:
    limiter = make_limiter()
    for principal in (LOCAL_PRINCIPAL, replace(LOCAL_PRINCIPAL, scopes=frozenset({Scope.JOBS_READ})), attempt_principal("job", 1)):
        for _ in range(10):
            assert limiter.check(principal, "write") == {}


def test_kind_that_is_left_out_has_no_limit() -> None:
    limiter = make_limiter("write=1/minute")
    for _ in range(10):
        assert limiter.check(ALICE, "read") == {}


@pytest.mark.parametrize(
    ("first", "second", "is_shared"),
    [
        ("192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("2001:db8:1:2::1", "2001:db8:1:2:ffff::9", True),  # one customer's network
        ("2001:db8:1:2::1", "2001:db8:1:3::1", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
    ],
)
def test_failed_authentications_are_limited_by_network(first: str, second: str, is_shared: bool) -> None:
    limiter = make_limiter()
    for _ in range(2):
        limiter.count_failed_authentication(first)
    with pytest.raises(TooManyRequests, match="failed authentications from this address"):
        limiter.count_failed_authentication(first)
    if is_shared:
        with pytest.raises(TooManyRequests):
            limiter.count_failed_authentication(second)
    else:
        limiter.count_failed_authentication(second)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "::ffff:127.0.0.1", "a-unix-socket", ""])
def test_failed_authentications_of_this_machine_have_no_limit(address: str) -> None:
    limiter = make_limiter()
    for _ in range(9):
        limiter.count_failed_authentication(address)


def test_kind_of_request_follows_from_method_and_route() -> None:
    assert [kind_of(method, is_upload=True) for method in ("GET", "HEAD", "POST")] == ["read", "read", "upload"]
    assert [kind_of(method, is_upload=False) for method in ("POST", "DELETE")] == ["write", "write"]


@pytest.mark.parametrize(
    "text", ["", "read", "read=fast", "reads=1/minute", "read=1/minute,read=2/minute", "read=0.5/minute", "read=-1/minute"]
)
def test_invalid_setting_is_refused_at_start(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_RATE_LIMITS", text)
    with pytest.raises(ValueError, match="rate_limits"):
        Settings()  # type: ignore[call-arg]


def test_none_means_no_limits_and_the_default_limits_every_kind() -> None:
    assert parse_rate_limits("none") == {}
    assert set(parse_rate_limits(DEFAULT_RATE_LIMITS)) == {"read", "write", "upload", "failed_auth"}

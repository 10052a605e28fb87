"""Who gets in: tokens, keys, identities and tenants over HTTP, and the audit log of what they did."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import APIRoute
from starlette.testclient import TestClient
from starlette.types import Message

from service.api.route import LimitedRoute
from service.main import ROUTERS
from tests.unit.api_harness import ROWS, get_error, get_services, make_request_body, run_test_service, submit_job, upload
from tests.unit.oidc_issuer import AUDIENCE, OidcIssuer, serve_issuer

PUBLIC_ROUTES = {
    *(("GET", path) for path in ("/", "/docs", "/health", "/files/{token}", "/login")),
    ("POST", "/logout"),
    ("PUT", "/datasets/uploads/{token}"),  # the token is what admits
}


def make_headers(client: TestClient, *scopes: str, **changes: Any) -> dict[str, str]:
    """The header of a new API key."""
    answer = client.post("/keys", json={"name": "test", "scopes": scopes, **changes})
    assert answer.status_code == 201, answer.text
    return {"Authorization": f"Bearer {answer.json()['key']}"}


@pytest.fixture
def anonymous(client: TestClient) -> Iterator[TestClient]:
    """The same service, with a client that has no token."""
    headers = client.headers.copy()
    del client.headers["Authorization"]
    yield client
    client.headers = headers


# --- without an identity ---------------------------------------------------------------------------------------------


def iter_routes() -> Iterator[tuple[str, str]]:
    for router in ROUTERS:
        for route in router.routes:
            assert isinstance(route, APIRoute)
            assert isinstance(route, LimitedRoute) or route.path == "/docs"
            yield from ((method, route.path_format) for method in route.methods)


def test_every_other_route_needs_an_identity(anonymous: TestClient) -> None:
    wrong: tuple[dict[str, str], ...] = (
        {},
        {"Authorization": "Bearer tsk_" + "a" * 43},
        {"Authorization": "Basic YTpi"},
        {"X-Goog-Authenticated-User-Email": "a"},
    )
    for method, path in sorted(set(iter_routes()) - PUBLIC_ROUTES):
        url = path.replace(":path}", "}").format(job_id="j", attempt=1, step=1, processed_dataset_id="d", key_id="k", name="m")
        for headers in wrong:
            answer = anonymous.request(method, url, headers=headers)
            assert get_error(answer, 401)["code"] == "unauthorized", f"{method} {path}"
            assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_public_routes_need_none(anonymous: TestClient) -> None:
    assert anonymous.get("/health").status_code == 200
    assert anonymous.get("/").status_code == 200
    assert get_error(anonymous.get("/files/no-token"), 401)["code"] == "unauthorized"


@pytest.mark.parametrize("path", ["/train", "/datasets", "/internal/jobs/j/attempts/1/events"])
def test_body_is_not_read_before_the_caller_is_known(client: TestClient, path: str) -> None:
    sent: list[Message] = []

    async def receive() -> Message:
        raise AssertionError("the body was read")

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"host", b"testserver"), (b"content-type", b"application/json"), (b"content-length", b"1000")]
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"", "headers": headers}
    scope |= {"http_version": "1.1", "scheme": "http", "server": ("testserver", 80), "client": ("testclient", 1), "root_path": ""}
    assert client.portal is not None
    client.portal.call(client.app, scope, receive, send)
    assert sent[0]["status"] == 401


@pytest.mark.parametrize("header", ["X-User-Id", "X-Forwarded-User", "X-Apigateway-Api-Userinfo", "X-Goog-Iap-Jwt-Assertion", "Cookie"])
def test_unsigned_headers_are_not_believed(anonymous: TestClient, header: str) -> None:
    token = "eyJhbGciOiJub25lIn0.eyJzdWIiOiJhZGEiLCJlbWFpbCI6ImFkYUBleGFtcGxlLmNvbSJ9."
    for value in ("local", token, f"session={token}"):
        assert anonymous.get("/jobs", headers={header: value}).status_code == 401
        assert anonymous.get("/jobs", headers={header: value, "Authorization": f"Bearer {token}"}).status_code == 401
        assert anonymous.get("/jobs", headers={"X-Serverless-Authorization": f"Bearer {token}"}).status_code == 401


def test_two_authorization_headers_are_refused(client: TestClient) -> None:
    token = client.headers["Authorization"]
    answer = client.get("/jobs", headers=[("Authorization", token), ("Authorization", token)])
    assert answer.status_code == 401


def test_token_of_the_home_folder_is_its_owners_only(tmp_path: Path) -> None:
    with run_test_service(tmp_path) as client:
        assert client.get("/whoami").json()["subject"] == "local"
    assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600
    first = (tmp_path / "token").read_text()
    with run_test_service(tmp_path):
        assert (tmp_path / "token").read_text() == first


# --- API keys --------------------------------------------------------------------------------------------------------


def test_key_is_shown_once(client: TestClient) -> None:
    created = client.post("/keys", json={"name": "ci", "scopes": ["read"], "expires_in_days": 7}).json()
    assert created["key"].startswith("tsk_")
    assert created["expires_at"] > (datetime.now(UTC) + timedelta(days=6)).isoformat()
    listed = client.get("/keys")
    [row] = [row for row in listed.json()["keys"] if row["key_id"] == created["key_id"]]
    assert row == {name: value for name, value in created.items() if name != "key"}
    assert "digest" not in listed.text
    assert created["key"] not in listed.text


def test_key_opens_what_its_scope_allows(client: TestClient) -> None:
    dataset_id = upload(client, ROWS).json()["processed_dataset_id"]
    read, submit, admin = (make_headers(client, scope) for scope in ("read", "submit", "admin"))
    assert [client.get("/jobs", headers=headers).status_code for headers in (read, submit, admin)] == [200] * 3
    body = make_request_body(dataset_id)
    assert [client.post("/train", json=body, headers=headers).status_code for headers in (read, submit, admin)] == [403, 201, 201]
    assert [client.get("/keys", headers=headers).status_code for headers in (read, submit, admin)] == [403, 403, 200]
    assert [client.get("/audit", headers=headers).status_code for headers in (read, submit, admin)] == [403, 403, 200]
    for headers in (read, submit, admin):
        assert client.post("/internal/reconcile", headers=headers).status_code == 403
        assert client.get("/internal/orphans", headers=headers).status_code == 403
        assert client.get("/audit?all_tenants=true", headers=headers).status_code == 403


def test_revoked_and_expired_keys_open_nothing(client: TestClient) -> None:
    created = client.post("/keys", json={"name": "ci", "scopes": ["read"]}).json()
    headers = {"Authorization": f"Bearer {created['key']}"}
    assert client.get("/jobs", headers=headers).status_code == 200
    assert client.delete(f"/keys/{created['key_id']}").json()["revoked_at"] is not None
    assert client.get("/jobs", headers=headers).status_code == 401
    assert client.delete("/keys/key_none").status_code == 404


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"scopes": ["read"]}, "name"),
        ({"name": "a", "scopes": []}, "scopes"),
        ({"name": "a", "scopes": ["root"]}, "scopes.0"),
        ({"name": "a", "scopes": ["operator"]}, "scopes.0"),
        ({"name": "a", "expires_in_days": 0}, "expires_in_days"),
        ({"name": "a", "expires_in_days": 100_000}, "expires_in_days"),
        ({"name": "a", "tenant_id": "../b"}, "tenant_id"),
        ({"name": "a", "key": "tsk_mine"}, "key"),
    ],
    ids=str,
)
def test_wrong_key_request_names_its_field(client: TestClient, body: dict[str, Any], param: str) -> None:
    assert get_error(client.post("/keys", json=body), 422)["param"] == param


# --- tenants ---------------------------------------------------------------------------------------------------------


def test_another_tenant_sees_and_changes_nothing(client: TestClient) -> None:
    dataset_id = upload(client, ROWS).json()["processed_dataset_id"]
    job_id = submit_job(client, dataset_id)
    other = make_headers(client, "admin", tenant_id="other")
    assert client.get("/whoami", headers=other).json()["tenant_id"] == "other"
    assert client.get("/jobs", headers=other).json()["jobs"] == []
    assert client.get("/datasets", headers=other).json()["datasets"] == []
    assert client.get("/keys", headers=other).json()["keys"][0]["tenant_id"] == "other"
    for method, path in (
        *(("GET", f"/jobs/{job_id}{rest}") for rest in ("", "/events", "/logs", "/metrics", "/checkpoints")),
        *(("POST", f"/jobs/{job_id}/{verb}") for verb in ("cancel", "pause", "resume", "retry", "clone", "export", "checkpoints/1/export")),
        ("GET", f"/jobs/download/{job_id}"),
        ("DELETE", f"/jobs/{job_id}"),
        ("GET", f"/datasets/{dataset_id}"),
        ("DELETE", f"/datasets/{dataset_id}"),
    ):
        answer = client.request(method, path, headers=other)
        missing = client.request(method, path.replace(job_id, "training_none").replace(dataset_id, "dataset_none"), headers=other)
        assert get_error(answer, 404)["code"] == "not_found", f"{method} {path}"
        # The answer is that of something that does not exist.
        assert answer.text.replace(job_id, "training_none").replace(dataset_id, "dataset_none") == missing.text
    assert get_error(client.post("/train", json=make_request_body(dataset_id), headers=other), 404)["param"] == "processed_dataset_id"
    assert client.get(f"/jobs/{job_id}").json()["status"] == "queued"


def test_idempotency_keys_of_tenants_are_apart(client: TestClient) -> None:
    other = make_headers(client, "submit", tenant_id="other")
    jobs = set()
    for headers in ({}, other):
        dataset_id = client.post("/datasets", files={"file": ("r", ROWS)}, headers=headers).json()["processed_dataset_id"]
        answer = client.post("/train", json=make_request_body(dataset_id), headers=headers | {"Idempotency-Key": "same"})
        jobs.add(answer.json()["job_id"])
    assert len(jobs) == 2


def test_incoming_files_of_tenants_are_apart(tmp_path: Path) -> None:
    with run_test_service(tmp_path, identity="{}") as client:
        other = make_headers(client, "submit", tenant_id="other")
        store = get_services(client).buckets.datasets
        for key in ("incoming/rows.jsonl", "incoming/local/rows.jsonl", "incoming/other/rows.jsonl"):
            store.write(key, ROWS.encode())

        def import_rows(key: str, headers: dict[str, str]) -> int:
            return client.post("/datasets", data={"incoming": key}, headers=headers).status_code

        assert import_rows("incoming/other/rows.jsonl", other) == 201
        for key in ("incoming/rows.jsonl", "incoming/local/rows.jsonl", "incoming/other/../local/rows.jsonl", "incoming/other"):
            assert import_rows(key, other) == 400, key
        assert import_rows("incoming/rows.jsonl", {}) == import_rows("incoming/local/rows.jsonl", {}) == 201
        assert import_rows("incoming/other/rows.jsonl", {}) == 400


# --- identities ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def issuer() -> Iterator[OidcIssuer]:
    with serve_issuer() as issuer:
        yield issuer


def test_identity_token_of_a_trusted_issuer(tmp_path: Path, issuer: OidcIssuer) -> None:
    rules = {
        "issuers": [{"issuer": issuer.url, "audience": [AUDIENCE]}],
        "rules": [{"email": "*@example.com", "tenant": "research", "role": "submit"}, {"subject": "cron", "role": "scheduler"}],
    }
    with run_test_service(tmp_path, identity=json.dumps(rules)) as client:
        now = datetime.now(UTC)

        def call(method: str, path: str, **claims: Any) -> Any:
            return client.request(method, path, headers={"Authorization": f"Bearer {issuer.sign(now, **claims)}"})

        assert call("GET", "/whoami").json() == {
            "tenant_id": "research",
            "subject": "ada@example.com",
            "scopes": ["datasets:read", "datasets:write", "jobs:read", "jobs:write"],
        }
        assert get_error(call("GET", "/whoami", email="eve@evil.org"), 403)["code"] == "forbidden"
        assert get_error(call("GET", "/whoami", aud="https://elsewhere"), 401)["code"] == "unauthorized"
        assert call("POST", "/internal/reconcile", email=None, sub="cron").status_code == 200
        assert call("GET", "/jobs", email=None, sub="cron").status_code == 403


@pytest.mark.parametrize(
    ("identity", "reason"),
    [("{", "JSON"), ('{"cloud_run": true}', "not Cloud Run"), ("/none/rules.json", "cannot be read"), ('{"rule": []}', "rule")],
)
def test_invalid_rule_file_stops_the_start(tmp_path: Path, identity: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason), run_test_service(tmp_path, identity=identity):
        pytest.fail("started")


# --- the audit log ---------------------------------------------------------------------------------------------------


def list_audit(client: TestClient, **query: str) -> list[dict[str, Any]]:
    return client.get("/audit", params=query).json()["entries"]


def test_changes_are_in_the_audit_log(client: TestClient) -> None:
    dataset_id = upload(client, ROWS).json()["processed_dataset_id"]
    job_id = submit_job(client, dataset_id)
    read = make_headers(client, "read")
    key_id = client.get("/whoami", headers=read).json()["subject"]
    client.post(f"/jobs/{job_id}/cancel", headers=read)
    client.post("/train", json={})
    client.get(f"/jobs/download/{job_id}")
    client.get("/jobs")
    found = [(row["subject"], row["action"], row["resource"], row["outcome"], row["status"], row["code"]) for row in list_audit(client)]
    assert found == [
        ("local", "get_download_links", job_id, "refused", 409, "conflict"),
        ("local", "create_training_job", None, "refused", 422, "malformed"),
        (key_id, "cancel_job", job_id, "refused", 403, "forbidden"),
        ("local", "create_key", key_id.removeprefix("key:"), "ok", 201, None),
        ("local", "create_training_job", job_id, "ok", 201, None),
        ("local", "upload_dataset", dataset_id, "ok", 201, None),
    ]
    assert {row["address"] for row in list_audit(client)} == {"testclient"}
    client.post("/train", json={}, headers={"X-Request-ID": "mine-1"})
    assert list_audit(client)[0]["request_id"] == "mine-1"
    assert [row["action"] for row in list_audit(client, subject=key_id)] == ["cancel_job"]
    assert len(list_audit(client, action="create_training_job", limit="1")) == 1


def test_audit_log_is_per_tenant_and_cannot_be_changed(client: TestClient) -> None:
    other = make_headers(client, "admin", tenant_id="other")
    client.post("/keys", json={"name": "theirs", "scopes": ["read"]}, headers=other)
    assert [row["tenant_id"] for row in client.get("/audit", headers=other).json()["entries"]] == ["other"]
    assert {row["tenant_id"] for row in list_audit(client)} == {"local"}
    assert {row["tenant_id"] for row in list_audit(client, all_tenants="true")} == {"local", "other"}
    for method in ("POST", "PUT", "PATCH", "DELETE"):
        assert client.request(method, "/audit").status_code == 405

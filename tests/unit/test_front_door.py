"""What every request passes before an endpoint: hosts, origins, headers, request ids and the access log."""

import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from service.api.middleware.request_context import RequestContextMiddleware
from service.core.principals import LOCAL_PRINCIPAL
from service.logs import _add_trace
from service.tracing import RequestTrace, current_traceparent, read_trace, tracing
from tests.unit.api_harness import ROWS, get_error, get_services, run_test_service, upload

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
EVIL = "https://evil.test"
BROWSER_PAGE = {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A service behind a proxy that is not trusted. Nothing here changes it."""
    settings: dict[str, Any] = {
        "public_url": "https://tune.example.com",
        "allowed_hosts": ("inside.example.com",),
        "allowed_origins": ("https://dashboard.example.com",),
        "reconcile_interval_s": 0,
    }
    with run_test_service(tmp_path_factory.mktemp("home"), **settings) as client:
        yield client


# --- hosts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "127.0.0.1:8080", "localhost", "LOCALHOST:1", "[::1]:8080"),
        *("tune.example.com", "tune.example.com:443", "inside.example.com:8080", "testserver"),  # the last: where the connection arrived
    ],
)
def test_own_host_is_answered(client: TestClient, host: str) -> None:
    assert client.get("/jobs", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        *("evil.test", "evil.test:8080", "127.0.0.1.evil.test", "localhost.evil.test", "tune.example.com.evil.test", "xtune.example.com"),
        *("user@127.0.0.1", "127.0.0.1:99999", "127.0.0.1/", "[::1", "127.0.0.1:80:80", "10.0.0.1", "", " ", "127.0.0.1, evil.test"),
    ],
)
def test_foreign_host_is_refused(client: TestClient, host: str) -> None:
    assert get_error(client.get("/jobs", headers={"Host": host}), 421)["code"] == "unknown_host"


def test_names_below_an_allowed_one_are_answered(tmp_path: Path) -> None:
    with run_test_service(tmp_path, allowed_hosts=("*.a.run.app",)) as client:
        for host, status in (("tunesmith-abc-ew.a.run.app", 200), ("a.run.app", 421), ("xa.run.app", 421), ("a.run.app.evil.test", 421)):
            assert client.get("/jobs", headers={"Host": host}).status_code == status, host


def test_probe_of_a_platform_may_name_any_address(client: TestClient) -> None:
    assert client.get("/docs", headers={"Host": "10.1.2.3:8080"}).status_code == 200
    assert client.post("/docs", headers={"Host": "10.1.2.3:8080"}).status_code == 421
    assert client.get("/docs", headers={"Host": "evil.test:8080"}).status_code == 421


def test_two_hosts_are_refused(client: TestClient) -> None:
    assert client.get("/jobs", headers=[("Host", "127.0.0.1"), ("Host", "evil.test")]).status_code == 421


# --- origins ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": EVIL},
        {"Origin": "null"},
        {"Origin": "http://testserver.evil.test"},
        {"Origin": "http://testserver:81"},
        {"Origin": "https://testserver"},  # another scheme is another origin
        {"Origin": "http://tune.example.com"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": EVIL, "Sec-Fetch-Site": "same-origin"},
        {"Origin": EVIL, **BROWSER_PAGE},
    ],
)
@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/jobs"), ("POST", "/train"), ("POST", "/datasets"), ("DELETE", "/jobs/x"), ("OPTIONS", "/jobs"), ("GET", "/health")],
)
def test_foreign_page_is_refused(client: TestClient, method: str, path: str, headers: dict[str, str]) -> None:
    response = client.request(method, path, headers=headers)
    assert get_error(response, 403)["code"] == "foreign_origin"
    assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Origin": "http://testserver", "Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "none"},
        {"Origin": "https://tune.example.com"},
        {"Origin": "https://dashboard.example.com", "Sec-Fetch-Site": "cross-site"},
    ],
)
def test_own_page_and_program_are_answered(client: TestClient, headers: dict[str, str]) -> None:
    assert client.get("/jobs", headers=headers).status_code == 200
    assert client.post("/train", json={}, headers=headers).status_code == 422


def test_link_on_another_website_opens_only_harmless_pages(client: TestClient) -> None:
    link = {"Sec-Fetch-Site": "cross-site", **BROWSER_PAGE}
    assert client.get("/docs", headers=link).status_code == 200
    assert client.get("/files/x", headers=link).status_code == 401  # a signed link; this one is not
    assert client.get("/jobs", headers=link).status_code == 403
    assert client.get("/docs", headers=link | {"Sec-Fetch-Dest": "iframe"}).status_code == 403
    assert client.post("/docs", headers=link).status_code == 403


def test_only_allowed_origins_get_cors_headers(client: TestClient) -> None:
    preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    allowed = client.options("/train", headers=preflight | {"Origin": "https://dashboard.example.com"})
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://dashboard.example.com"
    assert "access-control-allow-credentials" not in allowed.headers
    assert client.options("/train", headers=preflight | {"Origin": EVIL}).status_code == 403


def test_cors_is_closed_by_default(readonly_client: TestClient) -> None:
    response = readonly_client.get("/jobs", headers={"Origin": "http://testserver"})
    assert response.status_code == 200
    assert not [name for name in response.headers if name.startswith("access-control")]


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", None])
def test_json_of_another_type_is_refused(readonly_client: TestClient, content_type: str | None) -> None:
    """A form of another website can send JSON only as one of these types."""
    headers = {"Content-Type": content_type} if content_type else {}
    error = get_error(readonly_client.post("/train", content='{"processed_dataset_id": "x"}', headers=headers), 422)
    assert "Content-Type: application/json" in error["message"]


# --- security headers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "host"), [("/jobs", "testserver"), ("/nowhere", "testserver"), ("/jobs", "evil.test"), ("/train", "testserver")]
)
def test_every_answer_has_the_security_headers(client: TestClient, path: str, host: str) -> None:
    headers = client.get(path, headers={"Host": host}).headers
    assert headers["content-security-policy"].startswith("default-src 'none'")
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cross-origin-opener-policy"] == headers["cross-origin-resource-policy"] == "same-origin"
    assert headers["cache-control"] == "no-store"
    assert headers["strict-transport-security"].startswith("max-age=")


def test_unexpected_error_has_the_security_headers_and_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with run_test_service(tmp_path) as client:
        monkeypatch.setattr(get_services(client).store, "list_jobs", lambda query: 1 / 0)
        response = client.get("/jobs")
    get_error(response, 500)
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["x-request-id"]


def test_plain_http_promises_no_https(readonly_client: TestClient) -> None:
    assert "strict-transport-security" not in readonly_client.get("/jobs").headers


def test_docs_allow_only_their_own_script_and_files(readonly_client: TestClient) -> None:
    page = readonly_client.get("/docs")
    policy = page.headers["content-security-policy"]
    assert "unsafe" not in policy
    assert policy.count("'sha256-") == page.text.count("<script>") == 1
    assert page.headers["cache-control"] == "no-store"
    assert "cache-control" not in readonly_client.get("/docs/assets/swagger-ui.css").headers


# --- request ids and the access log ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "is_kept"), [("abc-123", True), ("a" * 64, True), ("a" * 65, False), ("a b", False), ("-a", False), ("é", False)]
)
def test_request_id_is_kept_if_it_is_safe(readonly_client: TestClient, sent: str, is_kept: bool) -> None:
    answered = readonly_client.get("/jobs", headers=[(b"X-Request-ID", sent.encode())]).headers["x-request-id"]
    assert (answered == sent) == is_kept
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,64}", answered)


@pytest.mark.parametrize(
    "traceparent",
    [
        *("", "00", TRACEPARENT.upper(), f"ff{TRACEPARENT[2:]}", f"{TRACEPARENT}-x", "00-" + "0" * 32 + TRACEPARENT[35:]),
        TRACEPARENT.replace("b7ad6b7169203331", "0" * 16),
    ],
)
def test_invalid_trace_begins_anew(traceparent: str) -> None:
    trace = read_trace("", traceparent)
    assert trace.trace_id not in traceparent.lower() or not traceparent
    assert read_trace("", trace.traceparent).trace_id == trace.trace_id


def test_trace_goes_on() -> None:
    trace = read_trace("id", TRACEPARENT)
    assert trace.trace_id == "0af7651916cd43dd8448eb211c80319c"
    assert trace.span_id != "b7ad6b7169203331"
    assert trace.is_sampled
    assert read_trace("id", f"01{TRACEPARENT[2:]}-later").trace_id == trace.trace_id  # a later version may add fields
    assert current_traceparent() is None
    with tracing(trace):
        assert current_traceparent() == trace.traceparent
    assert current_traceparent() is None


def test_log_line_of_a_request_has_its_ids() -> None:
    record = logging.makeLogRecord({"msg": "x"})
    _add_trace(record)
    assert not hasattr(record, "request_id")
    with tracing(RequestTrace("r", "t" * 32, "s" * 16, is_sampled=True)):
        _add_trace(record)
    assert (vars(record)["request_id"], vars(record)["trace_id"]) == ("r", "t" * 32)


def read_access_log(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [vars(record) for record in caplog.records if record.name == "service.access"]


def test_access_log_names_the_route_and_no_secret(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="service.access"):
        client.get("/files/secret-link?token=secret-query", headers={"Authorization": "Bearer secret-token"})
        client.get("/jobs/job_1/events?after=0")
        client.get("/secret-path")
        client.get("/health")
        client.get("/jobs", headers={"Host": "evil.test"})
    lines = read_access_log(caplog)
    assert [(line["method"], line["route"], line["status"]) for line in lines] == [
        ("GET", "/files/{token}", 401),
        ("GET", "/jobs/{job_id}/events", 404),
        ("GET", "unknown", 404),
        ("GET", "/health", 200),
        ("GET", "unknown", 421),
    ]
    assert [line["levelname"] for line in lines].count("DEBUG") == 1
    assert all(line["bytes"] > 0 and line["duration_ms"] >= 0 and line["client"] == "testclient" for line in lines)
    logged = " ".join(str({name: value for name, value in line.items() if name != "args"}) for line in lines)
    assert "secret" not in logged


def test_access_log_names_who_called(caplog: pytest.LogCaptureFixture) -> None:
    """The principal is set on the request, where an identity is checked."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("state", {})["principal"] = LOCAL_PRINCIPAL
        await PlainTextResponse("hello")(scope, receive, send)

    with caplog.at_level(logging.INFO, logger="service.access"):
        TestClient(RequestContextMiddleware(app)).get("/")
    (line,) = read_access_log(caplog)
    assert (line["tenant_id"], line["subject"], line["bytes"]) == (LOCAL_PRINCIPAL.tenant_id, LOCAL_PRINCIPAL.subject, 5)


# --- proxies, links and telemetry ------------------------------------------------------------------------------------


def test_proxy_headers_are_believed_only_from_trusted_proxies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    headers = {"X-Forwarded-For": "203.0.113.9", "X-Forwarded-Proto": "https", "Origin": "https://testserver"}
    found: list[tuple[list[str], int]] = []
    for number, proxies in enumerate(((), ("testclient",))):
        with run_test_service(tmp_path / str(number), trusted_proxies=proxies) as client:
            status = client.get("/jobs", headers=headers).status_code
        found.append((re.findall(r"client=(\S+)", capsys.readouterr().err), status))
    assert found == [(["testclient"], 403), (["203.0.113.9"], 200)]  # 403: as far as the service knows, the page was not its own


def test_telemetry_is_not_imported_unless_a_collector_is_configured() -> None:
    script = "import sys, service.__main__; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    imported = done.stdout.split()
    assert "service.main" in imported
    assert not [name for name in imported if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter", "service.telemetry"))]


def test_upload_that_finds_a_long_queue_is_told_to_come_back(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    slots = client.app.state.ingestion_slots  # type: ignore[attr-defined]
    monkeypatch.setattr(slots, "_max_waiting", 0)
    response = upload(client, ROWS)
    assert get_error(response, 503)["code"] == "unavailable"
    assert 1 <= int(response.headers["retry-after"]) <= 5
    assert json.loads(client.get("/datasets").text)["datasets"] == []

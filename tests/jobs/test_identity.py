"""The identity token that an attempt sends to the service, from a metadata server on loopback."""

import base64
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest

from jobs.runtime.client import IdTokenSource, ServiceUnavailable

AUDIENCE = "https://tunesmith.example"


class FakeMetadataServer:
    """Answers requests of Google's library with an identity token."""

    def __init__(self) -> None:
        self.token_lifetime_s = 3600
        self.is_unavailable = False
        self.requested_audiences: list[str] = []

    def answer(self, path: str, query: dict[str, list[str]]) -> str | None:
        if not path.endswith("/identity"):
            return json.dumps({"email": "job@p.iam.gserviceaccount.com", "scopes": []})
        self.requested_audiences += query["audience"]
        if self.is_unavailable:
            return None
        return make_token(query["audience"][0], int(time.time()) + self.token_lifetime_s, len(self.requested_audiences))


def make_token(audience: str, expires: int, number: int) -> str:
    parts = ({"alg": "RS256"}, {"aud": audience, "exp": expires, "n": number})
    return ".".join([*(base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts), "c2lnbmVk"])


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeMetadataServer]:
    metadata = FakeMetadataServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urlsplit(self.path)
            content = metadata.answer(url.path, parse_qs(url.query))
            self.send_response(404 if content is None else 200)
            self.send_header("Metadata-Flavor", "Google")
            self.send_header("Content-Type", "text/plain" if url.path.endswith("/identity") else "application/json")
            self.end_headers()
            self.wfile.write((content or "").encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    for name in ("GCE_METADATA_HOST", "GCE_METADATA_IP", "GCE_METADATA_ROOT"):
        monkeypatch.setenv(name, f"127.0.0.1:{server.server_port}")
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    monkeypatch.setenv("GCE_METADATA_TIMEOUT", "1")
    reread_environment(monkeypatch, server.server_port)
    yield metadata
    server.shutdown()
    thread.join()
    server.server_close()


def reread_environment(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    """Set the address of the metadata server again, because the library reads it when it is imported."""
    from google.auth.compute_engine import _metadata

    for name in ("_GCE_METADATA_HOST", "_GCE_DEFAULT_HOST", "_GCE_DEFAULT_MDS_IP"):
        if hasattr(_metadata, name):
            monkeypatch.setattr(_metadata, name, f"127.0.0.1:{port}")


def decode_token_payload(identity: IdTokenSource) -> dict[str, object]:
    scheme, _, token = identity.headers()["X-Serverless-Authorization"].partition(" ")
    assert scheme == "Bearer"
    payload = token.split(".")[1]
    return json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))


def test_id_token_is_for_the_service_and_cached(metadata: FakeMetadataServer) -> None:
    identity = IdTokenSource(AUDIENCE)
    assert decode_token_payload(identity)["aud"] == AUDIENCE
    assert decode_token_payload(identity) == decode_token_payload(identity)
    assert metadata.requested_audiences == [AUDIENCE]


def test_expiring_token_is_refreshed(metadata: FakeMetadataServer) -> None:
    metadata.token_lifetime_s = 1
    identity = IdTokenSource(AUDIENCE)
    assert decode_token_payload(identity)["n"] == 1
    metadata.token_lifetime_s = 3600
    assert decode_token_payload(identity)["n"] == 2


def test_missing_identity_counts_as_service_unavailable(metadata: FakeMetadataServer) -> None:
    metadata.is_unavailable = True
    with pytest.raises(ServiceUnavailable, match=AUDIENCE):
        IdTokenSource(AUDIENCE).headers()

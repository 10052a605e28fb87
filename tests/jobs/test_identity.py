"""The identity token that an attempt shows to the service's front door, from a metadata server on loopback."""

import base64
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest

from jobs.client import Identity, ServiceAway

AUDIENCE = "https://tunesmith.example"


class Metadata:
    """Gives an identity token to whoever asks as Google's library does."""

    def __init__(self) -> None:
        self.life_s = 3600
        self.gone = False
        self.asked: list[str] = []  # audiences

    def answer(self, path: str, query: dict[str, list[str]]) -> str | None:
        if not path.endswith("/identity"):
            return json.dumps({"email": "job@p.iam.gserviceaccount.com", "scopes": []})
        self.asked += query["audience"]
        return None if self.gone else a_token(query["audience"][0], int(time.time()) + self.life_s, len(self.asked))


def a_token(audience: str, expires: int, number: int) -> str:
    parts = ({"alg": "RS256"}, {"aud": audience, "exp": expires, "n": number})
    return ".".join([*(base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts), "c2lnbmVk"])


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> Iterator[Metadata]:
    metadata = Metadata()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            place = urlsplit(self.path)
            said = metadata.answer(place.path, parse_qs(place.query))
            self.send_response(404 if said is None else 200)
            self.send_header("Metadata-Flavor", "Google")
            self.send_header("Content-Type", "text/plain" if place.path.endswith("/identity") else "application/json")
            self.end_headers()
            self.wfile.write((said or "").encode())

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
    """The library reads where the metadata server is when it is imported."""
    from google.auth.compute_engine import _metadata

    for name in ("_GCE_METADATA_HOST", "_GCE_DEFAULT_HOST", "_GCE_DEFAULT_MDS_IP"):
        if hasattr(_metadata, name):
            monkeypatch.setattr(_metadata, name, f"127.0.0.1:{port}")


def shown(identity: Identity) -> dict[str, object]:
    scheme, _, token = identity.headers()["X-Serverless-Authorization"].partition(" ")
    assert scheme == "Bearer"
    payload = token.split(".")[1]
    return json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))


def test_the_token_is_for_the_service_and_asked_for_once(metadata: Metadata) -> None:
    identity = Identity(AUDIENCE)
    assert shown(identity)["aud"] == AUDIENCE
    assert shown(identity) == shown(identity)
    assert metadata.asked == [AUDIENCE]


def test_a_token_that_is_about_to_expire_is_asked_for_anew(metadata: Metadata) -> None:
    metadata.life_s = 1
    identity = Identity(AUDIENCE)
    assert shown(identity)["n"] == 1
    metadata.life_s = 3600
    assert shown(identity)["n"] == 2


def test_without_anybody_to_vouch_the_service_is_as_good_as_away(metadata: Metadata) -> None:
    metadata.gone = True
    with pytest.raises(ServiceAway, match=AUDIENCE):
        Identity(AUDIENCE).headers()

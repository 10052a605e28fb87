"""Google Cloud's process identity on loopback: the metadata server, and the IAM Credentials API, which signs with the account's key.

`python -m infra.loopback.google_identity --port 9025` runs in the foreground. Google's libraries find the metadata server by
GCE_METADATA_HOST=host:port and GCE_METADATA_IP=host:port; Tunesmith finds signBlob by IAM_CREDENTIALS_EMULATOR_HOST=host:port.
The public key that verifies identity tokens is at /oauth2/v3/certs, as on Google's server.
"""

import argparse
import base64
import json
import signal
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar, Self
from urllib.parse import parse_qs, urlsplit

import jwt
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from jwt.algorithms import RSAAlgorithm

EMAIL = "tunesmith-api@loopback.iam.gserviceaccount.com"
PROJECT = "loopback"
KEY_ID = "loopback-key"
ACCESS_TOKEN = "loopback-access-token"
TOKEN_TTL_S = 3600
SCOPE = "https://www.googleapis.com/auth/cloud-platform"


@dataclass(frozen=True)
class RecordedRequest:
    """A received request."""

    method: str
    path: str  # with its query
    authorization: str | None


@dataclass(frozen=True)
class InjectedError:
    """An error response of signBlob."""

    status: int
    reason: str  # IAM_PERMISSION_DENIED, SERVICE_DISABLED
    message: str = "refused"


class GoogleIdentity:
    """One HTTP server for one service account."""

    def __init__(self, *, port: int = 0, email: str = EMAIL, project: str = PROJECT, token_ttl_s: int = TOKEN_TTL_S) -> None:
        self.email = email
        self.project = project
        self.token_ttl_s = token_ttl_s
        self.key = rsa.generate_private_key(65537, 2048)
        self.requests: list[RecordedRequest] = []
        self.injected_errors: list[InjectedError] = []  # of signBlob; each is used once
        self._server = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (_Handler,), {"identity": self}))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.host = f"127.0.0.1:{self._server.server_address[1]}"

    def start(self) -> None:
        """Start serving."""
        self._thread.start()

    def stop(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def environment(self) -> dict[str, str]:
        """The environment in which a process has this account."""
        return {
            "GCE_METADATA_HOST": self.host,
            "GCE_METADATA_IP": self.host,
            "GCE_METADATA_ROOT": self.host,
            "IAM_CREDENTIALS_EMULATOR_HOST": self.host,
        }

    def sign(self, content: bytes) -> bytes:
        """RSA over SHA-256, like signBlob and a key file."""
        return self.key.sign(content, padding.PKCS1v15(), hashes.SHA256())

    def identity_token(self, audience: str, email: str | None = None) -> str:
        """An identity token for `audience`, of this or another account, valid for an hour like Google's."""
        now = int(time.time())
        claims = {"iss": "https://accounts.google.com", "aud": audience, "iat": now, "exp": now + self.token_ttl_s}
        account = {"email": email or self.email, "email_verified": True, "sub": "100000000000000000000"}
        return jwt.encode({**claims, **account}, self.key, algorithm="RS256", headers={"kid": KEY_ID})

    def public_keys(self) -> dict[str, object]:
        """The public key that verifies tokens, as a JSON Web Key Set."""
        public = json.loads(RSAAlgorithm.to_jwk(self.key.public_key()))
        return {"keys": [{**public, "kid": KEY_ID, "use": "sig", "alg": "RS256"}]}


class _Handler(BaseHTTPRequestHandler):
    """One request. Each server has a subclass with `identity` set."""

    identity: ClassVar[GoogleIdentity]
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise every response takes 40 ms

    def do_GET(self) -> None:
        self._record_request()
        path, query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        if path == "/oauth2/v3/certs":
            self._send_response(self.identity.public_keys())
        elif path not in ("", "/") and self.headers.get("Metadata-Flavor") != "Google":
            self._send_response("Missing Metadata-Flavor:Google header.", HTTPStatus.FORBIDDEN)
        else:
            self._send_response(*_metadata_response(self.identity, path, query))

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._record_request()
        errors = self.identity.injected_errors
        if self.path.partition("?")[0] != f"/v1/projects/-/serviceAccounts/{self.identity.email}:signBlob":
            self._send_response({"error": {"code": 404, "message": "no such account"}}, HTTPStatus.NOT_FOUND)
        elif self.headers.get("Authorization") != f"Bearer {ACCESS_TOKEN}":
            self._send_response({"error": {"code": 401, "message": "invalid credentials"}}, HTTPStatus.UNAUTHORIZED)
        elif errors:
            error = errors.pop(0)
            self._send_response(_error_body(error), HTTPStatus(error.status))
        else:
            signature = self.identity.sign(base64.b64decode(json.loads(content)["payload"]))
            self._send_response({"keyId": KEY_ID, "signedBlob": base64.b64encode(signature).decode()})

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""

    def _record_request(self) -> None:
        self.identity.requests.append(RecordedRequest(self.command, self.path, self.headers.get("Authorization")))

    def _send_response(self, body: object, status: HTTPStatus = HTTPStatus.OK) -> None:
        is_text = isinstance(body, str)
        content = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("Metadata-Flavor", "Google")
        self.send_header("Content-Type", "text/plain" if is_text else "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def _metadata_response(identity: GoogleIdentity, path: str, query: Mapping[str, list[str]]) -> tuple[object, HTTPStatus]:
    """The metadata server's response at a path."""
    account = path.removeprefix("/computeMetadata/v1/instance/service-accounts/").rstrip("/")
    name, _, attribute = account.partition("/")
    if name in ("default", identity.email):
        match attribute:
            case "" if "recursive" in query:
                return {"aliases": ["default"], "email": identity.email, "scopes": [SCOPE]}, HTTPStatus.OK
            case "token":
                return {"access_token": ACCESS_TOKEN, "expires_in": identity.token_ttl_s, "token_type": "Bearer"}, HTTPStatus.OK
            case "identity" if "audience" in query:
                return identity.identity_token(query["audience"][0]), HTTPStatus.OK
            case "email":
                return identity.email, HTTPStatus.OK
            case _:
                return "no such value", HTTPStatus.NOT_FOUND
    match path.removeprefix("/computeMetadata/v1/"):
        case "project/project-id":
            return identity.project, HTTPStatus.OK
        case "universe/universe-domain":
            return "googleapis.com", HTTPStatus.OK
        case "/" | "":
            return "computeMetadata/", HTTPStatus.OK
        case _:
            return "no such value", HTTPStatus.NOT_FOUND


def _error_body(error: InjectedError) -> dict[str, object]:
    """An error in the shape of Google's APIs."""
    detail = {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": error.reason, "domain": "googleapis.com"}
    return {"error": {"code": error.status, "message": error.message, "details": [detail]}}


def main() -> None:
    """Run until SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m infra.loopback.google_identity", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0 takes a free port")
    parser.add_argument("--email", default=EMAIL, help="the service account")
    parser.add_argument("--project", default=PROJECT)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end like Ctrl-C
    with suppress(KeyboardInterrupt), GoogleIdentity(port=args.port, email=args.email, project=args.project) as identity:
        print(identity.host, flush=True)
        signal.pause()


if __name__ == "__main__":
    main()

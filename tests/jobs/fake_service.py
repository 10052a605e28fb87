"""The service as an attempt sees it: three routes over real HTTP, controlled by a test."""

import json
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

TOKEN = "launch-token-0123456789"
CLAIM_TOKEN = "attempt-token-0123456789"


class UnixHTTPServer(ThreadingHTTPServer):
    """An HTTP server at a Unix socket."""

    address_family = socket.AF_UNIX
    server_address: Any

    def server_bind(self) -> None:
        self.socket.bind(self.server_address)
        self.server_name, self.server_port = "localhost", 0

    def get_request(self) -> tuple[Any, Any]:
        connection, _ = self.socket.accept()
        return connection, ("local", 0)


@dataclass
class FakeService:
    """Accepts claims, events and results. A test can change every field below at any time."""

    socket: Path | None = None  # listens at this Unix socket instead of a port
    claim_status: int = 200
    token_status: int = 200
    events_status: int = 200
    result_status: int = 204
    claim_directive: str = "continue"
    directive: str = "continue"
    secrets: dict[str, str] = field(default_factory=dict)
    on_events: Callable[[dict[str, Any]], None] = lambda batch: None
    claims: list[str] = field(default_factory=list)
    batches: list[dict[str, Any]] = field(default_factory=list)  # all that arrived, accepted or not
    events: list[dict[str, Any]] = field(default_factory=list)  # accepted, in order, once each
    results: list[dict[str, Any]] = field(default_factory=list)
    authorizations: set[str | None] = field(default_factory=set)
    traceparents: set[str | None] = field(default_factory=set)
    hosts: set[str | None] = field(default_factory=set)
    claimants: set[str | None] = field(default_factory=set)  # the secrets that were sent as headers
    credentials: dict[str, Any] = field(default_factory=lambda: {"kind": "ambient"})
    next_token: str | None = None  # in the answers to events
    tokens: int = 0  # how many the attempt asked for
    expired: set[str] = field(default_factory=set)  # the values of `Authorization` that are answered with 401

    def __enter__(self) -> Self:
        service = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
                service.authorizations.add(self.headers["Authorization"])
                service.traceparents.add(self.headers["traceparent"])
                service.hosts.add(self.headers["Host"])
                service.claimants.add(self.headers["X-Claimant"])
                is_expired = self.headers["Authorization"] in service.expired
                status, answer = (401, {}) if is_expired else service.answer(self.path.rpartition("/")[2], body)
                content = json.dumps(answer).encode() if status != 204 else b""
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = UnixHTTPServer(str(self.socket), Handler) if self.socket else ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop answering. Can be repeated."""
        self.server.shutdown()
        self.server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, endpoint: str, body: dict[str, Any]) -> tuple[int, Any]:
        match endpoint:
            case "claim":
                self.claims.append(body["claimant"])
                return self.claim_status, {"secrets": self.secrets, "directive": self.claim_directive, "token": CLAIM_TOKEN}
            case "credentials":
                return 200, self.credentials
            case "token":
                self.tokens += 1
                return self.token_status, {"token": f"renewed-token-{self.tokens}"}
            case "events":
                return self._accept_events(body)
            case _:
                self.results.append(body)
                return self.result_status, {}

    def _accept_events(self, batch: dict[str, Any]) -> tuple[int, Any]:
        """Like the real service: ignore known events and respond with the next expected number."""
        self.batches.append(batch)
        self.on_events(batch)
        if self.events_status != 200:
            return self.events_status, {}
        new = batch["events"][max(0, len(self.events) - batch["first_seq"]) :]
        self.events.extend(new)
        return 200, {"directive": self.directive, "next_seq": len(self.events), "token": self.next_token}

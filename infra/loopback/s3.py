"""S3 on loopback: moto's server, which serves the real boto3. It checks no signature and no checksum of what is sent.

`python -m infra.loopback.s3 --port 9024 --bucket a` runs in the foreground. Clients find it by AWS_ENDPOINT_URL_S3=<url>, with any
AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION=us-east-1.
"""

import argparse
import logging
import signal
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress

import httpx2
from moto.moto_server.threaded_moto_server import ThreadedMotoServer


class S3:
    """A server in a thread of this process."""

    def __init__(self, *, port: int = 0, buckets: Iterable[str] = ()) -> None:
        self._server = ThreadedMotoServer("127.0.0.1", port, verbose=False)
        self._buckets = tuple(buckets)
        self.url = ""

    def start(self) -> None:
        """Returns when it has its buckets."""
        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # one line a request otherwise
        self._server.start()
        self.url = f"http://127.0.0.1:{self._server.get_host_and_port()[1]}"
        for bucket in self._buckets:
            create_bucket(self.url, bucket)

    def stop(self) -> None:
        """End it, and forget the objects."""
        httpx2.post(f"{self.url}/moto-api/reset").raise_for_status()
        self._server.stop()


@contextmanager
def run_s3(*, port: int = 0, buckets: Iterable[str] = ()) -> Generator[str]:
    """The url of a server that is there for as long as the block lasts."""
    server = S3(port=port, buckets=buckets)
    server.start()
    try:
        yield server.url
    finally:
        server.stop()


def create_bucket(url: str, name: str) -> None:
    """Unsigned: the server lets everybody in."""
    httpx2.put(f"{url}/{name}").raise_for_status()


def main() -> None:
    """Run until told to stop."""
    parser = argparse.ArgumentParser(prog="python -m infra.loopback.s3", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--bucket", action="append", default=[], help="a bucket to make; may be repeated")
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C does it: what was started is ended
    with suppress(KeyboardInterrupt), run_s3(port=chosen.port, buckets=chosen.bucket) as url:
        print(url, flush=True)
        signal.pause()


if __name__ == "__main__":
    main()

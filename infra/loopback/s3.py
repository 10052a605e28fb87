"""S3 on loopback: moto's server for the real boto3. It verifies no signatures and no checksums.

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
        """Start and create the buckets."""
        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # otherwise one line per request
        self._server.start()
        self.url = f"http://127.0.0.1:{self._server.get_host_and_port()[1]}"
        for bucket in self._buckets:
            create_bucket(self.url, bucket)

    def stop(self) -> None:
        """Stop and delete the objects."""
        httpx2.post(f"{self.url}/moto-api/reset").raise_for_status()
        self._server.stop()


@contextmanager
def run_s3(*, port: int = 0, buckets: Iterable[str] = ()) -> Generator[str]:
    """The URL of a server that runs for the length of the block."""
    server = S3(port=port, buckets=buckets)
    server.start()
    try:
        yield server.url
    finally:
        server.stop()


def create_bucket(url: str, name: str) -> None:
    """Create a bucket. The request is unsigned: the server checks no credentials."""
    httpx2.put(f"{url}/{name}").raise_for_status()


def main() -> None:
    """Run until SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m infra.loopback.s3", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0 takes a free port")
    parser.add_argument("--bucket", action="append", default=[], help="a bucket to create; can be repeated")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end like Ctrl-C
    with suppress(KeyboardInterrupt), run_s3(port=args.port, buckets=args.bucket) as url:
        print(url, flush=True)
        signal.pause()


if __name__ == "__main__":
    main()

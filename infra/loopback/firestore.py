"""Firestore on this machine: the emulator of the Google Cloud SDK. It keeps everything in memory and needs no indexes.

with run_firestore_emulator() as host: ...           # for tests: a free port
python -m infra.loopback.firestore --port 8501   # in the foreground
"""

import argparse
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import IO

JAR = Path("platform/cloud-firestore-emulator/cloud-firestore-emulator.jar")
MAIN_CLASS = "com.google.cloud.datastore.emulator.firestore.CloudFirestore"
DEFAULT_SDK_ROOTS = (
    "/usr/lib/google-cloud-sdk",
    "/usr/share/google-cloud-sdk",
    "/opt/google-cloud-sdk",
    "/opt/homebrew/share/google-cloud-sdk",
    "/snap/google-cloud-cli/current",
    "~/google-cloud-sdk",
)
START_TIMEOUT_S = 60.0  # 2.5 s on an idle machine; a busy CI runner takes ten times that
STOP_TIMEOUT_S = 5.0


class EmulatorNotInstalled(RuntimeError):
    """The emulator or Java is not installed."""


class EmulatorFailed(RuntimeError):
    """The emulator did not start."""


@contextmanager
def run_firestore_emulator(port: int = 0) -> Generator[str]:
    """A new emulator that answers; yields its `host:port` for FIRESTORE_EMULATOR_HOST. Raises EmulatorNotInstalled, EmulatorFailed."""
    command = [*_find_java(), "-cp", str(_find_jar()), MAIN_CLASS, "start", "--host=127.0.0.1"]
    port = port or _find_free_port()
    with tempfile.TemporaryFile() as output:
        # The jar itself, because the SDK's wrapper scripts leave the emulator running when they end.
        emulator = subprocess.Popen([*command, f"--port={port}"], stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            _wait_until_ready(emulator, port, output)
            yield f"127.0.0.1:{port}"
        finally:
            _stop(emulator)


def main() -> None:
    """Run in the foreground until Ctrl-C or SIGTERM."""
    parser = argparse.ArgumentParser(
        prog="python -m infra.loopback.firestore", description="A Firestore emulator that keeps its data in memory."
    )
    parser.add_argument("--port", type=int, default=8501)
    port = parser.parse_args().port
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    with suppress(KeyboardInterrupt), run_firestore_emulator(port) as host:
        print(f"export FIRESTORE_EMULATOR_HOST={host}", flush=True)
        signal.pause()


def _find_java() -> list[str]:
    java = shutil.which("java")
    if java is None:
        raise EmulatorNotInstalled(
            "no java on the PATH; the Firestore emulator needs 17 or newer (21 for a Google Cloud SDK newer than 528): "
            "`apt-get install default-jre-headless`"
        )
    return [java, "-Duser.language=en", "-Xmx1g"]


def _find_jar() -> Path:
    searched: list[Path] = []
    for root in _sdk_roots():
        if (root / JAR).is_file():
            return root / JAR
        if root not in searched:
            searched.append(root)
    raise EmulatorNotInstalled(
        f"the Firestore emulator of the Google Cloud SDK is not installed in {', '.join(map(str, searched))}; "
        "`gcloud components install cloud-firestore-emulator` (or, from Google's apt repository, "
        "`apt-get install google-cloud-cli-firestore-emulator`) installs it, set CLOUDSDK_ROOT to the folder of the SDK"
    )


def _sdk_roots() -> Iterator[Path]:
    """Folders where the SDK may be, most likely first."""
    if named := os.environ.get("CLOUDSDK_ROOT"):
        yield Path(named)
    if gcloud := shutil.which("gcloud"):
        yield Path(gcloud).resolve().parents[1]
        command = [gcloud, "info", "--format=value(installation.sdk_root)"]
        if (root := subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()) and Path(root).is_dir():
            yield Path(root)
    yield from (Path(root).expanduser() for root in DEFAULT_SDK_ROOTS)


def _find_free_port() -> int:
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _wait_until_ready(emulator: "subprocess.Popen[bytes]", port: int, output: IO[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not _is_ready(port):
        if emulator.poll() is not None or time.monotonic() > deadline:
            output.seek(0)
            log = output.read()[-2000:].decode(errors="replace")
            raise EmulatorFailed(f"the Firestore emulator did not start on port {port}; its output:\n{log}")
        time.sleep(0.05)


def _is_ready(port: int) -> bool:
    with closing(HTTPConnection("127.0.0.1", port, timeout=1)) as connection:
        try:
            connection.request("GET", "/")
            return connection.getresponse().status == 200
        except (OSError, HTTPException):
            return False


def _stop(emulator: "subprocess.Popen[bytes]") -> None:
    emulator.terminate()
    try:
        emulator.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        emulator.kill()
        emulator.wait()


if __name__ == "__main__":
    main()

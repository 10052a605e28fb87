"""`tunesmith serve`: start and stop with Ctrl-C."""

import os
import signal
import subprocess
from pathlib import Path

import httpx2

from service.attempt_socket import find_attempt_socket
from tests.e2e.conftest import SOURCE, TUNESMITH


def test_serve_stops_cleanly_on_ctrl_c_and_ignores_current_folder(tmp_path: Path) -> None:
    other = tmp_path / "service"
    other.mkdir()
    (other / "__main__.py").write_text("print('not Tunesmith')")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TUNESMITH_")}
    environment["PYTHONPATH"] = str(SOURCE)  # `make` sets "."; in another folder that would be this one
    with subprocess.Popen(
        [str(TUNESMITH), "serve", "--port", "0"],
        env=environment | {"TUNESMITH_HOME": str(tmp_path / "home")},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("http://127.0.0.1:")
        while not (tmp_path / "home/service.json").exists():
            assert process.poll() is None
        attempt_socket = find_attempt_socket(tmp_path / "home")
        assert attempt_socket is not None
        with httpx2.Client(transport=httpx2.HTTPTransport(uds=str(attempt_socket))) as client:
            for _ in range(2):
                assert client.post("http://127.0.0.1/internal/jobs/j/attempts/1/claim", json={"claimant": "p"}).status_code == 401
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
    assert not (tmp_path / "home/service.json").exists()
    assert find_attempt_socket(tmp_path / "home") is None

"""Base models are downloaded from the Hub by its own client over real HTTP."""

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.jobs.conftest import make_spec

FILES = {
    "config.json": b"{}",
    "model.safetensors": (2).to_bytes(8, "little") + b"{}",
    "tokenizer.json": b"{}",
    "pytorch_model.bin": b"a pickle",
}
COMMIT = "a" * 40
# Runs in its own process, because the Hub client reads the Hub's URL when it is imported.
FETCH_SCRIPT = """
import json, sys
from pathlib import Path
from jobs.llm.base_model import fetch_base
from jobs.runtime.errors import JobFailed
from schema.spec import JobSpec
from tests.jobs.conftest import make_context
spec = JobSpec.load(sys.argv[1])
for name, token in json.loads(sys.argv[3]):
    config = spec.training_config.model_copy(update={"base_model_id": name})
    job = spec.model_copy(update={"training_config": config})
    try:
        folder = fetch_base(make_context(job, Path(sys.argv[2]), secrets={"hf_token": token} if token else {}))
        print(json.dumps({"files": sorted(path.name for path in folder.iterdir())}))
    except JobFailed as error:
        print(json.dumps(error.failure.model_dump()))
"""


class FakeHubHandler(BaseHTTPRequestHandler):
    """Has owner/open, owner/gated (for the token `licensed`) and owner/forbidden; answers 401 for any other, like the real Hub.

    While `failures` is not empty, each request pops one and gets a 503 or a closed connection.
    """

    protocol_version = "HTTP/1.1"
    tokens: set[str | None] = set()  # noqa: RUF012
    failures: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        FakeHubHandler.tokens.add(self.headers["Authorization"])
        if FakeHubHandler.failures:
            if FakeHubHandler.failures.pop() == "503":
                self._send(503, b"{}", {}, with_body)
            self.close_connection = True
            return
        error = self._error()
        if error:
            status, code = error
            self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": "refused"}, with_body)
        elif self.path.startswith("/api/models/"):
            siblings = [{"rfilename": name, "size": len(content)} for name, content in FILES.items()]
            if "/tree/" in self.path:
                tree = [{"type": "file", "path": name, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for name, c in FILES.items()]
                self._send(200, json.dumps(tree).encode(), {}, with_body)
            else:
                model_info = {"id": "owner/open", "sha": COMMIT, "siblings": siblings, "private": False, "tags": [], "downloads": 0}
                self._send(200, json.dumps(model_info).encode(), {}, with_body)
        else:
            content = FILES[self.path.rpartition("/")[2]]
            etag = hashlib.sha1(content).hexdigest()
            self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}, with_body)

    def _error(self) -> tuple[int, str] | None:
        if "owner/open" in self.path or ("owner/gated" in self.path and self.headers["Authorization"] == "Bearer licensed"):
            return None
        if "owner/gated" in self.path:
            return 403 if self.headers["Authorization"] else 401, "GatedRepo"
        if "owner/forbidden" in self.path:
            return 403, "Forbidden"
        return 401, "RepoNotFound"

    def _send(self, status: int, content: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Type": "application/json", "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub_url() -> Iterator[str]:
    FakeHubHandler.tokens.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHubHandler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def fetch_bases(
    url: str, tmp_path: Path, *requests: tuple[str, str | None], environment: dict[str, str] | None = None
) -> list[dict[str, Any]]:
    """Call `fetch_base` for each base model id and token, in order; return the file names or the failure of each."""
    spec = make_spec(tmp_path / "objects").model_dump_json()
    done = subprocess.run(
        [sys.executable, "-c", FETCH_SCRIPT, spec, str(tmp_path / "work"), json.dumps(requests)],
        env={"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0", "PYTHONPATH": ".", "HF_HUB_DISABLE_XET": "1"}
        | {"HF_HUB_ETAG_TIMEOUT": "2", "HOME": str(tmp_path)}
        | (environment or {}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_hub_responses_become_files_or_failures_with_hint(hub_url: str, tmp_path: Path) -> None:
    open_, absent, gated, wrong_token, licensed, forbidden = fetch_bases(
        hub_url,
        tmp_path,
        ("owner/open", None),
        ("owner/absent", None),
        ("owner/gated", None),
        ("owner/gated", "other"),
        ("owner/gated", "licensed"),
        ("owner/forbidden", "mine"),
    )
    assert open_ == licensed == {"files": ["config.json", "model.safetensors", "tokenizer.json"]}  # no pickle
    assert absent["code"] == "invalid_config"
    assert "owner/absent" in absent["message"]
    for failure in (gated, wrong_token):
        assert failure["code"] == "auth"
        assert "license" in failure["hint"]
        assert "hf_token" in failure["hint"]
    assert forbidden["code"] == "auth"
    assert FakeHubHandler.tokens == {None, "Bearer other", "Bearer licensed", "Bearer mine"}
    cached = b"".join(path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert not [token for token in (b"licensed", b"other", b"mine") if token in cached]


def test_hub_errors_are_retried(hub_url: str, tmp_path: Path) -> None:
    FakeHubHandler.failures[:] = ["503", "hang up", "503"]
    assert fetch_bases(hub_url, tmp_path, ("owner/open", None)) == [{"files": ["config.json", "model.safetensors", "tokenizer.json"]}]
    assert FakeHubHandler.failures == []


def test_offline_failure_explains_local_store(tmp_path: Path) -> None:
    (unreachable,) = fetch_bases("http://127.0.0.1:9", tmp_path, ("owner/open", None))
    (offline,) = fetch_bases("http://127.0.0.1:9", tmp_path, ("owner/open", None), environment={"HF_HUB_OFFLINE": "1"})
    for failure in (unreachable, offline):
        assert failure["code"] == "invalid_config"
        assert "pretrained_weights/huggingface/owner/open/" in failure["hint"]


def test_base_in_own_store_is_used_without_the_hub(hub_url: str, tmp_path: Path) -> None:
    folder = tmp_path / "objects/pretrained_weights/huggingface/owner/open"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(FILES["model.safetensors"])
    assert fetch_bases(hub_url, tmp_path, ("owner/open", "mine")) == [{"files": ["config.json", "model.safetensors"]}]
    assert FakeHubHandler.tokens == set()

"""Bases from the Hub, asked for with the Hub's own client over real HTTP."""

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

from tests.jobs.conftest import a_spec

FILES = {"config.json": b"{}", "model.safetensors": b"weights", "tokenizer.json": b"{}", "pytorch_model.bin": b"a pickle"}
COMMIT = "a" * 40
# In a process of its own: the Hub's address is read when its client is imported.
ASK = """
import json, sys
from pathlib import Path
from jobs.base_model import fetch_base
from jobs.errors import JobFailed
from schema.spec import JobSpec
from tests.jobs.conftest import a_context
spec = JobSpec.load(sys.argv[1])
for name, token in json.loads(sys.argv[3]):
    config = spec.training_config.model_copy(update={"base_model_id": name})
    asked = spec.model_copy(update={"training_config": config})
    try:
        folder = fetch_base(a_context(asked, Path(sys.argv[2]), secrets={"hf_token": token} if token else {}))
        print(json.dumps({"files": sorted(path.name for path in folder.iterdir())}))
    except JobFailed as error:
        print(json.dumps(error.failure.model_dump()))
"""


class Hub(BaseHTTPRequestHandler):
    """Knows owner/open, owner/gated (with token `licensed`) and owner/forbidden; 401 for all else, as the real one.

    While it has troubles left it answers 503, or hangs up.
    """

    protocol_version = "HTTP/1.1"
    tokens: set[str | None] = set()  # noqa: RUF012
    troubles: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        Hub.tokens.add(self.headers["Authorization"])
        if Hub.troubles:
            if Hub.troubles.pop() == "503":
                self._send(503, b"{}", {}, with_body)
            self.close_connection = True
            return
        refusal = self._refusal()
        if refusal:
            status, code = refusal
            self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": "refused"}, with_body)
        elif self.path.startswith("/api/models/"):
            siblings = [{"rfilename": name, "size": len(content)} for name, content in FILES.items()]
            if "/tree/" in self.path:
                tree = [{"type": "file", "path": name, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for name, c in FILES.items()]
                self._send(200, json.dumps(tree).encode(), {}, with_body)
            else:
                found = {"id": "owner/open", "sha": COMMIT, "siblings": siblings, "private": False, "tags": [], "downloads": 0}
                self._send(200, json.dumps(found).encode(), {}, with_body)
        else:
            content = FILES[self.path.rpartition("/")[2]]
            etag = hashlib.sha1(content).hexdigest()
            self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}, with_body)

    def _refusal(self) -> tuple[int, str] | None:
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
    Hub.tokens.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def ask(url: str, tmp_path: Path, *questions: tuple[str, str | None], environment: dict[str, str] | None = None) -> list[dict[str, Any]]:
    """What `fetch_base` answers for names with tokens, one after the other."""
    spec = a_spec(tmp_path / "objects").model_dump_json()
    told = subprocess.run(
        [sys.executable, "-c", ASK, spec, str(tmp_path / "work"), json.dumps(questions)],
        env={"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0", "PYTHONPATH": ".", "HF_HUB_DISABLE_XET": "1"}
        | {"HF_HUB_ETAG_TIMEOUT": "2", "HOME": str(tmp_path)}
        | (environment or {}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert told.returncode == 0, told.stderr
    return [json.loads(line) for line in told.stdout.splitlines() if line.startswith("{")]


def test_the_hub_s_answers_become_files_or_failures_with_a_hint(hub_url: str, tmp_path: Path) -> None:
    open_, absent, gated, gated_with_wrong, gated_with_right, forbidden = ask(
        hub_url,
        tmp_path,
        ("owner/open", None),
        ("owner/absent", None),
        ("owner/gated", None),
        ("owner/gated", "other"),
        ("owner/gated", "licensed"),
        ("owner/forbidden", "mine"),
    )
    assert open_ == gated_with_right == {"files": ["config.json", "model.safetensors", "tokenizer.json"]}  # no pickle
    assert absent["code"] == "invalid_config"
    assert "owner/absent" in absent["message"]
    for refused in (gated, gated_with_wrong):
        assert refused["code"] == "auth"
        assert "licence" in refused["hint"]
        assert "hf_token" in refused["hint"]
    assert forbidden["code"] == "auth"
    assert Hub.tokens == {None, "Bearer other", "Bearer licensed", "Bearer mine"}
    left = b"".join(path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert not [token for token in (b"licensed", b"other", b"mine") if token in left]  # no token was left behind


def test_a_hub_that_stumbles_is_asked_again(hub_url: str, tmp_path: Path) -> None:
    Hub.troubles[:] = ["503", "hang up", "503"]
    assert ask(hub_url, tmp_path, ("owner/open", None)) == [{"files": ["config.json", "model.safetensors", "tokenizer.json"]}]
    assert Hub.troubles == []


def test_without_a_network_the_failure_says_how_to_do_without_the_hub(tmp_path: Path) -> None:
    (away,) = ask("http://127.0.0.1:9", tmp_path, ("owner/open", None))
    (offline,) = ask("http://127.0.0.1:9", tmp_path, ("owner/open", None), environment={"HF_HUB_OFFLINE": "1"})
    for failure in (away, offline):
        assert failure["code"] == "invalid_config"
        assert "pretrained_weights/huggingface/owner/open/" in failure["hint"]


def test_the_deployment_s_own_store_is_used_in_place_and_the_hub_is_not_asked(hub_url: str, tmp_path: Path) -> None:
    folder = tmp_path / "objects/pretrained_weights/huggingface/owner/open"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "ours.safetensors").write_bytes(b"")
    assert ask(hub_url, tmp_path, ("owner/open", "mine")) == [{"files": ["config.json", "ours.safetensors"]}]
    assert Hub.tokens == set()

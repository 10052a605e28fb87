"""What every source of rows promises, with the real clients against servers on loopback."""

import hashlib
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.loopback import cloud_storage, s3
from infra.loopback.hub import LoopbackHub, Token
from jobs.ingest.sources import SOURCES, Downloaded, SourceRequest, download
from jobs.ingest.sources import hf as hf_source
from jobs.ingest.sources import https as https_source
from jobs.ingest.sources.hf import NoSelection, select_files
from jobs.runtime.context import Secrets, Stores
from jobs.runtime.errors import JobFailed, Stopped
from schema.egress import EgressPolicy
from schema.ingestion import IngestLimits, IngestOptions
from schema.sources import BucketSource, HubSource, InvalidSource, parse_source
from schema.spec import StoreUrls
from schema.training import IngestConfig
from storage.registry import open_store
from tests.contract.object_fixtures import use_cloud_storage

LOOPBACK = EgressPolicy(allow_loopback=True)
ROWS = b'{"text": "a"}\n' * 100


def make_request(
    tmp_path: Path, source: str, *, secrets: dict[str, str] | None = None, limits: dict[str, int] | None = None, **changes: Any
) -> SourceRequest:
    config = IngestConfig(
        source=source,
        options=IngestOptions.model_validate({}),
        limits=IngestLimits.model_validate(limits or {}),
        rights="caller" if secrets else "anonymous",
    )
    folder = tmp_path / "source"
    folder.mkdir(exist_ok=True)
    url = (tmp_path / "objects").as_uri()
    stores = Stores(StoreUrls(datasets=url, models=url, configs=url))
    return SourceRequest(config.model_copy(update=changes), Secrets(secrets or {}), stores, folder, LOOPBACK, lambda: None)


def contents(downloaded: Downloaded) -> dict[str, bytes]:
    return {file.name: Path(file.path).read_bytes() for file in downloaded.files}


def failure_of(request: SourceRequest, run: Callable[[SourceRequest], object] = download) -> tuple[str, str, str]:
    with pytest.raises(JobFailed) as failed:
        run(request)
    failure = failed.value.failure
    return failure.code, failure.message, failure.hint


def test_every_kind_of_source_has_a_module() -> None:
    kinds = {parse_source(text).kind for text in ("incoming/a", "gs://abc/a", "s3://abc/a", "hf://a/b", "https://h/a")}
    assert kinds == set(SOURCES)


@pytest.mark.parametrize(
    ("pattern", "key", "matches"),
    [
        ("a/b.csv", "a/b.csv", True),
        ("a/*.csv", "a/b.csv", True),
        ("a/*.csv", "a/b/c.csv", False),
        ("a/**.csv", "a/b/c.csv", True),
        ("a/?.csv", "a/b.csv", True),
        ("a/?.csv", "a/bb.csv", False),
        ("a/", "a/b/c.csv", True),
        ("a/", "ab/c.csv", False),
        ("a/", "a/_SUCCESS", False),
        ("a/", "a/.hidden", False),
        ("a/[b].csv", "a/b.csv", False),
        ("a+/*.csv", "a+/b.csv", True),
    ],
)
def test_pattern_names_objects(pattern: str, key: str, matches: bool) -> None:
    source = parse_source(f"gs://bucket/{pattern}")
    assert source.matches(key) is matches  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "text", ["", "x", "gs:/b/a", "gs://b", "hf://", "hf://a/b:", "hf://a b", "https://", "s3://abc/a//b", "incoming", "gs://abc/a\nb"]
)
def test_text_that_names_no_source_is_refused_with_what_would_work(text: str) -> None:
    with pytest.raises(InvalidSource) as refused:
        parse_source(text)
    assert str(refused.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf://squad", HubSource("squad")),
        ("hf://datasets/a/b", HubSource("a/b")),
        ("hf://a/b:cfg", HubSource("a/b", "cfg")),
        ("hf://a/b:cfg/test@refs/pr/1", HubSource("a/b", "cfg", "test", "refs/pr/1")),
        ("hf://a/b@v1.0", HubSource("a/b", revision="v1.0")),
    ],
)
def test_dataset_of_the_hub_is_parsed(text: str, expected: HubSource) -> None:
    assert parse_source(text) == expected


@given(
    st.one_of(
        st.text(max_size=60),
        st.builds("{}://{}".format, st.sampled_from(["gs", "s3", "hf", "https", "http"]), st.text("ab/:@*?.[]%-_\\#", max_size=30)),
    )
)
def test_any_text_is_a_source_or_refused(text: str) -> None:
    try:
        source = parse_source(text)
    except InvalidSource as error:
        assert str(error)
        return
    assert source.kind in SOURCES
    if isinstance(source, BucketSource):
        assert source.prefix.startswith(source.folder)
        assert not source.is_single or source.matches(source.pattern)


# --- incoming ----------------------------------------------------------------------------------------------------


def test_incoming_file_is_read_where_it_lies(tmp_path: Path) -> None:
    request = make_request(tmp_path, "incoming/uploads/x/rows.jsonl")
    open_store((tmp_path / "objects").as_uri()).write("incoming/uploads/x/rows.jsonl", ROWS)
    downloaded = download(request)
    assert contents(downloaded) == {"rows.jsonl": ROWS}
    assert list(request.folder.iterdir()) == []


def test_deleted_incoming_file_is_a_failure(tmp_path: Path) -> None:
    code, message, _ = failure_of(make_request(tmp_path, "incoming/rows.jsonl"))
    assert (code, message) == ("invalid_data", "incoming/rows.jsonl names no file that exists")


# --- buckets -----------------------------------------------------------------------------------------------------


@dataclass
class Bucket:
    """A bucket of a server on loopback, and how a request reaches it."""

    url: str
    secrets: dict[str, str]
    changes: dict[str, Any] = field(default_factory=dict)


@pytest.fixture(params=["gs", "s3"])
def bucket(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    name = f"bucket-{hashlib.sha256(request.node.name.encode()).hexdigest()[:12]}"
    if request.param == "gs":
        server = request.getfixturevalue("cloud_storage_url")
        cloud_storage.create_bucket(server, name)
        use_cloud_storage(monkeypatch, server)
        store = open_store(f"gs://{name}")
        secrets, changes = {"google_access_token": "a-token"}, {}
    else:
        server = request.getfixturevalue("s3_url")
        s3.create_bucket(server, name)
        for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
            monkeypatch.delenv(variable, raising=False)
        keys = {"aws_access_key_id": "an-id", "aws_secret_access_key": "a-secret", "region_name": "us-east-1"}
        store = boto3.client("s3", endpoint_url=server, **keys)
        secrets = {"access_key_id": "an-id", "secret_access_key": "a-secret"}
        changes = {"endpoint_url": server, "region": "us-east-1"}
    for key in ("rows/a.jsonl", "rows/b.jsonl", "rows/deep/c.jsonl", "rows/_SUCCESS", "rows.csv"):
        content = key.encode() + b"\n" + ROWS
        store.put_object(Bucket=name, Key=key, Body=content) if request.param == "s3" else store.write(key, content)
    store.close()
    return Bucket(f"{request.param}://{name}", secrets, changes)


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("rows/a.jsonl", ["a.jsonl"]),
        ("rows/*.jsonl", ["a.jsonl", "b.jsonl"]),
        ("rows/", ["a.jsonl", "b.jsonl", "deep/c.jsonl"]),
        ("*.csv", ["rows.csv"]),
    ],
)
def test_objects_are_downloaded_in_order_with_the_callers_rights(tmp_path: Path, bucket: Bucket, path: str, names: list[str]) -> None:
    downloaded = download(make_request(tmp_path, f"{bucket.url}/{path}", secrets=bucket.secrets, **bucket.changes))
    assert [file.name for file in downloaded.files] == names
    assert all(content.endswith(ROWS) for content in contents(downloaded).values())
    assert all(Path(file.path).parent == tmp_path / "source" for file in downloaded.files)


def test_missing_object_and_bucket_are_told(tmp_path: Path, bucket: Bucket) -> None:
    code, message, _ = failure_of(make_request(tmp_path, f"{bucket.url}/other/*.jsonl", secrets=bucket.secrets, **bucket.changes))
    assert (code, "names no file that exists" in message) == ("invalid_data", True)
    code, message, hint = failure_of(make_request(tmp_path, f"{bucket.url}-other/a", secrets=bucket.secrets, **bucket.changes))
    assert code == "auth"
    assert "does not exist" in message
    assert hint


def test_source_that_is_too_large_is_not_downloaded(tmp_path: Path, bucket: Bucket) -> None:
    request = make_request(tmp_path, f"{bucket.url}/rows/", secrets=bucket.secrets, limits={"max_source_bytes": 2000}, **bucket.changes)
    code, message, hint = failure_of(request)
    assert (code, "larger than" in message, "TUNESMITH_MAX_SOURCE_BYTES" in hint) == ("invalid_data", True, True)
    assert list(request.folder.iterdir()) == []
    request = make_request(tmp_path, f"{bucket.url}/rows/", secrets=bucket.secrets, limits={"max_parts": 2}, **bucket.changes)
    assert "has 3 files; the limit is 2" in failure_of(request)[1]


def test_callers_endpoint_must_be_allowed(tmp_path: Path) -> None:
    request = make_request(
        tmp_path, "s3://bucket/a", secrets={"access_key_id": "a", "secret_access_key": "b"}, endpoint_url="http://10.0.0.1:9000"
    )
    code, message, _ = failure_of(request)
    assert (code, "endpoint_url is refused" in message, "private address" in message) == ("invalid_config", True, True)


def test_requests_without_keys_are_not_signed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, web: "Web") -> None:
    """The machine's own keys never go where a caller says."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "the-machine")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "its-secret")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    web.status = 403
    code, message, hint = failure_of(make_request(tmp_path, "s3://bucket/a.jsonl", endpoint_url=web.url))
    assert (code, "cannot be read" in message, "without credentials" in hint) == ("auth", True, True)
    assert web.requests
    assert all("Authorization" not in headers for _, headers in web.requests)


# --- the web -----------------------------------------------------------------------------------------------------


@dataclass
class Web:
    """A web server on loopback whose answers a test sets."""

    url: str = ""
    body: bytes = ROWS
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    redirect_to: str | None = None
    cut_after: int | None = None  # bytes of the body, after which the connection breaks, once
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    def answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        self.requests.append((handler.path, dict(handler.headers)))
        if self.redirect_to is not None and not handler.path.startswith("/final"):
            handler.send_response(302)
            handler.send_header("Location", self.redirect_to)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        start = int(handler.headers["Range"].removeprefix("bytes=").rstrip("-")) if "Range" in handler.headers else 0
        handler.send_response(206 if start else self.status)
        body = self.body[start:]
        for name, value in self.headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        cut, self.cut_after = self.cut_after, None
        handler.wfile.write(body[:cut])
        if cut is not None:
            handler.close_connection = True


@pytest.fixture
def web() -> Iterator[Web]:
    state = Web()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            state.answer(self)

        do_HEAD = do_GET  # noqa: N815  # the name that http.server calls

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


def test_file_of_the_web_is_downloaded_with_the_query_that_is_a_secret(tmp_path: Path, web: Web) -> None:
    url = f"{web.url}/data/rows%20a.jsonl"
    downloaded = download(make_request(tmp_path, url, secrets={"source_url": f"{url}?signature=s3cret"}))
    assert contents(downloaded) == {"rows a.jsonl": ROWS}
    assert downloaded.source == url
    assert web.requests[0][0].endswith("?signature=s3cret")


def test_broken_download_goes_on_where_it_was(tmp_path: Path, web: Web) -> None:
    web.headers, web.cut_after = {"ETag": '"v1"'}, 300
    request = make_request(tmp_path, f"{web.url}/rows.jsonl")
    waits: list[float] = []
    assert contents(https_source.download(request, sleep=waits.append)) == {"rows.jsonl": ROWS}
    assert [headers.get("Range") for _, headers in web.requests] == [None, "bytes=300-"]
    assert web.requests[1][1]["If-Range"] == '"v1"'
    assert len(waits) == 1


def test_download_without_a_validator_begins_again(tmp_path: Path, web: Web) -> None:
    web.cut_after = 300
    assert contents(https_source.download(make_request(tmp_path, f"{web.url}/rows.jsonl"), sleep=lambda _: None)) == {"rows.jsonl": ROWS}
    assert [headers.get("Range") for _, headers in web.requests] == [None, None]


def test_redirect_is_followed_and_checked(tmp_path: Path, web: Web) -> None:
    web.redirect_to = "/final"
    assert contents(download(make_request(tmp_path, f"{web.url}/rows.jsonl"))) == {"rows.jsonl": ROWS}
    for target in ("http://10.0.0.1/x", "http://169.254.169.254/latest", "http://[::ffff:10.0.0.1]/x", "file:///etc/passwd"):
        web.redirect_to = target
        code, message, _ = failure_of(make_request(tmp_path, f"{web.url}/rows.jsonl"))
        assert (code, "is refused" in message) == ("invalid_config", True), target
    web.redirect_to = "/again"
    assert "redirects more than 5 times" in failure_of(make_request(tmp_path, f"{web.url}/rows.jsonl"))[1]


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [(404, "invalid_data", "answers 404"), (403, "auth", "answers 403"), (401, "auth", "answers 401"), (500, "internal", "answers 500")],
)
def test_answer_that_is_no_file_is_a_failure(tmp_path: Path, web: Web, status: int, code: str, message: str) -> None:
    web.status = status
    found, text, hint = failure_of(
        make_request(tmp_path, f"{web.url}/rows.jsonl"), lambda request: https_source.download(request, sleep=lambda _: None)
    )
    assert (found, message in text, bool(hint)) == (code, True, True)


def test_page_about_a_file_is_not_the_file(tmp_path: Path, web: Web) -> None:
    web.headers = {"Content-Type": "text/html; charset=utf-8"}
    code, message, hint = failure_of(make_request(tmp_path, f"{web.url}/rows.csv"))
    assert (code, "is a web page" in message, "raw or download" in hint) == ("invalid_data", True, True)


def test_endless_file_is_cut_off(tmp_path: Path, web: Web) -> None:
    web.body = b"x" * 100_000
    code, message, _ = failure_of(make_request(tmp_path, f"{web.url}/rows.jsonl", limits={"max_source_bytes": 1000}))
    assert (code, "larger than" in message) == ("invalid_data", True)


def test_download_stops_when_the_attempt_is_stopped(tmp_path: Path, web: Web) -> None:
    def stop() -> None:
        raise Stopped("cancel")

    request = make_request(tmp_path, f"{web.url}/rows.jsonl")
    with pytest.raises(Stopped):
        download(SourceRequest(request.config, request.secrets, request.stores, request.folder, LOOPBACK, stop))


# --- the Hub -----------------------------------------------------------------------------------------------------

CARD = """---
configs:
- config_name: chats
  data_files:
  - split: train
    path: chats/train-*.jsonl
  - split: test
    path: chats/test.jsonl
- config_name: other
  data_files: other/*.csv
---
# Rows
"""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    from huggingface_hub import constants, hf_api

    with LoopbackHub() as running:
        running.tokens["hf_ada"] = Token("ada")
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", running.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(hf_api.api, "endpoint", running.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield running


def add_chats(hub: LoopbackHub, **changes: Any) -> None:
    files = {"chats/train-0.jsonl": b"0", "chats/train-1.jsonl": b"1", "chats/test.jsonl": b"t", "other/a.csv": b"a", "load.py": b"raise"}
    hub.add_repository("ada/rows", {"README.md": CARD.encode(), **files}, **changes)


def test_files_of_a_configuration_are_downloaded_at_one_commit(tmp_path: Path, hub: LoopbackHub) -> None:
    add_chats(hub)
    downloaded = download(make_request(tmp_path, "hf://ada/rows:chats"))
    assert contents(downloaded) == {"chats/train-0.jsonl": b"0", "chats/train-1.jsonl": b"1"}
    commit = hub.repos["ada/rows"].head.oid
    assert downloaded.source == f"hf://ada/rows:chats/train@{commit}"
    hub.repos["ada/rows"].commit("empty", {})
    again = download(make_request(tmp_path, downloaded.source))
    assert contents(again) == contents(downloaded)


def test_private_dataset_needs_the_callers_token(tmp_path: Path, hub: LoopbackHub) -> None:
    add_chats(hub, private=True)
    code, message, hint = failure_of(make_request(tmp_path, "hf://ada/rows:chats"))
    assert (code, "does not exist, or may not be read" in message, "hf_token" in hint) == ("auth", True, True)
    assert {request.token for request in hub.requests} == {None}
    assert len(download(make_request(tmp_path, "hf://ada/rows:chats/test", secrets={"hf_token": "hf_ada"})).files) == 1


def test_gated_dataset_says_what_helps(tmp_path: Path, hub: LoopbackHub) -> None:
    add_chats(hub, gated=True)
    code, message, hint = failure_of(make_request(tmp_path, "hf://ada/rows:chats"))
    assert (code, "is gated" in message, "accept" in hint) == ("auth", True, True)


@pytest.mark.parametrize(
    ("source", "message", "hint"),
    [
        ("hf://ada/rows", "it has several configurations", "chats, other"),
        ("hf://ada/rows:nope", "no configuration 'nope'", "chats, other"),
        ("hf://ada/rows:chats/nope", "has no split 'nope'", "test, train"),
        ("hf://ada/rows:chats@nope", "no such revision", "branch"),
        ("hf://ada/nothing", "does not exist", "check the name"),
    ],
)
def test_what_the_hub_does_not_have_is_told(tmp_path: Path, hub: LoopbackHub, source: str, message: str, hint: str) -> None:
    add_chats(hub)
    _, found, help_text = failure_of(make_request(tmp_path, source))
    assert message in found
    assert hint in help_text


@pytest.mark.parametrize(
    ("files", "source", "selected"),
    [
        (["train.jsonl", "test.jsonl", "README.md"], "hf://a/b", ["train.jsonl"]),
        (
            ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/validation-0.parquet"],
            "hf://a/b",
            ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
        ),
        (["rows.csv"], "hf://a/b", ["rows.csv"]),
        (["test.csv"], "hf://a/b", ["test.csv"]),
        (["en/train.parquet", "de/train.parquet"], "hf://a/b:de", ["de/train.parquet"]),
        (["train/a.jsonl", "train/b.jsonl", "test/a.jsonl"], "hf://a/b", ["train/a.jsonl", "train/b.jsonl"]),
        (["a.jsonl.gz", "b.jsonl.zst", "dataset_infos.json", ".hidden.json"], "hf://a/b", ["a.jsonl.gz", "b.jsonl.zst"]),
        (["rows.csv", "dev.csv"], "hf://a/b:default/validation", ["dev.csv"]),
    ],
)
def test_files_are_selected_by_their_names(files: list[str], source: str, selected: list[str]) -> None:
    parsed = parse_source(source)
    assert isinstance(parsed, HubSource)
    assert list(select_files(files, (), parsed).paths) == selected


@pytest.mark.parametrize("files", [["load.py", "README.md"], ["README.md"], []])
def test_scripts_are_never_run(files: list[str]) -> None:
    with pytest.raises(NoSelection, match="never run" if "load.py" in files else "no data files"):
        select_files(files, (), HubSource("a/b"))


@pytest.mark.parametrize("path", ["../x.csv", "/etc/passwd.csv", "a//b.csv", "a/../../b.csv", "a\\b.csv"])
def test_path_that_leads_elsewhere_is_not_a_file(path: str) -> None:
    assert not hf_source._is_safe(path)  # pyright: ignore[reportPrivateUsage]


def test_card_of_any_shape_selects_or_is_ignored() -> None:
    source, files = HubSource("a/b"), ["x/train.csv", "x/test.csv", "y.csv"]
    shapes: list[Any] = [
        "x/*.csv",
        ["x/train.csv"],
        {"train": "x/train.csv"},
        {"train": ["x/train.csv"]},
        [{"split": "train", "path": "x"}],
        5,
    ]
    for data_files in shapes:
        selected = select_files(files, [{"config_name": "default", "data_files": data_files}], source)
        assert set(selected.paths) <= set(files)
        assert selected.paths, json.dumps(data_files)
    assert select_files(files, [{"data_dir": "x"}], source).paths == ("x/train.csv",)

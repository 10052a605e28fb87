"""Datasets, archives and images that are made to read files, reach the network, or use up memory and time; and ids that leave their folder.

A success is: a file or a byte that the caller must not have, a connection that the service made, a 5xx, or a /health that takes a second.
"""

import gzip
import io
import json
import pickle
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

import httpx2

from tests.attack import hostile_tools
from tests.attack.campaign import Row, Size, make_row
from tests.attack.fixtures import World
from tests.attack.image_bombs import make_bombs, make_largest
from tests.attack.sockets import exchange
from tests.attack.target import HEALTH_LIMITS_S, HealthProber, Json, Target, run_target

# Images that are each bad in another way, and rows that take longest to decode: more than the service has threads.
BOMBS: dict[Size, tuple[int, int, int]] = {"full": (40, 44, 2), "short": (10, 3, 1)}
VALID_WAIT_S = 2.0
BOMBS_TIMEOUT_S = 120
MEMORY_LIMIT_BYTES = 600 << 20  # an image is decoded in the service; a row may have 32
CANARY = "canary-of-the-home-folder"
LEAKS = (CANARY.encode(), b"root:x:0:0", b"BEGIN OPENSSH", b"SQLite format 3")
DEEP = 100_000
TRAVERSALS = (
    *("..", "../..", "../../canary", "%2e%2e", "%2e%2e%2fcanary", "..%2f..%2fcanary", "%252e%252e%252fcanary", "..%5c..%5ccanary"),
    *("....//canary", "%c0%ae%c0%ae/canary", "%ef%bc%8e%ef%bc%8e/canary", "%00", "x%00.json", "%0d%0aSet-Cookie:%20a=b", "%u002e%u002e"),
    *("/etc/passwd", "//etc/passwd", "%2fetc%2fpasswd", "file:///etc/passwd", "~root", ".", "-rf", "*", "%", "%zz", "'--", '";drop', "|id"),
    *("$(id)", "{{7*7}}", "${7*7}", "con", "a" * 5000, "%e2%80%ae", "training/../../canary", "./canary", "canary%2f..", "..;/canary"),
)
TRAVERSAL_PATHS = (
    *("/jobs/{}", "/jobs/{}/events", "/jobs/{}/logs", "/jobs/{}/checkpoints", "/jobs/download/{}", "/datasets/{}", "/files/{}", "/docs/{}"),
    *("/docs/assets/{}", "/{}"),
)


@dataclass
class CanaryServer:
    """A server on loopback that counts who connects to it."""

    hits: list[str] = field(default_factory=list[str])

    def __enter__(self) -> Self:
        hits = self.hits

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:  # the name that http.server calls
                hits.append(self.path)
                self.send_response(200)
                self.end_headers()

            do_POST = do_HEAD = do_GET  # noqa: N815

            def log_message(self, *_: Any) -> None:
                """Silent."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self._server.server_port}"


def run(size: Size) -> Row:
    """Upload all of it."""
    problems: list[str] = []
    with run_target(slots=1) as target, CanaryServer() as canary:
        world = World(target.owner())
        (target.home / "canary").write_text(CANARY)
        (target.objects / "canary").write_text(CANARY)
        with HealthProber(target) as prober:
            datasets = list(_make_datasets(canary, target))
            problems += [problem for name, upload in datasets for problem in _check_refused(world, name, upload)]
            problems += _check_filenames(world, target)
            traversals = _try_traversals(world)
            problems += traversals[1]
            odd, largest, rows_each = BOMBS[size]
            bombs = [*make_bombs(odd), *make_largest(largest, rows_each)]
            measured, bomb_problems = _drop_bombs(world, target, bombs)
            problems += bomb_problems + prober.problems(HEALTH_LIMITS_S[size])
        if canary.hits:
            problems.append(f"the service connected to an address in a row: {canary.hits[0]}")
    counts = f"{len(datasets)} hostile datasets and archives, {traversals[0]} traversals, {len(bombs)} image bombs"
    return make_row(
        "hostile datasets, archives, ids and images",
        "0 successes, /health under 1 s",
        f"{counts} ({measured}); {prober.describe()}",
        problems,
    )


# --- datasets


def _make_datasets(canary: CanaryServer, target: Target) -> Iterator[tuple[str, Json]]:
    """Uploads that must be refused, as options of a request."""
    image: Json = {"type": "image", "image": ""}
    for place in (
        canary.url + "/x.png",
        "/etc/passwd",
        "file:///etc/passwd",
        str(target.home / "canary"),
        "\\\\host\\x",
        "data:image/png,x",
    ):
        row = {"messages": [{"role": "user", "content": [image | {"image": place}]}, {"role": "assistant", "content": "x"}]}
        yield f"an image at {place[:30]}", _file(json.dumps(row).encode())
    good = b'{"text": "a row"}\n' * 10
    yield "a gzip bomb", _file(gzip.compress(bytes(100 << 20)), "rows.jsonl.gz")
    yield "a gzip in a gzip", _file(gzip.compress(gzip.compress(good)), "rows.jsonl.gz")
    yield "a zip with a traversal", _file(_zip("../../../canary", good), "rows.zip")
    yield "a zip bomb", _file(_zip("rows.jsonl", bytes(100 << 20)), "rows.jsonl")
    yield "a tar with a link", _file(_tar_link(), "rows.tar")
    yield "a pickle", _file(pickle.dumps(_Exploit()), "rows.pkl")
    yield "a pickle named as rows", _file(pickle.dumps(_Exploit()), "rows.jsonl")
    yield "a Parquet file", _file(b"PAR1" + bytes(1000) + b"PAR1", "rows.parquet")
    yield "deep nesting", _file(b'{"text":' + b"[" * DEEP + b"]" * DEEP + b"}")
    yield "a number of a million digits", _file(b'{"text": ' + b"9" * 1_000_000 + b"}")
    yield "NaN", _file(b'{"text": NaN}')
    yield "a duplicate field", _file(b'{"text": "a", "text": "b"}')
    yield "half a surrogate", _file(b'{"text": "\\ud800"}')
    yield "bytes that are no text", _file(b'{"text": "\xff\xfe"}')
    for name, row in hostile_tools.make_rows():
        yield f"a row with {name}", _file(row)
    yield "a row of 40 MB", _file(b'{"text": "' + b"x" * (40 << 20) + b'"}')
    yield "a field of 20 MB", {"data": {"name": "x" * (20 << 20)}, "files": {"file": ("rows.jsonl", good)}}
    yield "ten thousand fields", {"data": {f"field{n}": "x" for n in range(10_000)}, "files": {"file": ("rows.jsonl", good)}}
    yield "two thousand files", {"files": [("file", (f"rows{n}.jsonl", good)) for n in range(2000)]}
    yield "no boundary", {"content": good, "headers": {"Content-Type": "multipart/form-data"}}
    incoming = target.objects / "incoming"
    incoming.mkdir(parents=True, exist_ok=True)
    (target.home / "canary.jsonl").write_text(json.dumps({"text": CANARY}) + "\n")
    (incoming / "link.jsonl").symlink_to(target.home / "canary.jsonl")
    (incoming / "folder").symlink_to(target.home)
    for key in (
        "incoming/link.jsonl",
        "incoming/folder/canary.jsonl",
        "incoming/../../canary.jsonl",
        "/etc/passwd",
        "incoming//../../canary",
    ):
        yield f"incoming rows at {key}", {"files": {"incoming": (None, key)}}


class _Exploit:
    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("/dev/null", "rb"))


def _file(content: bytes, name: str = "rows.jsonl") -> Json:
    return {"files": {"file": (name, content)}}


def _zip(name: str, content: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return out.getvalue()


def _tar_link() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        link = tarfile.TarInfo("rows.jsonl")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return out.getvalue()


def _check_refused(world: World, name: str, upload: Json) -> list[str]:
    response = world.owner.request("POST", "/datasets", **upload)
    if not 400 <= response.status_code < 500:
        return [f"{name}: answered {response.status_code}"]
    if any(leak in response.content for leak in LEAKS):
        return [f"{name}: the answer contains a file of the machine"]
    return []


def _check_filenames(world: World, target: Target) -> list[str]:
    """A file's name is a label: nothing is written where it points."""
    before = {path for path in target.home.parent.rglob("*") if "objects/datasets" not in str(path)}
    problems: list[str] = []
    for name in ("../../../../escaped.jsonl", "/tmp/escaped.jsonl", "..\\escaped.jsonl", "a\x00b.jsonl", "x" * 3000, "\u202egnp.jsonl"):
        response = world.owner.request("POST", "/datasets", files={"file": (name, world.rows())})
        if response.status_code >= 500:
            problems.append(f"a file called {name[:30]!r}: answered {response.status_code}")
    after = {path for path in target.home.parent.rglob("*") if "objects/datasets" not in str(path)}
    escaped = [path.name for path in after - before if "escaped" in path.name]
    return problems + [f"a file was written outside: {name}" for name in escaped]


def _try_traversals(world: World) -> tuple[int, list[str]]:
    """Ids that would leave their folder, on every path that takes one."""
    problems: list[str] = []
    count = 0
    for template in TRAVERSAL_PATHS:
        for name in TRAVERSALS:
            count += 1
            status, answer = exchange(world.owner, "GET", template.format(name).replace(" ", "%20"))
            if status >= 500 or any(leak in answer for leak in LEAKS) or b"\r\nset-cookie: a=b" in answer.lower():
                problems.append(f"GET {template.format(name)[:60]}: answered {status}: {answer[:60]!r}")
    return count, problems


# --- images


def _drop_bombs(world: World, target: Target, bombs: list[tuple[str, bytes]]) -> tuple[str, list[str]]:
    """Upload all images at the same time, while a valid caller goes on."""
    count = len(bombs)
    began = time.monotonic()
    peak_bytes, slowest_s, lost = 0, 0.0, 0
    with ThreadPoolExecutor(count) as pool:
        futures = {pool.submit(_upload_bomb, world, content): name for name, content in bombs}
        while any(not future.done() for future in futures) and time.monotonic() - began < BOMBS_TIMEOUT_S:
            peak_bytes = max(peak_bytes, target.rss_bytes())
            at = time.monotonic()
            try:
                lost += not world.owner.request("POST", "/train", json=world.train_body(), timeout=10).is_success
            except httpx2.TransportError:
                lost += 1
            slowest_s = max(slowest_s, time.monotonic() - at)
            time.sleep(0.1)
        statuses = {name: future.result() for future, name in futures.items()}
    problems = [f"{name}: {status}" for name, status in statuses.items() if not _is_fine(status)]
    if lost or slowest_s > VALID_WAIT_S:
        problems.append(f"a valid caller waited {slowest_s:.1f} s, and {lost} of its requests failed")
    if peak_bytes > MEMORY_LIMIT_BYTES:
        problems.append(f"the service used {peak_bytes >> 20} MB")
    refused = sum(status in (400, 413, 422) for status in statuses.values())
    later = sum(status in (429, 503) for status in statuses.values())
    return f"{refused} refused, {later} told to come later, {count - refused - later} decoded; {peak_bytes >> 20} MB", problems


def _upload_bomb(world: World, content: bytes) -> int | str:
    """The status of the answer, or why there is none."""
    try:
        response = world.owner.request("POST", "/datasets", files={"file": ("rows.jsonl", content)}, timeout=BOMBS_TIMEOUT_S)
    except httpx2.TransportError as error:
        return type(error).__name__
    return response.status_code if "Retry-After" in response.headers or response.status_code < 500 else f"answered {response.status_code}"


def _is_fine(status: int | str) -> bool:
    return isinstance(status, int) and status in (201, 400, 413, 422, 429, 503)

"""A bucket that fails one call in five while attempts publish: fake-gcs-server behind a proxy that injects random faults.

Each publish works like a real attempt: files through `jobs/runtime/artifacts.py` and `storage/gs.py`, then a result that names them.
Afterwards the contents of the bucket are read without the proxy.
"""

import hashlib
import logging
import os
import random
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

import httpx2

from infra.loopback.cloud_storage import run_cloud_storage
from infra.loopback.http_faults import Fault, HttpFaultProxy, RecordedRequest
from jobs.runtime.artifacts import ArtifactUploader, ExportedArtifact
from jobs.runtime.errors import JobFailed
from jobs.runtime.retry import retry_store
from schema.job import Artifact
from schema.result import Result
from schema.spec import artifact_key, result_key
from storage import StorageError, map_concurrently
from storage.gs import GcsStore
from tests.chaos.campaign import Row, Size

log = logging.getLogger(__name__)

PUBLISHES: dict[Size, int] = {"full": 200, "short": 12}
CONCURRENCY = 4
FAULT_RATE = 0.2
# A failed upload is repeated completely: one call in five makes 1.25 times the bytes; with few calls, chance adds some.
MAX_BYTES_RATIO: dict[Size, float] = {"full": 1.3, "short": 1.6}
FILES, FILE_BYTES = 12, 512 << 10  # as in the folder of an adapter
LARGE_ONE_IN, LARGE_BYTES = 40, 17 << 20  # a multipart upload
BUCKET = "chaos"
KINDS = ("503", "429", "reset", "truncated", "wrong checksum")


def run(size: Size) -> Row:
    """Publish, then read everything back, both through the proxy."""
    publishes = PUBLISHES[size]
    with (
        tempfile.TemporaryDirectory(prefix="chaos-storage-") as folder,
        _open_bucket() as (proxy, url),
        httpx2.Client(base_url=url) as backend,
    ):
        store = GcsStore(f"gs://{BUCKET}")
        folders = _make_artifact_folders(Path(folder))
        with ThreadPoolExecutor(CONCURRENCY) as pool:
            sizes = list(
                pool.map(lambda number: _publish(store, number, folders[number % LARGE_ONE_IN == LARGE_ONE_IN - 1]), range(publishes))
            )
            sent = proxy.bytes_sent
            artifacts = _list_published_artifacts(backend)
            reads = list(pool.map(lambda artifact: _read_back(store, artifact, Path(folder)), artifacts))
        store.close()
        intact = [_is_intact(backend, artifact) for artifact in artifacts]
    outcome = Outcome(
        proxy.calls, proxy.faults.total(), len(artifacts), intact.count(False), reads.count(False), reads.count(None), sent / sum(sizes)
    )
    return Row(
        fault="storage fails",
        injected=f"{', '.join(KINDS)} on {outcome.faults:,} of {outcome.calls:,} calls, {publishes} publishes",
        expected=f"0 visible partial sets, 0 bad checksums accepted, at most {MAX_BYTES_RATIO[size]}× the bytes",
        observed=str(outcome),
        passed=(outcome.partial, outcome.damaged) == (0, 0)
        and outcome.ratio <= MAX_BYTES_RATIO[size]
        and outcome.published > publishes / 2,
    )


@dataclass(frozen=True)
class Outcome:
    """What was counted."""

    calls: int
    faults: int
    published: int  # attempts whose result is in the bucket
    partial: int  # published artifacts with a missing or different file
    damaged: int  # artifacts that were read with wrong contents
    refused: int  # artifacts that could not be read within the retries; the error was reported, so this is no damage
    ratio: float  # bytes of all requests divided by bytes of the files

    def __str__(self) -> str:
        visible = f"{self.published} visible, {self.partial} of them partial, {self.damaged} bad checksums accepted"
        return f"{visible}, {self.ratio:.2f}× the bytes ({self.refused} reads refused)"


class RandomFaults(HttpFaultProxy):
    """Injects faults at random and counts the requests."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._rng = random.Random(seed)
        self._counting = threading.Lock()
        self.bytes_sent = 0
        self.calls = 0
        self.faults: Counter[str] = Counter()

    def next_fault(self, request: RecordedRequest) -> Fault | None:
        with self._counting:
            self.requests[:] = [request]  # keeping all bodies would take gigabytes
            self.calls += 1
            size_bytes = int(request.headers.get("Content-Length", 0))
            fault = self._fault(request.method, size_bytes) if self._rng.random() < FAULT_RATE else None
            self.bytes_sent += size_bytes // 2 if fault and fault.kind == "truncate request" else size_bytes
            return fault

    def _fault(self, method: str, size_bytes: int) -> Fault:
        kind = self._rng.choice(KINDS)
        self.faults[kind] += 1
        match kind:
            case "503" | "429":
                return Fault("reject", status=int(kind))
            case "reset":
                return Fault("reset")
            case "truncated":
                return Fault(self._rng.choice(("truncate request", "truncate response")) if size_bytes else "truncate response")
            case _:
                return Fault("corrupt request" if size_bytes else self._rng.choice(("wrong checksum", "corrupt response")))


@contextmanager
def _open_bucket() -> Iterator[tuple[RandomFaults, str]]:
    """Yield the proxy, which clients of this process use for Cloud Storage, and the url of the server behind it."""
    proxy = RandomFaults(seed=4)
    before = os.environ.get("STORAGE_EMULATOR_HOST")
    with run_cloud_storage(public_url=proxy.url, buckets=(BUCKET,)) as server_url:
        proxy.target = server_url
        proxy.start()
        os.environ["STORAGE_EMULATOR_HOST"] = proxy.url
        try:
            yield proxy, server_url
        finally:
            proxy.stop()
            os.environ.pop("STORAGE_EMULATOR_HOST")
            os.environ.update({"STORAGE_EMULATOR_HOST": before} if before else {})


def _make_artifact_folders(folder: Path) -> tuple[Path, Path]:
    """What attempts publish: a folder of files, and the same with a large file."""
    rng = random.Random(5)
    small, large = folder / "small", folder / "large"
    for artifact_folder in (small, large):
        artifact_folder.mkdir()
        for number in range(FILES):
            (artifact_folder / f"part-{number}.bin").write_bytes(rng.randbytes(FILE_BYTES + number))
    (large / "model.gguf").write_bytes(rng.randbytes(LARGE_BYTES))
    return small, large


def _publish(store: GcsStore, number: int, path: Path) -> int:
    """The last steps of an attempt; return the size of its files. A failed one has no result, and none of its files are visible."""
    job_id = f"job-{number}"
    product = ExportedArtifact(name="adapter", kind="adapter", path=path, key=artifact_key("trained_adapters", job_id, 1))
    now = datetime.now(UTC)
    try:
        artifact = ArtifactUploader(store, job_id, 1).upload(product)
        result = Result(job_id=job_id, attempt=1, outcome="completed", artifacts=(artifact,), started_at=now, finished_at=now)
        content = result.model_dump_json(indent=1).encode()
        retry_store("the result", lambda: store.write(result_key(job_id, 1), content, if_absent=True))
    except (JobFailed, StorageError) as error:
        log.warning("publish failed", extra={"job_id": job_id, "error": str(error)})
    return sum(file.stat().st_size for file in path.iterdir())


def _list_published_artifacts(backend: httpx2.Client) -> list[Artifact]:
    """All artifacts that results in the bucket name."""
    artifacts: list[Artifact] = []
    for number in range(max(PUBLISHES.values())):
        content = _read_object(backend, result_key(f"job-{number}", 1))
        artifacts += Result.load(content).artifacts if content is not None else ()
    return artifacts


def _is_intact(backend: httpx2.Client, artifact: Artifact) -> bool:
    """Whether every named file is in the bucket exactly as it was published."""
    return all(_digest(_read_object(backend, artifact.file_key(file))) == file.sha256 for file in artifact.files)


def _read_back(store: GcsStore, artifact: Artifact, folder: Path) -> bool | None:
    """Whether the files are read correctly through the proxy; None when the store reported a failure."""
    with tempfile.TemporaryDirectory(dir=folder) as target:
        try:
            map_concurrently(lambda file: store.download(artifact.file_key(file), Path(target, file.path)), artifact.files)
        except StorageError:
            return None
        return all(_digest(Path(target, file.path).read_bytes()) == file.sha256 for file in artifact.files)


def _read_object(backend: httpx2.Client, key: str) -> bytes | None:
    """Read an object without the proxy."""
    response = backend.get(f"/storage/v1/b/{BUCKET}/o/{quote(key, safe='')}", params={"alt": "media"})
    return response.content if response.status_code == 200 else None


def _digest(content: bytes | None) -> str:
    return hashlib.sha256(content).hexdigest() if content is not None else "nothing"

"""B9: speed and memory of transfers: a 2 GB file through a folder, and 50 MB objects through the loopback servers.

Each transfer runs in its own child process; its peak memory, as the system reports it, includes the interpreter and the client library.
The servers keep uploads in their memory, so only the folder gets the 2 GB file, and their throughput is not that of a network.
"""

import json
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from bench.context import BenchmarkContext
from bench.figures import Measurement, at_most
from bench.servers import SOURCE, make_environment
from infra.loopback.cloud_storage import run_cloud_storage
from infra.loopback.s3 import run_s3

NAME = "transfers"
MB = 1_000_000
LARGE_MB = 2000
OBJECT_MB = 50
FILES = 20  # transferred concurrently, 2.5 MB each
MAX_PEAK_MEMORY_MB = 200
BUCKET = "bench-transfers"
S3_KEYS = {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench", "AWS_REGION": "us-east-1"}

# VmHWM counts from the start of the program; getrusage in a forked child would include the pages of its parent.
CHILD_SCRIPT = """
import hashlib, json, sys, time
from pathlib import Path
from storage import map_concurrently
from storage.registry import open_store
direction, url, source, target = sys.argv[1:]
store, source, target = open_store(url), Path(source), Path(target)
files = sorted(source.iterdir()) if source.is_dir() else [source]
started_at = time.perf_counter()
if direction == "up":
    digests = {file: hashlib.file_digest(file.open("rb"), "sha256").hexdigest() for file in files}
    map_concurrently(lambda file: store.upload(file, f"m/{file.name}", sha256=digests[file]), files)
elif direction == "down":
    map_concurrently(lambda file: store.download(f"m/{file.name}", target / file.name), files)
else:
    with store.open_read(f"m/{files[0].name}") as stream:
        while stream.read(1 << 16):
            pass
elapsed_s = time.perf_counter() - started_at
for line in Path("/proc/self/status").read_text().splitlines():
    if line.startswith("VmHWM"):
        peak_mb = int(line.split()[1]) * 1024 / 1e6
print(json.dumps({"elapsed_s": elapsed_s, "peak_mb": peak_mb}))
"""


@dataclass(frozen=True)
class TransferResult:
    """Time and peak memory of one transfer."""

    elapsed_s: float
    peak_mb: float


async def measure(context: BenchmarkContext) -> list[Measurement]:
    """Measure upload, download and streaming in three stores, and concurrent transfers of many files."""
    single_file, file_folder = context.folder / "one.bin", context.folder / "many"
    _write_file(single_file, OBJECT_MB)
    file_folder.mkdir()
    for number in range(FILES):
        _write_file(file_folder / f"{number:02}.bin", OBJECT_MB / FILES)
    figures = _measure_file_store(context)
    with ExitStack() as servers:
        gs = servers.enter_context(run_cloud_storage(buckets=[BUCKET]))
        aws = servers.enter_context(run_s3(buckets=[BUCKET]))
        variables = {"STORAGE_EMULATOR_HOST": gs, "AWS_ENDPOINT_URL_S3": aws, **S3_KEYS}
        for scheme in ("gs", "s3"):
            figures += _measure(context, f"{scheme}://{BUCKET}/one", single_file, f"{scheme}, {OBJECT_MB} MB", OBJECT_MB, variables)
            figures += _measure(context, f"{scheme}://{BUCKET}/many", file_folder, f"{scheme}, {FILES} files at once", OBJECT_MB, variables)
    return figures


def _measure_file_store(context: BenchmarkContext) -> list[Measurement]:
    large, store = context.folder / "large.bin", context.folder / "objects"
    _write_file(large, LARGE_MB)
    figures = _measure(context, store.as_uri(), large, f"file, {LARGE_MB / 1000:g} GB", LARGE_MB, {})
    large.unlink()
    (store / "m" / large.name).unlink()
    return figures


def _measure(context: BenchmarkContext, url: str, source: Path, name: str, size_mb: float, variables: dict[str, str]) -> list[Measurement]:
    figures: list[Measurement] = []
    for direction in ("up", "down", "stream"):
        if direction == "stream" and source.is_dir():
            continue
        result = _run_transfer(context, direction, url, source, variables)
        figures.append(Measurement(NAME, f"{name}, {direction}, peak memory", result.peak_mb, "MB", at_most(MAX_PEAK_MEMORY_MB)))
        figures.append(Measurement(NAME, f"{name}, {direction}", size_mb / result.elapsed_s, "MB/s"))
    for copy in (context.folder / "copies").glob("*"):
        copy.unlink()
    return figures


def _run_transfer(context: BenchmarkContext, direction: str, url: str, source: Path, variables: dict[str, str]) -> TransferResult:
    command = [sys.executable, "-c", CHILD_SCRIPT, direction, url, str(source), str(context.folder / "copies")]
    done = subprocess.run(command, env=make_environment(context.folder, **variables), cwd=SOURCE, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{direction} {url}: {done.stderr[-2000:]}")
    return TransferResult(**json.loads(done.stdout))


def _write_file(path: Path, size_mb: float) -> None:
    """Write a file whose blocks all differ: each begins with its number."""
    block = bytes(range(256)) * 3906  # 999,936 bytes
    with path.open("wb") as stream:
        for number in range(round(size_mb * MB / len(block))):
            stream.write(number.to_bytes(8, "big") + block)

"""B9: a 2 GB file through a folder and 50 MB objects through the loopback servers, up and down, and the memory that it takes.

Each transfer is a child process, whose peak memory the system tells; its interpreter and client library are in it. The servers keep
uploads in their own memory, so 2 GB go to the folder only, and what they do a second is theirs rather than a network's.
"""

import json
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from bench.figures import Measurement, at_most
from bench.scene import BenchmarkContext
from bench.servers import SOURCE, make_environment
from infra.loopback.cloud_storage import run_cloud_storage
from infra.loopback.s3 import run_s3

NAME = "transfers"
MB = 1_000_000
LARGE_MB = 2000
OBJECT_MB = 50
FILES = 20  # at once, 2.5 MB each
MAX_PEAK_MEMORY_MB = 200
BUCKET = "bench-transfers"
S3_KEYS = {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench", "AWS_REGION": "us-east-1"}

# Its peak counts from its own start: a forked child's getrusage would count its parent's pages.
CHILD_SCRIPT = """
import hashlib, json, sys, time
from pathlib import Path
from storage import map_concurrently
from storage.registry import open_store
how, url, source, target = sys.argv[1:]
store, source, target = open_store(url), Path(source), Path(target)
files = sorted(source.iterdir()) if source.is_dir() else [source]
began = time.perf_counter()
if how == "up":
    digests = {file: hashlib.file_digest(file.open("rb"), "sha256").hexdigest() for file in files}
    map_concurrently(lambda file: store.upload(file, f"m/{file.name}", sha256=digests[file]), files)
elif how == "down":
    map_concurrently(lambda file: store.download(f"m/{file.name}", target / file.name), files)
else:
    with store.open_read(f"m/{files[0].name}") as stream:
        while stream.read(1 << 16):
            pass
took_s = time.perf_counter() - began
for line in Path("/proc/self/status").read_text().splitlines():
    if line.startswith("VmHWM"):
        peak_mb = int(line.split()[1]) * 1024 / 1e6
print(json.dumps({"took_s": took_s, "peak_mb": peak_mb}))
"""


@dataclass(frozen=True)
class TransferResult:
    """One transfer."""

    took_s: float
    peak_mb: float


async def measure(context: BenchmarkContext) -> list[Measurement]:
    """Three ways, three stores; then many files at once."""
    one, many = context.folder / "one.bin", context.folder / "many"
    _write_file(one, OBJECT_MB)
    many.mkdir()
    for number in range(FILES):
        _write_file(many / f"{number:02}.bin", OBJECT_MB / FILES)
    figures = _measure_file_store(context)
    with ExitStack() as servers:
        gs = servers.enter_context(run_cloud_storage(buckets=[BUCKET]))
        aws = servers.enter_context(run_s3(buckets=[BUCKET]))
        variables = {"STORAGE_EMULATOR_HOST": gs, "AWS_ENDPOINT_URL_S3": aws, **S3_KEYS}
        for scheme in ("gs", "s3"):
            figures += _measure(context, f"{scheme}://{BUCKET}/one", one, f"{scheme}, {OBJECT_MB} MB", OBJECT_MB, variables)
            figures += _measure(context, f"{scheme}://{BUCKET}/many", many, f"{scheme}, {FILES} files at once", OBJECT_MB, variables)
    return figures


def _measure_file_store(context: BenchmarkContext) -> list[Measurement]:
    large, store = context.folder / "large.bin", context.folder / "objects"
    _write_file(large, LARGE_MB)
    figures = _measure(context, store.as_uri(), large, f"file, {LARGE_MB / 1000:g} GB", LARGE_MB, {})
    large.unlink()
    (store / "m" / large.name).unlink()
    return figures


def _measure(context: BenchmarkContext, url: str, source: Path, what: str, size_mb: float, variables: dict[str, str]) -> list[Measurement]:
    figures: list[Measurement] = []
    for how in ("up", "down", "stream"):
        if how == "stream" and source.is_dir():
            continue
        moved = _run_transfer(context, how, url, source, variables)
        figures.append(Measurement(NAME, f"{what}, {how}, peak memory", moved.peak_mb, "MB", at_most(MAX_PEAK_MEMORY_MB)))
        figures.append(Measurement(NAME, f"{what}, {how}", size_mb / moved.took_s, "MB/s"))
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
    """Each block begins with its number."""
    block = bytes(range(256)) * 3906  # 999,936 bytes
    with path.open("wb") as stream:
        for number in range(round(size_mb * MB / len(block))):
            stream.write(number.to_bytes(8, "big") + block)

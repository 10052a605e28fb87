"""The service under attack: a real process in its own home, who may call it, and what its home holds."""

import hashlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import httpx2
import psutil

from bench.stub_trainer import make_stub_trainer
from tests.attack.campaign import Size
from tests.chaos.campaign import CampaignError
from tests.chaos.service import INHERITED_VARIABLES, ROWS, SOURCE, store_base_model
from tests.local_token import local_headers
from tests.waiting import wait_until

Json = dict[str, Any]
STOP_WAIT_S = 30
HEALTH_LIMITS_S: dict[Size, float] = {"full": 1.0, "short": 4.0}  # the short form shares its machine with other tests
PROBE_INTERVAL_S = 0.05
# Tables that change by being called: they hold no caller's records.
# One client for all requests of a row: each new one would load the certificates of the whole web, which takes longer than any request.
HTTP = httpx2.Client(timeout=60, trust_env=False, verify=False, limits=httpx2.Limits(max_keepalive_connections=0))
VOLATILE_TABLES = ("audit_entries", "heartbeats", "usage")
VOLATILE_COLUMNS = ("last_used_at",)


@dataclass
class Target:
    """`python -m service` in its own home, on a free port of loopback."""

    home: Path
    variables: Mapping[str, str] = field(default_factory=dict[str, str])
    port: int = 0
    process: "subprocess.Popen[str] | None" = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> Path:
        return self.home.parent / f"{self.home.name}.log"

    @property
    def database(self) -> Path:
        return self.home / "tunesmith.db"

    @property
    def keys_database(self) -> Path:
        return self.home / "access.db"

    @property
    def objects(self) -> Path:
        return self.home / "objects"

    def start(self) -> None:
        """Start the process; return when it listens. Raises CampaignError."""
        self.port = self.port or _free_port()  # its first line has the public URL, which may have another
        inherited = {name: os.environ[name] for name in INHERITED_VARIABLES if name in os.environ}
        store_base_model(self.objects)
        settings = {"HOME": str(self.home), "PYTHONPATH": str(SOURCE), "TUNESMITH_HOME": str(self.home), "OMP_NUM_THREADS": "1"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "service", "--port", str(self.port)],
                cwd=SOURCE,
                env={**inherited, **settings, "HF_HUB_OFFLINE": "1", **self.variables},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        assert self.process.stdout is not None
        if not self.process.stdout.readline().strip():
            raise CampaignError(f"the service did not start: {self.log.read_text()[-500:]}")
        wait_until(self._is_ready, 60, interval_s=0.05, description="the service")

    def stop(self, signal_number: signal.Signals = signal.SIGTERM) -> None:
        """Stop the process."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal_number)
            try:
                self.process.wait(STOP_WAIT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(STOP_WAIT_S)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def close(self) -> None:
        """End the process and its attempts."""
        if self.process is not None:
            self.stop()
        for attempt in self.attempts():
            attempt.kill()

    def attempts(self) -> list[psutil.Process]:
        """The attempt processes of this home."""
        found: list[psutil.Process] = []
        for process in psutil.process_iter(["cmdline", "environ"]):
            workdir = (process.info["environ"] or {}).get("JOB_WORKDIR", "")
            if "jobs.run" in (process.info["cmdline"] or []) and workdir.startswith(f"{self.home}/"):
                found.append(process)
        return found

    def rss_bytes(self) -> int:
        """The resident size of the service's process."""
        assert self.process is not None
        return psutil.Process(self.process.pid).memory_info().rss

    def owner(self) -> "Caller":
        """The caller that owns this home."""
        return Caller(self, local_headers(self.home)["Authorization"].partition(" ")[2])

    def anonymous(self) -> "Caller":
        """A caller without any identity."""
        return Caller(self, None)

    def read_rows(self, tenant_id: str | None = None) -> dict[str, str]:
        """A digest of each row that callers own, by table and key, of one tenant or of all."""
        rows: dict[str, str] = {}
        for path in (self.database, self.keys_database):
            with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
                tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
                for table in tables:
                    if table not in VOLATILE_TABLES and not table.startswith("sqlite_"):
                        rows |= _read_table(database, table, tenant_id)
        return rows

    def read_objects(self) -> dict[str, tuple[int, int]]:
        """Size and time of change of every object."""
        files = (path for path in self.objects.rglob("*") if path.is_file())
        return {str(path.relative_to(self.objects)): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}

    def _is_ready(self) -> bool:
        try:
            return self.anonymous().request("GET", "/health").status_code == 200
        except httpx2.TransportError:
            return False


@dataclass(frozen=True)
class Caller:
    """Someone who sends requests, with a bearer token or none."""

    target: Target
    token: str | None

    def headers(self) -> dict[str, str]:
        """The headers that identify the caller."""
        return {"Authorization": f"Bearer {self.token}"} if self.token else {}

    def request(self, method: str, path: str, **options: Any) -> httpx2.Response:
        """Send one request."""
        headers = self.headers() | dict(options.pop("headers", None) or {})
        return HTTP.request(method, self.target.url + path, headers=headers, **options)

    def expect(self, status: int, method: str, path: str, **options: Any) -> Json:
        """Send a request that must succeed; return its body. Raises CampaignError."""
        response = self.request(method, path, **options)
        if response.status_code != status:
            raise CampaignError(f"{method} {path} answered {response.status_code}: {response.text[:300]}")
        return response.json() if response.content else {}

    def upload(self, rows: str = ROWS, name: str = "rows") -> str:
        """Upload a dataset; return its id."""
        answer = self.expect(201, "POST", "/datasets", files={"file": ("rows.jsonl", rows)}, data={"name": name})
        return str(answer["processed_dataset_id"])

    def create_key(self, name: str, scopes: tuple[str, ...] = ("read", "submit"), **fields: Any) -> "Caller":
        """Create an API key; return the caller that has it."""
        answer = self.expect(201, "POST", "/keys", json={"name": name, "scopes": list(scopes), **fields})
        return Caller(self.target, str(answer["key"]))


@contextmanager
def run_target(*, slots: int = 4, **variables: str) -> Iterator[Target]:
    """A service with a stub of the trainer's environment, whose attempts occupy their slots and leave their token to this suite."""
    with TemporaryDirectory(prefix="tunesmith-attack-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        settings = make_stub_trainer(folder / "trainer") | {"TUNESMITH_LOCAL_MAX_CONCURRENT_JOBS": str(slots)}
        with run_target_in(folder / "home", **{**settings, **variables}) as target:
            yield target


@contextmanager
def run_target_in(home: Path, **variables: str) -> Iterator[Target]:
    """A service in this home, with these settings."""
    target = Target(home, variables)
    try:
        target.start()
        yield target
    finally:
        target.close()


class HealthProber:
    """Asks for /health over and over, in a thread, and remembers the slowest answer."""

    def __init__(self, target: Target) -> None:
        self._url = target.url
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._probe, name="health prober", daemon=True)
        self.answers_s: list[float] = []
        self.failures: list[str] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(30)

    @property
    def slowest_s(self) -> float:
        """The slowest answer."""
        return max(self.answers_s, default=0.0)

    def problems(self, limit_s: float) -> list[str]:
        """What was wrong with the answers."""
        slow = [f"/health took {self.slowest_s:.1f} s"] if self.slowest_s > limit_s else []
        return slow + self.failures[:1]

    def describe(self) -> str:
        """The measurement, for the table."""
        return f"slowest of {len(self.answers_s)} /health: {self.slowest_s * 1000:.0f} ms"

    def _probe(self) -> None:
        while not self._stopping.wait(PROBE_INTERVAL_S):
            began = time.monotonic()
            try:
                response = HTTP.get(f"{self._url}/health", timeout=20)
                if response.status_code != 200:
                    self.failures.append(f"/health answered {response.status_code}")
            except httpx2.TransportError as error:
                self.failures.append(f"/health: {type(error).__name__}")
            self.answers_s.append(time.monotonic() - began)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _read_table(database: sqlite3.Connection, table: str, tenant_id: str | None) -> dict[str, str]:
    cursor = database.execute(f'SELECT * FROM "{table}"')
    columns = [column[0] for column in cursor.description]
    kept = [index for index, name in enumerate(columns) if name not in VOLATILE_COLUMNS]
    rows: dict[str, str] = {}
    for row in cursor:
        if tenant_id is not None and "tenant_id" in columns and row[columns.index("tenant_id")] != tenant_id:
            continue
        values = json.dumps([str(row[index]) for index in kept])
        rows[f"{table}:{'/'.join(str(value) for value in row[:3])}"] = hashlib.sha256(values.encode()).hexdigest()
    return rows

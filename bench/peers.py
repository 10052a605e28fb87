"""Servers that store comparable records: MLflow, Prefect and dstack, each in its own environment.

Each uses SQLite and its default number of workers. Work that the service does not do is turned off: the background jobs of MLflow and
dstack and the services of Prefect. A peer that cannot be installed or started is skipped, with the reason in the table.
"""

import asyncio
import hashlib
import itertools
import os
import sqlite3
import subprocess
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from bench.http import Request, request_json
from bench.servers import Server, ServerUnavailable, find_free_port, make_environment, run_server

PYTHON = "python3.11"
INSTALL_TIMEOUT_S = 900
PIP_QUIET_FLAGS = ("--quiet", "--disable-pip-version-check")
RowOverrides = Callable[[int, str], Mapping[str, str]]


@dataclass(frozen=True)
class PeerTable:
    """A table with one row per run, and the columns to change in a copy of a row: a function of the run's number and uuid."""

    name: str
    row_overrides: RowOverrides


@dataclass(frozen=True)
class Peer:
    """How to install, run and measure a server. `{home}` and `{port}` are replaced in `command` and `environment`."""

    name: str
    packages: tuple[str, ...]
    command: tuple[str, ...]
    environment: Mapping[str, str]
    health_request: Request
    setup_request: Request | None  # creates what a run belongs to; its id goes to `make_create_request`
    make_create_request: Callable[[int, str], Request]  # of the n-th run
    page_request: Request  # for the newest 50 runs
    database: str  # path of the SQLite file in its home
    tables: tuple[PeerTable, ...]


MLFLOW = Peer(
    name="MLflow 3.17.2",
    packages=("mlflow==3.17.2",),
    command=(
        *("mlflow", "server", "--port", "{port}"),
        *("--backend-store-uri", "sqlite:///{home}/mlflow.db", "--artifacts-destination", "{home}/artifacts"),
    ),
    environment={"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"},
    health_request=Request("GET", "/health"),
    setup_request=None,
    make_create_request=lambda n, _: Request(
        "POST", "/api/2.0/mlflow/runs/create", {"experiment_id": "0", "run_name": f"run {n}", "start_time": n}
    ),
    page_request=Request("POST", "/api/2.0/mlflow/runs/search", {"experiment_ids": ["0"], "max_results": 50}),
    database="mlflow.db",
    tables=(
        PeerTable("runs", lambda _, key: {"run_uuid": key, "name": key, "artifact_uri": f"mlflow-artifacts:/0/{key}/artifacts"}),
        PeerTable("tags", lambda _, key: {"run_uuid": key}),
    ),
)

PREFECT = Peer(
    name="Prefect 3.8.8",
    # It requires fastapi 0.139 or newer, but still uses Body(min_items=...), which later versions removed.
    packages=("prefect==3.8.8", "fastapi==0.139.2"),
    command=("prefect", "server", "start", "--host", "127.0.0.1", "--port", "{port}", "--no-services"),
    environment={"PREFECT_HOME": "{home}", "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"},
    health_request=Request("GET", "/api/health"),
    setup_request=Request("POST", "/api/flows/", {"name": "bench"}),
    make_create_request=lambda n, flow: Request(
        "POST", "/api/flow_runs/", {"flow_id": flow, "name": f"run {n}", "state": {"type": "PENDING"}}
    ),
    page_request=Request("POST", "/api/flow_runs/filter", {"limit": 50, "sort": "START_TIME_DESC"}),
    database="prefect.db",
    tables=(
        PeerTable("flow_run_state", lambda _, key: {"id": _second_uuid(key), "flow_run_id": str(uuid.UUID(key))}),
        PeerTable("flow_run", lambda _, key: {"id": str(uuid.UUID(key)), "name": key, "state_id": _second_uuid(key)}),
    ),
)

DSTACK_TOKEN = "bench-only"  # for a server on loopback that runs for a minute
DSTACK_HEADERS = {"Authorization": f"Bearer {DSTACK_TOKEN}"}


def _dstack_run(n: int, _: str) -> Request:
    spec = {"run_name": f"run-{n}", "configuration": {"type": "task", "commands": ["true"]}, "ssh_key_pub": "ssh-ed25519 AAAA"}
    body = {"plan": {"run_spec": spec, "current_resource": None}, "force": False}
    return Request("POST", "/api/project/main/runs/apply", body, DSTACK_HEADERS)


DSTACK = Peer(
    name="dstack 0.22.5",
    packages=("dstack[server]==0.22.5",),
    command=("dstack", "server", "--host", "127.0.0.1", "--port", "{port}", "--token", DSTACK_TOKEN, "-y"),
    environment={"DSTACK_SERVER_DIR": "{home}/server", "DSTACK_SERVER_BACKGROUND_PROCESSING_DISABLED": "1"},
    health_request=Request("GET", "/healthcheck"),
    setup_request=None,
    make_create_request=_dstack_run,
    page_request=Request("POST", "/api/runs/list", {"limit": 50}, DSTACK_HEADERS),
    database="server/data/sqlite.db",
    tables=(
        PeerTable("runs", lambda n, key: {"id": key, "run_name": f"clone-{n}", "submitted_at": _make_timestamp(n)}),
        PeerTable("jobs", lambda n, key: {"id": uuid.UUID(_second_uuid(key)).hex, "run_id": key, "run_name": f"clone-{n}"}),
    ),
)

PEERS = (MLFLOW, PREFECT, DSTACK)


@asynccontextmanager
async def peer_server(peer: Peer, home: Path) -> AsyncGenerator[Server]:
    """A running peer; installs it first if necessary. Raises ServerUnavailable."""
    programs = await asyncio.to_thread(_install, peer)
    home.mkdir(parents=True, exist_ok=True)
    port = find_free_port()
    program, *arguments = [part.format(home=home, port=port) for part in peer.command]
    variables = {name: value.format(home=home) for name, value in peer.environment.items()}
    async with run_server([programs / program, *arguments], home, make_environment(home, **variables), port, peer.health_request) as server:
        yield server


async def make_run_requests(peer: Peer, server: Server) -> Iterator[Request]:
    """Endless requests, each of which creates a run."""
    parent = await request_json(server.url, peer.setup_request) if peer.setup_request else {"id": ""}
    return (peer.make_create_request(number, parent["id"]) for number in itertools.count())


def clone_runs(peer: Peer, home: Path, rows: int) -> None:
    """Add this many copies of the only run to the database of a stopped peer."""
    with closing(sqlite3.connect(home / peer.database)) as db, db:
        db.row_factory = sqlite3.Row
        for table in peer.tables:
            _clone_rows(db, table, rows)


def cache_folder() -> Path:
    """Where the benchmarks install other software."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tunesmith/bench"


def describe_install_error(error: OSError | subprocess.SubprocessError) -> str:
    """The last line that the failed command printed to stderr, if any."""
    return error.stderr.strip().splitlines()[-1] if isinstance(error, subprocess.CalledProcessError) and error.stderr else str(error)


def _clone_rows(db: sqlite3.Connection, table: PeerTable, rows: int) -> None:
    row = dict(db.execute(f"SELECT * FROM {table.name} LIMIT 1").fetchone())
    columns = ", ".join(f'"{name}"' for name in row)
    placeholders = ", ".join(f":{name}" for name in row)
    clones = ({**row, **table.row_overrides(n, _run_key(n))} for n in range(rows))
    for batch in iter(lambda: list(itertools.islice(clones, 10_000)), []):
        db.executemany(f"INSERT INTO {table.name} ({columns}) VALUES ({placeholders})", batch)


def _install(peer: Peer) -> Path:
    """Install a peer if necessary; returns the folder with its programs. Raises ServerUnavailable."""
    folder = cache_folder() / peer.name.partition(" ")[0].lower()
    marker = folder / ".installed"
    if marker.exists() and marker.read_text().split() == list(peer.packages):
        return folder / "bin"
    try:
        subprocess.run([PYTHON, "-m", "venv", folder], check=True, capture_output=True, text=True)
        command = [folder / "bin/pip", "install", *PIP_QUIET_FLAGS, *peer.packages]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError) as error:
        raise ServerUnavailable(f"{peer.name} could not be installed: {describe_install_error(error)}") from error
    marker.write_text("\n".join(peer.packages))
    return folder / "bin"


def _run_key(n: int) -> str:
    return _deterministic_uuid4(str(n)).hex


def _second_uuid(key: str) -> str:
    """A second uuid for the run with this key."""
    return str(_deterministic_uuid4(key))


def _deterministic_uuid4(name: str) -> uuid.UUID:
    """A uuid derived from the name, marked as version 4: dstack hides runs with other versions."""
    return uuid.UUID(bytes=hashlib.blake2b(name.encode(), digest_size=16).digest(), version=4)


def _make_timestamp(n: int) -> str:
    return datetime.fromtimestamp(1_700_000_000 + n, UTC).strftime("%Y-%m-%d %H:%M:%S.%f")

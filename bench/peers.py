"""Servers that keep comparable records: MLflow, Prefect and dstack, each in an environment of its own.

Each runs from SQLite with its default number of workers, and is spared the work that it would do beside ours: MLflow's and
dstack's background jobs and Prefect's services are off. A peer that cannot be installed or started is left out, and the table says why.
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

from bench.http import Request, ask
from bench.servers import Server, ServerDown, environment, free_port, running

PYTHON = "python3.11"
INSTALL_TIMEOUT_S = 900
SILENT_PIP = ("--quiet", "--disable-pip-version-check")
CloneOne = Callable[[int, str], Mapping[str, str]]


@dataclass(frozen=True)
class Table:
    """A table of which one run has one row, and what is different in another run's row: by its number and by a uuid."""

    name: str
    clone: CloneOne


@dataclass(frozen=True)
class Peer:
    """What measuring needs to know of a server. `{home}` and `{port}` stand for what they say."""

    name: str
    packages: tuple[str, ...]
    command: tuple[str, ...]
    variables: Mapping[str, str]
    health: Request
    first: Request | None  # what has to be there before a run; its id goes to `create`
    create: Callable[[int, str], Request]  # the n-th run
    page: Request  # the newest 50
    database: str  # the SQLite file, below its home
    tables: tuple[Table, ...]


MLFLOW = Peer(
    name="MLflow 3.17.2",
    packages=("mlflow==3.17.2",),
    command=(
        *("mlflow", "server", "--port", "{port}"),
        *("--backend-store-uri", "sqlite:///{home}/mlflow.db", "--artifacts-destination", "{home}/artifacts"),
    ),
    variables={"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"},
    health=Request("GET", "/health"),
    first=None,
    create=lambda n, _: Request("POST", "/api/2.0/mlflow/runs/create", {"experiment_id": "0", "run_name": f"run {n}", "start_time": n}),
    page=Request("POST", "/api/2.0/mlflow/runs/search", {"experiment_ids": ["0"], "max_results": 50}),
    database="mlflow.db",
    tables=(
        Table("runs", lambda _, key: {"run_uuid": key, "name": key, "artifact_uri": f"mlflow-artifacts:/0/{key}/artifacts"}),
        Table("tags", lambda _, key: {"run_uuid": key}),
    ),
)

PREFECT = Peer(
    name="Prefect 3.8.8",
    # It needs fastapi from 0.139 on by its own word, and one that still takes Body(min_items=...).
    packages=("prefect==3.8.8", "fastapi==0.139.2"),
    command=("prefect", "server", "start", "--host", "127.0.0.1", "--port", "{port}", "--no-services"),
    variables={"PREFECT_HOME": "{home}", "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"},
    health=Request("GET", "/api/health"),
    first=Request("POST", "/api/flows/", {"name": "bench"}),
    create=lambda n, flow: Request("POST", "/api/flow_runs/", {"flow_id": flow, "name": f"run {n}", "state": {"type": "PENDING"}}),
    page=Request("POST", "/api/flow_runs/filter", {"limit": 50, "sort": "START_TIME_DESC"}),
    database="prefect.db",
    tables=(
        Table("flow_run_state", lambda _, key: {"id": _twin(key), "flow_run_id": str(uuid.UUID(key))}),
        Table("flow_run", lambda _, key: {"id": str(uuid.UUID(key)), "name": key, "state_id": _twin(key)}),
    ),
)

DSTACK_TOKEN = "bench-only"  # of a server on loopback that lives for a minute
DSTACK_HEADERS = {"Authorization": f"Bearer {DSTACK_TOKEN}"}


def _dstack_run(n: int, _: str) -> Request:
    spec = {"run_name": f"run-{n}", "configuration": {"type": "task", "commands": ["true"]}, "ssh_key_pub": "ssh-ed25519 AAAA"}
    body = {"plan": {"run_spec": spec, "current_resource": None}, "force": False}
    return Request("POST", "/api/project/main/runs/apply", body, DSTACK_HEADERS)


DSTACK = Peer(
    name="dstack 0.22.5",
    packages=("dstack[server]==0.22.5",),
    command=("dstack", "server", "--host", "127.0.0.1", "--port", "{port}", "--token", DSTACK_TOKEN, "-y"),
    variables={"DSTACK_SERVER_DIR": "{home}/server", "DSTACK_SERVER_BACKGROUND_PROCESSING_DISABLED": "1"},
    health=Request("GET", "/healthcheck"),
    first=None,
    create=_dstack_run,
    page=Request("POST", "/api/runs/list", {"limit": 50}, DSTACK_HEADERS),
    database="server/data/sqlite.db",
    tables=(
        Table("runs", lambda n, key: {"id": key, "run_name": f"clone-{n}", "submitted_at": _earlier(n)}),
        Table("jobs", lambda n, key: {"id": uuid.UUID(_twin(key)).hex, "run_id": key, "run_name": f"clone-{n}"}),
    ),
)

PEERS = (MLFLOW, PREFECT, DSTACK)


@asynccontextmanager
async def peer_server(peer: Peer, home: Path) -> AsyncGenerator[Server]:
    """A peer at work, installed first where it is missing. Raises ServerDown."""
    programs = await asyncio.to_thread(_installed, peer)
    home.mkdir(parents=True, exist_ok=True)
    port = free_port()
    program, *arguments = [part.format(home=home, port=port) for part in peer.command]
    variables = {name: value.format(home=home) for name, value in peer.variables.items()}
    async with running([programs / program, *arguments], home, environment(home, **variables), port, peer.health) as server:
        yield server


async def run_requests(peer: Peer, server: Server) -> Iterator[Request]:
    """Requests that create a run each, as many as one likes."""
    made = await ask(server.url, peer.first) if peer.first else {"id": ""}
    return (peer.create(number, made["id"]) for number in itertools.count())


def clone_runs(peer: Peer, home: Path, rows: int) -> None:
    """Give a peer that is not running as many more runs, each a copy of the one that it has."""
    with closing(sqlite3.connect(home / peer.database)) as db, db:
        db.row_factory = sqlite3.Row
        for table in peer.tables:
            _clone_rows(db, table, rows)


def _clone_rows(db: sqlite3.Connection, table: Table, rows: int) -> None:
    row = dict(db.execute(f"SELECT * FROM {table.name} LIMIT 1").fetchone())
    columns = ", ".join(f'"{name}"' for name in row)
    marks = ", ".join(f":{name}" for name in row)
    clones = ({**row, **table.clone(n, _key(n))} for n in range(rows))
    for part in iter(lambda: list(itertools.islice(clones, 10_000)), []):
        db.executemany(f"INSERT INTO {table.name} ({columns}) VALUES ({marks})", part)


def _installed(peer: Peer) -> Path:
    """The folder of a peer's programs. Raises ServerDown when it cannot be installed."""
    folder = _cache() / peer.name.partition(" ")[0].lower()
    done = folder / ".installed"
    if done.exists() and done.read_text().split() == list(peer.packages):
        return folder / "bin"
    try:
        subprocess.run([PYTHON, "-m", "venv", folder], check=True, capture_output=True, text=True)
        command = [folder / "bin/pip", "install", *SILENT_PIP, *peer.packages]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError) as error:
        why = error.stderr.strip().splitlines()[-1] if isinstance(error, subprocess.CalledProcessError) and error.stderr else str(error)
        raise ServerDown(f"{peer.name} could not be installed: {why}") from error
    done.write_text("\n".join(peer.packages))
    return folder / "bin"


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tunesmith/bench"


def _key(n: int) -> str:
    return _uuid4(str(n)).hex


def _twin(key: str) -> str:
    """Another uuid that belongs to a run."""
    return str(_uuid4(key))


def _uuid4(name: str) -> uuid.UUID:
    """The same for the same name, and yet of version 4: dstack does not show a run with another."""
    return uuid.UUID(bytes=hashlib.blake2b(name.encode(), digest_size=16).digest(), version=4)


def _earlier(n: int) -> str:
    return datetime.fromtimestamp(1_700_000_000 + n, UTC).strftime("%Y-%m-%d %H:%M:%S.%f")

"""The real service as a process that can be killed, and a trainer environment in which an attempt takes milliseconds."""

import json
import os
import shlex
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import psutil

from bench.stub_trainer import write_interpreter, write_manifest
from tests.chaos.campaign import CampaignError
from tests.local_token import local_headers

SOURCE = Path(__file__).resolve().parents[2]
TUNESMITH = Path(sys.executable).with_name("tunesmith")
TRAINER_PYTHON = SOURCE / ".venvs/llm/bin/python"
SITE_FOLDER = Path(__file__).resolve().with_name("site")
STOP_WAIT_S = 30
INHERITED_VARIABLES = ("PATH", "LANG", "TMPDIR", "TZ", "CLOUDSDK_ROOT")
Json = dict[str, Any]

ROWS = "".join(
    json.dumps({"messages": [{"role": "user", "content": f"what is {n}"}, {"role": "assistant", "content": f"it is {n}"}]}) + "\n"
    for n in range(20)
)
# The launcher recognizes attempts by their command line, so it must equal that of a real attempt.
INTERPRETER = """\
#!/bin/sh
export PYTHONPATH={site}:"$PYTHONPATH" CHAOS_ATTEMPT_LOG={attempt_log} CHAOS_REAL_ONE_IN={real_one_in}
exec {python} "$@"
"""


BASE_MODEL = "tests/no-model"


def store_base_model(objects: Path) -> None:
    """Store a base model without weights: an offline service refuses one that no attempt could get."""
    config = objects / "pretrained_weights/huggingface" / BASE_MODEL / "config.json"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text("{}")


@dataclass
class Service:
    """`tunesmith serve` in its own home, on a fixed port."""

    home: Path
    variables: dict[str, str] = field(default_factory=dict[str, str])
    port: int = 0
    process: "subprocess.Popen[str] | None" = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start the process; return when it listens. Raises CampaignError."""
        self.home.mkdir(parents=True, exist_ok=True)
        store_base_model(self.home / "objects")
        inherited = {name: os.environ[name] for name in INHERITED_VARIABLES if name in os.environ}
        settings = {"HOME": str(self.home), "PYTHONPATH": str(SOURCE), "TUNESMITH_HOME": str(self.home), "OMP_NUM_THREADS": "1"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [TUNESMITH, "serve", "--port", str(self.port)],
                cwd=SOURCE,
                env={**inherited, **settings, "HF_HUB_OFFLINE": "1", **self.variables},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        assert self.process.stdout is not None
        url = self.process.stdout.readline().strip()
        if not url:
            raise CampaignError(f"the service did not start: {self.last_log_line()}")
        self.port = int(url.rpartition(":")[2])

    def kill(self, signal_number: signal.Signals = signal.SIGKILL) -> None:
        """Kill the process, by default without a clean shutdown."""
        assert self.process is not None
        self.process.send_signal(signal_number)
        self.process.wait(STOP_WAIT_S)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def close(self) -> None:
        """End the process and its attempts."""
        if self.process is not None and self.process.poll() is None:
            self.kill(signal.SIGTERM)
        for attempt in self.attempts():
            attempt.kill()

    def attempts(self) -> list[psutil.Process]:
        """The attempt processes of this home."""
        processes = psutil.process_iter(["cmdline", "environ"])
        return [process for process in processes if self._is_attempt(process.info)]

    def request(self, method: str, path: str, **options: Any) -> httpx2.Response:
        """Send one request on its own connection."""
        return httpx2.request(method, self.url + path, **{"timeout": 60, "headers": self.headers, **options})

    @property
    def token(self) -> str:
        """The token of its home folder."""
        return (self.home / "token").read_text()

    @property
    def headers(self) -> dict[str, str]:
        """What every request needs."""
        return local_headers(self.home)

    def upload(self, rows: str = ROWS) -> str:
        """Upload a small dataset; return its id."""
        response = self.request("POST", "/datasets", files={"file": ("rows.jsonl", rows)})
        if response.status_code != 201:
            raise CampaignError(f"the dataset was rejected: {response.text}")
        return response.json()["processed_dataset_id"]

    def job(self, job_id: str) -> Json:
        """Fetch a job."""
        return self.request("GET", f"/jobs/{job_id}").json()

    def jobs(self, **query: str) -> Iterator[Json]:
        """Iterate over all jobs."""
        cursor: str | None = ""
        while cursor is not None:
            page = self.request(
                "GET", "/jobs", params={"limit": "200", "cursor": cursor, **query} if cursor else {"limit": "200", **query}
            ).json()
            yield from page["jobs"]
            cursor = page["next_cursor"]

    @property
    def log(self) -> Path:
        return self.home / "service.log"

    def last_log_line(self) -> str:
        """The last line of its log."""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "nothing"

    def _is_attempt(self, info: Json) -> bool:
        workdir = (info["environ"] or {}).get("JOB_WORKDIR", "")
        return "jobs.run" in (info["cmdline"] or []) and workdir.startswith(f"{self.home}/")


@contextmanager
def service(home: Path, **variables: str) -> Iterator[Service]:
    """Run a service for the duration of the block; `variables` extend its environment."""
    running = Service(home, variables)
    try:
        running.start()
        yield running
    finally:
        running.close()


def make_light_trainer(folder: Path, *, real_one_in: int = 1) -> dict[str, str]:
    """Write an interpreter that trains nothing; one attempt in `real_one_in` is the real `jobs.run`. Returns the launcher's settings.

    The others implement the same protocol with the standard library alone (tests/chaos/light_attempt.py). Each attempt records in the
    folder's file `attempt.log` that it started and whether it got the claim.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {"site": SITE_FOLDER, "attempt_log": folder / "attempt.log", "python": sys.executable}
    (folder / "attempt.log").touch()
    write_interpreter(folder, INTERPRETER.format(**{name: shlex.quote(str(path)) for name, path in paths.items()}, real_one_in=real_one_in))
    return write_manifest(folder)


def make_train_request(dataset_id: str, **changes: Any) -> Json:
    """The body of `POST /train`."""
    return {"processed_dataset_id": dataset_id, "training_config": {"base_model_id": BASE_MODEL}} | changes


def find_corruption(database: Path) -> str:
    """The errors that SQLite finds in its file; empty when it is intact."""
    reader = sqlite3.connect(f"file:{database}?mode=ro", uri=True)
    try:
        [(verdict,)] = reader.execute("PRAGMA integrity_check").fetchmany(1)
        return "" if verdict == "ok" else str(verdict)
    finally:
        reader.close()

"""Runs the service on emulators of Google Cloud on this machine: Firestore, Cloud Storage, Secret Manager, Cloud Run, identities.

    python -m infra.cloud_local                    # runs until Ctrl-C; prints the variables to export in another terminal
    python -m infra.cloud_local -- COMMAND …       # runs a command with these variables, then stops

The service is the real one, with the deployment's adapters and client libraries. They connect to the Firestore emulator,
fake-gcs-server and our own emulators (`infra/loopback/`). Attempts are child processes of the Cloud Run emulator. Buckets are in the
folder, so base models stay there between runs.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from infra.loopback.cloud_run.server import CloudRun
from infra.loopback.cloud_storage import find_free_port, run_cloud_storage
from infra.loopback.firestore import run_firestore_emulator
from infra.loopback.google_identity import GoogleIdentity
from infra.loopback.http_faults import HttpFaultProxy
from infra.loopback.secret_manager import SecretManager

SOURCE = Path(__file__).resolve().parent.parent
TRAINER_PYTHON = SOURCE / ".venvs/llm/bin/python"
DATA_PYTHON = SOURCE / ".venvs/data/bin/python"
PROJECT, REGION, PROFILE = "tunesmith-local", "loopback", "cpu"
BUCKETS = {name: f"{PROJECT}-{name}" for name in ("configs", "datasets", "models")}
USER = "somebody@example.com"
SERVICE_ACCOUNT = f"tunesmith@{PROJECT}.iam.gserviceaccount.com"  # in the cloud, the service and attempts have different ones
RECONCILE_INTERVAL_S = 2.0  # Cloud Scheduler calls once a minute; a person should not wait that long
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 15.0
# Variables of this machine that every process needs.
INHERITED_VARIABLES = (
    *("PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "OMP_NUM_THREADS"),
    *("HF_HOME", "HF_HUB_OFFLINE", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"),
)


@dataclass(frozen=True)
class CloudLocal:
    """The running service and its emulators."""

    url: str
    firestore_host: str
    storage_url: str
    secret_manager: SecretManager
    cloud_run: CloudRun
    identity: GoogleIdentity
    service_log: Path

    def identity_token(self) -> str:
        """An identity token of a user who may call the service, like that of `gcloud auth print-identity-token`."""
        return self.identity.identity_token(self.url, USER)

    def client_environment(self) -> dict[str, str]:
        """The environment of a client: the service's URL, the user's identity token, and the models bucket."""
        return {
            "TUNESMITH_URL": self.url,
            "TUNESMITH_IDENTITY_TOKEN": self.identity_token(),
            "TUNESMITH_MODELS_URL": f"gs://{BUCKETS['models']}",
            "STORAGE_EMULATOR_HOST": self.storage_url,
            "GOOGLE_CLOUD_PROJECT": PROJECT,
        }

    def reconcile(self) -> None:
        """Send the request that Cloud Scheduler sends every minute."""
        request = urllib.request.Request(f"{self.url}/internal/reconcile", data=b"", method="POST")
        request.add_header("Authorization", f"Bearer {self.identity_token()}")
        with urllib.request.urlopen(request, timeout=60):
            pass


@contextmanager
def run_cloud_local(
    folder: Path, *, trainer_python: Path = TRAINER_PYTHON, port: int = 0, storage_faults: HttpFaultProxy | None = None
) -> Generator[CloudLocal]:
    """Run the service and its emulators for the length of the block. Buckets are in `folder`; records are lost at the end.

    `storage_faults` is a running proxy between all clients and the buckets, for tests that inject faults.
    """
    folder.mkdir(parents=True, exist_ok=True)
    inherited = {name: os.environ[name] for name in INHERITED_VARIABLES if name in os.environ}
    with ExitStack() as stack:
        firestore_host = stack.enter_context(run_firestore_emulator())
        address = storage_faults.url if storage_faults else None
        storage_url = stack.enter_context(run_cloud_storage(folder=folder / "buckets", buckets=BUCKETS.values(), public_url=address))
        if storage_faults:
            storage_faults.target, storage_url = storage_url, storage_faults.url
        identity = stack.enter_context(GoogleIdentity(project=PROJECT, email=SERVICE_ACCOUNT))
        secret_manager = stack.enter_context(SecretManager())
        google = {"STORAGE_EMULATOR_HOST": storage_url, "GOOGLE_CLOUD_PROJECT": PROJECT, **identity.environment}
        cloud_run = stack.enter_context(
            CloudRun(
                folder / "executions",
                {"llm": [str(trainer_python), "-m", "jobs.run"], "data": [str(DATA_PYTHON), "-m", "jobs.run"]},
                environment={**inherited, **google, "PYTHONPATH": str(SOURCE), "PYTHONUNBUFFERED": "1", "JOB_REPORT_INTERVAL_S": "1"},
                cwd=SOURCE,
            )
        )
        jobs = f"projects/{PROJECT}/locations/{REGION}/jobs"
        cloud_run.create_job(f"{jobs}/tunesmith-{PROFILE}", "llm")
        cloud_run.create_job(f"{jobs}/tunesmith-data-{PROFILE}", "data")
        port = port or find_free_port()
        url = f"http://127.0.0.1:{port}"
        settings = inherited | google | service_settings(url, folder, firestore_host, cloud_run.host, secret_manager.host)
        log = folder / "service.log"
        stack.enter_context(_run_service(port, settings, log))
        local = CloudLocal(url, firestore_host, storage_url, secret_manager, cloud_run, identity, log)
        _wait_until_ready(local)
        stack.enter_context(_run_scheduler(local))
        yield local


def service_settings(url: str, folder: Path, firestore: str, cloud_run: str, secret_manager: str) -> dict[str, str]:
    """The environment of the deployed service, as infra/terraform sets it, plus the addresses of the emulators."""
    return {
        "PROJECT_ID": PROJECT,
        "REGION": REGION,
        "GCS_CONFIG_BUCKET_NAME": BUCKETS["configs"],
        "TUNESMITH_HOME": str(folder / "home"),
        "TUNESMITH_JOB_STORE": "firestore",
        "TUNESMITH_LAUNCHERS": "cloud-run",
        "TUNESMITH_SECRET_STORE": "secret-manager",
        "TUNESMITH_DATASETS_URL": f"gs://{BUCKETS['datasets']}",
        "TUNESMITH_MODELS_URL": f"gs://{BUCKETS['models']}",
        "TUNESMITH_PUBLIC_URL": url,
        "TUNESMITH_IDENTITY_AUDIENCE": url,
        "TUNESMITH_ATTEMPT_IDENTITY": SERVICE_ACCOUNT,
        "TUNESMITH_IDENTITY": json.dumps({"cloud_run": True, "rules": [{"email": USER, "role": "operator"}]}),
        "K_SERVICE": "tunesmith",
        "TUNESMITH_CLOUD_RUN_PROFILES": PROFILE,
        "TUNESMITH_RECONCILE_INTERVAL_S": "0",
        "TUNESMITH_EVENT_POLL_S": "0.5",
        "TUNESMITH_LOG_FORMAT": "json",
        "TUNESMITH_SIGNING_KEY": "loopback-" * 6,
        "FIRESTORE_EMULATOR_HOST": firestore,
        "CLOUD_RUN_EMULATOR_HOST": cloud_run,
        "SECRET_MANAGER_EMULATOR_HOST": secret_manager,
    }


@contextmanager
def _run_service(port: int, environment: Mapping[str, str], log: Path) -> Generator[None]:
    app = [sys.executable, "-m", "uvicorn", "infra.loopback.front_door:create_app", "--factory"]
    options = ["--port", str(port), "--no-access-log", "--timeout-graceful-shutdown", "3"]
    with log.open("ab") as output:
        process = subprocess.Popen([*app, *options], cwd=SOURCE, env=dict(environment), stdout=output, stderr=output)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(local: CloudLocal) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not _is_ready(local):
        if time.monotonic() > deadline:
            raise SystemExit(f"the service did not start; its log ends with:\n{local.service_log.read_text()[-3000:]}")
        time.sleep(0.1)


def _is_ready(local: CloudLocal) -> bool:
    request = urllib.request.Request(f"{local.url}/health", headers={"Authorization": f"Bearer {local.identity_token()}"})
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


@contextmanager
def _run_scheduler(local: CloudLocal) -> Generator[None]:
    stopping = threading.Event()

    def call_periodically() -> None:
        while not stopping.wait(RECONCILE_INTERVAL_S):
            try:
                local.reconcile()
            except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
                print(f"reconcile: {error}", file=sys.stderr)

    thread = threading.Thread(target=call_periodically, name="scheduler")
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()


def main() -> int:
    """Run until Ctrl-C, or run a command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m infra.cloud_local", description="Runs the service on emulators of Google Cloud.")
    home = Path("~/.tunesmith/cloud-local").expanduser()
    parser.add_argument("--folder", type=Path, default=home, help="folder for buckets, logs and executions")
    parser.add_argument("--port", type=int, default=0, help="port of the service; 0 takes a free one")
    parser.add_argument("command", nargs="*", help="a command to run, after --")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, _raise_keyboard_interrupt)
    with run_cloud_local(args.folder, port=args.port) as local:
        if args.command:
            return subprocess.run(args.command, env=os.environ | local.client_environment(), check=False).returncode
        _print_instructions(local)
        try:
            signal.pause()
        except KeyboardInterrupt:
            print("stopping")
    return 0


def _print_instructions(local: CloudLocal) -> None:
    print("# The service is running. In another terminal:\n")
    for name, value in local.client_environment().items():
        print(f"export {name}={value}")
    print(f'\ncurl -H "Authorization: Bearer $TUNESMITH_IDENTITY_TOKEN" {local.url}/health')
    print(".venvs/dev/bin/tunesmith jobs")
    print(".venvs/dev/bin/python infra/demo.py\n")
    print(f"# The service's log: {local.service_log}")
    print(f"# The output of attempts: {local.service_log.parent / 'executions'}")
    print("# Ctrl-C stops everything. The token is valid for an hour.", flush=True)


def _raise_keyboard_interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    raise SystemExit(main())

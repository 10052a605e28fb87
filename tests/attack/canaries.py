"""Secrets of a caller, each a text that appears nowhere else, on their whole way: no place but the secret store and the attempt knows them.

The full form trains with the real trainer, tracks with W&B and pushes to a Hub on loopback; the short one acts as the attempt.
"""

import base64
import json
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self
from urllib.parse import quote

import psutil

from infra.loopback.hub import LoopbackHub, Token
from tests.attack.attempt_client import end_process, start_attempt
from tests.attack.campaign import Row, Size, make_row
from tests.attack.fixtures import FIXTURES, World, write_artifact
from tests.attack.real_trainer import BASE, build_base, install_base
from tests.attack.target import Caller, Json, Target, run_target, run_target_in
from tests.chaos.campaign import CampaignError
from tests.waiting import wait_until

WATCH_INTERVAL_S = 0.25
TRAINING_WAIT_S = 240
FINAL = ("completed", "failed", "cancelled")


@dataclass(frozen=True)
class Canaries:
    """The secrets of one caller, by what they are."""

    hub_token: str = field(default_factory=lambda: "hf_" + secrets.token_hex(17))
    wandb_key: str = field(default_factory=lambda: secrets.token_hex(20))
    mlflow_token: str = field(default_factory=lambda: "mlflow" + secrets.token_hex(16))
    judge_key: str = field(default_factory=lambda: "judge" + secrets.token_hex(16))
    api_key: str = ""  # of the caller

    def find_in(self, content: bytes) -> list[str]:
        """Which of them the content has, also in the forms that encoders write."""
        found: list[str] = []
        for name, value in vars(self).items():
            forms = (
                value.encode(),
                value.encode()[::-1],
                value.encode().hex().encode(),
                quote(value, safe="").encode(),
                *_base64_forms(value),
            )
            found += [name] if value and any(form in content for form in forms) else []
        return found


@dataclass
class Hits:
    """Where a secret was found."""

    places: dict[str, None] = field(default_factory=dict[str, None])  # in the order in which they were found
    searched: int = 0

    def search(self, place: str, content: bytes, canaries: Canaries) -> None:
        """Search one place."""
        self.searched += 1
        for name in canaries.find_in(content):
            self.places[f"{name} in {place}"] = None


class ProcessWatcher:
    """Reads the command lines of all processes, and the environment of those of one home, over and over."""

    def __init__(self, home: Path, canaries: Canaries, hits: Hits) -> None:
        self._home = str(home)
        self._canaries = canaries
        self._hits = hits
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="process watcher", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(10)

    def _watch(self) -> None:
        while not self._stopping.wait(WATCH_INTERVAL_S):
            for process in psutil.process_iter(["cmdline", "environ", "name"]):
                variables = process.info["environ"] or {}
                environment = json.dumps(variables) if self._home in str(variables) else ""
                seen = f"{process.info['cmdline']} {environment}".encode(errors="replace")
                self._hits.search(f"the process list ({process.info['name']})", seen, self._canaries)


def run(size: Size) -> Row:
    """Lead the secrets through everything; then search."""
    hits = Hits()
    with run_target(slots=2) as target:
        owner = target.owner().create_key("canary", ("admin",), tenant_id="canary")
        canaries = Canaries(api_key=str(owner.token))
        with ProcessWatcher(target.home.parent, canaries, hits):
            _lead_through_api(owner, canaries, hits)
        target.stop()
        _search_files(target.home.parent, canaries, hits)
        problems = _check_secrets_deleted(target)
    if size == "full":
        problems += _train(hits)
    problems = list(hits.places) + problems
    steps = "submit, fail, retry, pause, resume, clone, export, delete" + (", real training, W&B, push" if size == "full" else "")
    figure = "0 hits in stores, objects, logs, processes, answers, W&B folders, models"
    return make_row("secret canaries", figure, f"{steps}: {hits.searched} places searched, {len(hits.places)} hits", problems)


# --- with a stub


def _lead_through_api(owner: Caller, canaries: Canaries, hits: Hits) -> None:
    """Every request that takes a secret, and the answers of every route afterwards."""
    target = owner.target
    world = World(owner)
    wandb: Json = {"api_key": canaries.wandb_key, "mode": "offline"}
    config = {"base_model_id": "tests/no-model", "wandb_config": wandb}
    config |= {"mlflow_config": {"tracking_uri": "http://127.0.0.1:50099/", "token": canaries.mlflow_token}}
    body = world.train_body(hf_token=canaries.hub_token, training_config=config)
    judge = {"type": "score_model", "name": "judge", "base_url": "http://127.0.0.1:50099/v1", "model": "m", "api_key": canaries.judge_key}
    grpo = {"base_model_id": "tests/no-model", "trainer_type": "grpo", "reward_config": [judge]}
    again: Json = {"hf_token": canaries.hub_token, "wandb_api_key": canaries.wandb_key, "secrets": {"mlflow_token": canaries.mlflow_token}}

    def send(method: str, path: str, *, status: int, **options: object) -> Json:
        response = owner.request(method, path, **options)
        hits.search(f"the answer to {method} {path.partition('?')[0]}", str(response.headers).encode() + response.content, canaries)
        if response.status_code != status:
            raise CampaignError(f"{method} {path} answered {response.status_code}: {response.text[:200]}")
        return response.json()

    job_id = str(send("POST", "/train", json=body, status=201)["job_id"])
    attempt = start_attempt(target, job_id)
    attempt.report({"type": "warning", "code": "test", "message": "a line of the attempt"}, first_seq=1)
    attempt.finish("failed", failure={"code": "auth", "message": "the Hub refused the token"})
    end_process(target, attempt)
    send("POST", f"/jobs/{job_id}/retry", json=again, status=202)
    attempt = start_attempt(target, job_id, 2)
    attempt.finish(artifacts=[write_artifact(attempt, b"weights")])
    end_process(target, attempt)
    copy = str(
        send("POST", f"/jobs/{job_id}/clone", json={"hf_token": canaries.hub_token, "secrets": _clone_secrets(canaries)}, status=201)[
            "job_id"
        ]
    )
    send("POST", f"/jobs/{copy}/pause", status=202)
    send("POST", f"/jobs/{world.completed_job_id}/export", json={"hf_token": canaries.hub_token}, status=201)
    judged = world.train_body(training_config=grpo, processed_dataset_id=world.prompts_id)
    send("POST", "/train", json=judged, status=201)
    send("POST", "/train", json=judged | {"unknown": 1}, status=422)
    for name, make_request in FIXTURES.items():
        if name.startswith(("get_", "list_", "read_")):
            response = make_request(world).send(owner)
            hits.search(f"the answer to {name}", response.content, canaries)
    for each in (job_id, copy):
        for path in ("", "/events?limit=1000", "/logs", "/checkpoints"):
            hits.search(f"the answer to GET a job{path.partition('?')[0]}", owner.request("GET", f"/jobs/{each}{path}").content, canaries)
    headers = {"X-HF-Token": canaries.hub_token}
    send("DELETE", f"/jobs/{job_id}?delete_hub=true", headers=headers, status=200)


def _clone_secrets(canaries: Canaries) -> dict[str, str]:
    return {"wandb_api_key": canaries.wandb_key, "mlflow_token": canaries.mlflow_token}


# --- with the real trainer


def _train(hits: Hits) -> list[str]:
    """A training that tracks with W&B and pushes, one that fails and is retried, and the deletion of both."""
    canaries = Canaries()
    with TemporaryDirectory(prefix="tunesmith-attack-") as name, LoopbackHub() as hub:
        folder = Path(name)
        base = build_base(folder / "base")
        hub.tokens[canaries.hub_token] = Token("ada")
        variables = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        with run_target_in(folder / "home", **variables) as target:
            install_base(target, base)
            with ProcessWatcher(target.home, canaries, hits):
                problems = _train_and_delete(target, canaries, hits, hub)
            _search_files(folder, canaries, hits)
        for request in hub.requests:
            hits.search(f"the path of a request to the Hub ({request.method})", request.path.encode(), canaries)
    return problems


def _train_and_delete(target: Target, canaries: Canaries, hits: Hits, hub: LoopbackHub) -> list[str]:
    owner = target.owner()
    rows = "".join(
        json.dumps({"messages": [{"role": "user", "content": f"what is {n}"}, {"role": "assistant", "content": "a list"}]}) + "\n"
        for n in range(20)
    )
    dataset_id = owner.upload(rows)
    export = {"format": "merged", "destination": "hfhub", "hf_repo_id": "ada/tuned", "include_gguf": False}
    config: Json = {"base_model_id": BASE, "hyperparameters": {"max_steps": 2, "batch_size": 2, "max_seq_length": 64}}
    config |= {"wandb_config": {"api_key": canaries.wandb_key, "mode": "offline"}, "export_config": export}
    body: Json = {"processed_dataset_id": dataset_id, "hf_token": canaries.hub_token, "training_config": config}
    missing: Json = body | {"training_config": config | {"base_model_id": "ada/missing", "export_config": {"format": "adapter"}}}
    response = owner.request("POST", "/train", json=missing)
    job_ids = [str(owner.expect(201, "POST", "/train", json=body)["job_id"])]
    job_ids += [str(response.json()["job_id"])] if response.is_success else []
    statuses = [_wait_until_final(owner, job_id) for job_id in job_ids]
    problems = [] if statuses[0] == "completed" else [f"the training that pushes is {statuses[0]}"]
    _search_answers(owner, job_ids, canaries, hits)
    _search_files(target.home, canaries, hits)
    for name, repository in hub.repos.items():
        for path, file in repository.files.items():
            hits.search(f"{path} of the repository {name}", bytes(file.content), canaries)
    for job_id in job_ids:
        response = owner.request("DELETE", f"/jobs/{job_id}", headers={"X-HF-Token": canaries.hub_token}, params={"delete_hub": "true"})
        hits.search("the answer to DELETE", response.content, canaries)
    return problems


def _wait_until_final(owner: Caller, job_id: str) -> str:
    wait_until(
        lambda: owner.expect(200, "GET", f"/jobs/{job_id}")["status"] in FINAL, TRAINING_WAIT_S, interval_s=0.5, description="the training"
    )
    return str(owner.expect(200, "GET", f"/jobs/{job_id}")["status"])


def _search_answers(owner: Caller, job_ids: list[str], canaries: Canaries, hits: Hits) -> None:
    for job_id in job_ids:
        for path in ("", "/events?limit=1000", "/logs?limit=1048576", "/checkpoints"):
            hits.search(f"the answer to GET a job{path.partition('?')[0]}", owner.request("GET", f"/jobs/{job_id}{path}").content, canaries)


# --- searching


def _search_files(folder: Path, canaries: Canaries, hits: Hits) -> None:
    """Every file below a folder: records, objects, logs, working folders, W&B's too."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with _tolerate_removal():
                hits.search(str(path.relative_to(folder)), path.read_bytes(), canaries)


@contextmanager
def _tolerate_removal() -> Iterator[None]:
    """A file may be removed between its listing and its reading."""
    try:
        yield
    except FileNotFoundError:
        return


def _check_secrets_deleted(target: Target) -> list[str]:
    """The deleted job's secrets are gone: the stores of the jobs that are left are no more than those."""
    database_jobs = {row.partition(":")[2].partition("/")[0] for row in target.read_rows() if row.startswith("jobs:")}
    stored = [path.name for path in (target.home / "secrets").rglob("*") if path.is_file()]
    left = [name for name in stored if name.startswith("training_") and not any(name.startswith(job_id) for job_id in database_jobs)]
    return [f"secrets of a deleted job are left: {left[0]}"] if left else []


def _base64_forms(value: str) -> Iterator[bytes]:
    """What is the same in base64 wherever the value begins."""
    for offset in range(3):
        encoded = base64.b64encode(b"x" * offset + value.encode())
        yield encoded[4 if offset else 0 : -4]

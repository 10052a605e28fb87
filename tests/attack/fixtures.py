"""A valid request for every operation of the API, against resources that exist. A new operation adds its fixture to `FIXTURES`.

The rows that walk the API take their paths, ids and bodies from here: the fuzzer mixes them with generated ones so that it reaches
successful answers, and the access row sends each of them as someone who must not.
"""

import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any
from urllib.parse import quote, urlsplit

import httpx2

from schema.checkpoint import MANIFEST, Checkpoint, checkpoint_key, checkpoints_prefix
from schema.ingestion import TokenLengths
from tests.attack.attempt_client import AttemptClient, end_process, start_attempt
from tests.attack.target import Caller, Json, Target
from tests.chaos.service import BASE_MODEL
from tests.factories import make_config

CHECKPOINT_STEP = 4


@dataclass(frozen=True)
class ValidRequest:
    """A request that the service accepts from its owner."""

    method: str
    template: str  # the path with its parameters in braces, as in the OpenAPI document
    status: int  # of the answer
    path: dict[str, str] = field(default_factory=dict[str, str])
    query: dict[str, str] = field(default_factory=dict[str, str])
    headers: dict[str, str] = field(default_factory=dict[str, str])
    body: Json | None = None
    form: dict[str, str] | None = None
    file: tuple[str, str] | None = None  # name and content
    content: bytes | None = None  # a body that is no JSON

    @property
    def url_path(self) -> str:
        """The path with its parameters."""
        return self.template.format_map({name: quote(value, safe="") for name, value in self.path.items()})

    def options(self) -> Json:
        """The request's content, as an HTTP client takes it."""
        options: Json = {"params": self.query, "headers": self.headers}
        if self.body is not None:
            options["json"] = self.body
        if self.content is not None:
            options["content"] = self.content
        if self.form is not None:
            options["data"] = self.form
        if self.file is not None:
            options["files"] = {"file": self.file}
        return options

    def send(self, caller: Caller, **changes: Any) -> httpx2.Response:
        """Send it as this caller."""
        return caller.request(self.method, self.url_path, **(self.options() | changes))


class World:
    """One tenant's dataset and jobs in every state, made through the API. `mark` is in every name and row of it."""

    def __init__(self, owner: Caller) -> None:
        self.owner = owner
        self.target: Target = owner.target
        self.mark = f"mark{secrets.token_hex(8)}"
        self.dataset_id = self.make_dataset()
        prompts = (json.dumps({"prompt": f"{self.mark} what is {n}", "answer": str(n)}) + "\n" for n in range(12))
        self.prompts_id = owner.upload("".join(prompts), name=f"{self.mark} prompts")
        self.completed_job_id, self.artifact_key = self._complete_job()
        self.failed_job_id = self._fail_job()
        self.running = start_attempt(self.target, self.submit())  # keeps its slot, so that later jobs stay queued

    @property
    def marks(self) -> tuple[str, ...]:
        """What must never be in another tenant's answers."""
        return (self.mark, self.dataset_id, self.prompts_id, self.completed_job_id, self.failed_job_id, self.running.job_id)

    def make_dataset(self) -> str:
        """A new dataset."""
        return self.owner.upload(self.rows(), name=f"{self.mark} rows")

    def rows(self) -> str:
        """The rows of a dataset, different each time."""
        salt = secrets.token_hex(4)
        rows = (
            {"messages": [{"role": "user", "content": f"{self.mark} {salt} {n}"}, {"role": "assistant", "content": f"it is {n}"}]}
            for n in range(12)
        )
        return "".join(json.dumps(row) + "\n" for row in rows)

    def train_body(self, **changes: Any) -> Json:
        """The body of `POST /train`."""
        config = {"base_model_id": BASE_MODEL, "hyperparameters": {"max_steps": 8}}
        return {"processed_dataset_id": self.dataset_id, "job_name": f"{self.mark} job", "training_config": config} | changes

    def submit(self, **changes: Any) -> str:
        """A new job."""
        return str(self.owner.expect(201, "POST", "/train", json=self.train_body(**changes))["job_id"])

    def paused_job(self) -> str:
        """A new paused job."""
        return self._control("pause")

    def cancelled_job(self) -> str:
        """A new cancelled job."""
        return self._control("cancel")

    def file_token(self) -> str:
        """The token of a link to the published file."""
        answer = self.owner.expect(200, "GET", f"/jobs/download/{self.completed_job_id}")
        return urlsplit(answer["download_url"]).path.rpartition("/")[2]

    def upload_token(self) -> str:
        """The token of a new link that takes a file."""
        answer = self.owner.expect(201, "POST", "/datasets/uploads", json={"filename": "rows.jsonl", "size_bytes": 100_000})
        return urlsplit(answer["url"]).path.rpartition("/")[2]

    def write_token_lengths(self) -> str:
        """Write down the token lengths of the dataset, as an earlier count does; returns the dataset's id."""
        lengths = {"base_model_id": BASE_MODEL, "tokenizer_digest": "1", "exact": True, "rows": 12, "total_tokens": 24, "mean": 2.0}
        counted = TokenLengths.model_validate(lengths | {"percentiles": {"50": 2}, "histogram": [(2, 12)]})
        name = sha256(BASE_MODEL.encode()).hexdigest()[:16]
        path = self.target.objects / f"datasets/{self.dataset_id}/token_lengths/{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(counted.model_dump_json())
        (self.target.objects / f"pretrained_weights/huggingface/{BASE_MODEL}/tokenizer.json").write_text("{}")
        return self.dataset_id

    def login_code(self) -> str:
        """A new code with which a browser logs in."""
        return urlsplit(self.owner.expect(201, "POST", "/login-codes")["url"]).query.removeprefix("code=")

    def make_key(self) -> str:
        """The id of a new API key."""
        return str(self.owner.expect(201, "POST", "/keys", json={"name": f"{self.mark} key", "scopes": ["read"]})["key_id"])

    def _control(self, verb: str) -> str:
        job_id = self.submit()
        self.owner.expect(202, "POST", f"/jobs/{job_id}/{verb}")
        return job_id

    def _complete_job(self) -> tuple[str, str]:
        """A completed job with a checkpoint and a published file."""
        job_id = self.submit()
        attempt = start_attempt(self.target, job_id)
        content = f"{self.mark} weights".encode()
        artifact = write_artifact(attempt, content)
        self._write_checkpoint(attempt)
        response = attempt.finish(artifacts=[artifact], published_step=CHECKPOINT_STEP, last_checkpoint_step=CHECKPOINT_STEP)
        response.raise_for_status()
        end_process(self.target, attempt)
        return job_id, str(artifact["key"])

    def _write_checkpoint(self, attempt: AttemptClient) -> None:
        manifest = Checkpoint.model_validate(
            {"job_id": attempt.job_id, "attempt": attempt.number, "step": CHECKPOINT_STEP, "total_steps": 8, "epoch": 0.5, "files": []}
            | {"training_config": make_config(), "created_at": datetime.now(UTC)}
        )
        key = checkpoint_key(checkpoints_prefix(attempt.job_id, None), attempt.number, CHECKPOINT_STEP)
        path = self.target.objects / key / MANIFEST
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(manifest.with_checksum())

    def _fail_job(self) -> str:
        attempt = start_attempt(self.target, self.submit())
        failure = {"code": "internal", "message": f"{self.mark} failure"}
        attempt.finish("failed", failure=failure).raise_for_status()
        end_process(self.target, attempt)
        return attempt.job_id


def write_artifact(attempt: AttemptClient, content: bytes) -> Json:
    """Write an adapter into the object store, as the attempt does; return it as the result names it."""
    key = f"trained_adapters/{attempt.job_id}/attempt-{attempt.number}/"
    path = attempt.target.objects / key / "adapter_model.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    file = {"path": path.name, "size_bytes": len(content), "sha256": sha256(content).hexdigest()}
    uri = f"{attempt.target.objects.as_uri()}/{key}"
    return {"name": "adapter", "kind": "adapter", "uri": uri, "key": key, "size_bytes": len(content), "files": [file]}


def _of_job(method: str, verb: str, status: int, job_id: Callable[[World], str], **fields: Any) -> Callable[[World], ValidRequest]:
    """A request to a path below a job."""
    return lambda world: ValidRequest(method, "/jobs/{job_id}" + verb, status, path={"job_id": job_id(world)}, **fields)


def _completed(world: World) -> str:
    return world.completed_job_id


# By operation id. Each call makes what it needs, so that a request that deletes or changes something can be sent again.
FIXTURES: dict[str, Callable[[World], ValidRequest]] = {
    "create_training_job": lambda world: ValidRequest("POST", "/train", 201, body=world.train_body()),
    "get_capabilities": lambda _: ValidRequest("GET", "/capabilities", 200),
    "list_models": lambda _: ValidRequest("GET", "/models", 200),
    "get_model": lambda _: ValidRequest("GET", "/models/{name}", 200, path={"name": BASE_MODEL}),
    "list_jobs": lambda _: ValidRequest("GET", "/jobs", 200, query={"limit": "200", "counts": "true"}),
    "get_download_links": lambda world: ValidRequest("GET", "/jobs/download/{job_id}", 200, path={"job_id": world.completed_job_id}),
    "get_job": _of_job("GET", "", 200, _completed),
    "delete_job": _of_job("DELETE", "", 200, World.cancelled_job),
    "cancel_job": _of_job("POST", "/cancel", 202, World.submit),
    "pause_job": _of_job("POST", "/pause", 202, World.submit),
    "resume_job": _of_job("POST", "/resume", 202, World.paused_job, body={}),
    "retry_job": _of_job("POST", "/retry", 202, World.cancelled_job, body={}),
    "clone_job": _of_job("POST", "/clone", 201, _completed, body={}),
    "export_job": _of_job("POST", "/export", 201, _completed, body={}),
    "list_checkpoints": _of_job("GET", "/checkpoints", 200, _completed),
    "delete_checkpoints": _of_job("DELETE", "/checkpoints", 200, World.cancelled_job),
    "get_storage": lambda _: ValidRequest("GET", "/storage", 200),
    "export_checkpoint": lambda world: ValidRequest(
        "POST",
        "/jobs/{job_id}/checkpoints/{step}/export",
        201,
        path={"job_id": world.completed_job_id, "step": str(CHECKPOINT_STEP)},
        body={},
    ),
    "list_job_events": _of_job("GET", "/events", 200, _completed),
    "get_job_metrics": _of_job("GET", "/metrics", 200, _completed, query={"points": "10"}),
    "read_job_logs": _of_job("GET", "/logs", 200, _completed),
    "upload_dataset": lambda world: ValidRequest(
        "POST", "/datasets", 201, form={"name": f"{world.mark} upload"}, file=("rows.jsonl", world.rows())
    ),
    "check_dataset": lambda world: ValidRequest(
        "POST", "/datasets/check", 200, form={"format": "jsonl"}, file=("rows.jsonl", world.rows())
    ),
    "create_upload": lambda _: ValidRequest("POST", "/datasets/uploads", 201, body={"filename": "rows.jsonl", "size_bytes": 1000}),
    "receive_upload": lambda world: ValidRequest(
        "PUT", "/datasets/uploads/{token}", 200, path={"token": world.upload_token()}, content=world.rows().encode()
    ),
    "list_rows": lambda world: ValidRequest(
        "GET", "/datasets/{processed_dataset_id}/rows", 200, path={"processed_dataset_id": world.dataset_id}, query={"limit": "3"}
    ),
    "count_token_lengths": lambda world: ValidRequest(
        "POST",
        "/datasets/{processed_dataset_id}/token_lengths",
        200,
        path={"processed_dataset_id": world.write_token_lengths()},
        body={"base_model_id": BASE_MODEL},
    ),
    "list_datasets": lambda _: ValidRequest("GET", "/datasets", 200, query={"limit": "200"}),
    "get_dataset": lambda world: ValidRequest(
        "GET", "/datasets/{processed_dataset_id}", 200, path={"processed_dataset_id": world.dataset_id}
    ),
    "delete_dataset": lambda world: ValidRequest(
        "DELETE", "/datasets/{processed_dataset_id}", 200, path={"processed_dataset_id": world.make_dataset()}
    ),
    "download_file": lambda world: ValidRequest("GET", "/files/{token}", 200, path={"token": world.file_token()}),
    "get_health": lambda _: ValidRequest("GET", "/health", 200),
    "create_login_code": lambda _: ValidRequest("POST", "/login-codes", 201),
    "log_in": lambda world: ValidRequest("GET", "/login", 303, query={"code": world.login_code()}),
    "log_out": lambda _: ValidRequest("POST", "/logout", 204),
    "get_whoami": lambda _: ValidRequest("GET", "/whoami", 200),
    "create_key": lambda world: ValidRequest("POST", "/keys", 201, body={"name": f"{world.mark} key", "scopes": ["read"]}),
    "list_keys": lambda _: ValidRequest("GET", "/keys", 200),
    "revoke_key": lambda world: ValidRequest("DELETE", "/keys/{key_id}", 200, path={"key_id": world.make_key()}),
    "list_audit_entries": lambda _: ValidRequest("GET", "/audit", 200),
}


def _of_attempt(message: str, status: int, body: Callable[[AttemptClient], Json]) -> Callable[[World], ValidRequest]:
    """A message of the running attempt, without its token."""
    return lambda world: ValidRequest(
        "POST",
        "/internal/jobs/{job_id}/attempts/{attempt}/" + message,
        status,
        path={"job_id": world.running.job_id, "attempt": str(world.running.number)},
        body=body(world.running),
    )


# Routes that the OpenAPI document leaves out, by the name of their function.
UNLISTED_FIXTURES: dict[str, Callable[[World], ValidRequest]] = {
    "get_root": lambda _: ValidRequest("GET", "/", 200),
    "get_docs": lambda _: ValidRequest("GET", "/docs", 200),
    "claim": _of_attempt("claim", 200, lambda attempt: {"claimant": attempt.claimant}),
    "report": _of_attempt("events", 200, lambda _: {"first_seq": 1, "events": []}),
    "finish": _of_attempt("result", 204, lambda attempt: attempt.make_result("failed")),
    "renew_token": _of_attempt("token", 200, lambda _: {}),
    "issue_credentials": _of_attempt("credentials", 200, lambda _: {}),
    "reconcile": lambda _: ValidRequest("POST", "/internal/reconcile", 200),
    "clean_up": lambda _: ValidRequest("POST", "/internal/cleanup", 200, body={"orphans": True}),
    "list_orphans": lambda _: ValidRequest("GET", "/internal/orphans", 200),
}

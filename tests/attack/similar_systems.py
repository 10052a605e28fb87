"""Faults that similar services had in production, one check each.

An unsigned header that names the caller, tokens in the files of a bucket, files that anybody can download who knows a job's id, another
tenant's model as a base, evaluated client input, pickled uploads, a path that the server opens, keys that are echoed or logged.
"""

import base64
import json
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.attack.attempt_client import start_attempt
from tests.attack.campaign import Row, Size, make_row
from tests.attack.fixtures import FIXTURES, World
from tests.attack.sockets import exchange
from tests.attack.target import Caller, Json, Target, run_target

SECRET = "hf_" + "SimilarSystemsSecret0123456789"
IDENTITY_HEADERS: dict[str, str] = {
    "X-Goog-Authenticated-User-Email": "accounts.google.com:admin@example.com",
    "X-Goog-Authenticated-User-Id": "accounts.google.com:1",
    "X-Apigateway-Api-Userinfo": base64.b64encode(b'{"email": "admin@example.com", "sub": "1"}').decode(),
    "X-Endpoint-Api-Userinfo": base64.b64encode(b'{"email": "admin@example.com", "sub": "1"}').decode(),
    "X-Forwarded-User": "admin",
    "X-Forwarded-Email": "admin@example.com",
    "X-Auth-Request-User": "admin",
    "X-Remote-User": "admin",
    "Remote-User": "admin",
    "X-User-Id": "admin",
    "X-Tenant-Id": "local",
    "X-Forwarded-For": "127.0.0.1",
    "X-Real-IP": "127.0.0.1",
    "X-Goog-IAP-JWT-Assertion": "",
    "X-Serverless-Authorization": "",
    "X-Amzn-Oidc-Data": "",
    "Cookie": "session=admin; token=admin",
}
EVALUATED = ("__import__('os').system('touch {canary}')", "(lambda: open('{canary}', 'w'))()", "{{7*7}}", "${{jndi:ldap://127.0.0.1/x}}")


def run(size: Size) -> Row:
    """Run every check; size does not matter."""
    with run_target(slots=2) as target:
        world = World(target.owner())
        checks: tuple[tuple[str, Callable[[World, Target], Iterator[str]]], ...] = (
            ("unsigned identity headers", _check_identity_headers),
            ("tokens in files of the bucket", _check_secrets_in_objects),
            ("downloads without a signed link", _check_unsigned_links),
            ("another tenant's model as a base", _check_foreign_base),
            ("evaluated hyperparameters", _check_evaluated_input),
            ("pickled uploads", _check_pickles),
            ("paths that the service opens", _check_paths),
            ("secrets echoed in errors", _check_echoes),
        )
        problems = [f"{name}: {problem}" for name, check in checks for problem in check(world, target)]
    return make_row("faults of similar systems", "0 present", f"{len(checks)} checked", problems)


def _check_identity_headers(world: World, target: Target) -> Iterator[str]:
    unsigned = _unsigned_token({"email": "admin@example.com", "email_verified": True, "sub": "1", "aud": target.url})
    for name, value in IDENTITY_HEADERS.items():
        for text in (value or unsigned, f"Bearer {unsigned}"):
            for operation in ("list_jobs", "create_training_job", "list_keys"):
                response = FIXTURES[operation](world).send(target.anonymous(), headers={name: text})
                if response.status_code != 401:
                    yield f"{name} with {operation}: answered {response.status_code}"
    for scheme in ("Basic " + base64.b64encode(b"admin:admin").decode(), f"Bearer {unsigned}", "Bearer local", "Token admin"):
        response = target.anonymous().request("GET", "/jobs", headers={"Authorization": scheme})
        if response.status_code != 401:
            yield f"{scheme[:12]}: answered {response.status_code}"


def _unsigned_token(claims: Json) -> str:
    issued = claims | {"iss": "https://accounts.google.com", "iat": 1_700_000_000, "exp": 4_000_000_000}
    parts = ({"alg": "none", "typ": "JWT"}, issued)
    return ".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode() for part in parts) + ".SIGNATURE_REMOVED"


def _check_secrets_in_objects(world: World, target: Target) -> Iterator[str]:
    job_id = world.submit(hf_token=SECRET)
    attempt = start_attempt(target, job_id)  # the spec is written
    attempt.finish("failed", failure={"code": "internal", "message": "done"})
    for path in (path for path in target.home.parent.rglob("*") if path.is_file() and not path.is_symlink()):
        if SECRET.encode() in path.read_bytes():
            yield f"the token is in {path.relative_to(target.home.parent)}"
    if not list((target.objects / "configs").glob(f"{job_id}*")):
        yield "the spec was not found"


def _check_unsigned_links(world: World, target: Target) -> Iterator[str]:
    token = world.file_token()
    key = world.artifact_key + "adapter_model.safetensors"
    header, claims, signature = token.split(".")
    changed = json.loads(base64.urlsafe_b64decode(claims + "=="))
    changed["sub"] = f"datasets/{world.dataset_id}/train.jsonl"
    forged = base64.urlsafe_b64encode(json.dumps(changed).encode()).rstrip(b"=").decode()
    paths = (
        *(
            f"/files/{key}",
            f"/files/{world.completed_job_id}",
            f"/{key}",
            f"/objects/{key}",
            "/files/",
            f"/files/{header}.{forged}.{signature}",
        ),
        *(f"/files/{header}.{claims}.", f"/files/{token[:-4]}AAAA", f"/files/{token}/../{key}", f"/jobs/download/{world.completed_job_id}"),
        *(f"/files/{_unsigned_token({'sub': key, 'aud': 'tunesmith-file', 'filename': 'x'})}",),
    )
    for path in paths:
        status, answer = exchange(target.anonymous(), "GET", path)
        if 200 <= status < 300 or f"{world.mark} weights".encode() in answer:
            yield f"GET {path[:60]} answered {status}"
    _, answer = exchange(world.owner, "GET", f"/files/{token}", Host="evil.example")
    if b"evil.example" in answer:
        yield "the host of a link comes from a header"
    links = world.owner.request("GET", f"/jobs/download/{world.completed_job_id}", headers={"X-Forwarded-Host": "evil.example"})
    links_https = world.owner.request("GET", f"/jobs/download/{world.completed_job_id}", headers={"X-Forwarded-Proto": "https"})
    if "evil.example" in links.text or "https://127.0.0.1" in links_https.text:
        yield "the host or scheme of a link comes from a header"
    for path in (target.home, target.database, target.home / "signing-key", target.home / "token", target.home / "secrets"):
        if path.exists() and path.stat().st_mode & 0o077:
            yield f"{path.name} can be read by other accounts of this machine"


def _check_foreign_base(world: World, target: Target) -> Iterator[str]:
    rival = Caller(target, world.owner.create_key("rival", ("admin",), tenant_id="rival").token)
    dataset_id = rival.upload(name="rows of the rival")
    artifact = world.artifact_key.rstrip("/")
    for base in (
        artifact,
        f"../../{artifact}",
        f"gs://models/{artifact}",
        (target.objects / artifact).as_uri(),
        str(target.objects / artifact),
    ):
        body: Json = {"processed_dataset_id": dataset_id, "training_config": {"base_model_id": base}}
        response = rival.request("POST", "/train", json=body)
        if response.is_success:
            yield f"{base[:40]} was accepted as a base"
    for verb, body in (
        ("clone", {"processed_dataset_id": dataset_id}),
        ("export", {}),
        ("checkpoints/4/export", {}),
        ("resume", {}),
        ("retry", {}),
    ):
        response = rival.request("POST", f"/jobs/{world.completed_job_id}/{verb}", json=body)
        if response.status_code != 404:
            yield f"{verb} of another tenant's job answered {response.status_code}"


def _check_evaluated_input(world: World, target: Target) -> Iterator[str]:
    canary = target.home.parent / "evaluated"
    for text in EVALUATED:
        value = text.format(canary=canary)
        for field in ("learning_rate", "lora_rank", "lr_scheduler_type", "save_strategy", "max_steps"):
            config = {"base_model_id": "tests/no-model", "hyperparameters": {field: value}}
            response = world.owner.request("POST", "/train", json=world.train_body(training_config=config))
            if response.status_code not in (400, 422):
                yield f"{field}={value[:30]!r} answered {response.status_code}"
        world.owner.request("POST", "/train", json=world.train_body(job_name=value[:120]))
    if canary.exists():
        yield "client input was evaluated"


class _Exploit:
    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self._canary), "w"))


def _check_pickles(world: World, target: Target) -> Iterator[str]:
    canary = target.home.parent / "unpickled"
    content = pickle.dumps(_Exploit(canary))
    for name in ("rows.jsonl", "rows.pkl", "rows.pt", "model.safetensors"):
        response = world.owner.request("POST", "/datasets", files={"file": (name, content)})
        if response.is_success:
            yield f"a pickle called {name} was accepted"
    world.owner.request("POST", "/train", content=content, headers={"Content-Type": "application/octet-stream"})
    if canary.exists():
        yield "an upload was unpickled"


def _check_paths(world: World, target: Target) -> Iterator[str]:
    for place in ("/etc/passwd", "file:///etc/passwd", str(target.home / "token"), "{0.__class__}"):
        part = {"type": "image", "image": place}
        row = {"messages": [{"role": "user", "content": [part]}, {"role": "assistant", "content": "x"}]}
        response = world.owner.request("POST", "/datasets", files={"file": ("rows.jsonl", json.dumps(row))})
        if response.status_code != 400 or "root:" in response.text:
            yield f"an image at {place} answered {response.status_code}"


def _check_echoes(world: World, target: Target) -> Iterator[str]:
    """A request that is refused, with its secret in the wrong place and form, comes back without it, and is not logged."""
    secret = "wandb" + "0123456789abcdef" * 2
    bodies: tuple[Json, ...] = (
        world.train_body(hf_token=[secret]),
        world.train_body(hf_token=secret, unknown=1),
        world.train_body(hf_token={"token": secret}),
        world.train_body(hf_token=f"{secret}\r\nX: y"),
        world.train_body(training_config={"base_model_id": "a/b", "wandb_config": {"api_key": secret, "unknown": 1}}),
        world.train_body(training_config={"base_model_id": "a/b", "mlflow_config": {"tracking_uri": f"http://user:{secret}@h/"}}),
    )
    for body in bodies:
        response = world.owner.request("POST", "/train", json=body)
        if response.is_success or secret in response.text:
            yield f"answered {response.status_code}, {'with' if secret in response.text else 'without'} the secret"
    world.owner.request("GET", f"/jobs?cursor={secret}")
    target.anonymous().request("GET", "/jobs", headers={"Authorization": f"Bearer tsk_{secret}"})
    if re.search(secret, target.log.read_text(errors="replace")):
        yield "the log contains a secret"

"""Everything that a stolen, forged or outlived attempt token could be used for, and what an honest one must not reach.

Two attempts run beside each other; each case sends one message that must be refused, and nothing of any job may change by it.
"""

import base64
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import httpx2
import jwt

from tests.attack.attempt_client import LAUNCH_ENDPOINTS, AttemptClient, end_process, make_batch, now, start_attempt
from tests.attack.campaign import Row, Size, make_row
from tests.attack.fixtures import World, write_artifact
from tests.attack.target import Caller, Json, Target, run_target

SIGNING_KEY = "the key of this deployment, for its own tokens only"
FOREIGN_KEY = "another key of the same length, which signs nothing"
PHASE = {"type": "phase", "phase": "exporting"}
# The process that ended the attempt may not have heard the answer, and repeats its result: answered as the first time, and not applied.
MAY_BE_IGNORED = ("another result after the end",)
Case = tuple[str, Callable[[], httpx2.Response]]


def run(size: Size) -> Row:
    """Send every case; count what was not refused."""
    problems: list[str] = []
    with run_target(slots=3, TUNESMITH_SIGNING_KEY=SIGNING_KEY, TUNESMITH_RECONCILE_INTERVAL_S="0.2") as target:
        world = World(target.owner())
        victim = world.running
        own = start_attempt(target, world.submit())
        cases = [*_tokens(own, victim, world), *_claimants(own), *_results(own, victim, world), *_events(own, world)]
        problems += _send_all(target, cases)
        problems += _check_derived_uri(own, target)
        cases_after_end = list(_replays(own))
        problems += _send_all(target, cases_after_end)
        count = len(cases) + len(cases_after_end)
    return make_row(
        "attempt tokens", "all refused, nothing changed", f"{count - len(problems)} of {count} refused or without effect", problems
    )


def _send_all(target: Target, cases: list[Case]) -> list[str]:
    """The cases that were not refused, or that changed something."""
    problems: list[str] = []
    for name, send in cases:
        before = target.read_rows()
        response = send()
        if not 400 <= response.status_code < 500 and not (response.is_success and name in MAY_BE_IGNORED):
            problems.append(f"{name}: answered {response.status_code}")
        elif target.read_rows() != before:
            problems.append(f"{name}: answered {response.status_code} and changed a record")
    return problems


def _tokens(own: AttemptClient, victim: AttemptClient, world: World) -> Iterator[Case]:
    """Tokens that are not valid for the attempt they are sent to. The victim's claimant is known to the attacker."""
    for endpoint, body in _messages(victim).items():
        valid, foreign = (attempt.launch_token if endpoint in LAUNCH_ENDPOINTS else attempt.token for attempt in (victim, own))
        forged = {
            "no token": "",
            "garbage": "x" * 200,
            "the token of another job": foreign,
            "a signature with another key": _resign(valid, FOREIGN_KEY),
            "the algorithm none": _unsigned(valid),
            "no signature": valid.rpartition(".")[0] + ".",
            "claims of another token": _swap_claims(foreign, valid),
            "an expired token": _resign(valid, SIGNING_KEY, exp=int(time.time()) - 3600),
            "a token without expiry": _resign(valid, SIGNING_KEY, exp=None),
            "a token for files": world.file_token(),
            "a token for another audience": _resign(valid, SIGNING_KEY, aud="tunesmith-file"),
            "the token for other messages": victim.token if endpoint in LAUNCH_ENDPOINTS else victim.launch_token,
            "a token of another attempt": _resign(valid, SIGNING_KEY, attempt=victim.number + 1),
            "the caller's own token": world.owner.token or "",
        }
        for name, token in forged.items():
            yield f"{name}, {endpoint}", lambda endpoint=endpoint, body=body, token=token: victim.post(endpoint, body, token=token)
    beyond = replace(victim, number=victim.number + 1)
    yield "an attempt that does not exist", beyond.claim
    huge = replace(victim, number=2**63)
    yield "a huge attempt number", huge.claim
    reader = Caller(own.target, own.token)
    if world.owner.token:  # a service without identities asks callers for none
        yield "an attempt's token as a caller's", lambda: reader.request("GET", "/jobs")
        yield "an attempt's token to cancel its job", lambda: reader.request("POST", f"/jobs/{own.job_id}/cancel")
        yield "an attempt's token for upkeep", lambda: reader.request("POST", "/internal/reconcile")
    yield "an attempt's token as a link", lambda: reader.request("GET", f"/files/{own.token}")


def _messages(attempt: AttemptClient) -> dict[str, Json]:
    """One message of each kind."""
    bodies = {"claim": {"claimant": attempt.claimant}, "events": make_batch(PHASE, first_seq=1), "result": attempt.make_result()}
    return bodies | {"credentials": {}, "token": {}}


def _claimants(own: AttemptClient) -> Iterator[Case]:
    """A second process with the right token, which did not claim."""
    thief = replace(own, claimant="thief")
    yield "another claimant, claim", thief.claim
    yield "another claimant, events", lambda: thief.report(PHASE, first_seq=1)
    yield "another claimant, result", thief.finish
    yield "another claimant, credentials", lambda: thief.post("credentials", {})
    yield "another claimant, token", lambda: thief.post("token", {})
    stolen = own.make_result()  # names the right claimant, as logs and buckets do, and comes from another process
    yield "the claimant's name without its secret, result", lambda: thief.post("result", stolen)
    for endpoint, body in _messages(own).items():
        if endpoint != "claim":
            yield f"no claimant, {endpoint}", lambda endpoint=endpoint, body=body: replace(own, claimant="").post(endpoint, body)


def _results(own: AttemptClient, victim: AttemptClient, world: World) -> Iterator[Case]:
    """Results of the right claimant that name what is not the attempt's own."""
    genuine = write_artifact(own, b"the attempt's own weights")
    for name, artifact in _foreign_artifacts(genuine, own, world):
        yield f"a result with {name}", lambda artifact=artifact: own.finish(artifacts=[artifact])
    yield "a result for another job", lambda: own.finish(job_id=victim.job_id)
    yield "a result for another attempt", lambda: own.finish(attempt=2)
    yield "a script as the run's address", lambda: own.finish(wandb_url="javascript:alert(1)")
    yield "a local file as a tracker's address", lambda: own.finish(tracker_urls={"mlflow": "file:///etc/passwd"})
    hub = {"repo_id": "victim/private", "revision": "0" * 40, "url": "https://huggingface.co/victim/private"}
    yield "a repository that was not requested", lambda: own.finish(artifacts=[genuine | {"hub": hub}])
    yield "two artifacts of one name", lambda: own.finish(artifacts=[genuine, genuine])


def _events(own: AttemptClient, world: World) -> Iterator[Case]:
    genuine = write_artifact(own, b"the attempt's own weights")
    for name, artifact in _foreign_artifacts(genuine, own, world):
        event = {"type": "artifact", "artifact": artifact}
        yield f"an event with {name}", lambda event=event: own.report(event, first_seq=1)
    status = {"type": "status", "status": "completed", "attempt": 1}
    yield "an event that sets the status", lambda: own.report(status, first_seq=1)


def _foreign_artifacts(genuine: Json, own: AttemptClient, world: World) -> Iterator[tuple[str, Json]]:
    """Artifacts whose bytes the attempt did not upload below its own prefix."""
    own_key = str(genuine["key"])
    keys = {
        "a dataset": f"datasets/{world.dataset_id}/",
        "another job's artifact": world.artifact_key,
        "the job's spec": "configs/",
        "a base model": "pretrained_weights/huggingface/tests/no-model/",
        "the prefix of all jobs": "trained_adapters/",
        "a later attempt": own_key.replace("attempt-1", "attempt-2"),
        "a traversal": f"{own_key}../../../datasets/{world.dataset_id}/",
        "an encoded traversal": f"{own_key}%2e%2e/%2e%2e/",
        "an absolute key": "/etc/",
        "a doubled slash": own_key.replace("/", "//"),
        "a control character": f"{own_key}\u0000/",
        "a neighbor with the same beginning": own_key.rstrip("/") + "0/",
        "an empty key": "",
    }
    for name, key in keys.items():
        yield name, genuine | {"key": key}
    for name, path in {"a file outside": "../../../../etc/passwd", "an absolute file": "/etc/passwd"}.items():
        yield name, genuine | {"files": [genuine["files"][0] | {"path": path}]}
    yield "a negative size", genuine | {"size_bytes": -1}
    yield "a digest that is none", genuine | {"files": [genuine["files"][0] | {"sha256": "x"}]}


def _check_derived_uri(own: AttemptClient, target: Target) -> list[str]:
    """The honest result is accepted, and an address that it made up is not shown."""
    artifact = write_artifact(own, b"the attempt's own weights") | {"uri": "https://evil.example/weights"}
    response = own.finish(artifacts=[artifact])
    if 400 <= response.status_code < 500:
        response = own.finish(artifacts=[write_artifact(own, b"the attempt's own weights")])
    if not response.is_success:
        return [f"the honest result was refused: {response.text[:200]}"]
    end_process(target, own)
    job = target.owner().expect(200, "GET", f"/jobs/{own.job_id}")
    return ["an address that the attempt made up is shown"] if "evil.example" in json.dumps(job) else []


def _replays(own: AttemptClient) -> Iterator[Case]:
    """Messages after the attempt has ended."""
    yield "a claim after the end", own.claim
    yield "events after the end", lambda: own.report(PHASE, first_seq=1)
    yield "another result after the end", lambda: own.finish("failed", failure={"code": "internal", "message": "no"}, started_at=now())
    yield "credentials after the end", lambda: own.post("credentials", {})
    yield "a new token after the end", lambda: own.post("token", {})


def _resign(token: str, key: str, **changes: Any) -> str:
    """The token with changed claims (None removes one), signed with this key."""
    claims = jwt.decode(token, options={"verify_signature": False}) | changes
    header = {name: value for name, value in jwt.get_unverified_header(token).items() if name not in ("alg", "typ")}
    kept = {name: value for name, value in claims.items() if value is not None}
    return jwt.encode(kept, key, algorithm="HS256", headers=header)


def _unsigned(token: str) -> str:
    claims = jwt.decode(token, options={"verify_signature": False})
    header = jwt.get_unverified_header(token) | {"alg": "none"}
    parts = (base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode() for part in (header, claims))
    return ".".join(parts) + "."


def _swap_claims(signed: str, claims: str) -> str:
    header, _, signature = signed.split(".")
    return f"{header}.{claims.split('.')[1]}.{signature}"

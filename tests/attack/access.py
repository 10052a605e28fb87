"""Every route, sent by someone who must not: nobody, an unknown, expired or revoked key, a key without the scope, another tenant.

Each request is the one that its fixture makes for the victim. No answer may contain anything of the victim that the request did not
contain, and no record or file of the victim may change.
"""

import re
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace

import httpx2

from tests.attack.campaign import Row, Size, make_row
from tests.attack.fixtures import FIXTURES, UNLISTED_FIXTURES, ValidRequest, World
from tests.attack.target import Caller, Json, Target, run_target
from tests.chaos.campaign import CampaignError

VICTIM, RIVAL = "acme", "rival"
# Routes that anybody may call. They say nothing about a tenant; a file's link and a login's have their own signed token.
PUBLIC = ("get_root", "get_docs", "get_health", "download_file", "receive_upload", "log_in", "log_out")
# Routes that answer every caller, with what is their own.
OWN_ANSWERS = (
    "get_capabilities",
    "get_whoami",
    "list_models",
    "get_model",
    "get_storage",
    "list_jobs",
    "list_datasets",
    "list_keys",
    "list_audit_entries",
    "upload_dataset",
    "check_dataset",
    "create_upload",
    "create_key",
    "create_login_code",
)
ATTEMPT_ROUTES = ("claim", "report", "finish", "renew_token", "issue_credentials")
UPKEEP_ROUTES = ("reconcile", "clean_up", "list_orphans")
ADMIN_ROUTES = ("create_key", "list_keys", "revoke_key", "list_audit_entries")


@dataclass
class Counts:
    """What was sent, and what went wrong."""

    requests: int = 0
    leaks: list[str] = field(default_factory=list[str])
    writes: list[str] = field(default_factory=list[str])
    answers: list[str] = field(default_factory=list[str])  # neither, and yet not the status that was expected
    known_ids: set[tuple[str, str]] = field(default_factory=set[tuple[str, str]])  # of the victim, that an intruder has sent before

    @property
    def problems(self) -> list[str]:
        """All of them, the worst first."""
        return self.writes + self.leaks + self.answers


@dataclass(frozen=True)
class Intruder:
    """A caller that must not get through, and the statuses that it must get instead."""

    name: str
    caller: Caller
    statuses: tuple[int, ...]
    operations: tuple[str, ...] | None = None  # those that it lacks the scope for; None: all
    sees_own: bool = False  # it may call routes that answer with the caller's own


def run(size: Size) -> Row:
    """Send every route's request as every intruder; size does not matter, it is fast."""
    counts = Counts()
    with run_target(slots=2) as target:  # one for the running job of each tenant; no other is launched
        operator = target.owner()
        victim = World(operator.create_key("victim", ("admin",), tenant_id=VICTIM))
        fixtures = FIXTURES | UNLISTED_FIXTURES
        intruders = _make_intruders(target, operator, tuple(fixtures))
        rival = World(next(intruder.caller for intruder in intruders if intruder.sees_own))
        for operation, make_request in fixtures.items():
            for intruder in intruders:
                if intruder.operations is None or operation in intruder.operations:
                    _attack(intruder, operation, make_request(victim), victim, counts)
        _cross_links(victim, rival, counts)
        _compare_with_missing(rival.owner, victim, counts)
        _compare_references_with_missing(rival, victim, counts)
        routes = len(fixtures)
    measured = f"{counts.requests} requests to {routes} routes: {len(counts.leaks)} leaks, {len(counts.writes)} writes"
    return make_row("every route × {none, unknown, expired, revoked, scope, tenant}", "0 leaks, 0 writes", measured, counts.problems)


def _make_intruders(target: Target, operator: Caller, operations: tuple[str, ...]) -> list[Intruder]:
    expired = operator.create_key("expired", ("admin",), tenant_id=VICTIM)
    _expire(target, "expired")
    revoked = operator.expect(201, "POST", "/keys", json={"name": "revoked", "scopes": ["admin"], "tenant_id": VICTIM})
    operator.expect(200, "DELETE", f"/keys/{revoked['key_id']}")
    reader = operator.create_key("reader", ("read",), tenant_id=VICTIM)
    submitter = operator.create_key("submitter", ("submit",), tenant_id=VICTIM)
    rival = operator.create_key("rival", ("admin",), tenant_id=RIVAL)
    writes = tuple(name for name in operations if _is_write(name) and name not in (*PUBLIC, *ATTEMPT_ROUTES, "create_login_code"))
    unknown = Caller(target, "tsk_" + "A" * 43)
    return [
        Intruder("no identity", target.anonymous(), (401,)),
        Intruder("an unknown key", unknown, (401,)),
        Intruder("a key without its last letter", replace(rival, token=str(rival.token)[:-1]), (401,)),
        Intruder("an expired key", expired, (401,)),
        Intruder("a revoked key", Caller(target, str(revoked["key"])), (401,)),
        Intruder("a key to read", reader, (403,), (*writes, *UPKEEP_ROUTES, "list_keys", "list_audit_entries")),
        Intruder("a key to submit", submitter, (403,), (*ADMIN_ROUTES, *UPKEEP_ROUTES)),
        Intruder("another tenant's admin", rival, (403, 404), sees_own=True),
    ]


def _is_write(operation: str) -> bool:
    return not operation.startswith(("get_", "list_", "read_", "download_"))


def _attack(intruder: Intruder, operation: str, request: ValidRequest, victim: World, counts: Counts) -> None:
    """Send one request; compare the answer and the victim's records and files."""
    if operation == "upload_dataset" and intruder.sees_own:
        request = replace(request, form={"name": "rows"}, file=("rows.jsonl", '{"text": "rows of the rival"}\n' * 3))
    if operation == "create_key" and intruder.sees_own and request.body is not None:
        request = replace(request, body=request.body | {"tenant_id": VICTIM})
    before = victim.target.read_rows(VICTIM), victim.target.read_objects()
    response = request.send(intruder.caller)
    counts.requests += 1
    what = f"{intruder.name}, {operation}"
    sent = f"{request.url_path} {request.options()}"
    counts.known_ids |= {(intruder.name, mark) for mark in victim.marks if mark != victim.mark and mark in sent}
    unknown = [mark for mark in victim.marks if (intruder.name, mark) not in counts.known_ids]
    if victim.mark in sent:
        unknown.remove(victim.mark)  # names are told in this one request only
    if leaked := _find_leak(request, response, unknown):
        counts.leaks.append(f"{what}: the answer contains {leaked}")
    after = victim.target.read_rows(VICTIM), victim.target.read_objects()
    if after[0] != before[0] or not before[1].items() <= after[1].items():
        counts.writes.append(f"{what}: answered {response.status_code} and changed the victim's records or files")
    expected = _expected_statuses(intruder, operation, request)
    if response.status_code not in expected:
        counts.answers.append(f"{what}: answered {response.status_code} instead of {expected}")


def _expected_statuses(intruder: Intruder, operation: str, request: ValidRequest) -> tuple[int, ...]:
    if operation in PUBLIC:
        return (request.status,)
    if operation in ATTEMPT_ROUTES:
        return (401,)  # it takes the attempt's token, whoever calls
    if intruder.sees_own and operation in OWN_ANSWERS:
        return (request.status, 400, 403)
    return intruder.statuses


def _find_leak(request: ValidRequest, response: httpx2.Response, marks: list[str]) -> str:
    """A mark of the victim in the answer."""
    if request.template.startswith(("/files/", "/login")):
        return ""  # the signed token in the path or query is the right to what it names
    answer = f"{response.headers} {response.text}"
    return next((mark for mark in marks if mark in answer), "")


def _cross_links(victim: World, rival: World, counts: Counts) -> None:
    """Requests of the rival for its own resources that name the victim's in a body, a header, a query or a link."""
    caller = rival.owner
    own = f"/jobs/{rival.completed_job_id}"
    key = {"Idempotency-Key": f"key-of-{victim.mark}"}
    victim_body = victim.train_body()
    victim_job = victim.owner.expect(201, "POST", "/train", json=victim_body, headers=key)["job_id"]
    export = {"export_of": {"job_id": victim.completed_job_id, "attempt": 1, "step": 4, "key": "checkpoints/"}}
    config = {"base_model_id": victim.artifact_key.rstrip("/")}
    requests: list[tuple[str, httpx2.Response, tuple[int, ...]]] = [
        ("a foreign dataset", caller.request("POST", "/train", json=victim.train_body()), (404,)),
        (
            "a clone with a foreign dataset",
            caller.request("POST", own + "/clone", json={"processed_dataset_id": victim.dataset_id}),
            (404,),
        ),
        ("another tenant's idempotency key", caller.request("POST", "/train", json=rival.train_body(), headers=key), (201,)),
        (
            "its key and its body",
            caller.request("POST", "/train", json=victim_body, headers={"Idempotency-Key": key["Idempotency-Key"]}),
            (404, 409),
        ),
        ("a foreign checkpoint", caller.request("POST", "/train", json=rival.train_body() | export), (400, 404, 422)),
        (
            "a foreign artifact as the base",
            caller.request("POST", "/train", json=rival.train_body(training_config=config)),
            (400, 404, 422),
        ),
        (
            "a foreign job as the base",
            caller.request("POST", "/train", json=rival.train_body(training_config={"base_model_id": f"job:{victim.completed_job_id}"})),
            (404,),
        ),
        (
            "a clone with a foreign job as the base",
            caller.request("POST", own + "/clone", json={"training_config": {"base_model_id": f"job:{victim.completed_job_id}"}}),
            (404,),
        ),
        ("a foreign dataset in a mix", caller.request("POST", "/train", json=rival.train_body(**_mix(rival, victim.dataset_id))), (404,)),
        (
            "a clone with a foreign dataset in a mix",
            caller.request("POST", own + "/clone", json={"datasets": _mix(rival, victim.dataset_id)["datasets"]}),
            (404,),
        ),
        ("a foreign file as incoming rows", _incoming(caller, f"datasets/{victim.dataset_id}/train.jsonl"), (400, 404, 422)),
        ("a traversal as incoming rows", _incoming(caller, f"incoming/../datasets/{victim.dataset_id}/train.jsonl"), (400, 404, 422)),
        ("a foreign tenant in the query", caller.request("GET", "/jobs", params={"tenant_id": VICTIM, "limit": "200"}), (200, 400, 422)),
        ("every tenant's keys", caller.request("GET", "/keys", params={"all_tenants": "true"}), (403,)),
        ("every tenant's audit log", caller.request("GET", "/audit", params={"all_tenants": "true"}), (403,)),
        ("a foreign artifact by name", caller.request("GET", f"/jobs/download/{victim.completed_job_id}?artifact=adapter"), (404,)),
        (
            "a foreign stream",
            caller.request("GET", f"/jobs/{victim.completed_job_id}/events", headers={"Accept": "text/event-stream"}),
            (404,),
        ),
        ("a foreign log", caller.request("GET", f"/jobs/{victim.completed_job_id}/logs?follow=true"), (404,)),
    ]
    for name, response, statuses in requests:
        counts.requests += 1
        sent = f"{response.request.url} {_read_body(response.request)}"
        leaked = [mark for mark in (*victim.marks, victim_job) if mark in response.text and mark not in sent]
        if leaked:
            counts.leaks.append(f"{name}: the answer contains {leaked[0]}")
        if response.status_code not in statuses:
            counts.answers.append(f"{name}: answered {response.status_code} instead of {statuses}")


def _mix(rival: World, dataset_id: str) -> Json:
    """The fields of a request that mixes the rival's own dataset with another."""
    mixed = [{"processed_dataset_id": each, "weight": 1.0} for each in (rival.dataset_id, dataset_id)]
    return {"processed_dataset_id": None, "datasets": mixed}


def _read_body(request: httpx2.Request) -> str:
    """What was sent; a multipart body is read here."""
    return request.read().decode(errors="replace")


def _incoming(caller: Caller, key: str) -> httpx2.Response:
    return caller.request("POST", "/datasets", files={"incoming": (None, key)})


def _compare_with_missing(rival: Caller, victim: World, counts: Counts) -> None:
    """What belongs to another tenant is answered exactly as what does not exist."""
    for operation, make_request in FIXTURES.items():
        request = make_request(victim)
        parameter = next((name for name in request.path if name in ("job_id", "processed_dataset_id", "key_id")), None)
        if parameter is None:
            continue
        missing = replace(request, path=request.path | {parameter: "nothing-of-this-name"})
        answers = [_normalize(each.send(rival), each.path[parameter]) for each in (request, missing)]
        counts.requests += 2
        if answers[0] != answers[1]:
            counts.leaks.append(f"{operation}: another tenant's is answered as {answers[0][:80]}, a missing one as {answers[1][:80]}")


def _compare_references_with_missing(rival: World, victim: World, counts: Counts) -> None:
    """The same for ids in the body of a request."""
    bodies: dict[str, tuple[str, Callable[[str], Json]]] = {
        "base_model_id": (victim.completed_job_id, lambda job_id: rival.train_body(training_config={"base_model_id": f"job:{job_id}"})),
        "datasets": (victim.dataset_id, lambda dataset_id: rival.train_body(**_mix(rival, dataset_id))),
    }
    for field_name, (resource, make_body) in bodies.items():
        resources = (resource, "nothing-of-this-name")
        answers = [_normalize(rival.owner.request("POST", "/train", json=make_body(each)), each) for each in resources]
        counts.requests += 2
        if answers[0] != answers[1]:
            counts.leaks.append(f"{field_name}: another tenant's is answered as {answers[0][:80]}, a missing one as {answers[1][:80]}")


def _normalize(response: httpx2.Response, resource: str) -> str:
    return re.sub(re.escape(resource), "ID", f"{response.status_code} {response.text}")


def _expire(target: Target, name: str) -> None:
    """Move the key's end into the past, in the record that the service reads."""
    with closing(sqlite3.connect(target.keys_database, timeout=10)) as database, database:
        rows = database.execute("SELECT key_id, record FROM api_keys").fetchall()
        for key_id, record in rows:
            if f'"name":"{name}"' in record.replace(" ", ""):
                changed = re.sub(r'"expires_at":\s*"[^"]*"', '"expires_at":"2020-01-01T00:00:00Z"', record)
                database.execute("UPDATE api_keys SET record = ? WHERE key_id = ?", (changed, key_id))
                return
    raise CampaignError(f"no key {name!r} in the database")

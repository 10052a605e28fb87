"""Values that parse and cannot be stored, in every field that an attempt or a caller can write, and records that cannot be read.

Whatever is sent, every answer is a success or a 4xx, every record can still be read as strict JSON, other jobs go on, and the poisoned job
can be seen and deleted.
"""

import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, NoReturn

import httpx2

from schema.requests import TRAIN_REQUEST_EXAMPLE
from tests.attack.attempt_client import AttemptClient, end_process, now, start_attempt
from tests.attack.campaign import Row, Size, make_row
from tests.attack.fixtures import World, write_artifact
from tests.attack.target import HEALTH_LIMITS_S, HealthProber, Json, Target, run_target
from tests.chaos.campaign import CampaignError
from tests.waiting import wait_until

PLACEHOLDER = "the poison goes here"
DEEP = 20_000
# Literals of JSON, because Python cannot write all of them.
POISONS: dict[str, str] = {
    "NaN": "NaN",
    "Infinity": "Infinity",
    "-Infinity": "-Infinity",
    "a float beyond all": "1e400",
    "an integer beyond 64 bits": str(2**64),
    "an integer of 500 digits": "9" * 500,
    "half a surrogate": '"\\ud800"',
    "a name with half a surrogate": '{"\\udfff": 1}',
    "NaN in an object": '{"loss": NaN}',
    "a zero byte": '"a\\u0000b"',
    "a terminal escape": '"\\u001b]0;owned\\u0007"',
    "the year 9999": '"9999-12-31T23:59:59.999999+00:00"',
    "the year 1": '"0001-01-01T00:00:00+14:00"',
    "nested lists": "[" * 250 + "]" * 250,
    "deeply nested objects": '{"a":' * DEEP + "1" + "}" * DEEP,
    "null": "null",
    "a long string": '"' + "x" * 300_000 + '"',
}
SHORT_POISONS = (
    "NaN",
    "a float beyond all",
    "half a surrogate",
    "a name with half a surrogate",
    "the year 9999",
    "nested lists",
    "NaN in an object",
)
EVERY_NTH_FIELD_IN_SHORT = 3
POISON_RECORDS: dict[str, str] = {
    "no JSON": "{",
    "no record": "[]",
    "an unknown status": '{"schema_version": 2, "status": "exploded"}',
    "a newer version": '{"schema_version": 9000}',
    "nesting beyond the parser": '{"schema_version": 2, "training_config": ' + '{"a":' * 2000 + "1" + "}" * 2000 + "}",
    "NaN": '{"schema_version": 2, "revision": NaN}',
    "an empty text": "",
}


@dataclass
class Counts:
    """What was sent and what went wrong."""

    sent: int = 0
    accepted: int = 0
    problems: list[str] = field(default_factory=list[str])

    def add(self, description: str, response: httpx2.Response) -> bool:
        """Count an answer; return whether the message was accepted."""
        self.sent += 1
        self.accepted += response.is_success
        if response.status_code >= 500:
            self.problems.append(f"{description}: answered {response.status_code}")
        return response.is_success


def run(size: Size) -> Row:
    """Send all of it; then read, go on and delete."""
    counts = Counts()
    with run_target(slots=3, TUNESMITH_RECONCILE_INTERVAL_S="0.2") as target:
        world = World(target.owner())
        poisoned = start_attempt(target, world.submit())
        with HealthProber(target) as prober:
            for attack in (
                lambda: _poison_events(poisoned, size, counts),
                lambda: _poison_results(world, poisoned, size, counts),
                lambda: _poison_requests(world, size, counts),
                lambda: _poison_parameters(world, counts),
            ):
                _run_step(attack, counts)
        counts.problems += prober.problems(HEALTH_LIMITS_S[size])
        _run_step(lambda: _poison_records(world, target, counts), counts)
        counts.problems += _check_delete(world, poisoned.job_id)
    measured = f"{counts.sent} messages, {counts.accepted} accepted, {len(POISON_RECORDS) + 2} unreadable records; {prober.describe()}"
    return make_row("poison records and NaN", "0 of 5xx; others go on; seen and deleted", measured, counts.problems)


def _run_step(attack: Callable[[], None], counts: Counts) -> None:
    """Run one step; when something valid fails in it, count that and go on with the next."""
    try:
        attack()
    except (TimeoutError, CampaignError) as error:
        counts.problems.append(f"a valid step failed in between: {error}")


# --- attempts


def _poison_events(attempt: AttemptClient, size: Size, counts: Counts) -> None:
    seq = 1
    for name, text in _substitute({"first_seq": 1, "events": [{"at": now(), "event": PLACEHOLDER}]}, size, [["events", 0, "event"]]):
        counts.add(f"an event that is {name}", attempt.post("events", None, **_raw(text)))
    for event in _make_events(attempt):
        batch: Json = {"first_seq": seq, "events": [{"at": now(), "event": event}], "phase": "training", "progress": _PROGRESS}
        for name, text in _substitute(batch, size, list(_leaves(batch))):
            response = attempt.post("events", None, **_raw(text))
            if counts.add(f"{event['type']} event with {name}", response):
                seq = response.json().get("next_seq", seq)
                batch["first_seq"] = seq
        counts.problems += _check_readable(attempt.target, attempt.job_id, f"after poisoned {event['type']} events")


def _poison_results(world: World, attempt: AttemptClient, size: Size, counts: Counts) -> None:
    """Each result that is accepted ends its job, so the next one needs another."""
    metrics = {"eval_loss": 0.5, "perplexity": 1.0, "eval_rows": 1, "values": {"f1": 0.5}, "notes": {"f1": "a note"}}
    gate = {"passed": True, "checks": [{"metric": "eval_loss", "value": 1.0, "at_most": 2.0, "passed": True, "reason": "why"}]}
    body = attempt.make_result("failed") | {"failure": {"code": "internal", "message": "text", "hint": "text"}}
    body |= {"metrics": metrics, "base_metrics": metrics, "gate": gate, "published_step": 1, "tracker_urls": {"mlflow": "http://x"}}
    body |= {"train_rows": 1, "train_tokens": 1, "train_runtime_s": 1.0, "artifacts": [write_artifact(attempt, b"weights")]}
    body["artifacts"][0] |= {"fidelity": {"difference": 0.1, "nested": [1]}}
    current = attempt
    for name, text in _substitute(body, size, list(_leaves(body))):
        text = text.replace(attempt.job_id, current.job_id)
        if counts.add(f"result with {name}", current.post("result", None, **_raw(text))):
            counts.problems += _check_readable(world.target, current.job_id, f"after a result with {name}")
            end_process(world.target, current)
            current = start_attempt(world.target, world.submit())
    world.owner.request("POST", f"/jobs/{current.job_id}/cancel")
    end_process(world.target, current)


_PROGRESS: Json = {"step": 1, "total_steps": 8, "epoch": 0.5, "total_epochs": 1.0, "eta_s": 3.0}


def _make_events(attempt: AttemptClient) -> Iterator[Json]:
    """One valid event of each type that an attempt sends."""
    yield {"type": "phase", "phase": "training"}
    yield {"type": "metrics", "step": 1, "epoch": 0.5, "values": {"loss": 1.0}, "notes": {"loss": "a note"}, "progress": _PROGRESS}
    metrics = {"eval_loss": 1.0, "accuracy": 0.5, "eval_rows": 3, "values": {"f1": 0.5}, "notes": {"f1": "text"}}
    yield {"type": "evaluation", "when": "after", "step": 1, "metrics": metrics}
    yield {"type": "samples", "when": "after", "step": 1, "samples": [{"prompt": "p", "reference": "r", "text": "t"}]}
    check = {"metric": "eval_loss", "value": 1.0, "at_most": 2.0, "at_least": 0.0, "base": 1.0, "passed": True, "reason": "text"}
    yield {"type": "gate", "gate": {"passed": True, "checks": [check]}}
    yield {"type": "decision", "setting": "batch_size", "value": "4", "reason": "text"}
    yield {"type": "warning", "code": "code", "message": "text"}
    yield {"type": "tracker", "tracker": "mlflow", "url": "http://127.0.0.1/x"}
    yield {"type": "artifact", "artifact": write_artifact(attempt, b"weights") | {"fidelity": {"difference": 0.1}}}
    yield {"type": "checkpoint_saved", "step": 1, "epoch": 0.5, "reason": "interval", "size_bytes": 1, "save_s": 0.1, "upload_s": 0.1}
    yield {"type": "checkpoint_skipped", "attempt": 1, "step": 1, "reason": "text"}
    yield {"type": "checkpoint_restored", "step": 1, "from_attempt": 1}


# --- callers


def _poison_requests(world: World, size: Size, counts: Counts) -> None:
    """Each field of a training request, a clone and a resume. No request may create a job that cannot be read."""
    train: Json = json.loads(json.dumps(TRAIN_REQUEST_EXAMPLE)) | {"processed_dataset_id": world.dataset_id}
    train["training_config"]["export_config"]["include_gguf"] = False
    grader = {"type": "json_schema", "name": "right", "json_schema": {"type": "object", "required": ["a"]}}
    grpo = {"base_model_id": "tests/no-model", "trainer_type": "grpo", "reward_config": [grader]}
    bodies: list[tuple[str, str, Json]] = [
        ("training request", "/train", train),
        ("grader", "/train", {"processed_dataset_id": world.dataset_id, "training_config": grpo}),
        ("clone", f"/jobs/{world.completed_job_id}/clone", {"job_name": "a", "training_config": {"hyperparameters": {"max_steps": 2}}}),
        ("export", f"/jobs/{world.completed_job_id}/export", {"job_name": "a", "step": 4, "export_config": {"format": "adapter"}}),
        ("resume", f"/jobs/{world.paused_job()}/resume", {"epochs": 3, "hf_token": "hf_x", "secrets": {"mlflow_token": "x"}}),
        ("retry", f"/jobs/{world.cancelled_job()}/retry", {"from_start": True, "max_steps": 4}),
    ]
    for kind, path, body in bodies:
        for name, text in _substitute(body, size, list(_leaves(body))):
            response = world.owner.request("POST", path, **_raw(text))
            if counts.add(f"{kind} with {name}", response) and (job_id := response.json().get("job_id")):
                counts.problems += _check_readable(world.target, job_id, f"after a {kind} with {name}")
                world.owner.request("POST", f"/jobs/{job_id}/cancel")  # or it would take a slot
        for depth in (100, 200, 254, 900, 50_000):  # the whole body, and the one field that holds any JSON
            deep = '{"a":' * depth + "1" + "}" * depth
            counts.add(f"{kind} that is nested {depth} levels", world.owner.request("POST", path, **_raw(deep)))
            schema = json.dumps(grpo).replace('{"type": "object", "required": ["a"]}', deep)
            request = f'{{"processed_dataset_id": "{world.dataset_id}", "training_config": {schema}}}'
            response = world.owner.request("POST", "/train", **_raw(request))
            if counts.add(f"a grader nested {depth} levels", response):
                job_id = response.json()["job_id"]
                counts.problems += _check_readable(world.target, job_id, f"after a grader nested {depth} levels")
                world.owner.request("POST", f"/jobs/{job_id}/cancel")


def _poison_parameters(world: World, counts: Counts) -> None:
    """Numbers at their extremes and text that is none, in paths, queries, headers and forms."""
    job = f"/jobs/{world.completed_job_id}"
    extremes = ("-1", "9007199254740992", "9223372036854775807", "9223372036854775808", "1" * 400, "NaN", "1e9", "%00", "%ud800", "")
    for value in extremes:
        for path in (
            f"{job}/events?after={value}",
            f"{job}/events?limit={value}",
            f"{job}/logs?offset={value}",
            f"{job}/logs?limit={value}",
            f"{job}/logs?attempt={value}",
            f"/jobs?limit={value}",
            f"/jobs?cursor={value}",
            f"/datasets?cursor={value}",
            f"{job}/checkpoints/{value or '-'}/export",
            f"/internal/jobs/{world.completed_job_id}/attempts/{value or '-'}/claim",
        ):
            method = "POST" if path.endswith(("export", "claim")) else "GET"
            counts.add(f"{method} {path[:80]}", world.owner.request(method, path))
        if value.isascii() and "%" not in value:
            headers = {"Last-Event-ID": value}
            counts.add(f"Last-Event-ID {value[:20]}", world.owner.request("GET", f"{job}/events", headers=headers))
        form = {"name": value, "eval_fraction": value, "project_id": value}
        files = {"file": ("rows.jsonl", world.rows())}
        counts.add(f"a form with {value[:20]!r}", world.owner.request("POST", "/datasets", data=form, files=files))


# --- records


def _poison_records(world: World, target: Target, counts: Counts) -> None:
    """Make records unreadable while the service is stopped. Others go on; the poisoned ones are listed and can be deleted."""
    active = start_attempt(target, world.submit())
    jobs = {name: world.submit() for name in POISON_RECORDS}
    dataset_id = world.make_dataset()
    target.stop()
    with closing(sqlite3.connect(target.database, timeout=10)) as database, database:
        for name, job_id in jobs.items():
            database.execute("UPDATE jobs SET record = ? WHERE job_id = ?", (POISON_RECORDS[name], job_id))
        database.execute("UPDATE jobs SET record = '{' WHERE job_id = ?", (active.job_id,))
        database.execute("UPDATE datasets SET record = '{' WHERE dataset_id = ?", (dataset_id,))
    target.start()
    counts.problems += _check_others_go_on(world, target)
    listed = _list_jobs(world)
    for name, job_id in {**jobs, "an active job": active.job_id}.items():
        if job_id not in listed:
            counts.problems.append(f"a record with {name} is not listed")
        for method, path in (("GET", ""), ("GET", "/events"), ("POST", "/cancel")):
            response = world.owner.request(method, f"/jobs/{job_id}{path}")
            if response.status_code >= 500 and "Retry-After" not in response.headers:
                counts.problems.append(f"{method} {path or 'the job'} of a record with {name}: {response.status_code}")
        counts.problems += _check_delete(world, job_id)
    for method in ("GET", "DELETE"):
        response = world.owner.request(method, f"/datasets/{dataset_id}")
        if response.status_code >= 500 and "Retry-After" not in response.headers:
            counts.problems.append(f"{method} of an unreadable dataset: {response.status_code}")
    if not world.owner.request("GET", "/datasets").is_success:
        counts.problems.append("one unreadable dataset stops the list of datasets")


def _check_others_go_on(world: World, target: Target) -> list[str]:
    """Another job is launched, trains and completes."""
    try:
        attempt = start_attempt(target, world.submit())
    except (TimeoutError, CampaignError) as error:
        return [f"other jobs do not go on: {error}"]
    response = attempt.finish(artifacts=[write_artifact(attempt, b"weights")])
    end_process(target, attempt)
    return [] if response.is_success else [f"other jobs do not go on: the result got {response.status_code}"]


def _list_jobs(world: World) -> set[str]:
    found: set[str] = set()
    cursor: str | None = ""
    while cursor is not None:
        response = world.owner.request("GET", "/jobs", params={"limit": "200", **({"cursor": cursor} if cursor else {})})
        if not response.is_success:
            return found
        page = response.json()
        found |= {row["job_id"] for row in page["jobs"]}
        cursor = page["next_cursor"]
    return found


def _check_readable(target: Target, job_id: str, when: str) -> list[str]:
    """Every view of the job is strict JSON."""
    problems: list[str] = []
    for path in (f"/jobs/{job_id}", f"/jobs/{job_id}/events?limit=1000", "/jobs?limit=200"):
        response = target.owner().request("GET", path)
        try:
            if response.status_code != 200:
                raise ValueError(f"{response.status_code}")
            json.loads(response.content.decode("utf-8"), parse_constant=_reject_constant)
        except ValueError as error:
            problems.append(f"GET {path.partition('?')[0]} {when}: {error}")
    return problems


def _check_delete(world: World, job_id: str) -> list[str]:
    """The job can be deleted, and is gone from the list."""

    def is_deleted() -> bool:
        response = world.owner.request("DELETE", f"/jobs/{job_id}")
        return response.status_code == 404 or (response.status_code == 200 and response.json()["deleted"])

    try:
        wait_until(is_deleted, 15, interval_s=0.2)
    except TimeoutError:
        return [f"the poisoned job {job_id} cannot be deleted: {world.owner.request('DELETE', f'/jobs/{job_id}').status_code}"]
    return [f"{job_id} is deleted and still listed"] if job_id in _list_jobs(world) else []


# --- substitution


def _substitute(body: Json, size: Size, paths: list[list[Any]]) -> Iterator[tuple[str, str]]:
    """The body as JSON, once for each poison in each of these places."""
    names = SHORT_POISONS if size == "short" else tuple(POISONS)
    for path in paths[:: EVERY_NTH_FIELD_IN_SHORT if size == "short" else 1]:
        for name in names:
            changed = json.loads(json.dumps(body))
            place = changed
            for step in path[:-1]:
                place = place[step]
            place[path[-1]] = PLACEHOLDER
            yield f"{name} in {'.'.join(map(str, path))}", json.dumps(changed).replace(f'"{PLACEHOLDER}"', POISONS[name])


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[list[Any]]:
    """The paths of all fields, inner ones included."""
    if path:
        yield list(path)
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, inner in items:
        yield from _leaves(inner, (*path, step))


def _raw(text: str) -> Json:
    return {"content": text.encode(), "headers": {"Content-Type": "application/json"}}


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")

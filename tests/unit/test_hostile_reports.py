"""Whatever JSON an attempt sends is either stored and can be read, or refused with a client error."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from tests.factories import START
from tests.unit.api_harness import attempt_headers, get_error, get_services, make_result_body, start_attempt

AT = START.isoformat()
METRICS: dict[str, Any] = {
    "eval_loss": 1.5,
    "perplexity": 4.5,
    "accuracy": 0.5,
    "eval_runtime": 1.0,
    "eval_rows": 3,
    "eval_tokens": 40,
    "values": {"rouge_l": 0.5},
    "notes": {"accuracy": "a note"},
}
PROGRESS = {"step": 1, "total_steps": 10, "epoch": 0.1, "total_epochs": 1.0, "eta_s": 60.0}
ARTIFACT = {
    "name": "adapter",
    "kind": "adapter",
    "uri": "file:///a",
    "key": "a/",
    "size_bytes": 1,
    "files": [{"path": "a", "size_bytes": 1, "sha256": "0" * 64}],
    "fidelity": {"kl": 0.5, "nested": [1, {"a": "b"}]},
    "hub": {"repo_id": "a/b", "revision": "c", "url": "https://hub.example"},
}
GATE = {"passed": True, "checks": [{"metric": "eval_loss", "value": 1.0, "at_most": 2.0, "base": 3.0, "passed": True, "reason": ""}]}
FAILURE = {"code": "internal", "message": "a message", "hint": "a hint", "attempt": 1}
EVENTS: list[dict[str, Any]] = [
    {"type": "status", "status": "training", "attempt": 1, "reason": "", "failure": FAILURE},
    {"type": "phase", "phase": "exporting"},
    {"type": "metrics", "step": 1, "epoch": 0.5, "values": {"loss": 1.0}, "notes": {"a": "b"}, "progress": PROGRESS},
    {"type": "evaluation", "when": "during", "step": 1, "metrics": METRICS},
    {"type": "samples", "when": "after", "step": 1, "samples": [{"prompt": "p", "reference": "r", "text": "t"}]},
    {"type": "gate", "gate": GATE},
    {"type": "decision", "setting": "a", "value": "b", "reason": "c"},
    {"type": "warning", "code": "a", "message": "b"},
    {"type": "tracker", "tracker": "wandb", "url": "https://wandb.example"},
    {"type": "artifact", "artifact": ARTIFACT},
    {"type": "checkpoint_saved", "step": 1, "epoch": 0.5, "reason": "pause", "size_bytes": 1, "save_s": 0.5, "upload_s": 0.5},
    {"type": "checkpoint_skipped", "attempt": 1, "step": 1, "reason": "a"},
    {"type": "checkpoint_restored", "step": 1, "from_attempt": 2},
]
RESULT = make_result_body(
    "JOB",
    "failed",
    claimant="p",
    last_checkpoint_step=1,
    resumed_step=1,
    failure=FAILURE,
    metrics=METRICS,
    base_metrics=METRICS,
    gate=GATE,
    published_step=1,
    wandb_url="https://wandb.example",
    tracker_urls={"mlflow": "https://mlflow.example"},
    train_rows=1,
    train_tokens=1,
    train_runtime_s=1.0,
)


def nest(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


HOSTILE = st.sampled_from(
    [
        *(float("nan"), float("inf"), float("-inf"), 1e308, 2**31, 2**53, 2**63, -(2**63) - 1, 10**30, 10**400, -1, 0.5, True, None),
        *("\ud800", "a\udfffb", "\x00\x1b[2J\u202e", "", "x" * 70_000, "NaN", "Infinity", "1e999", "9" * 30),
        *("9999-12-31T23:59:59+14:00", "0001-01-01T00:00:00-14:00", "9999-12-31T23:59:59Z", "2026-01-01T00:00:00", 253402300799, 1e300),
        *([], {}, [[]], {"\ud800": 1}, {"a": float("nan")}, {"a": 2**64}, {"": None}, nest(63), nest(150), nest(900), [0] * 20_000),
    ]
) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(), max_size=5), inner, max_size=3),
    max_leaves=6,
)


def list_paths(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The place of every value within a JSON value, except the outermost."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield from list_paths(child, (*path, key))


def replace_at(value: Any, path: tuple[str | int, ...], replacement: Any) -> Any:
    changed = json.loads(json.dumps(value))  # a copy that shares no part with itself
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = replacement
    return changed


BATCHES = [{"first_seq": 0, "events": [{"at": AT, "event": event}], "phase": "training", "progress": PROGRESS} for event in EVENTS]
PLACES_IN_BATCHES = [(batch, path) for batch in BATCHES for path in list_paths(batch)]


class Attempt:
    """An attempt of a job over HTTP; another one replaces it when it has ended."""

    def __init__(self, client: TestClient, dataset_id: str) -> None:
        self.client = client
        self._dataset_id = dataset_id
        self.start()

    def start(self) -> None:
        self.job_id = start_attempt(self.client, self._dataset_id)
        self.seq = 0

    def post(self, action: str, body: Any) -> int:
        text = json.dumps(body)
        headers = attempt_headers(self.client, self.job_id) | {"Content-Type": "application/json"}
        response = self.client.post(f"/internal/jobs/{self.job_id}/attempts/1/{action}", content=text, headers=headers)
        assert response.status_code < 500, (response.text, text[:500])
        if response.status_code >= 400:
            assert response.json()["error"]["message"]
        return response.status_code

    def check_readable(self) -> None:
        store = get_services(self.client).store
        assert self.client.get(f"/jobs/{self.job_id}").status_code == 200
        newest = store.find_last_cursor(self.job_id)
        page = self.client.get(f"/jobs/{self.job_id}/events?after={max(0, newest - 3)}&limit=10")
        assert page.status_code == 200
        assert newest == 0 or page.json()["events"][-1]["id"] == newest
        assert self.client.post("/internal/reconcile").status_code == 200


@pytest.fixture(scope="module")
def attempt(readonly_client: TestClient, readonly_dataset_id: str) -> Attempt:
    return Attempt(readonly_client, readonly_dataset_id)


PROPERTY = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@given(place=st.sampled_from(PLACES_IN_BATCHES), value=HOSTILE)
@PROPERTY
def test_hostile_event_is_stored_readably_or_refused(attempt: Attempt, place: tuple[Any, tuple[str | int, ...]], value: Any) -> None:
    batch, path = place
    body = replace_at(batch | {"first_seq": attempt.seq}, path, value)
    if attempt.post("events", body) == 200:
        attempt.seq += 1
    attempt.check_readable()


@given(path=st.sampled_from(list(list_paths(RESULT | {"artifacts": [ARTIFACT]}))), value=HOSTILE)
@PROPERTY
def test_hostile_result_is_stored_readably_or_refused(attempt: Attempt, path: tuple[str | int, ...], value: Any) -> None:
    body = replace_at(RESULT | {"artifacts": [ARTIFACT], "job_id": attempt.job_id}, path, value)
    status = attempt.post("result", body)
    attempt.check_readable()
    if status == 204:
        attempt.start()


@given(value=HOSTILE)
@settings(PROPERTY, max_examples=15)
def test_hostile_claimant_is_stored_readably_or_refused(attempt: Attempt, value: Any) -> None:
    attempt.start()
    attempt.post("claim", {"claimant": value})
    attempt.check_readable()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("events", 0, "event", "values", "loss"), float("nan")),
        (("events", 0, "event", "progress", "epoch"), float("inf")),
        (("progress", "eta_s"), float("nan")),
        (("events", 0, "event", "notes", "a"), "\ud800"),
        (("events", 0, "event", "step"), 2**64),
        (("events", 0, "at"), "9999-12-31T23:59:59Z"),
        (("events", 0, "at"), "1969-12-31T23:59:59Z"),
    ],
)
def test_error_names_the_field(attempt: Attempt, path: tuple[str | int, ...], value: Any) -> None:
    text = json.dumps(replace_at(BATCHES[2], path, value))
    headers = attempt_headers(attempt.client, attempt.job_id) | {"Content-Type": "application/json"}
    response = attempt.client.post(f"/internal/jobs/{attempt.job_id}/attempts/1/events", content=text, headers=headers)
    param = get_error(response, 422)["param"]
    assert param.replace(".metrics.", ".") == ".".join(map(str, path))


def test_events_cannot_make_a_record_grow_without_end(attempt: Attempt) -> None:
    attempt.start()
    statuses = set[int]()
    for n in range(12):
        metrics = {"notes": {f"{n}-{m}": "x" * 1000 for m in range(50)}}
        event = {"type": "tracker", "tracker": f"t{n}", "url": "x" * 50_000}
        events = [{"at": AT, "event": event}, {"at": AT, "event": {"type": "evaluation", "when": "after", "step": n, "metrics": metrics}}]
        statuses.add(attempt.post("events", {"first_seq": 2 * n, "events": events}))
    assert statuses == {200, 413}
    assert attempt.post("result", RESULT | {"job_id": attempt.job_id}) == 204  # there is room for the end of the job
    attempt.check_readable()

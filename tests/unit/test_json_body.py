"""JSON bodies that cannot be stored are refused at any route, with an error that names the field."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from schema.json_limits import BODY_LIMITS, FREE_FORM_LIMITS, JsonLimits, find_json_problem
from service.api.json_body import MalformedBody, parse_body
from tests.unit.api_harness import get_error, make_request_body, make_request_body_with_config

JSON_HEADERS = {"Content-Type": "application/json"}


def nest(depth: int, innermost: object = 1) -> object:
    value = innermost
    for _ in range(depth):
        value = {"a": value}
    return value


def make_grpo_body(dataset_id: str, json_schema: object) -> dict[str, object]:
    grader = {"type": "json_schema", "name": "shape", "json_schema": json_schema}
    return make_request_body_with_config(dataset_id, trainer_type="grpo", reward_config=[grader])


@pytest.mark.parametrize("depth", [65, 120, 197, 254, 500, 5000])
def test_deeply_nested_json_schema_is_rejected(readonly_client: TestClient, readonly_dataset_id: str, depth: int) -> None:
    body = json.dumps(make_grpo_body(readonly_dataset_id, "HERE")).replace('"HERE"', '{"a":' * depth + "1" + "}" * depth)
    error = get_error(readonly_client.post("/train", content=body, headers=JSON_HEADERS), 422)
    assert "nested" in error["message"]


def test_json_schema_of_too_many_values_is_rejected(readonly_client: TestClient, readonly_dataset_id: str) -> None:
    body = make_grpo_body(readonly_dataset_id, {"enum": [1] * 20_000})
    error = get_error(readonly_client.post("/train", json=body), 422)
    assert error["param"] == "training_config.reward_config.0.json_schema"
    assert "10000 values" in error["message"]


@pytest.mark.parametrize(
    ("literal", "reason"),
    [
        ("NaN", "finite"),
        ("-Infinity", "finite"),
        ("1e999", "finite"),
        ('"\\ud800"', "surrogate"),
        ('{"\\udfff": 1}', "surrogate"),
        ("9223372036854775808", "64 bits"),
        ("-9223372036854775809", "64 bits"),
    ],
)
def test_value_that_cannot_be_stored_is_rejected_with_its_place(
    readonly_client: TestClient, readonly_dataset_id: str, literal: str, reason: str
) -> None:
    body = json.dumps(make_grpo_body(readonly_dataset_id, {"const": "HERE"})).replace('"HERE"', literal)
    error = get_error(readonly_client.post("/train", content=body, headers=JSON_HEADERS), 422)
    assert error["param"] == "training_config.reward_config.0.json_schema.const"
    assert reason in error["message"]


@pytest.mark.parametrize("path", ["/train", "/jobs/x/clone", "/jobs/x/retry", "/internal/cleanup"])
@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b"[" * 250 + b"]" * 250, b'{"a":' * 900 + b"1" + b"}" * 900, b"9" * 5000, b"\xff\xfe{"]
)
def test_hostile_body_is_a_client_error_at_every_route(readonly_client: TestClient, path: str, content: bytes) -> None:
    response = readonly_client.post(path, content=content, headers=JSON_HEADERS)
    assert 400 <= response.status_code < 500
    assert response.json()["error"]["message"]


def test_name_of_the_job_with_half_a_surrogate_pair_is_rejected(readonly_client: TestClient, readonly_dataset_id: str) -> None:
    body = json.dumps(make_request_body(readonly_dataset_id, job_name="HERE")).replace("HERE", "\\ud800")
    assert get_error(readonly_client.post("/train", content=body, headers=JSON_HEADERS), 422)["param"] == "job_name"


def test_depth_limit_is_exact() -> None:
    assert find_json_problem(nest(64), FREE_FORM_LIMITS) is None
    problem = find_json_problem(nest(65), FREE_FORM_LIMITS)
    assert problem is not None
    assert problem.path == ("a",) * 64


def test_value_limit_is_exact() -> None:
    limits = JsonLimits(max_depth=3, max_values=3)
    assert find_json_problem([1, 2], limits) is None
    assert find_json_problem([1, 2, 3], limits) is not None


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(), max_size=4), inner, max_size=4),
        max_leaves=12,
    )
)
@settings(max_examples=200, deadline=None)
def test_accepted_body_can_be_encoded_and_read_again(value: object) -> None:
    try:
        parsed = parse_body(json.dumps(value).encode())
    except MalformedBody:
        assert find_json_problem(value, BODY_LIMITS) is not None
        return
    assert parse_body(json.dumps(parsed, ensure_ascii=False, allow_nan=False).encode()) == parsed

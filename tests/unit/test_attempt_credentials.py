"""What an attempt's tokens and its claimant's secret allow, and everything that is refused."""

import base64
import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import jwt
import pytest
from starlette.testclient import TestClient

from schema.spec import CLAIMANT_HEADER
from service.core.errors import Unauthorized
from service.core.tokens import ATTEMPT_AUDIENCE, ATTEMPT_TOKEN_TTL, LAUNCH_TOKEN_TTL, TokenSigner, key_id
from tests.factories import START
from tests.fakes import FakeClock
from tests.unit.api_harness import (
    CLAIMANT,
    attempt_headers,
    claim_attempt,
    get_error,
    get_services,
    launch_headers,
    make_result_body,
    start_attempt,
)

CALLS = ("events", "result")


def post(client: TestClient, job_id: str, call: str, headers: dict[str, str]) -> Any:
    body = make_result_body(job_id) if call == "result" else {"first_seq": 0}
    return client.post(f"/internal/jobs/{job_id}/attempts/1/{call}", json=body, headers=headers)


def read_status(client: TestClient, job_id: str) -> str:
    return client.get(f"/jobs/{job_id}").json()["status"]


@pytest.mark.parametrize("call", CALLS)
def test_calls_without_valid_token_of_this_attempt_are_refused(client: TestClient, dataset_id: str, call: str) -> None:
    job_id = start_attempt(client, dataset_id)
    own = attempt_headers(client, job_id)
    claims = {"sub": job_id, "attempt": 1, "aud": ATTEMPT_AUDIENCE, "exp": 4_000_000_000}
    forged = jwt.encode(claims, "another key of at least 32 bytes", algorithm="HS256", headers={"kid": own["Authorization"][-16:]})
    header, payload, signature = own["Authorization"].removeprefix("Bearer ").split(".")
    kid = json.loads(base64.urlsafe_b64decode(header + "=="))["kid"]
    unsigned = base64.urlsafe_b64encode(json.dumps({"alg": "none", "typ": "JWT", "kid": kid}).encode()).decode().rstrip("=")
    other_payload = base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")
    tokens = {
        "no token": None,
        "not a token": "x",
        "forged": forged,
        "forged with a known key id": jwt.encode(claims, "another key of at least 32 bytes", algorithm="HS256", headers={"kid": kid}),
        "algorithm none": f"{unsigned}.{payload}.",
        "algorithm none with a signature": f"{unsigned}.{payload}.{signature}",
        "changed payload": f"{header}.{other_payload}.{signature}",
        "another attempt": attempt_headers(client, job_id, 2)["Authorization"].removeprefix("Bearer "),
        "another job": attempt_headers(client, "other")["Authorization"].removeprefix("Bearer "),
        "the launch token": launch_headers(client, job_id)["Authorization"].removeprefix("Bearer "),
        "a link's token": get_services(client).tokens.sign_file_token(job_id, "f", 900),
    }
    for name, token in tokens.items():
        headers = own | {"Authorization": f"Bearer {token}"} if token else {CLAIMANT_HEADER: CLAIMANT}
        assert post(client, job_id, call, headers).status_code == 401, name
    assert post(client, job_id, call, own | {"Authorization": own["Authorization"].replace("Bearer", "Basic")}).status_code == 401
    assert read_status(client, job_id) == "preparing"
    assert post(client, job_id, call, own).is_success


@pytest.mark.parametrize("call", [*CALLS, "token"])
def test_token_without_the_claimants_secret_is_refused(client: TestClient, dataset_id: str, call: str) -> None:
    job_id = start_attempt(client, dataset_id)
    headers = launch_headers(client, job_id) if call == "token" else attempt_headers(client, job_id)
    headers.pop(CLAIMANT_HEADER, None)
    get_error(post(client, job_id, call, headers), 401)
    refused = post(client, job_id, call, headers | {CLAIMANT_HEADER: "d" * 64})
    assert refused.status_code == (400 if call == "result" else 409)
    assert read_status(client, job_id) == "preparing"


def test_result_in_another_process_name_is_refused(client: TestClient, dataset_id: str) -> None:
    job_id = start_attempt(client, dataset_id)
    other = make_result_body(job_id, claimant="someone")
    url, headers = f"/internal/jobs/{job_id}/attempts/1/result", attempt_headers(client, job_id)
    assert get_error(client.post(url, json=other, headers=headers), 400)["param"] == "claimant"
    assert read_status(client, job_id) == "preparing"


@pytest.mark.parametrize("call", CALLS)
def test_attempt_that_nobody_claimed_cannot_report(client: TestClient, dataset_id: str, call: str) -> None:
    job_id = start_attempt(client, dataset_id, claimed=False)
    assert get_error(post(client, job_id, call, attempt_headers(client, job_id)), 409)["code"] == "fenced"
    assert read_status(client, job_id) == "preparing"


def test_replays_after_the_end_change_nothing(client: TestClient, dataset_id: str) -> None:
    job_id = start_attempt(client, dataset_id)
    headers = attempt_headers(client, job_id)
    assert post(client, job_id, "result", headers).status_code == 204
    before = client.get(f"/jobs/{job_id}").json()
    assert post(client, job_id, "result", headers).status_code == 204  # its answer may have been lost
    assert get_error(post(client, job_id, "events", headers), 409)["code"] == "fenced"
    assert get_error(claim_attempt(client, job_id), 409)["code"] == "fenced"
    token_headers = launch_headers(client, job_id) | {CLAIMANT_HEADER: CLAIMANT}
    assert get_error(post(client, job_id, "token", token_headers), 409)["code"] == "fenced"
    assert client.get(f"/jobs/{job_id}").json() == before


def test_launch_token_of_another_attempt_cannot_claim(client: TestClient, dataset_id: str) -> None:
    job_id = start_attempt(client, dataset_id, claimed=False)
    url, body = f"/internal/jobs/{job_id}/attempts/1/claim", {"claimant": CLAIMANT}
    for headers in ({}, launch_headers(client, job_id, 2), launch_headers(client, "other"), attempt_headers(client, job_id)):
        get_error(client.post(url, json=body, headers=headers), 401)
    assert claim_attempt(client, job_id).status_code == 200
    get_error(client.post(url, json={"claimant": "two words"}, headers=launch_headers(client, job_id)), 422)


def test_secret_of_the_claimant_is_neither_stored_nor_shown(client: TestClient, dataset_id: str) -> None:
    job_id = start_attempt(client, dataset_id, claimed=False)
    claim_attempt(client, job_id)
    job = get_services(client).store.find_job(job_id)
    assert job is not None
    assert CLAIMANT not in job.model_dump_json()
    home: Path = get_services(client).settings.home_folder
    assert not [path for path in home.rglob("*") if path.is_file() and CLAIMANT.encode() in path.read_bytes()]


def test_new_token_is_exchanged_for_the_launch_token(client: TestClient, dataset_id: str) -> None:
    job_id = start_attempt(client, dataset_id)
    answer = post(client, job_id, "token", launch_headers(client, job_id) | {CLAIMANT_HEADER: CLAIMANT}).json()
    headers = {"Authorization": f"Bearer {answer['token']}", CLAIMANT_HEADER: CLAIMANT}
    assert post(client, job_id, "events", headers).status_code == 200


# --- tokens and keys -------------------------------------------------------------------------------------------------


def test_attempt_token_expires_and_renews_from_half_of_its_life() -> None:
    clock = FakeClock()
    signer = TokenSigner(b"k" * 32, clock)
    token = signer.sign_attempt_token("job", 1)
    remaining = signer.verify_attempt_token(token, "job", 1)
    assert remaining == ATTEMPT_TOKEN_TTL
    assert signer.renew_attempt_token("job", 1, remaining) is None
    clock.advance((ATTEMPT_TOKEN_TTL / 2 + timedelta(seconds=1)).total_seconds())
    renewed = signer.renew_attempt_token("job", 1, signer.verify_attempt_token(token, "job", 1))
    assert renewed is not None
    clock.advance((ATTEMPT_TOKEN_TTL / 2 + timedelta(minutes=2)).total_seconds())
    with pytest.raises(Unauthorized, match="expired"):
        signer.verify_attempt_token(token, "job", 1)
    assert signer.verify_attempt_token(renewed, "job", 1) > timedelta()


def test_launch_token_outlives_a_long_wait_but_not_forever() -> None:
    clock = FakeClock()
    signer = TokenSigner(b"k" * 32, clock)
    token = signer.sign_launch_token("job", 1)
    clock.advance((LAUNCH_TOKEN_TTL - timedelta(hours=1)).total_seconds())
    signer.verify_launch_token(token, "job", 1)
    clock.advance((timedelta(hours=2)).total_seconds())
    with pytest.raises(Unauthorized, match="expired"):
        signer.verify_launch_token(token, "job", 1)


def test_previous_key_is_accepted_and_never_signs() -> None:
    clock = FakeClock()
    old = TokenSigner(b"o" * 32, clock)
    tokens = old.sign_launch_token("job", 1), old.sign_attempt_token("job", 1), old.sign_file_token("a/b", "b", 900)
    rotated = TokenSigner(b"n" * 32, clock, [b"x" * 32, b"o" * 32])
    rotated.verify_launch_token(tokens[0], "job", 1)
    rotated.verify_attempt_token(tokens[1], "job", 1)
    assert rotated.read_file_token(tokens[2]) == ("a/b", "b")
    assert jwt.get_unverified_header(rotated.sign_attempt_token("job", 1))["kid"] == key_id(b"n" * 32)
    with pytest.raises(Unauthorized):
        old.verify_attempt_token(rotated.sign_attempt_token("job", 1), "job", 1)
    with pytest.raises(Unauthorized):
        TokenSigner(b"n" * 32, clock).verify_attempt_token(tokens[1], "job", 1)


def test_token_without_key_id_is_refused() -> None:
    signer = TokenSigner(b"k" * 32, FakeClock())
    claims = {"sub": "job", "attempt": 1, "aud": ATTEMPT_AUDIENCE, "exp": START + timedelta(minutes=5)}
    with pytest.raises(Unauthorized):
        signer.verify_attempt_token(jwt.encode(claims, b"k" * 32, algorithm="HS256"), "job", 1)


def test_store_credentials_need_the_owner(client: TestClient, dataset_id: str) -> None:
    job_id = start_attempt(client, dataset_id)
    url, headers = f"/internal/jobs/{job_id}/attempts/1/credentials", attempt_headers(client, job_id)
    assert client.post(url, headers=headers).json() == {"kind": "none", "token": None, "expires_at": None}
    get_error(client.post(url, headers=headers | {CLAIMANT_HEADER: "d" * 64}), 409)
    get_error(client.post(url, headers=headers | launch_headers(client, job_id)), 401)
    get_error(client.post(url, headers={CLAIMANT_HEADER: CLAIMANT}), 401)
    assert post(client, job_id, "result", headers).status_code == 204
    get_error(client.post(url, headers=headers), 409)

"""What attempts and operators call under /internal, and the events and logs that users read."""

import json
from pathlib import Path

import jwt
from starlette.testclient import TestClient

from tests.factories import START
from tests.unit.api_harness import attempt_headers, get_error, get_services, make_result_body, run_test_service, start_attempt


def test_an_attempt_claims_reports_and_finishes(client: TestClient, dataset_id: str) -> None:
    job_id = start_attempt(client, dataset_id)
    path, headers = f"/internal/jobs/{job_id}/attempts/1", attempt_headers(client, job_id)
    claim = client.post(f"{path}/claim", json={"claimant": "a"}, headers=headers)
    assert claim.json() == {"secrets": {"hf_token": "hf_..."}, "directive": "continue"}
    assert get_error(client.post(f"{path}/claim", json={"claimant": "b"}, headers=headers), 409)["code"] == "fenced"
    metrics = {"at": START.isoformat(), "event": {"type": "metrics", "step": 0, "values": {"loss": 2.5}}}
    phase = {"at": START.isoformat(), "event": {"type": "phase", "phase": "training"}}
    response = client.post(f"{path}/events", json={"first_seq": 0, "events": [phase, metrics], "phase": "training"}, headers=headers)
    assert response.json() == {"directive": "continue", "next_seq": 2}
    job = client.get(f"/jobs/{job_id}").json()
    assert (job["status"], job["phase"]) == ("training", "training")
    events = client.get(f"/jobs/{job_id}/events").json()
    assert [event["event"]["type"] for event in events["events"]] == ["phase", "metrics", "status"]
    assert client.post(f"{path}/result", json=make_result_body(job_id), headers=headers).status_code == 204
    assert client.get(f"/jobs/{job_id}").json()["status"] == "completed"
    assert get_error(client.post(f"{path}/events", json={"first_seq": 2}, headers=headers), 409)["code"] == "fenced"


def test_an_attempt_needs_its_own_token(client: TestClient, dataset_id: str) -> None:
    job_id = start_attempt(client, dataset_id)
    for headers in (
        {},
        {"Authorization": "Bearer x"},
        {"Authorization": "Basic x"},
        attempt_headers(client, job_id, 2),
        attempt_headers(client, "other"),
    ):
        for call in ("claim", "events", "result"):
            response = client.post(f"/internal/jobs/{job_id}/attempts/1/{call}", json={"claimant": "a"}, headers=headers)
            assert response.status_code in (401, 422), call
            assert response.status_code == 401 or call == "result"


def test_attempt_identity_can_only_report(tmp_path: Path) -> None:
    token = {email: jwt.encode({"email": email, "sub": email}, "k" * 32, algorithm="HS256") for email in ("job@p", "me@p")}
    headers_of = {email: {"X-Serverless-Authorization": f"Bearer {token[email]}"} for email in token}
    rules = {"cloud_run": True, "rules": [{"email": "*", "role": "operator"}]}
    with run_test_service(tmp_path, attempt_identity="job@p", identity=json.dumps(rules), K_SERVICE="tunesmith") as client:
        key = dict(client.headers)
        del client.headers["Authorization"]
        assert get_error(client.get("/jobs", headers=headers_of["job@p"]), 403)["code"] == "forbidden"
        assert client.get("/jobs", headers=headers_of["job@p"] | {"Authorization": f"Bearer {token['me@p']}"}).status_code == 403
        assert client.get("/jobs", headers=headers_of["job@p"] | {"Authorization": key["authorization"]}).status_code == 403
        assert client.post("/internal/reconcile", headers={"Authorization": f"Bearer {token['job@p']}"}).status_code == 403
        assert client.post("/internal/jobs/j/attempts/1/claim", json={"claimant": "p"}, headers=headers_of["job@p"]).status_code == 401
        for headers in (headers_of["me@p"], {"Authorization": f"Bearer {token['me@p']}"}):
            assert client.get("/jobs", headers=headers).status_code == 200
        for headers in ({}, {"Authorization": "Bearer no.token"}, {"Authorization": "Basic eA=="}):
            assert client.get("/jobs", headers=headers).status_code == 401


def test_orphans_are_listed_and_removed_on_request(client: TestClient) -> None:
    get_services(client).buckets.models.write("trained_adapters/gone/attempt-1/a", b"xyz")
    (row,) = client.get("/internal/orphans").json()["orphans"]
    assert (row["job_id"], row["objects"], row["size_bytes"]) == ("gone", 1, 3)
    client.post("/internal/cleanup")
    assert len(client.get("/internal/orphans").json()["orphans"]) == 1
    client.post("/internal/cleanup", json={"orphans": True})
    assert client.get("/internal/orphans").json() == {"orphans": [], "complete": True}


# --- events and logs -------------------------------------------------------------------------------------------------


def test_event_stream_resumes_after_last_event_id(client: TestClient, dataset_id: str) -> None:
    job_id = start_attempt(client, dataset_id)
    client.post(f"/jobs/{job_id}/cancel")
    [first] = client.get(f"/jobs/{job_id}/events").json()["events"]
    path, headers = f"/internal/jobs/{job_id}/attempts/1", attempt_headers(client, job_id)
    client.post(f"{path}/result", json=make_result_body(job_id, "cancelled"), headers=headers)
    stream_headers = {"Accept": "text/event-stream", "Last-Event-ID": str(first["id"])}
    text = client.get(f"/jobs/{job_id}/events", headers=stream_headers).text
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert [event["event"]["status"] for event in events if event] == ["cancelled"]
    assert text.rstrip().endswith("data: {}")
    get_error(client.get(f"/jobs/{job_id}/events", headers={**stream_headers, "Last-Event-ID": "x"}), 400)


def test_logs_are_paged(client: TestClient, dataset_id: str) -> None:
    job_id = start_attempt(client, dataset_id)
    log = get_services(client).settings.home_folder / f"attempts/{job_id}.1.log"
    log.parent.mkdir(exist_ok=True)
    log.write_text("one\ntwo é\n")
    page = client.get(f"/jobs/{job_id}/logs?limit=5").json()
    assert page == {"attempt": 1, "text": "one\nt", "next_offset": 5}
    assert client.get(f"/jobs/{job_id}/logs?offset=5").json()["text"] == "wo é\n"
    get_error(client.get(f"/jobs/{job_id}/logs?attempt=2"), 404)

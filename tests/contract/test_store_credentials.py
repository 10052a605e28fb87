"""Narrow credentials of attempts: Google's client exchanges a token at a Security Token Service, here one on this machine."""

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote

import pytest
from google.oauth2.credentials import Credentials

from schema.job import ExportSource
from service.adapters.credentials.cloud_storage import GoogleCredentialIssuer, render_boundary
from service.core.errors import Unavailable
from service.core.jobs.credentials import DeploymentCredentials, find_attempt_access
from service.core.ports import Buckets
from service.core.store_credentials import StoreAccess
from storage.gs import GcsStore
from storage.registry import open_store
from tests.factories import START, make_dataset, make_job
from tests.fakes import FakeClock

SOURCE_TOKEN = "broad"


@dataclass
class TokenService:
    """Answers as Google's Security Token Service does."""

    url: str = ""
    answer: dict[str, Any] = field(default_factory=lambda: {"access_token": "narrow", "token_type": "Bearer", "expires_in": 3600})
    status: int = 200
    requests: list[dict[str, str]] = field(default_factory=list)


@pytest.fixture
def sts() -> Iterator[TokenService]:
    service = TokenService()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            service.requests.append({name: values[0] for name, values in parse_qs(body).items()})
            content = json.dumps(service.answer).encode()
            self.send_response(service.status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    service.url = f"http://127.0.0.1:{server.server_port}/v1/token"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield service
    server.shutdown()
    server.server_close()


def make_issuer(sts: TokenService) -> GoogleCredentialIssuer:
    expiry = datetime.now(UTC).replace(tzinfo=None) + timedelta(minutes=30)
    return GoogleCredentialIssuer(FakeClock(), sts_url=sts.url, find_credentials=lambda: Credentials(SOURCE_TOKEN, expiry=expiry))


def make_buckets(*urls: str) -> Buckets:
    return Buckets(*map(open_store, urls))


def test_token_is_exchanged_for_one_with_a_boundary(sts: TokenService) -> None:
    access = StoreAccess("gs://models/team", readable=("configs/j.json",), writable=("results/j/",))
    credentials = make_issuer(sts).issue([access])
    assert (credentials.kind, credentials.token, credentials.expires_at) == ("google", "narrow", START + timedelta(hours=1))
    assert "narrow" not in repr(credentials)
    [request] = sts.requests
    assert (request["subject_token"], request["grant_type"]) == (SOURCE_TOKEN, "urn:ietf:params:oauth:grant-type:token-exchange")
    rules = json.loads(unquote(request["options"]))["accessBoundary"]["accessBoundaryRules"]
    assert [(rule["availableResource"], rule["availablePermissions"]) for rule in rules] == [
        ("//storage.googleapis.com/projects/_/buckets/models", ["inRole:roles/storage.objectViewer"]),
        ("//storage.googleapis.com/projects/_/buckets/models", ["inRole:roles/storage.objectUser"]),
    ]
    assert rules[0]["availabilityCondition"]["expression"] == "resource.name == 'projects/_/buckets/models/objects/team/configs/j.json'"
    assert rules[1]["availabilityCondition"]["expression"] == (
        "resource.name.startsWith('projects/_/buckets/models/objects/team/results/j/') || "
        "api.getAttribute('storage.googleapis.com/objectListPrefix', '').startsWith('team/results/j/')"
    )


def test_token_without_own_lifetime_expires_with_the_source(sts: TokenService) -> None:
    del sts.answer["expires_in"]
    credentials = make_issuer(sts).issue([StoreAccess("gs://models", ("a/",), ())])
    assert credentials.expires_at is not None
    assert timedelta() < credentials.expires_at - datetime.now(UTC) <= timedelta(minutes=30)


def test_refused_exchange_is_unavailable_and_hides_the_token(sts: TokenService) -> None:
    sts.status, sts.answer = 400, {"error": "invalid_request", "error_description": "no"}
    with pytest.raises(Unavailable) as refused:
        make_issuer(sts).issue([StoreAccess("gs://models", ("a/",), ())])
    assert SOURCE_TOKEN not in refused.value.message


def test_attempt_reaches_only_what_its_job_needs() -> None:
    source = ExportSource(job_id="other", attempt=1, step=1, key="checkpoints/test-jobs/job_other/attempt-1/step-00000001/")
    job, dataset = make_job("job-1", export_of=source), make_dataset()
    access = {found.url: found for found in find_attempt_access(job, [dataset], make_buckets("gs://configs", "gs://data", "gs://models"))}
    assert access["gs://configs"] == StoreAccess("gs://configs", ("configs/job-1.json",), ("results/job-1/",))
    assert access["gs://data"].readable == ("datasets/dataset_1/train.jsonl", "datasets/dataset_1/eval.jsonl")
    assert access["gs://data"].writable == ("datasets/dataset_1/tokens/",)
    assert access["gs://models"].readable == ("pretrained_weights/", source.key)
    assert {"trained_adapters/job-1/", "trackers/job-1/", "runs/job-1/", "checkpoints/test-jobs/job_job-1/"} <= set(
        access["gs://models"].writable
    )
    assert all("job-1/" in prefix for prefix in access["gs://models"].writable)


def test_boundary_of_every_layout_has_at_most_ten_rules() -> None:
    for urls in (("gs://configs", "gs://data", "gs://models"), ("gs://one",) * 3):
        accesses = find_attempt_access(make_job(), [make_dataset()], make_buckets(*urls))
        assert 2 <= len(render_boundary(accesses)["accessBoundary"]["accessBoundaryRules"]) <= 6


def test_boundary_of_sixteen_mixed_datasets_stays_within_the_limits() -> None:
    datasets = [make_dataset(f"dataset_{number:012d}") for number in range(16)]
    for urls in (
        ("gs://configs-of-a-deployment", "gs://data-of-a-deployment", "gs://models-of-a-deployment"),
        ("gs://one-for-all/team",) * 3,
    ):
        accesses = find_attempt_access(make_job(), datasets, make_buckets(*urls))
        rules = render_boundary(accesses)["accessBoundary"]["accessBoundaryRules"]
        expressions = [rule["availabilityCondition"]["expression"] for rule in rules]
        assert len(rules) <= 10
        assert all(len(expression) <= 2048 for expression in expressions)
        assert all(any(dataset.splits["train"].key in expression for expression in expressions) for dataset in datasets)


def test_quote_in_a_key_does_not_end_the_expression() -> None:
    [rule] = render_boundary([StoreAccess("gs://models", ("a'/",), ())])["accessBoundary"]["accessBoundaryRules"]
    assert "objects/a\\'/')" in rule["availabilityCondition"]["expression"]


@pytest.mark.parametrize(("urls", "kind"), [(("file:///objects",) * 3, "none"), (("gs://configs", "gs://data", "gs://models"), "ambient")])
def test_without_narrow_credentials_attempts_use_their_machines_own(urls: tuple[str, ...], kind: str) -> None:
    accesses = find_attempt_access(make_job(), [make_dataset()], make_buckets(*urls))
    assert DeploymentCredentials().issue(accesses).kind == kind


def test_store_asks_for_a_new_token_before_it_expires() -> None:
    tokens: list[str] = []

    def get_token() -> tuple[str, datetime]:
        tokens.append(f"token-{len(tokens)}")
        return tokens[-1], datetime.now(UTC) + timedelta(hours=1)

    store = open_store("gs://models", get_token)
    assert isinstance(store, GcsStore)
    credentials = store._get_client()._credentials
    headers: dict[str, str] = {}
    for is_old in (False, False, True, False):
        if is_old:
            credentials.expiry = datetime.now(UTC).replace(tzinfo=None) + timedelta(minutes=1)
        credentials.before_request(None, "GET", "https://storage.googleapis.com/x", headers)
    assert tokens == ["token-0", "token-1"]
    assert headers["authorization"] == "Bearer token-1"
    store.close()

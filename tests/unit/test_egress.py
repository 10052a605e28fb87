"""The egress policy: which URLs of a caller a deployment connects to."""

from pathlib import Path

import pytest
from httpx2 import Response
from pydantic import ValidationError
from starlette.testclient import TestClient

from schema.egress import EGRESS_VARIABLE, EgressPolicy, EgressRefused, allow_rule_of, parse_allow_rule, parse_url
from schema.requests import CloneRequest
from schema.training import TRAINER_TYPES
from service.core.errors import InvalidRequest
from service.core.jobs.trackers import DeploymentTrackers
from service.core.validation.egress import URL_FIELDS, EgressCheck
from service.settings import Settings, attempt_variables, egress_policy
from tests.factories import make_config, make_grpo_config
from tests.unit.api_harness import get_error, run_test_service, upload
from tests.unit.egress_targets import ALLOWED_URLS, HOSTILE_NAMES, HOSTILE_URLS, LOOPBACK_URLS, METADATA_URLS, UNSPECIFIED_URLS
from tests.unit.jobs_harness import PRINCIPAL, JobsHarness

STRICT = EgressPolicy()
LOCAL = EgressPolicy(allow_loopback=True, own_ports=(8080,), own_addresses=("192.168.0.7", "2606:4700::7"), own_hosts=("t.example:443",))


def check(policy: EgressPolicy, url: str, *addresses: str) -> None:
    """Check a URL as the service and the attempt do, with what its host resolves to."""
    target = parse_url(url)
    policy.check_target(target)
    policy.check_addresses(target, addresses)


def is_allowed(policy: EgressPolicy, url: str, *addresses: str) -> bool:
    try:
        check(policy, url, *addresses)
    except EgressRefused:
        return False
    return True


def test_there_are_enough_hostile_targets() -> None:
    assert len(set(HOSTILE_URLS)) == len(HOSTILE_URLS) >= 150


@pytest.mark.parametrize("url", HOSTILE_URLS)
def test_hostile_url_is_refused_with_hint(url: str) -> None:
    with pytest.raises(EgressRefused) as refused:
        check(STRICT, url)
    assert str(refused.value)
    assert refused.value.hint


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_name_with_forbidden_address_is_refused(name: str) -> None:
    check(STRICT, f"https://{name}/v1")
    assert not is_allowed(STRICT, f"https://{name}/v1", *HOSTILE_NAMES[name])


@pytest.mark.parametrize("url", ALLOWED_URLS)
def test_public_https_url_is_allowed(url: str) -> None:
    check(STRICT, url, "93.184.215.14")


@pytest.mark.parametrize(
    ("url", "host", "port"),
    [
        ("https://JUDGE.Example.com./v1", "judge.example.com", 443),
        ("http://0x7f.1:81/v1", "127.0.0.1", 81),
        ("https://[2606:4700:0:0::1111]/", "2606:4700::1111", 443),
    ],
)
def test_host_is_normalized(url: str, host: str, port: int) -> None:
    target = parse_url(url)
    assert (target.host, target.port) == (host, port)


def test_local_profile_reaches_loopback() -> None:
    for url in (*LOOPBACK_URLS, "http://127.0.0.1:11434/v1", "http://localhost:11434/v1", "http://[::1]:11434/v1"):
        addresses = ("127.0.0.1", "::1") if "localhost" in url.lower() else ()
        assert is_allowed(LOCAL, url, *addresses), url
    for url in METADATA_URLS + UNSPECIFIED_URLS:
        assert not is_allowed(LOCAL, url), url
    assert not is_allowed(LOCAL, "http://judge.example.com/v1", "93.184.215.14")
    assert not is_allowed(LOCAL, "http://10.0.0.8/v1")


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://127.0.0.1:8080/v1", None),
        ("http://127.0.0.2:8080/v1", None),
        ("http://127.1:8080/v1", None),
        ("http://0.0.0.0:8080/v1", None),
        ("http://[::1]:8080/v1", None),
        ("http://[::]:8080/v1", None),
        ("http://[::ffff:127.0.0.1]:8080/v1", None),
        ("http://localhost:8080/v1", None),
        ("http://LOCALHOST.:8080/v1", None),
        ("http://192.168.0.7:8080/v1", None),
        ("http://this-machine:8080/v1", "127.0.1.1"),
        ("http://this-machine:8080/v1", "192.168.0.7"),
        ("https://[2606:4700::7]:8080/v1", None),
        ("https://t.example/v1", None),
    ],
)
def test_service_itself_is_refused_even_if_a_rule_allows_it(url: str, address: str | None) -> None:
    open_policy = LOCAL.model_copy(update={"allow": ("0.0.0.0/0", "::/0", "localhost", "this-machine", "t.example")})
    with pytest.raises(EgressRefused, match="is this service itself"):
        check(open_policy, url, *([address] if address else []))


@pytest.mark.parametrize(
    ("rule", "url", "address"),
    [
        ("10.0.0.0/8", "https://10.0.0.8/v1", None),
        ("10.0.0.0/8", "http://10.0.0.8:8000/v1", None),
        ("10.0.0.8", "https://10.0.0.8/v1", None),
        ("10.0.0.8:8000", "http://10.0.0.8:8000/v1", None),
        ("10.0.0.0/8:8000", "http://judge.corp.example:8000/v1", "10.0.0.8"),
        ("fd12::/16", "http://[fd12::8]/v1", None),
        ("[fd12::/16]:8000", "http://[fd12::8]:8000/v1", None),
        ("judge.corp.example", "http://judge.corp.example/v1", "10.0.0.8"),
        ("Judge.Corp.Example.:8000", "http://judge.corp.example:8000/v1", "10.0.0.8"),
        ("*.corp.example", "https://judge.corp.example/v1", "10.0.0.8"),
        ("*.corp.example", "http://a.b.corp.example/v1", "8.8.8.8"),
        ("127.0.0.0/8", "http://127.0.0.1:11434/v1", None),
        ("localhost:11434", "http://localhost:11434/v1", "127.0.0.1"),
        ("10.0.0.8:6379", "http://10.0.0.8:6379/v1", None),
        ("64:ff9b::/96", "https://judge.example.com/v1", "64:ff9b::808:808"),
    ],
)
def test_operator_rule_allows_what_it_names(rule: str, url: str, address: str | None) -> None:
    addresses = [address] if address else []
    assert not is_allowed(STRICT, url, *addresses)
    check(EgressPolicy(allow=("203.0.113.0/24", rule)), url, *addresses)


@pytest.mark.parametrize(
    ("rule", "url", "address"),
    [
        ("10.0.0.0/8", "https://192.168.0.1/v1", None),
        ("10.0.0.8:8000", "https://10.0.0.8/v1", None),
        ("corp.example", "https://judge.corp.example/v1", "10.0.0.8"),
        ("*.corp.example", "https://corp.example/v1", "10.0.0.8"),
        ("*.corp.example", "https://evilcorp.example/v1", "10.0.0.8"),
        ("*.corp.example", "https://judge.corp.example/v1", "127.0.0.1"),
        ("*.corp.example", "https://judge.corp.example/v1", "0.0.0.0"),
        ("*.corp.example", "https://judge.corp.example/v1", "::"),
        ("*.corp.example", "https://judge.corp.example/v1", "::ffff:127.0.0.1"),
        ("*.corp.example", "https://judge.corp.example/v1", "169.254.169.254"),
        ("0.0.0.0/0", "https://169.254.169.254/v1", None),
        ("::/0", "https://[fd00:ec2::254]/v1", None),
        ("metadata.google.internal", "https://metadata.google.internal/v1", None),
        ("64:ff9b::/96", "https://judge.example.com/v1", "64:ff9b::a00:8"),
        ("judge.corp.example", "https://10.0.0.8/v1", None),
    ],
)
def test_operator_rule_allows_nothing_else(rule: str, url: str, address: str | None) -> None:
    assert not is_allowed(EgressPolicy(allow=(rule,)), url, *([address] if address else []))


@pytest.mark.parametrize(
    "rule", ["10.0.0.1/8", "10.0.0.0/33", "[fd00::/8", "judge example", "*", "*.", "https://judge.example", "a:0", "-a.b", ""]
)
def test_invalid_operator_rule_is_refused_at_start(rule: str) -> None:
    with pytest.raises(ValidationError):
        EgressPolicy(allow=(rule,))
    with pytest.raises(ValidationError, match="egress_allow"):
        Settings(egress_allow=(rule,))  # type: ignore[call-arg]


def test_rule_of_a_target_allows_it() -> None:
    for url in ("http://[fd12::8]:8000/v1", "http://10.0.0.8/v1"):
        check(EgressPolicy(allow=(allow_rule_of(parse_url(url)),)), url)
    assert parse_allow_rule(allow_rule_of(parse_url("https://judge.corp.example"))).host == "judge.corp.example"


def test_policy_survives_the_way_to_the_attempt() -> None:
    assert EgressPolicy.load(LOCAL.model_dump_json()) == LOCAL


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        ({}, True),
        ({"host": "localhost", "public_url": "http://127.0.0.1:9000"}, True),
        ({"host": "0.0.0.0"}, False),
        ({"public_url": "https://t.example"}, False),
        ({"launchers": ("local", "cloud-run")}, False),
    ],
)
def test_loopback_is_allowed_only_where_all_is_on_one_machine(settings: dict[str, object], allowed: bool) -> None:
    assert egress_policy(Settings(**settings)).allow_loopback == allowed  # type: ignore[arg-type]


def test_settings_make_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_EGRESS_ALLOW", "10.2.0.0/16, *.corp.example")
    monkeypatch.setenv("TUNESMITH_TRACKERS", '{"mlflow_config": {"tracking_uri": "http://mlflow:5000"}}')
    settings = Settings(port=8123, public_url="http://10.2.0.9:9000")  # type: ignore[call-arg]
    policy = egress_policy(settings)
    assert EgressPolicy.load(attempt_variables(settings)[EGRESS_VARIABLE]) == policy
    assert policy.allow == ("10.2.0.0/16", "*.corp.example", "mlflow:5000")
    assert policy.own_ports == (8123, 9000)
    assert {"127.0.0.1", "10.2.0.9"} <= set(policy.own_addresses)
    assert egress_policy(Settings(public_url="https://t.example/")).own_hosts == ("t.example:443",)  # type: ignore[call-arg]
    check(policy, "http://mlflow:5000", "10.9.0.1")


# --- at submit --------------------------------------------------------------------------------------------------------

JUDGE = {"type": "score_model", "name": "judge", "model": "m"}
COSINE = {"type": "text_similarity", "name": "near", "metric": "cosine", "embedding_model": "m"}


class FixedResolver:
    """Resolves the hostile names, and nothing else."""

    def resolve(self, host: str, port: int) -> tuple[str, ...]:
        return HOSTILE_NAMES.get(host, ())


@pytest.mark.parametrize(
    ("graders", "config", "param"),
    [
        ([JUDGE | {"base_url": "https://private.example/v1"}], {}, "training_config.reward_config.0.base_url"),
        (
            [{"type": "format", "name": "form"}, COSINE | {"base_url": "https://127.0.0.1/v1"}],
            {},
            "training_config.reward_config.1.base_url",
        ),
        (
            [{"type": "format", "name": "form"}],
            {"mlflow_config": {"tracking_uri": "http://mlflow.example"}},
            "training_config.mlflow_config.tracking_uri",
        ),
    ],
)
def test_refused_url_is_an_error_of_its_field(graders: list[dict[str, object]], config: dict[str, object], param: str) -> None:
    with pytest.raises(InvalidRequest, match=f"{param} is refused") as excinfo:
        EgressCheck(STRICT, FixedResolver()).check(make_grpo_config(*graders, **config))
    assert excinfo.value.param == param
    assert "TUNESMITH_EGRESS_ALLOW" in excinfo.value.hint
    assert "10.0.0.8" not in str(excinfo.value) + excinfo.value.hint  # what a name resolves to inside is not the caller's to know


def test_host_that_is_not_found_passes() -> None:
    EgressCheck(STRICT, FixedResolver()).check(make_grpo_config(JUDGE | {"base_url": "https://only-inside.example/v1"}))


def test_submit_and_clone_check_urls(tmp_path: Path) -> None:
    harness = JobsHarness(tmp_path)
    job = harness.submit(training_config=make_config(mlflow_config={"tracking_uri": "https://mlflow.example"}))
    with pytest.raises(InvalidRequest, match="is refused"):
        harness.submit(training_config=make_config(mlflow_config={"tracking_uri": "https://10.0.0.8"}))
    patch = CloneRequest.model_validate({"training_config": {"mlflow_config": {"tracking_uri": "https://10.0.0.8"}}})
    with pytest.raises(InvalidRequest, match="is refused") as excinfo:
        harness.jobs.submission.clone(PRINCIPAL, job.job_id, patch)
    assert excinfo.value.param == "training_config.mlflow_config.tracking_uri"
    assert harness.wake_count == 1


def test_operator_tracker_may_be_anywhere(tmp_path: Path) -> None:
    trackers = DeploymentTrackers.model_validate({"mlflow_config": {"tracking_uri": "http://10.0.0.8:5000"}})
    job = JobsHarness(tmp_path, trackers=trackers).submit()
    assert job.training_config.mlflow_config is not None


def test_every_url_field_of_a_training_config_is_checked() -> None:
    url_fields: set[str] = set()

    def collect(name: str, schema: object) -> None:
        match schema:
            case {"pattern": str(pattern)} if pattern.startswith("^https?"):
                url_fields.add(name)
            case list():
                for item in schema:
                    collect(name, item)
            case dict():
                for key, value in schema.items():
                    collect(name if key in ("anyOf", "items") else str(key), value)

    for trainer in TRAINER_TYPES.values():
        collect("", trainer.model_json_schema())
    assert url_fields == set(URL_FIELDS)


# --- over HTTP ----------------------------------------------------------------------------------------------------------


def submit_judge(client: TestClient, dataset_id: str, base_url: str) -> Response:
    config = {"base_model_id": "google/gemma-3-270m", "trainer_type": "grpo", "reward_config": [JUDGE | {"base_url": base_url}]}
    return client.post("/train", json={"processed_dataset_id": dataset_id, "training_config": config})


def test_shared_service_refuses_every_hostile_url(tmp_path: Path) -> None:
    with run_test_service(tmp_path, public_url="https://t.example") as client:
        dataset_id = upload(client, '{"prompt": "p", "answer": "a"}\n' * 20).json()["processed_dataset_id"]
        for url in (*HOSTILE_URLS, "https://t.example/v1"):
            response = submit_judge(client, dataset_id, url)
            assert response.status_code in (400, 422), url
            assert response.json()["error"]["param"] == "training_config.reward_config.0.base_url", url
        assert client.get("/jobs").json()["jobs"] == []
        assert submit_judge(client, dataset_id, "https://8.8.8.8/v1").status_code == 201


def test_local_service_accepts_a_local_judge_but_not_itself(tmp_path: Path) -> None:
    with run_test_service(tmp_path, port=8123) as client:
        dataset_id = upload(client, '{"prompt": "p", "answer": "a"}\n' * 20).json()["processed_dataset_id"]
        for host in ("127.0.0.1", "127.0.0.2", "localhost", "[::1]", "0.0.0.0", "127.1", "[::ffff:127.0.0.1]"):
            error = get_error(submit_judge(client, dataset_id, f"http://{host}:8123/v1"), 400)
            assert error["message"].endswith("is this service itself")
        assert submit_judge(client, dataset_id, "http://127.0.0.1:11434/v1").status_code == 201

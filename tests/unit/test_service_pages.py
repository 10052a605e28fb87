"""How the service describes itself: documentation, root, capabilities, health, and the OpenAPI document."""

import asyncio
import re
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any, NoReturn

import anyio.to_thread
import pytest
from starlette.testclient import TestClient

from schema.requests import TRAIN_REQUEST_EXAMPLE
from service.api.health import HealthChecks
from service.core.errors import Unavailable
from tests.unit.api_harness import get_services, run_test_service
from tests.waiting import wait_until


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """One service for all tests: nothing here changes it. It never reconciles on its own."""
    with run_test_service(tmp_path_factory.mktemp("home"), reconcile_interval_s=0) as client:
        yield client


# --- documentation, root and capabilities ----------------------------------------------------------------------------


def test_docs_load_only_from_this_service(client: TestClient) -> None:
    page = client.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "://" not in page.text.replace("window.location.origin", "")
    loaded = {path: client.get(path) for path in re.findall(r'(?:src|href)="([^"]+)"', page.text)}
    types = {path.rpartition(".")[2]: response.headers["content-type"].partition(";")[0] for path, response in loaded.items()}
    assert {response.status_code for response in loaded.values()} == {200}
    assert types == {"js": "text/javascript", "css": "text/css", "png": "image/png"}
    (schema_path,) = re.findall(r"url: '([^']+)'", page.text)
    assert client.get(schema_path).json()["info"]["title"] == "Tunesmith"


def test_docs_never_call_a_validator(client: TestClient) -> None:
    assert '"validatorUrl": null' in client.get("/docs").text
    assert client.get("/redoc").status_code == 404


def test_root_links_exist(client: TestClient) -> None:
    root = client.get("/").json()
    assert (root.pop("name"), bool(root.pop("version"))) == ("Tunesmith", True)
    assert set(root) == {"docs", "openapi", "health", "capabilities"}
    assert {name: client.get(path).status_code for name, path in root.items()} == dict.fromkeys(root, 200)


def test_root_redirects_browser_to_docs(client: TestClient) -> None:
    response = client.get("/", headers={"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}, follow_redirects=False)
    assert (response.status_code, response.headers["location"]) == (307, "/docs")


def test_capabilities_list_all_request_options(client: TestClient) -> None:
    capabilities = client.get("/capabilities").json()
    assert set(capabilities["trainer_types"]) == {"sft", "dpo", "orpo", "kto", "grpo", "reward"}
    assert capabilities["launchers"]["local"]["profiles"]["local"]["device"] == "cpu"
    assert capabilities["launchers"]["local"]["environments"]["llm"]["families"]["llm"]["options"]["method"] == capabilities["methods"]
    assert capabilities["default_hardware"] == "local/local"
    assert {"graders", "trackers", "modalities", "export", "lm_eval"} <= set(capabilities)


# --- health ----------------------------------------------------------------------------------------------------------


def test_health_lists_dependencies(client: TestClient) -> None:
    health = client.get("/health").json()
    assert (health["live"], health["ready"]) == (True, True)


def test_unavailable_store_makes_service_unready(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_unavailable() -> NoReturn:
        raise Unavailable("the disk is gone")

    monkeypatch.setattr(get_services(client).store, "ping", raise_unavailable)
    response = client.get("/health")
    assert (response.status_code, response.json()["live"], response.json()["ready"]) == (503, True, False)
    assert response.json()["checks"]["job_store"] == "the disk is gone"


def test_health_answers_while_all_request_threads_are_busy(client: TestClient) -> None:
    release = threading.Event()
    assert client.portal is not None
    threads = int(client.portal.call(lambda: anyio.to_thread.current_default_thread_limiter().total_tokens))
    busy = [client.portal.start_task_soon(anyio.to_thread.run_sync, release.wait) for _ in range(threads + 1)]
    try:
        wait_until(partial(client.portal.call, lambda: not anyio.to_thread.current_default_thread_limiter().available_tokens), 10)
        assert client.get("/health").status_code == 200
    finally:
        release.set()
    assert all(task.result(10) for task in busy)


def test_hanging_check_is_named_in_time_and_never_runs_twice() -> None:
    release, calls = threading.Event(), []

    def hang() -> None:
        calls.append(None)
        release.wait()

    checks = HealthChecks({"job_store": hang, "object_store": lambda: None}, timeout_s=0.1)
    try:
        for _ in range(2):
            assert asyncio.run(checks.run()) == {"job_store": "no answer within 0.1 s", "object_store": "ok"}
        assert len(calls) == 1
    finally:
        release.set()
        checks.close()


# --- the OpenAPI document --------------------------------------------------------------------------------------------


def test_openapi_documents_the_contract_with_an_example(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    assert {"/train", "/jobs", "/jobs/{job_id}", "/jobs/download/{job_id}", "/health", "/datasets", "/capabilities"} <= set(
        document["paths"]
    )
    assert not [path for path in document["paths"] if path.startswith("/internal")]
    schemas = document["components"]["schemas"]
    request = schemas["TrainRequest"]
    assert request["examples"][0]["training_config"]["hyperparameters"] == TRAIN_REQUEST_EXAMPLE["training_config"]["hyperparameters"]
    config = request["properties"]["training_config"]
    assert set(config["discriminator"]["mapping"]) == {"sft", "dpo", "orpo", "kto", "grpo", "reward"}
    assert schemas["SftConfig"]["properties"]["trainer_type"]["default"] == "sft"
    assert "reward_config" in schemas["GrpoConfig"]["required"]
    hyperparameters = schemas["SftHyperparameters"]["properties"]
    assert hyperparameters["lora_rank"]["minimum"] == 1
    assert hyperparameters["learning_rate"]["anyOf"][0]["maximum"] == 1
    assert schemas["DpoHyperparameters"]["properties"]["beta"]["default"] == 0.1


CALLER = {"401", "403", "421", "429", "503"}  # of every operation that needs to know who calls


def documented_errors(client: TestClient) -> dict[str, set[str]]:
    """The error statuses of each operation, as `GET /jobs`."""
    document = client.get("/openapi.json").json()
    return {
        f"{method.upper()} {path}": {status for status in operation["responses"] if status >= "400"}
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    }


@pytest.mark.parametrize(
    ("operation", "statuses"),
    [
        ("POST /train", CALLER | {"400", "404", "409", "413", "422"}),
        ("GET /jobs", CALLER | {"400", "422"}),
        ("GET /jobs/{job_id}", CALLER | {"400", "404", "422"}),
        ("GET /jobs/download/{job_id}", CALLER | {"400", "404", "409", "422"}),
        ("POST /jobs/{job_id}/cancel", CALLER | {"400", "404", "409", "422"}),
        ("POST /datasets", CALLER | {"400", "404", "413", "422"}),
        ("DELETE /datasets/{processed_dataset_id}", CALLER | {"400", "404", "409", "422"}),
        ("GET /files/{token}", {"400", "401", "403", "404", "421", "422", "503"}),
        ("GET /health", {"403", "421", "503"}),
        ("GET /capabilities", CALLER),
    ],
)
def test_operation_lists_its_errors(client: TestClient, operation: str, statuses: set[str]) -> None:
    assert documented_errors(client)[operation] == statuses


def test_operations_declare_how_callers_are_identified(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    assert document["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
    security = {path: {str(operation["security"]) for operation in operations.values()} for path, operations in document["paths"].items()}
    assert {path for path, schemes in security.items() if schemes == {"[]"}} == {
        *("/health", "/login", "/logout"),
        *("/files/{token}", "/datasets/uploads/{token}"),  # the token is what admits
    }
    assert {scheme for schemes in security.values() for scheme in schemes} == {"[]", "[{'bearer': []}]"}


def test_documented_errors_have_the_one_error_shape(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    schemas: dict[str, Any] = document["components"]["schemas"]
    assert set(schemas["ErrorBody"]["properties"]) == {"code", "message", "hint", "param", "errors"}
    assert "HTTPValidationError" not in schemas
    used = [
        response["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        for path, operations in document["paths"].items()
        for operation in operations.values()
        for status, response in operation["responses"].items()
        if status >= "400" and path != "/health"
    ]
    assert set(used) <= {"ErrorResponse", "DeleteJobResponse"}

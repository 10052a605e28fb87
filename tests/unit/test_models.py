"""The registry of base models: what the model store has, which model a name means, and what is refused before a job is taken."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from schema.models import MODEL_RECORD, ModelFile, ModelRecord, describe_model, model_prefix
from service.core.errors import InvalidRequest, NotFound
from service.core.models.names import find_meant, suggest
from service.core.models.registry import ModelRegistry
from service.core.principals import LOCAL_PRINCIPAL
from service.core.validation.hub import NoHub
from storage import ObjectStore
from storage.registry import open_store
from tests.factories import make_train_request
from tests.fakes import FakeHub
from tests.unit.api_harness import get_error, make_request_body_with_config, run_test_service, upload
from tests.unit.jobs_harness import PRINCIPAL, JobsHarness

GEMMA = "google/gemma-3-270m"
GEMMA_CONFIG = {"architectures": ["Gemma3ForCausalLM"], "dtype": "bfloat16"}


def make_safetensors(**shapes: list[int]) -> bytes:
    """A file of bfloat16 tensors, without their values."""
    header = json.dumps({name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}).encode()
    return len(header).to_bytes(8, "little") + header


def store_model(store: ObjectStore, name: str, files: Mapping[str, bytes] | None = None) -> None:
    """Put a model into the store by hand."""
    content = files or {"config.json": json.dumps(GEMMA_CONFIG).encode(), "model.safetensors": make_safetensors(a=[3, 4], b=[5])}
    for path, text in content.items():
        store.write(model_prefix(name) + path, text)


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return open_store((tmp_path / "objects").as_uri())


@pytest.fixture
def hub() -> FakeHub:
    return FakeHub()


@pytest.fixture
def registry(store: ObjectStore, hub: FakeHub) -> ModelRegistry:
    return ModelRegistry(store, hub)


def test_a_model_that_was_put_there_by_hand_is_described_from_its_files(store: ObjectStore, registry: ModelRegistry) -> None:
    store_model(store, GEMMA)
    store.write(model_prefix(GEMMA) + "README.md", b"---\nlanguage: en\nlicense: gemma\n---\n# Gemma")
    [view] = registry.list_models(LOCAL_PRINCIPAL)
    record = view.record
    assert (record.name, record.family, record.source, record.precision) == (GEMMA, "llm", "unknown", "bfloat16")
    assert (record.parameters, record.license, record.architecture) == (17, "gemma", "Gemma3ForCausalLM")
    assert view.available
    assert view.known is not None
    assert view.known.hidden_size == 640


def test_a_record_is_believed_only_while_it_describes_the_files(store: ObjectStore, registry: ModelRegistry) -> None:
    store_model(store, GEMMA)
    sizes = {stored.key.rpartition("/")[2]: stored.size_bytes for stored in store.iter_objects(model_prefix(GEMMA))}
    files = tuple(ModelFile(path=path, size_bytes=size) for path, size in sizes.items())
    record = ModelRecord(name=GEMMA, source="package", note="dequantized from Q4_K_M", files=files)
    store.write(model_prefix(GEMMA) + MODEL_RECORD, record.model_dump_json().encode())
    assert registry.find(LOCAL_PRINCIPAL, GEMMA).record == record

    store.write(model_prefix(GEMMA) + "model.safetensors", make_safetensors(a=[7, 7]))
    replaced = registry.find(LOCAL_PRINCIPAL, GEMMA).record
    assert (replaced.source, replaced.note, replaced.parameters) == ("unknown", "", 49)

    store.write(model_prefix(GEMMA) + MODEL_RECORD, b"{ not JSON")
    assert registry.find(LOCAL_PRINCIPAL, GEMMA).record.source == "unknown"


def test_hostile_files_of_a_model_are_described_without_trusting_them() -> None:
    files: dict[str, Any] = {
        "config.json": json.dumps({"architectures": ["x\x1b[31m" * 100]}).encode(),
        "model.safetensors": (1 << 60).to_bytes(8, "little"),
        "README.md": b"---\nlicense: \x00a\x1b]0;b\n---",
    }
    sizes = {path: len(content) for path, content in files.items()}
    record = describe_model("a/b", sizes, lambda path, max_bytes: files[path][:max_bytes])
    assert record.architecture is not None
    assert record.architecture.isprintable()
    assert len(record.architecture) <= 120
    assert (record.parameters, record.license) == (None, "a]0;b")


def test_parameters_of_a_model_in_several_files_come_from_its_index() -> None:
    index = {"metadata": {"total_size": 80}, "weight_map": {}}
    files = {
        "config.json": b"{}",
        "model-00001-of-00002.safetensors": make_safetensors(a=[2]),
        "model-00002-of-00002.safetensors": make_safetensors(b=[38]),
        "model.safetensors.index.json": json.dumps(index).encode(),
    }
    record = describe_model("a/b", {path: len(content) for path, content in files.items()}, lambda path, count: files[path][:count])
    assert (record.parameters, record.precision) == (40, "bfloat16")


def test_an_incomplete_model_is_not_listed(store: ObjectStore, registry: ModelRegistry) -> None:
    store_model(store, "a/half", {"model.safetensors": make_safetensors(a=[1])})
    assert registry.list_models(LOCAL_PRINCIPAL) == []


@pytest.mark.parametrize("name", ["gemma-3-270m", "GEMMA-3-270M", "google/Gemma-3-270m"])
def test_a_unique_short_name_finds_its_model(store: ObjectStore, registry: ModelRegistry, name: str) -> None:
    store_model(store, GEMMA)
    assert registry.find(LOCAL_PRINCIPAL, name).record.name == GEMMA


def test_an_ambiguous_short_name_lists_the_models(store: ObjectStore, registry: ModelRegistry) -> None:
    store_model(store, GEMMA)
    store_model(store, "unsloth/gemma-3-270m")
    with pytest.raises(NotFound, match="google/gemma-3-270m or unsloth/gemma-3-270m"):
        registry.find(LOCAL_PRINCIPAL, "gemma-3-270m")


def test_a_model_that_is_not_stored_is_looked_up_on_the_hub(registry: ModelRegistry, hub: FakeHub) -> None:
    hub.read_result = "gated"
    view = registry.find(LOCAL_PRINCIPAL, "google/gemma-3-1b-pt")
    assert (view.available, view.hub, view.record.source) == (False, "gated", "hub")
    assert view.known is not None
    assert view.known.hidden_size == 1152


def test_a_model_that_the_hub_does_not_have_is_not_found(store: ObjectStore, registry: ModelRegistry, hub: FakeHub) -> None:
    store_model(store, GEMMA)
    hub.read_result = "absent"
    with pytest.raises(NotFound) as caught:
        registry.find(LOCAL_PRINCIPAL, "google/gemma-3-271m")
    assert caught.value.hint == "did you mean google/gemma-3-270m?"


def test_what_cannot_be_a_name_is_refused(registry: ModelRegistry) -> None:
    for name in ("../secrets", "a/b/c", "", "/tmp/x", "a b"):
        with pytest.raises(InvalidRequest, match="is not the name of a model"):
            registry.find(LOCAL_PRINCIPAL, name)
    with pytest.raises(ValidationError):
        ModelRecord(name="../secrets")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("google/gemma-3-270M", [GEMMA]),
        ("gemma-3-270m", [GEMMA]),
        ("google/gema-3-270m", [GEMMA]),
        ("gogle/gemma-3-270m", [GEMMA]),
        ("google/gemma3-270m", [GEMMA]),
        ("google/gemma-3-270m-it", []),
        ("google/gemma-3-27b", []),
        ("unsloth/gemma-3-270m", []),
        ("meta-llama/Llama-3.2-1B", []),
    ],
)
def test_a_typo_is_told_from_another_model(name: str, meant: list[str]) -> None:
    assert find_meant(name, [GEMMA]) == meant


def test_similar_names_are_suggested() -> None:
    assert suggest("google/gemma-3-270m-it", [GEMMA, "hf/other"]) == [GEMMA]
    assert suggest("something/else-entirely", [GEMMA]) == []


def submit(harness: JobsHarness, name: str) -> str:
    return harness.jobs.submission.submit(PRINCIPAL, make_train_request(training_config={"base_model_id": name})).job_id


@pytest.mark.parametrize("name", ["gemma-3-270m", "google/gemma-3-270M", "google/gema-3-270m"])
def test_a_misspelled_base_is_refused_before_a_job_is_taken(harness: JobsHarness, name: str) -> None:
    store_model(harness.objects, GEMMA)
    with pytest.raises(InvalidRequest) as caught:
        submit(harness, name)
    assert (caught.value.hint, caught.value.param) == ("did you mean google/gemma-3-270m?", "training_config.base_model_id")


def test_a_base_that_the_hub_has_is_accepted_however_similar_its_name(harness: JobsHarness) -> None:
    store_model(harness.objects, GEMMA)
    harness.hub.read_result = "yes"
    assert submit(harness, "gogle/gemma-3-270m")


def test_a_base_with_another_suffix_is_accepted_while_the_hub_does_not_answer(harness: JobsHarness) -> None:
    store_model(harness.objects, GEMMA)
    assert submit(harness, "google/gemma-3-270m-it")


def test_a_similar_stored_base_is_suggested_for_one_that_the_hub_does_not_have(harness: JobsHarness) -> None:
    store_model(harness.objects, GEMMA)
    harness.hub.read_result = "absent"
    with pytest.raises(InvalidRequest) as caught:
        submit(harness, "google/gemma-3-270")
    assert (caught.value.hint, caught.value.param) == ("did you mean google/gemma-3-270m?", "training_config.base_model_id")


def test_an_offline_deployment_refuses_a_base_that_no_attempt_can_get() -> None:
    hub = NoHub(is_cached=lambda name: name == "a/cached")
    assert hub.is_unreachable_for_attempts("a/missing")
    assert not hub.is_unreachable_for_attempts("a/cached")
    assert not NoHub().is_unreachable_for_attempts("a/missing")


def test_the_refusal_of_an_offline_deployment_lists_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    with run_test_service(tmp_path / "home", offline_attempts=True) as client:
        store = open_store((tmp_path / "home/objects").as_uri())
        store_model(store, "a/stored")
        rows = "\n".join(json.dumps({"text": f"row {n}"}) for n in range(20))
        dataset_id = upload(client, rows).json()["processed_dataset_id"]
        body = make_request_body_with_config(dataset_id, base_model_id="b/missing")
        error = get_error(client.post("/train", json=body), 400)
        assert error["param"] == "training_config.base_model_id"
        assert "the model store has a/stored" in error["message"]
        assert "tunesmith models import FOLDER --name b/missing" in error["hint"]
        (tmp_path / "cache/hub/models--b--missing/snapshots/1").mkdir(parents=True)
        (tmp_path / "cache/hub/models--b--missing/snapshots/1/config.json").write_text("{}")
        assert client.post("/train", json=body).status_code == 201


def test_models_are_listed_and_shown_by_the_api(tmp_path: Path) -> None:
    with run_test_service(tmp_path) as client:
        store = open_store((tmp_path / "objects").as_uri())
        store_model(store, GEMMA)
        answer = client.get("/models").json()
        assert answer["store_url"] == store.url
        assert [row["name"] for row in answer["models"]] == [GEMMA]
        assert client.get(f"/models/{GEMMA}").json() == client.get("/models/gemma-3-270m").json() == answer["models"][0]
        assert "offline" in get_error(client.get("/models/a/missing"), 404)["message"]

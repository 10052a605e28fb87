"""Base models are pulled from the Hub and imported from folders; what is stored is whole, checked and described."""

import json
import os
from hashlib import sha256
from pathlib import Path

import pytest

from infra.loopback.http_faults import HttpFaultProxy
from infra.loopback.hub import LoopbackHub
from jobs.llm.bases.__main__ import main
from jobs.llm.bases.folder import import_model
from jobs.llm.bases.hub import pull_model
from jobs.llm.bases.store import find_model, remove_model
from jobs.runtime.errors import JobFailed
from schema.models import MODEL_RECORD, ModelRecord, model_prefix
from storage import ObjectStore
from storage.file import LocalStore
from storage.registry import open_store
from tests.jobs.hub_fixture import hub, hub_proxy  # noqa: F401

NAME = "ada/base"


def make_weights(values: int) -> bytes:
    header = json.dumps({"a": {"dtype": "BF16", "shape": [values], "data_offsets": [0, 2 * values]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(2 * values)


def make_files(values: int = 8) -> dict[str, bytes]:
    return {
        "config.json": json.dumps({"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}).encode(),
        "model.safetensors": make_weights(values),
        "tokenizer.json": b"{}",
        "README.md": b"---\nlicense: gemma\n---\n",
    }


UNUSED_FILES = {
    "pytorch_model.bin": b"a pickle",
    "modeling_gemma.py": b"import os",
    "onnx/model.onnx": b"x",
    "consolidated.safetensors": b"x",
}


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    opened = open_store((tmp_path / "objects").as_uri())
    assert isinstance(opened, LocalStore)
    return opened


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model as save_pretrained writes it."""
    path = tmp_path / "my model"
    path.mkdir()
    for name, content in make_files().items():
        (path / name).write_bytes(content)
    return path


def ignore(_: str) -> None:
    """For what is said while a command runs."""


def raise_interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def count_downloads(hub: LoopbackHub) -> int:  # noqa: F811
    """How often the content of a large file was requested."""
    return sum(request.method == "GET" and request.path.startswith("/lfs/") for request in hub.requests)


def list_names(store: ObjectStore, name: str = NAME) -> set[str]:
    return {stored.key.removeprefix(model_prefix(name)) for stored in store.iter_objects(model_prefix(name))}


def test_pull_stores_the_files_that_trainers_use_with_their_digests(
    hub: LoopbackHub,  # noqa: F811
    hub_proxy: HttpFaultProxy,  # noqa: F811
    store: LocalStore,
    tmp_path: Path,
) -> None:
    repo = hub.add_repository(NAME, make_files() | UNUSED_FILES)
    said: list[str] = []
    record = pull_model(NAME, store, tmp_path / "work", say=said.append)
    assert list_names(store) == {*make_files(), MODEL_RECORD}
    assert (record.source, record.revision, record.family, record.parameters) == ("hub", repo.head.oid, "llm", 8)
    assert (record.license, record.precision) == ("gemma", "bfloat16")
    assert {file.path: file.sha256 for file in record.files} == {name: sha256(text).hexdigest() for name, text in make_files().items()}
    assert ModelRecord.load(store.read(model_prefix(NAME) + MODEL_RECORD)) == record == find_model(store, NAME)
    assert not list((tmp_path / "work").iterdir())
    assert any(repo.head.oid[:12] in line for line in said)

    requests = len(hub.requests)
    assert pull_model(NAME, store, tmp_path / "work", say=ignore) == record
    assert len(hub.requests) == requests + 1, "the same commit is not downloaded again"


def test_another_revision_replaces_the_stored_one_only_when_asked(
    hub: LoopbackHub,  # noqa: F811
    hub_proxy: HttpFaultProxy,  # noqa: F811
    store: LocalStore,
    tmp_path: Path,
) -> None:
    hub.add_repository(NAME, make_files() | {"merges.txt": b"of the first"})
    pull_model(NAME, store, tmp_path / "work", say=ignore)
    hub.add_repository(NAME, make_files(16))
    with pytest.raises(JobFailed) as refused:
        pull_model(NAME, store, tmp_path / "work", say=ignore)
    assert "--replace" in refused.value.failure.hint
    assert pull_model(NAME, store, tmp_path / "work", replace=True, say=ignore).parameters == 16
    assert list_names(store) == {*make_files(), MODEL_RECORD}


def test_interrupted_pull_stores_nothing_and_continues(
    hub: LoopbackHub,  # noqa: F811
    hub_proxy: HttpFaultProxy,  # noqa: F811
    store: LocalStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub.add_repository(NAME, make_files())
    with monkeypatch.context() as patch:
        patch.setattr("jobs.llm.bases.hub.store_model", raise_interrupt)
        with pytest.raises(KeyboardInterrupt):
            pull_model(NAME, store, tmp_path / "work", say=ignore)
    assert find_model(store, NAME) is None
    downloads = count_downloads(hub)
    assert downloads > 0
    assert pull_model(NAME, store, tmp_path / "work", say=ignore).parameters == 8
    assert count_downloads(hub) == downloads, "what was downloaded is not downloaded again"


def test_weights_that_differ_from_the_hubs_digest_are_refused(
    hub: LoopbackHub,  # noqa: F811
    hub_proxy: HttpFaultProxy,  # noqa: F811
    store: LocalStore,
    tmp_path: Path,
) -> None:
    hub.add_repository(NAME, make_files())
    digest = sha256(make_weights(8)).hexdigest()
    hub.lfs_objects[digest] = make_weights(8)[:-1] + b"x"
    with pytest.raises(JobFailed, match=r"model\.safetensors is not what the Hub says"):
        pull_model(NAME, store, tmp_path / "work", say=ignore)
    assert find_model(store, NAME) is None
    hub.lfs_objects[digest] = make_weights(8)
    assert pull_model(NAME, store, tmp_path / "work", say=ignore).parameters == 8


def test_gated_missing_and_pickled_models_say_what_would_help(
    hub: LoopbackHub,  # noqa: F811
    hub_proxy: HttpFaultProxy,  # noqa: F811
    store: LocalStore,
    tmp_path: Path,
) -> None:
    hub.add_repository("ada/gated", make_files(), gated=True, readers={"grace"})
    hub.add_repository("ada/pickles", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    with pytest.raises(JobFailed, match="is gated") as gated:
        pull_model("ada/gated", store, tmp_path / "work", say=ignore)
    assert "accept the license" in gated.value.failure.hint
    assert pull_model("ada/gated", store, tmp_path / "work", token="hf_grace", say=ignore).name == "ada/gated"
    with pytest.raises(JobFailed, match="no safetensors weights"):
        pull_model("ada/pickles", store, tmp_path / "work", say=ignore)
    with pytest.raises(JobFailed, match="does not exist on the Hub"):
        pull_model("ada/missing", store, tmp_path / "work", say=ignore)
    hub.add_repository(NAME, make_files())
    with pytest.raises(JobFailed, match="no revision 'v9'"):
        pull_model(NAME, store, tmp_path / "work", revision="v9", say=ignore)


def test_import_links_the_files_of_a_folder(store: LocalStore, folder: Path) -> None:
    record = import_model(folder, NAME, store, say=ignore)
    assert (record.source, record.name, record.parameters) == ("folder", NAME, 8)
    weights = store.path_for_key(model_prefix(NAME) + "model.safetensors")
    assert os.path.samefile(weights, folder / "model.safetensors")
    assert import_model(folder, NAME, store, say=ignore) == record, "the same files are not stored again"
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(make_weights(16))
    with pytest.raises(JobFailed, match="has a model ada/base already, imported from a folder"):
        import_model(folder, NAME, store, say=ignore)
    assert import_model(folder, NAME, store, replace=True, say=ignore).parameters == 16
    assert list_names(store) == {*make_files(), MODEL_RECORD}


def test_the_stores_own_folder_is_not_imported_over_itself(store: LocalStore, folder: Path) -> None:
    import_model(folder, NAME, store, say=ignore)
    own = store.path_for_key(model_prefix(NAME) + "config.json").parent
    with pytest.raises(JobFailed, match="the model store's own folder"):
        import_model(own, NAME, store, replace=True, say=ignore)
    assert list_names(store) == {*make_files(), MODEL_RECORD}


def test_import_takes_a_snapshot_of_the_hub_clients_cache(store: LocalStore, folder: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--ada--base/blobs", tmp_path / "models--ada--base/snapshots/abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(blobs / path.name)
    assert import_model(snapshot, NAME, store, say=ignore).parameters == 8


@pytest.mark.parametrize(
    ("files", "message", "hint"),
    [
        ({"config.json": b"{}", "pytorch_model.bin": b"x"}, "pickled weights", "save it as safetensors"),
        ({"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"}, "has an adapter", "job:ID"),
        ({"model.gguf": b"GGUF"}, "has a GGUF file", "quantized"),
        ({"notes.txt": b"x"}, r"has no config\.json", "save_pretrained"),
        ({"config.json": b"{}", "model.safetensors": b"\xff" * 20}, "damaged model.safetensors", ""),
    ],
)
def test_import_refuses_what_is_no_model(store: LocalStore, tmp_path: Path, files: dict[str, bytes], message: str, hint: str) -> None:
    (tmp_path / "given").mkdir()
    for name, content in files.items():
        (tmp_path / "given" / name).write_bytes(content)
    with pytest.raises(JobFailed, match=message) as refused:
        import_model(tmp_path / "given", NAME, store, say=ignore)
    assert hint in refused.value.failure.hint
    assert not list_names(store)


def test_remove_deletes_the_marker_first(store: LocalStore, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_model(folder, NAME, store, say=ignore)
    deleted: list[str] = []
    delete = store.delete
    monkeypatch.setattr(store, "delete", lambda key: (deleted.append(key), delete(key))[1])
    assert remove_model(store, NAME) > 0
    assert deleted[0].endswith("/config.json")
    assert not list_names(store)
    with pytest.raises(JobFailed, match="no model ada/base"):
        remove_model(store, NAME)


def test_the_command_answers_with_one_json_document(store: LocalStore, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", NAME, "--folder", str(folder), "--store", store.url]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["name"] == NAME
    assert main(["import", "../x", "--folder", str(folder), "--store", store.url]) == 1
    assert "not the name of a model" in json.loads(capsys.readouterr().out)["error"]["message"]
    assert main(["remove", NAME, "--store", store.url]) == 0
    assert json.loads(capsys.readouterr().out)["removed_bytes"] > 0

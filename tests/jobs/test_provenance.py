"""The provenance record holds inputs, code, machine and results of a training, and no secret."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from jobs.llm.chat_format import ChatFormat
from jobs.llm.trained_model import TrainedModel
from jobs.runtime.artifacts import ArtifactUploader, ExportedArtifact
from jobs.runtime.context import JobContext
from jobs.runtime.provenance import base_record, build_run_record, installed_packages, machine_record, record_bytes, store_record
from jobs.runtime.system_metrics import Energy
from schema.job import Artifact, EvalMetrics, Gate, GateCheck
from schema.provenance import CodeRecord, RunRecord
from schema.spec import artifact_key
from schema.training.llm_fidelity import Fidelity
from tests.jobs.conftest import make_context, make_spec

STARTED_AT = datetime(2026, 11, 21, 14, 0, tzinfo=UTC)
SECRET = "s3cret-of-the-judge"
RAW = ChatFormat("raw", "raw", None, None, (), (), turn_tokens_are_trained=True)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The files of a base model that a record is made from."""
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights of the base")
    return folder


def make_trained_model(folder: Path, base: Path) -> TrainedModel:
    return TrainedModel(folder, True, base, (), RAW, None, None, train_rows=24, train_tokens=700, train_runtime_s=12.5, step=4)


def publish_artifacts(context: JobContext, folder: Path) -> tuple[Artifact, ...]:
    """An adapter and a GGUF file in the store."""
    adapter = folder / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / "m-q8_0.gguf").write_bytes(b"gguf")
    job, number = context.spec.job_id, context.attempt
    fidelity = Fidelity(
        compared_tokens=9, argmax_agreement=1.0, mean_kl_to_merged=0.001, perplexity=3.5, sample_prompt="a row"
    ).model_dump()
    products = [
        ExportedArtifact("adapter", "adapter", adapter, artifact_key("trained_adapters", job, number)),
        ExportedArtifact("gguf-q8_0", "gguf", folder / "m-q8_0.gguf", artifact_key("gguf_models", job, number, "m-q8_0.gguf"), fidelity),
    ]
    return tuple(ArtifactUploader(context.stores.models, job, number).upload(product) for product in products)


def make_record(context: JobContext, base: Path, artifacts: tuple[Artifact, ...] = (), **changes: Any) -> RunRecord:
    arguments: dict[str, Any] = {"code": CodeRecord(tunesmith_version="0.2.0", commit="abc"), "energy": Energy(None, "no GPU")}
    arguments |= {"started_at": STARTED_AT, "finished_at": STARTED_AT + timedelta(seconds=90)}
    return build_run_record(context, make_trained_model(context.workdir, base), artifacts, **(arguments | changes))


def test_record_contains_inputs_and_results(base: Path, tmp_path: Path) -> None:
    context = make_context(make_spec(tmp_path / "objects", hyperparameters={"seed": 7}), tmp_path / "work", attempt=2)
    context.state.base_metrics = EvalMetrics(eval_loss=4.0, perplexity=54.6)
    context.state.metrics = EvalMetrics(eval_loss=3.0, perplexity=20.1)
    context.state.gate = Gate(passed=True, checks=(GateCheck(metric="perplexity", value=20.1, at_most=49.1, passed=True),))
    context.state.decisions["attention"] = "sdpa"
    artifacts = publish_artifacts(context, tmp_path / "out")
    record = make_record(context, base, artifacts, energy=Energy(7200.0))

    assert (record.attempt, record.seed, record.published_step, record.train_rows) == (2, 7, 4, 24)
    assert {name: split.rows for name, split in record.dataset.splits.items()} == {"train": 24, "eval": 5}
    assert (
        record.dataset.splits["train"].sha256
        == sha256((tmp_path / "objects" / context.spec.dataset.splits["train"].key).read_bytes()).hexdigest()
    )
    assert record.training_config["hyperparameters"]["lora_rank"] == 4  # type: ignore[index,call-overload]
    assert record.base_model.config_sha256 == sha256((base / "config.json").read_bytes()).hexdigest()
    assert record.base_model.weights_sha256 == {path.name: sha256(path.read_bytes()).hexdigest() for path in base.glob("*.safetensors")}
    assert record.packages["transformers"].startswith("5.")
    assert (record.time.total_s, record.time.train_runtime_s, record.cost.gpu_energy_wh) == (90.0, 12.5, 2.0)
    assert record.metrics
    assert record.base_metrics
    assert record.metrics.perplexity == 20.1
    assert record.gate
    assert record.gate.passed
    assert {artifact.name: artifact.files[0].sha256 for artifact in record.artifacts}["gguf-q8_0"] == sha256(b"gguf").hexdigest()
    assert record.artifacts[1].fidelity
    assert record.artifacts[1].fidelity["perplexity"] == 3.5
    assert "a row" not in record_bytes(record).decode()  # the compared text is user data
    assert record.decisions == {"attention": "sdpa"}


def test_unknown_values_are_null_with_reason(base: Path, tmp_path: Path) -> None:
    record = make_record(make_context(make_spec(tmp_path / "objects"), tmp_path), base)
    assert record.cost.gpu_energy_wh is record.cost.price is record.base_model.revision is record.code.image is None
    assert {"gpu_energy_wh", "price", "base.revision", "code.image"} == set(record.notes)
    assert record.notes["gpu_energy_wh"] == "no GPU"


def test_record_is_stored_beside_every_artifact(base: Path, tmp_path: Path) -> None:
    context = make_context(make_spec(tmp_path / "objects"), tmp_path / "work", attempt=3)
    artifacts = publish_artifacts(context, tmp_path / "out")
    content = record_bytes(make_record(context, base, artifacts))
    adapter, gguf = store_record(content, artifacts, context)
    job = context.spec.job_id
    for folder in ("runs", "trained_adapters", "gguf_models"):
        assert (tmp_path / "objects" / folder / job / "attempt-3/run.json").read_bytes() == content
    assert [file.path for file in adapter.files] == ["adapter_model.safetensors", "run.json"]
    assert adapter.size_bytes == sum(file.size_bytes for file in adapter.files)
    assert adapter.files[1].sha256 == sha256(content).hexdigest()
    assert gguf == artifacts[1]
    assert store_record(content, (adapter, gguf), context) == (adapter, gguf)  # a retry lists nothing twice


def test_record_roundtrips_as_same_bytes(base: Path, tmp_path: Path) -> None:
    record = make_record(make_context(make_spec(tmp_path / "objects"), tmp_path), base)
    content = record_bytes(record)
    assert content == record_bytes(RunRecord.load(content))
    assert list(json.loads(content)) == sorted(json.loads(content))


def test_no_secret_is_in_the_record(base: Path, tmp_path: Path) -> None:
    spec = make_spec(
        tmp_path / "objects",
        wandb_config={"api_key": SECRET, "project": "p"},
        mlflow_config={"tracking_uri": "https://m.example", "token": SECRET},
    )
    content = record_bytes(make_record(make_context(spec, tmp_path, secrets={"mlflow_token": SECRET}), base))
    assert SECRET.encode() not in content
    assert b'"project": "p"' in content


def test_base_in_hub_cache_is_identified_without_reading(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / ("a" * 40)
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / ("b" * 64)).write_bytes(b"this content is not read")
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model.safetensors").symlink_to(blobs / ("b" * 64))
    record, notes = base_record("owner/base", snapshot)
    assert (record.revision, record.weights_sha256, notes) == ("a" * 40, {"model.safetensors": "b" * 64}, {})


def test_hash_of_large_weights_is_skipped_with_reason(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with (tmp_path / "model.safetensors").open("wb") as sparse:
        sparse.truncate(5 << 30)
    record, notes = base_record("owner/base", tmp_path)
    assert record.weights_sha256 is None
    assert "5 GB" in notes["base.weights_sha256"]


def test_training_without_base_model_and_tokens_is_recorded(base: Path, tmp_path: Path) -> None:
    context = make_context(make_spec(tmp_path / "objects"), tmp_path / "work")
    trained: Any = replace(make_trained_model(tmp_path, base), base_folder=None, train_rows=None, train_tokens=None, step=None)
    moments = {"started_at": STARTED_AT, "finished_at": STARTED_AT}
    record = build_run_record(context, trained, (), code=CodeRecord(), energy=Energy(1.0), **moments)
    assert record.base_model is record.train_rows is record.train_tokens is record.published_step is None
    assert record.notes["base_model"] == "the training started without a base model"


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_base_weights_of_any_format_are_recorded(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"model{suffix}").write_bytes(b"weights")
    (tmp_path / "copy.onnx").write_bytes(b"for another framework")
    record, notes = base_record("detector", tmp_path)
    assert record.weights_sha256 == {f"model{suffix}": sha256(b"weights").hexdigest()}
    assert record.config_sha256 is None
    assert notes["base.config_sha256"] == "the base model has no config.json"


def test_base_without_known_weights_is_noted(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    record, notes = base_record("owner/base", tmp_path)
    assert record.weights_sha256 is None
    assert notes["base.weights_sha256"] == "the base model's folder has no file of a known format of weights"


def test_machine_and_packages_are_recorded() -> None:
    machine = machine_record("12.8")
    assert machine.cuda == "12.8"
    assert machine.cpu
    assert machine.cpu_count >= 1
    assert machine.python.startswith("3.")
    assert list(installed_packages()) == sorted(installed_packages())

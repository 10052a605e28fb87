"""The provenance of a trained model, `run.json`: data, config, code, machine, time and what was measured.

The record is built once, after the artifacts are uploaded. The same bytes are stored at runs/{job_id}/attempt-{n}/, beside every
artifact, and on the Hub.
"""

import hashlib
import json
import os
import platform
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from jobs.runtime.artifacts import ExportedArtifact
from jobs.runtime.context import JobContext
from jobs.runtime.family import RenderModelCard, TrainedModel
from jobs.runtime.files import sha256_of
from jobs.runtime.hub import push
from jobs.runtime.probe import installed_packages
from jobs.runtime.retry import retry_store
from jobs.runtime.system_metrics import Energy, EnergyMeter, nvidia_gpus
from schema.job import Artifact, ArtifactFile
from schema.provenance import (
    RUN_RECORD,
    ArtifactRecord,
    BaseModelRecord,
    CodeRecord,
    CostRecord,
    DatasetRecord,
    MachineRecord,
    RunRecord,
    TimeRecord,
    run_record_key,
)
from schema.version import VERSION

MAX_HASHED_BYTES = 4 << 30  # of the base model's weights; hashing that many takes some ten seconds
# Of the files with weights, in order of preference: where a folder has several formats, they are copies for other frameworks.
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".onnx", ".ckpt", ".pkl", ".h5", ".msgpack")
PRICE_UNKNOWN = "the deployment knows what the hardware costs, the attempt does not"


class ProvenanceRecorder:
    """Records the provenance of one attempt. Created when the attempt begins, to measure its energy; used once, after the upload."""

    def __init__(self, context: JobContext, *, image: str | None, started_at: datetime) -> None:
        self._context = context
        self._code = CodeRecord(tunesmith_version=VERSION, image=image)
        self._started_at = started_at
        self._energy = EnergyMeter()
        self._energy.start_sampling()

    def finalize(
        self,
        trained: TrainedModel,
        exported_artifacts: Sequence[ExportedArtifact],
        artifacts: Sequence[Artifact],
        render_model_card: RenderModelCard,
    ) -> tuple[Artifact, ...]:
        """Store `run.json` beside the artifacts and push the files to the Hub if the job asks for it; returns the artifacts with both.

        Raises JobFailed `upload_failed`, and `auth` for a token that may not push.
        """
        record = build_run_record(
            self._context,
            trained,
            artifacts,
            code=self._code,
            energy=self._energy.read(),
            started_at=self._started_at,
            finished_at=datetime.now(UTC),
        )
        content = record_bytes(record)
        recorded = store_record(content, artifacts, self._context)
        repo_id = self._context.spec.training_config.export_config.hf_repo_id
        if repo_id is None:
            return recorded
        return push(exported_artifacts, recorded, render_model_card(record, repo_id), content, self._context)


def build_run_record(
    context: JobContext,
    trained: TrainedModel,
    artifacts: Sequence[Artifact],
    *,
    code: CodeRecord,
    energy: Energy,
    started_at: datetime,
    finished_at: datetime,
) -> RunRecord:
    """The record of an attempt that has uploaded its artifacts."""
    spec, state = context.spec, context.state
    base, base_notes = None, {"base_model": "the training started without a base model"}
    if trained.base_folder is not None:
        base, base_notes = base_record(spec.training_config.summarize().base_model_id, trained.base_folder)
    notes = base_notes | {"price": PRICE_UNKNOWN} | ({"gpu_energy_wh": energy.missing_reason} if energy.joules is None else {})
    notes |= {f"code.{name}": "the launcher did not set it" for name, value in code.model_dump().items() if value is None}
    return RunRecord(
        job_id=spec.job_id,
        job_name=spec.job_name,
        attempt=context.attempt,
        resumed_step=context.checkpoints.resumed_step,
        published_step=trained.step,
        training_config=json.loads(context.secrets.redact(spec.training_config.model_dump_json())),
        seed=spec.training_config.hyperparameters.seed,
        dataset=DatasetRecord.from_dataset(spec.dataset),
        mixed_datasets=tuple(DatasetRecord.from_dataset(each.dataset, each.weight) for each in spec.mixed_datasets),
        train_rows=trained.train_rows,
        train_tokens=trained.train_tokens,
        base_model=base,
        earlier_model=spec.earlier_model,
        code=code,
        packages=installed_packages(),
        machine=machine_record(trained.cuda),
        time=TimeRecord(
            started_at=started_at,
            finished_at=finished_at,
            total_s=(finished_at - started_at).total_seconds(),
            train_runtime_s=trained.train_runtime_s,
        ),
        cost=CostRecord(gpu_energy_wh=energy.watt_hours),
        base_metrics=state.base_metrics,
        metrics=state.metrics,
        gate=state.gate,
        artifacts=tuple(ArtifactRecord.from_artifact(artifact) for artifact in artifacts),
        decisions=dict(state.decisions),
        notes=notes,
    )


def record_bytes(record: RunRecord) -> bytes:
    """The record as it is stored. Equal records have equal bytes."""
    return json.dumps(record.model_dump(mode="json"), indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def store_record(content: bytes, artifacts: Sequence[Artifact], context: JobContext) -> tuple[Artifact, ...]:
    """Store the record by itself and beside every artifact; returns the artifacts, where a folder now lists it as one of its files.

    Raises JobFailed `upload_failed`.
    """
    store = context.stores.models
    folders = {artifact.key.rpartition("/")[0] for artifact in artifacts}  # files in the same folder share one record
    for key in [run_record_key(context.spec.job_id, context.attempt), *(f"{folder}/{RUN_RECORD}" for folder in sorted(folders))]:
        retry_store(f"{RUN_RECORD} could not be stored", lambda key=key: store.write(key, content))
    record_file = ArtifactFile(path=RUN_RECORD, size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    return tuple(_add_file(artifact, record_file) if artifact.key.endswith("/") else artifact for artifact in artifacts)


def _add_file(artifact: Artifact, file: ArtifactFile) -> Artifact:
    files = [each for each in artifact.files if each.path != file.path] + [file]
    return artifact.model_copy(update={"files": files, "size_bytes": sum(each.size_bytes for each in files)})


def base_record(model_id: str, folder: Path) -> tuple[BaseModelRecord, dict[str, str]]:
    """What identifies the base model exactly, and notes on what could not be determined."""
    suffix = next((suffix for suffix in WEIGHT_SUFFIXES if any(folder.glob(f"*{suffix}"))), "")
    weights = sorted(folder.glob(f"*{suffix}")) if suffix else []
    digests = {path.name: _hub_cache_digest(path) for path in weights}
    unhashed_bytes = sum(path.stat().st_size for path in weights if digests[path.name] is None)
    notes: dict[str, str] = {}
    if not weights:
        notes["base.weights_sha256"] = "the base model's folder has no file of a known format of weights"
    elif unhashed_bytes <= MAX_HASHED_BYTES:
        digests = {path.name: digests[path.name] or sha256_of(path) for path in weights}
    else:
        notes["base.weights_sha256"] = f"{unhashed_bytes / 1e9:.0f} GB of weights are too large to hash"
    # The Hub's cache has one folder per commit.
    revision = folder.name if folder.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", folder.name) else None
    if revision is None:
        notes["base.revision"] = "the base model is from the deployment's own store, which has no Hub revision"
    config = folder / "config.json"
    if not config.is_file():
        notes["base.config_sha256"] = "the base model has no config.json"
    known = {name: digest for name, digest in digests.items() if digest is not None}
    return BaseModelRecord(
        model_id=model_id,
        revision=revision,
        config_sha256=sha256_of(config) if config.is_file() else None,
        weights_sha256=known if known and len(known) == len(digests) else None,
    ), notes


def machine_record(cuda: str | None = None) -> MachineRecord:
    """The machine that this process runs on. `cuda` is the version that the family's framework was built for."""
    import psutil

    gpus = nvidia_gpus()
    return MachineRecord(
        platform=platform.platform(),
        python=platform.python_version(),
        cpu=_cpu_name(),
        cpu_count=os.cpu_count() or 1,
        memory_bytes=psutil.virtual_memory().total,
        gpus=tuple(gpus.names) if gpus else (),
        gpu_driver=gpus.driver if gpus else None,
        cuda=cuda,
    )


def _hub_cache_digest(path: Path) -> str | None:
    """The sha256 of a large file in the Hub's cache, which uses it as the file's name."""
    name = path.resolve().name
    return name if re.fullmatch(r"[0-9a-f]{64}", name) else None


def _cpu_name() -> str:
    """The processor's model name, or else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.is_file() else None
    return match[1] if match else platform.processor() or platform.machine()

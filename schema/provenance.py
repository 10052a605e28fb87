"""`run.json`: where a model comes from, as it lies beside every artifact. Null is what nobody knew; `notes` says why, by name."""

from datetime import datetime
from typing import Literal

from pydantic import Field, JsonValue

from schema.base import ForwardCompatible, Id
from schema.dataset import Dataset
from schema.job import Artifact, ArtifactFile, ArtifactKind, EvalMetrics, Fidelity, Gate

RUN_RECORD = "run.json"


class CodeRecord(ForwardCompatible):
    """What trained it."""

    tunesmith_version: str | None = None  # the version
    commit: str | None = None
    image: str | None = None  # of the container, with its digest where the deployment names one


class SplitRecord(ForwardCompatible):
    """One part of the dataset."""

    rows: int
    sha256: str


class DatasetRecord(ForwardCompatible):
    """What it was trained on. The digest names the exact rows."""

    processed_dataset_id: Id
    name: str
    dataset_type: str
    digest: str
    splits: dict[str, SplitRecord]

    @classmethod
    def from_dataset(cls, dataset: Dataset) -> "DatasetRecord":
        """What a run record keeps of a dataset."""
        splits = {name: SplitRecord(rows=split.rows, sha256=split.sha256) for name, split in sorted(dataset.splits.items())}
        return cls(splits=splits, **dataset.model_dump(include={"processed_dataset_id", "name", "dataset_type", "digest"}))


class BaseModelRecord(ForwardCompatible):
    """The model it was made from."""

    model_id: str
    revision: str | None = None  # the Hub's commit
    config_sha256: str | None = None
    weights_sha256: dict[str, str] | None = None  # by file


class MachineRecord(ForwardCompatible):
    """What it ran on."""

    platform: str
    python: str
    cpu: str
    cpu_count: int
    memory_bytes: int
    gpus: tuple[str, ...] = ()
    gpu_driver: str | None = None
    cuda: str | None = None  # that torch was built for


class TimeRecord(ForwardCompatible):
    """How long it took: `total_s` of this attempt alone, from its claim on."""

    started_at: datetime
    finished_at: datetime
    total_s: float
    train_runtime_s: float | None = None


class CostRecord(ForwardCompatible):
    """What it took of the world."""

    gpu_energy_wh: float | None = None  # of this attempt
    price: float | None = None


class ArtifactRecord(ForwardCompatible):
    """One thing that came of it."""

    name: str
    kind: ArtifactKind
    key: str  # where it lies in the model bucket; a folder's ends in "/"
    size_bytes: int
    files: tuple[ArtifactFile, ...]
    fidelity: Fidelity | None = None  # without the answers that were compared

    @classmethod
    def from_artifact(cls, artifact: Artifact) -> "ArtifactRecord":
        """What a run record keeps of an artifact."""
        fidelity = artifact.fidelity and artifact.fidelity.model_copy(update={"sample_prompt": "", "sample_text": ""})
        return cls(
            name=artifact.name,
            kind=artifact.kind,
            key=artifact.key,
            size_bytes=artifact.size_bytes,
            files=tuple(artifact.files),
            fidelity=fidelity,
        )


class RunRecord(ForwardCompatible):
    """Everything that is known of how an attempt made its artifacts. Holds no secret and no row."""

    version: Literal[1] = 1
    job_id: Id
    job_name: str
    attempt: int
    resumed_step: int | None = None  # the step of the checkpoint that this attempt went on from
    published_step: int | None = None  # the step whose weights these are
    training_config: dict[str, JsonValue]  # with every default spelled out
    seed: int
    dataset: DatasetRecord
    train_rows: int | None = None
    train_tokens: int | None = None  # over all epochs
    base_model: BaseModelRecord
    code: CodeRecord
    packages: dict[str, str]
    machine: MachineRecord
    time: TimeRecord
    cost: CostRecord
    base_metrics: EvalMetrics | None = None
    metrics: EvalMetrics | None = None
    gate: Gate | None = None
    artifacts: tuple[ArtifactRecord, ...]
    decisions: dict[str, str] = Field(default={})  # what the attempt chose by itself
    notes: dict[str, str] = Field(default={})


def run_record_key(job_id: str, attempt: int) -> str:
    """Where an attempt keeps its record in the model bucket."""
    return f"runs/{job_id}/attempt-{attempt}/{RUN_RECORD}"

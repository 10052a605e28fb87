"""`run.json`: a model's provenance, stored beside every artifact. Null is an unknown value; `notes` gives the reason, by name."""

from datetime import datetime
from typing import Literal

from pydantic import Field, JsonValue

from schema.base import ForwardCompatible, Id
from schema.dataset import Dataset
from schema.job import Artifact, ArtifactFile, EarlierModel, EvalMetrics, Gate
from schema.types import ArtifactKind

RUN_RECORD = "run.json"
SAMPLE_PREFIX = "sample_"  # of the names in `Artifact.fidelity` whose values show held-out rows


class CodeRecord(ForwardCompatible):
    """The code that trained the model."""

    tunesmith_version: str | None = None  # the release
    commit: str | None = None
    image: str | None = None  # the container image, with its digest where the deployment provides it


class SplitRecord(ForwardCompatible):
    """One part of the dataset."""

    rows: int
    sha256: str


class DatasetRecord(ForwardCompatible):
    """The dataset. The digest identifies the exact rows."""

    processed_dataset_id: Id
    name: str
    dataset_type: str
    digest: str
    splits: dict[str, SplitRecord]
    weight: float | None = None  # among several datasets

    @classmethod
    def from_dataset(cls, dataset: Dataset, weight: float | None = None) -> "DatasetRecord":
        """The part of a dataset that a run record keeps."""
        splits = {name: SplitRecord(rows=split.rows, sha256=split.sha256) for name, split in sorted(dataset.splits.items())}
        return cls(splits=splits, weight=weight, **dataset.model_dump(include={"processed_dataset_id", "name", "dataset_type", "digest"}))


class BaseModelRecord(ForwardCompatible):
    """The base model."""

    model_id: str
    revision: str | None = None  # the Hub's commit
    config_sha256: str | None = None
    weights_sha256: dict[str, str] | None = None  # by file


class MachineRecord(ForwardCompatible):
    """The machine."""

    platform: str
    python: str
    cpu: str
    cpu_count: int
    memory_bytes: int
    gpus: tuple[str, ...] = ()
    gpu_driver: str | None = None
    cuda: str | None = None  # the version that the family's framework was built for


class TimeRecord(ForwardCompatible):
    """Times of this attempt. `total_s` counts from its claim."""

    started_at: datetime
    finished_at: datetime
    total_s: float
    train_runtime_s: float | None = None


class CostRecord(ForwardCompatible):
    """What the attempt consumed."""

    gpu_energy_wh: float | None = None  # by this attempt
    price: float | None = None


class ArtifactRecord(ForwardCompatible):
    """An artifact."""

    name: str
    kind: ArtifactKind
    key: str  # in the model bucket; ends in "/" for a folder
    size_bytes: int
    files: tuple[ArtifactFile, ...]
    fidelity: dict[str, JsonValue] | None = None  # without what shows held-out rows

    @classmethod
    def from_artifact(cls, artifact: Artifact) -> "ArtifactRecord":
        """The part of an artifact that a run record keeps."""
        fidelity = artifact.fidelity and {name: value for name, value in artifact.fidelity.items() if not name.startswith(SAMPLE_PREFIX)}
        return cls(
            name=artifact.name,
            kind=artifact.kind,
            key=artifact.key,
            size_bytes=artifact.size_bytes,
            files=tuple(artifact.files),
            fidelity=fidelity,
        )


class RunRecord(ForwardCompatible):
    """How an attempt produced its artifacts. Holds no secret and no row."""

    version: Literal[1] = 1
    job_id: Id
    job_name: str
    attempt: int
    resumed_step: int | None = None  # the step of the checkpoint that this attempt continued from
    published_step: int | None = None  # the optimizer step of the published weights
    training_config: dict[str, JsonValue]  # with every default
    seed: int
    dataset: DatasetRecord  # of several the first
    mixed_datasets: tuple[DatasetRecord, ...] = ()  # all of them, where several were mixed
    train_rows: int | None = None
    train_tokens: int | None = None  # in all epochs
    base_model: BaseModelRecord | None = None  # None: the family trains without one
    earlier_model: EarlierModel | None = None  # the training started from the model of this earlier job, not from the base itself
    code: CodeRecord
    packages: dict[str, str]
    machine: MachineRecord
    time: TimeRecord
    cost: CostRecord
    base_metrics: EvalMetrics | None = None
    metrics: EvalMetrics | None = None
    gate: Gate | None = None
    artifacts: tuple[ArtifactRecord, ...]
    decisions: dict[str, str] = Field(default={})  # settings that the attempt chose
    notes: dict[str, str] = Field(default={})


def run_record_key(job_id: str, attempt: int) -> str:
    """The key of an attempt's run record in the model bucket."""
    return f"runs/{job_id}/attempt-{attempt}/{RUN_RECORD}"

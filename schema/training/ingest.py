"""The configuration of a job that makes a dataset from a source that is too large for a request. `POST /datasets` creates it, no caller."""

from typing import ClassVar, Literal

from schema.ingestion import IngestLimits, IngestOptions
from schema.training.base import ArtifactKindInfo, BaseTrainingConfig
from schema.types import DatasetType, Phase


class IngestConfig(BaseTrainingConfig):
    """Read a source, check its rows and write the splits of a dataset."""

    family: ClassVar[str] = "ingest"
    environment: ClassVar[str] = "data"
    train: ClassVar[str] = "jobs.ingest.family:train"
    check_export: ClassVar[str] = "jobs.ingest.family:check_export"
    export: ClassVar[str] = "jobs.ingest.family:export"
    probe: ClassVar[str] = "jobs.ingest.probe:probe"
    dataset_types: ClassVar[tuple[DatasetType, ...]] = ()
    artifact_kinds: ClassVar[tuple[ArtifactKindInfo, ...]] = ()
    out_of_memory_hint: ClassVar[str] = "split the source into several files, or save it as JSON lines or Parquet"
    phases: ClassVar[tuple[Phase, ...]] = ("downloading", "reading", "reporting", "uploading")

    trainer_type: Literal["ingest"] = "ingest"
    source: str  # as `schema/sources.py` writes it; of an https URL without its query, which may be a signature
    # With whose rights the source is read: those of the secrets that came with the request, none, or the deployment's own.
    rights: Literal["caller", "anonymous", "deployment"] = "anonymous"
    endpoint_url: str | None = None  # of an S3 server that is not Amazon's
    region: str | None = None
    options: IngestOptions
    limits: IngestLimits

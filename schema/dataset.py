"""A dataset: immutable, validated, versioned rows, known by its `processed_dataset_id`.

A stored row has exactly one of three forms, all JSON, whitespace untouched:

    messages            {"messages": [{"role": "system" | "user" | "assistant", "content": "..."}, ...]}
    prompt_completion   {"prompt": "..." | [message, ...], "completion": "..." | [message, ...]}
    text                {"text": "..."}
"""

from datetime import datetime

from schema.base import Id, Label, Lenient
from schema.training import DatasetType

TRAIN_SPLIT = "train"
EVAL_SPLIT = "eval"


class Split(Lenient):
    """One part of a dataset: a JSONL file in the object store."""

    rows: int
    size_bytes: int
    sha256: str
    key: str  # below the dataset bucket: datasets/{dataset_id}/{split}.jsonl


class Dataset(Lenient):
    """The record of a dataset."""

    processed_dataset_id: Id
    tenant_id: Id
    project_id: Id | None = None
    name: Label
    dataset_type: DatasetType
    splits: dict[str, Split]
    digest: str  # "sha256:..." over the digests of the splits; the dataset's version
    rows_uploaded: int
    duplicates_dropped: int = 0
    created_at: datetime

    @property
    def rows(self) -> int:
        """Rows over all splits."""
        return sum(split.rows for split in self.splits.values())

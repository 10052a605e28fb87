"""A dataset: immutable, validated, versioned rows, known by its `processed_dataset_id`.

A stored row has exactly one of six forms, all JSON, whitespace untouched:

    messages              {"messages": [{"role": "system" | "user" | "assistant", "content": "..."}, ...]}
    prompt_completion     {"prompt": "..." | [message, ...], "completion": "..." | [message, ...]}
    text                  {"text": "..."}
    preference            {"prompt": …, "chosen": …, "rejected": …}: three strings, or three lists of messages
    unpaired_preference   {"prompt": …, "completion": …, "label": true | false}: two strings, or two lists of messages
    prompt                {"prompt": …, and any other columns of strings, numbers or truth values, for graders to read}

In lists of messages a prompt ends with the user, and each answer is one message of the assistant. The content of a message is a
string, or where the user shows images a list of parts, {"type": "text", "text": "..."} and
{"type": "image", "image": "data:image/png;base64,..."} (or jpeg, webp). Numbers stand as they were uploaded, however large.
"""

from datetime import datetime

from schema.base import ForwardCompatible, Id, Label
from schema.migrations import VersionedRecord
from schema.types import DatasetType

TRAIN_SPLIT = "train"
EVAL_SPLIT = "eval"


class Split(ForwardCompatible):
    """One part of a dataset: a JSONL file in the object store."""

    rows: int
    size_bytes: int
    sha256: str
    key: str  # below the dataset bucket: datasets/{dataset_id}/{split}.jsonl


class Dataset(VersionedRecord):
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
    images: int = 0  # over all rows; a dataset with images is for modality vision
    columns: tuple[str, ...] = ()  # of the form `prompt`, sorted: what graders can read beside the prompt
    created_at: datetime

    @property
    def rows(self) -> int:
        """Rows over all splits."""
        return sum(split.rows for split in self.splits.values())

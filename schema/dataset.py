"""A dataset: immutable, validated, versioned rows, known by its `processed_dataset_id`.

A stored row is JSON in one of six forms. Whitespace is kept:

    messages              {"messages": [{"role": "system" | "user" | "assistant", "content": "..."}, ...]}
    prompt_completion     {"prompt": "..." | [message, ...], "completion": "..." | [message, ...]}
    text                  {"text": "..."}
    preference            {"prompt": …, "chosen": …, "rejected": …}: three strings, or three lists of messages
    unpaired_preference   {"prompt": …, "completion": …, "label": true | false}: two strings, or two lists of messages
    prompt                {"prompt": …, and any other columns of strings, numbers or booleans, for graders to read}

In lists of messages a prompt ends with a user message (or with the results of tools), and each answer is one assistant message. The
content of a message is a string, or with images a list of parts, {"type": "text", "text": "..."} and
{"type": "image", "image": "data:image/png;base64,..."} (or jpeg, webp). Numbers keep their uploaded digits, however large.

Rows with messages may have tools, in OpenAI's form, without images; rows with and without them may be in one dataset:

    a column of the row   "tools": [{"type": "function", "function": {"name", "description", "parameters": {...}}}, ...]
    an assistant message  "tool_calls": [{"id", "type": "function", "function": {"name", "arguments": {...}}}, ...], content "" if none
    a tool message        {"role": "tool", "content": "...", "tool_call_id", and "name" if uploaded}

An assistant message of a `messages` row may have "weight": 0, which excludes it from the loss; weight 1 is not stored.
"""

from datetime import datetime
from typing import Literal

from schema.base import ForwardCompatible, Id, Label
from schema.ingestion import DatasetReport, Detected
from schema.migrations import VersionedRecord
from schema.types import DatasetType, PromptForm

DatasetStatus = Literal["processing", "ready", "failed"]

UNKNOWN_TYPE = "unknown"  # the type of a dataset that is being made
TRAIN_SPLIT = "train"
EVAL_SPLIT = "eval"


class Split(ForwardCompatible):
    """One part of a dataset: a JSONL file in the object store."""

    rows: int
    size_bytes: int
    sha256: str
    key: str  # in the dataset bucket: datasets/{dataset_id}/{split}.jsonl
    index_key: str | None = None  # likewise: byte offsets of rows 0, 256, 512, …; None: of a dataset from before they were recorded


class DatasetShare(ForwardCompatible):
    """One of several datasets that a job trains on."""

    processed_dataset_id: Id
    weight: float  # relative to the other weights


class Dataset(VersionedRecord):
    """The record of a dataset. One that is not `ready` has no splits, and its type, rows and digest say nothing."""

    processed_dataset_id: Id
    tenant_id: Id
    project_id: Id | None = None
    name: Label
    dataset_type: DatasetType
    splits: dict[str, Split]
    digest: str  # "sha256:..." over the digests of the splits; identifies the dataset's version
    rows_uploaded: int
    duplicates_dropped: int = 0
    images: int = 0  # in all rows; a dataset with images is for modality vision
    columns: tuple[str, ...] = ()  # of form `prompt`, sorted: the columns that graders can read besides the prompt
    prompt_form: PromptForm | None = None  # of prompts, answers and texts; None: not known, of a record from before it was recorded
    has_tools: bool = False  # some row offers tools or has calls
    has_weights: bool = False  # some assistant message has weight 0
    status: DatasetStatus = "ready"
    job_id: Id | None = None  # of the job that makes or made it; None: made inside the request
    source: str | None = None  # where the rows came from, without credentials: a file's name, or a URL
    detected: Detected | None = None  # what the file was taken for
    report: DatasetReport | None = None
    created_at: datetime

    @property
    def rows(self) -> int:
        """Rows in all splits."""
        return sum(split.rows for split in self.splits.values())


class WeightedDataset(ForwardCompatible):
    """A dataset with its weight among several: the share of an epoch's rows that it gives, relative to the other weights."""

    dataset: Dataset
    weight: float = 1.0

"""Ingestion: from the files that people have to the checked rows of a dataset. What is asked for, what was found, what is wrong.

The service writes an `IngestTask` and starts `jobs.ingest`, which answers with an `IngestOutcome`; a large source is read by an attempt
instead. Lines and rows count from 1. In a table the header is row 1, as a spreadsheet shows it.
"""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints, WithJsonSchema, model_validator

from schema.base import ForwardCompatible, Strict, field_error
from schema.types import BaseModelId, PromptForm, TextDatasetType

MAX_REPORTED_PROBLEMS = 1000  # bad rows that a report names; the others are counted
MAX_FOUND_PROBLEMS = 100_000  # bad rows after which reading stops, unless they are dropped
INDEX_INTERVAL_ROWS = 256  # rows from one position in an index file to the next
REPORT_SAMPLE_ROWS = 20_000  # rows in which near-duplicates, languages and personal data are looked for, unless all are asked for
# How an ingestion that has no memory left says so before it ends: Python, C++, Rust and Arrow.
OUT_OF_MEMORY_TEXTS = ("MemoryError", "std::bad_alloc", "memory allocation of", "ArrowMemoryError")

FormatName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
ColumnName = Annotated[str, StringConstraints(min_length=1, max_length=200)]
# The name of a column, or a template with columns in braces; "{{" is a brace.
ColumnOrTemplate = Annotated[str, StringConstraints(min_length=1, max_length=10_000)]
# Without a schema of its own, OpenAPI would describe each of the two apart, which many clients cannot read.
IntegerPair = Annotated[tuple[int, int], WithJsonSchema({"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2})]
RoleName = Annotated[str, StringConstraints(min_length=1, max_length=64)]

# The forms of a mapping: the type of dataset that each makes, its required fields and the others that it may have.
MAPPED_FIELDS: tuple[tuple[TextDatasetType, tuple[str, ...], tuple[str, ...]], ...] = (
    ("messages", ("messages",), ("system", "tools")),
    ("prompt_completion", ("prompt", "completion"), ("system", "tools", "history")),
    ("text", ("text",), ()),
    ("preference", ("chosen", "rejected"), ("prompt", "system", "tools", "history", "preferred")),
    ("preference", ("messages", "chosen", "rejected"), ("system", "tools", "preferred")),  # the prompt is a list of messages
    ("preference", ("messages", "rejected"), ("system", "tools")),  # the last message is the chosen answer
    ("unpaired_preference", ("prompt", "completion", "label"), ("system", "tools", "history")),
    ("unpaired_preference", ("messages", "label"), ("system", "tools")),  # the last message is the completion
    ("prompt", ("prompt",), ("system", "tools", "history", "keep")),
)
MAPPED_FIELD_NAMES = frozenset(name for _, required, optional in MAPPED_FIELDS for name in (*required, *optional))


class RowMapping(Strict):
    """How the columns of a file become rows. `prompt`, `completion`, `text`, `chosen`, `rejected` and `system` are names of columns,
    or templates such as `"{instruction}\\n\\n{input}"`: `{{` and `}}` are braces, null is empty text, and a column that stands alone on
    its lines leaves no blank lines when it is empty. Which fields are given decides the type of the dataset."""

    prompt: ColumnOrTemplate | None = None
    completion: ColumnOrTemplate | None = None
    text: ColumnOrTemplate | None = None
    chosen: ColumnOrTemplate | None = Field(
        default=None, description="The better answer. If `rejected` is the same column, it has lists of two answers, the better one first."
    )
    rejected: ColumnOrTemplate | None = None
    preferred: ColumnName | None = Field(
        default=None,
        description="A column that says which of the two answers is the better one, by the name of its column or by the end of that "
        "name: with `response_0` and `response_1`, 0 or 1. Without it, `chosen` is.",
    )
    label: ColumnName | None = Field(
        default=None, description="A column of true and false, 1 and 0, yes and no, good and bad, or thumbs_up and thumbs_down."
    )
    messages: ColumnName | None = Field(
        default=None,
        description="A column with lists of messages, or with JSON text of such lists. With `chosen` and `rejected` it is the prompt; with "
        "`rejected` alone, or with `label`, its last message is the answer.",
    )
    system: ColumnOrTemplate | None = Field(
        default=None,
        description="Becomes a system message; prompt and answer then are messages too. Text of several words is the same in each row.",
    )
    history: ColumnName | None = Field(
        default=None, description="Earlier turns, as lists of pairs of a prompt and an answer; prompt and answer then are messages too."
    )
    tools: ColumnName | None = Field(default=None, description="A column with lists of functions, or with JSON text of such lists.")
    keep: tuple[ColumnName, ...] = Field(
        default=(), max_length=32, description="More columns of a dataset of prompts, for graders.", strict=False
    )
    role_key: ColumnName | None = Field(
        default=None,
        description="Of a message, the key of its role, such as `from`. Default: `role`. If it is given, prompts and answers are messages, "
        "JSON text of messages is read as such, and names such as `human`, `gpt`, `function_call` and `observation` are known.",
    )
    content_key: ColumnName | None = Field(
        default=None, description="Of a message, the key of its content, such as `value`. Default: `content`."
    )
    roles: dict[RoleName, RoleName] = Field(
        default={},
        max_length=32,
        description='Roles by the name that the file has: `{"gpt": "assistant"}`. The role `tool_calls` is of an assistant whose '
        "content is JSON text of calls, each with `name` and `arguments`.",
    )

    @model_validator(mode="after")
    def _check_fields(self) -> "RowMapping":
        if self.dataset_type is None:
            forms = "; ".join(f"{name}: {', '.join(required)}" for name, required, _ in MAPPED_FIELDS)
            given = ", ".join(sorted(self._given)) or "no field"
            raise field_error("mapping", f"{given} makes no row; what makes one: {forms}")
        return self

    @property
    def dataset_type(self) -> TextDatasetType | None:
        """The type of dataset that the given fields make; None if they make none."""
        for dataset_type, required, optional in MAPPED_FIELDS:
            if set(required) <= self._given <= {*required, *optional}:
                return dataset_type
        return None

    @property
    def _given(self) -> set[str]:
        return {name for name in MAPPED_FIELD_NAMES if getattr(self, name)}


class IngestOptions(Strict):
    """What a caller chooses about a file. Everything that is left out is recognized."""

    format: FormatName | None = Field(None, description="`jsonl`, `json`, `csv`, `parquet`, `arrow`, `xlsx` or `text`.")
    encoding: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,40}$")] | None = Field(
        None, description="Of a text file, such as `cp1252`. Default: UTF-8, or UTF-16 with a byte order mark."
    )
    delimiter: Annotated[str, StringConstraints(min_length=1, max_length=1)] | None = Field(None, description="Of a CSV file.")
    sheet: Annotated[str, StringConstraints(min_length=1, max_length=64)] | None = Field(
        None, description="Of a spreadsheet. Default: the only one that has rows."
    )
    text_unit: Literal["file", "paragraph", "line"] = Field("paragraph", description="What becomes one row of a text file.")
    mapping: RowMapping | None = None
    eval_fraction: float = Field(0.1, ge=0, le=0.5, description="Share of the rows held out for evaluation.")
    on_invalid: Literal["refuse", "drop"] = Field(
        "refuse", description="`refuse` keeps nothing if a row is not valid; `drop` keeps the others, and counts those that are dropped."
    )
    base_model_id: BaseModelId | None = Field(None, description="Count tokens with the tokenizer of this base model.")
    max_seq_length: int | None = Field(None, ge=8, le=1_048_576, description="Count the rows that are longer, in tokens.")
    full_report: bool = Field(False, description="Look for near-duplicates, languages and personal data in all rows, not in a sample.")


class IngestLimits(ForwardCompatible):
    """The size limits of one ingestion. Sizes are bytes after decompression."""

    max_row_bytes: int = 1 << 20  # without its images
    max_image_row_bytes: int = 16 << 20  # with them
    max_rows: int = 1_000_000
    max_pixels: int = 20_000_000_000  # of all images: to decode them takes about ten seconds per 10⁹
    max_total_bytes: int = 16 << 30  # of all files of an archive together
    max_parts: int = 10_000  # files in an archive or folder
    max_columns: int = 1000  # of a table
    max_source_bytes: int = 16 << 30  # of all files of a source that is not sent in a request, as they are downloaded
    max_memory_bytes: int = 4 << 30  # that the process may address


class InputFile(ForwardCompatible):
    """A file on the machine that ingests it."""

    path: str
    name: str  # as the caller named it, with its suffix: rows.csv.gz


class IngestTask(ForwardCompatible):
    """What `jobs.ingest` must do. It reads nothing but these files and writes to `output` only."""

    files: tuple[InputFile, ...]
    options: IngestOptions = IngestOptions()  # type: ignore[call-arg]  # pyright: every field has a default
    limits: IngestLimits = IngestLimits()
    seed: int = 42  # of the split into training and held-out rows: the same in a request and in an attempt
    check_only: bool = False  # look for all problems, write no rows
    output: str  # an empty folder: train.jsonl, eval.jsonl, outcome.json
    tokenizer_folder: str | None = None  # with the tokenizer's files of options.base_model_id


class RowProblem(ForwardCompatible):
    """What is wrong with one row."""

    part: str = ""  # the file in an archive or folder, or the sheet; empty for a single file
    line: int
    unit: Literal["line", "row"] = "line"  # what `line` counts: a table has rows, of which the header is the first
    field: str = ""  # a path such as messages[2].content; empty for the whole row
    reason: str  # what is wrong and what would work
    code: str  # the kind of problem, for counts: empty, not_json, missing_field, …

    @property
    def place(self) -> str:
        """Where it is, for people."""
        return f"{self.part} {self.unit} {self.line}".lstrip()


class InputProblem(ForwardCompatible):
    """Why a file as a whole cannot be read, or an option does not fit it."""

    message: str
    hint: str = ""
    param: str = "file"


class Detected(ForwardCompatible):
    """What a file was taken for. A caller can send `mapping` back, with changes."""

    format: FormatName
    container: Literal["gzip", "zstd", "zip", "folder"] | None = None
    encoding: str | None = None  # of a text file
    delimiter: str | None = None
    sheet: str | None = None
    parts: int = 1  # files or sheets
    shape: str  # the form of the records: native, openai, sharegpt, alpaca, question_answer, dpo_pair, mapped, …
    dataset_type: TextDatasetType
    mapping: RowMapping | None = None  # None: the records are rows as they are
    columns: tuple[str, ...] = ()  # of the file
    unused_columns: tuple[str, ...] = ()  # which become part of no row
    reason: str = ""  # one line, for people


class WrittenSplit(ForwardCompatible):
    """One split, written as a file of JSON lines to the output folder."""

    file: str
    rows: int
    size_bytes: int
    sha256: str
    index_file: str | None = None  # byte offsets of rows 0, 256, 512, …: unsigned 64-bit integers, little-endian


class IngestedRows(ForwardCompatible):
    """What is true of the rows that were kept."""

    dataset_type: TextDatasetType
    splits: dict[str, WrittenSplit]
    duplicates_dropped: int = 0
    images: int = 0
    columns: tuple[str, ...] = ()
    prompt_form: PromptForm
    has_tools: bool = False
    has_weights: bool = False


class TokenLengths(ForwardCompatible):
    """How many tokens rows have, by one tokenizer and its chat template; of a pair the longer answer."""

    base_model_id: str
    tokenizer_digest: str  # of the tokenizer's files
    tokenizer_version: str = ""  # of their objects in the model store; empty: not known
    exact: bool  # rendered with the chat template; otherwise the contents were counted, and what a template adds was estimated
    note: str = ""  # why they are not exact
    rows: int
    total_tokens: int
    mean: float
    percentiles: dict[str, int]  # "50", "90", "95", "99", "100"
    histogram: tuple[IntegerPair, ...]  # (largest length of the bucket, rows), ascending; the lengths are powers of 2 and halves between
    longest: tuple[int, ...] = ()  # of the longest rows, descending
    max_seq_length: int | None = None
    truncated_rows: int | None = None  # longer than max_seq_length
    split_tokens: dict[str, int] = Field(default={})  # of all rows of each split
    # Of the training split, by the length at which every row is cut: "256", "512", … "131072".
    clipped_tokens: dict[str, int] = Field(default={})
    learned_tokens: int | None = None  # of the training split, without cutting: the answers with their ends; of a pair those of both


class TokenLengthsTask(ForwardCompatible):
    """What `jobs.ingest.token_lengths` must do: count the tokens of a stored dataset."""

    splits: dict[str, str]  # by name, the path of each split's file
    base_model_id: str
    tokenizer_folder: str  # with the tokenizer's files of the base model
    max_seq_length: int | None = None
    limits: IngestLimits = IngestLimits()
    output: str  # a folder, for token_lengths.json


class TokenLengthsOutcome(ForwardCompatible):
    """The lengths, or why they cannot be counted."""

    refused: InputProblem | None = None
    lengths: TokenLengths | None = None


class NearDuplicates(ForwardCompatible):
    """Rows that nearly say the same, in different splits: an evaluation on them is too good."""

    compared_rows: int  # held-out rows
    compared_training_rows: int = 0
    held_out_rows_with_a_near_duplicate: int
    examples: tuple[IntegerPair, ...] = ()  # the held-out row and the training row, by their numbers in the splits


class Finding(ForwardCompatible):
    """Something that a person should look at. Nothing is changed or dropped for it."""

    kind: str  # "email", "phone", "credit_card", "private_key", "aws_access_key", …
    rows: int
    first_rows: tuple[int, ...] = ()  # numbers of rows in the training split
    first_held_out_rows: tuple[int, ...] = ()  # numbers of rows in the evaluation split


class DatasetReport(ForwardCompatible):
    """Everything that was found about the rows of a dataset."""

    rows_read: int
    rows_kept: int
    dropped: dict[str, int] = Field(default={})  # by reason: duplicate, and with on_invalid "drop" the codes of the problems
    problems: tuple[RowProblem, ...] = ()  # the first of the rows that were dropped as not valid
    characters: int = 0  # of all texts that a model reads or learns
    sampled_rows: int = 0  # in which the following were looked for
    near_duplicates: NearDuplicates | None = None
    languages: dict[str, float] = Field(default={})  # share of the rows by ISO 639-1 code; "und" where it cannot be told
    personal_data: tuple[Finding, ...] = ()
    secrets: tuple[Finding, ...] = ()
    token_lengths: TokenLengths | None = None
    warnings: tuple[str, ...] = ()  # one line each, for people


class IngestOutcome(ForwardCompatible):
    """What an ingestion found. Rows were kept if there are `rows`; otherwise `refused` says why, or `problems` do.

    After a check there are `rows` and a `report` too: what the valid rows would become. Nothing of it was kept.
    """

    refused: InputProblem | None = None  # the file as a whole; beside problems, what is wrong with its valid rows together
    detected: Detected | None = None
    rows_read: int = 0
    problems: tuple[RowProblem, ...] = ()  # the first MAX_REPORTED_PROBLEMS
    problem_count: int = 0
    problem_counts: dict[str, int] = Field(default={})  # by code
    stopped_early: bool = False  # after MAX_FOUND_PROBLEMS; what follows was not read
    samples: tuple[dict[str, object], ...] = ()  # the first rows as they would be stored, with images shortened, for confirmation
    rows: IngestedRows | None = None
    report: DatasetReport | None = None


class IngestProgress(ForwardCompatible):
    """One line of standard output while an ingestion runs."""

    rows: int
    bytes_read: int
    total_bytes: int
    phase: Literal["reading", "splitting", "reporting"] = "reading"

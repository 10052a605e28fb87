"""Rows in a file of this machine: cheap checks before an upload, the upload, and how a file that was uploaded before is found again."""

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from cli.errors import ApiError, CliError
from cli.http_client import Client, Json
from cli.output import err
from cli.render.formats import format_rows
from cli.settings import Settings

SHOWN_FROM_BYTES = 5_000_000  # smaller uploads take no time
MAX_LINE_BYTES = 1 << 20  # of the first row, which is looked at here
FEW_ROWS = 20  # a model hardly learns from fewer
MEMORY = "uploads.json"  # in TUNESMITH_HOME
MAX_REMEMBERED = 200
JSONL_HINT = 'write one JSON object per line, such as {"prompt": "…", "completion": "…"}; docs/api.md shows the row formats'
# First bytes of files that are often taken for rows.
MAGIC = {b"PAR1": "a Parquet file", b"PK\x03\x04": "an Excel or zip file", b"\x1f\x8b": "a gzip file", b"ARROW1": "an Arrow file"}


@dataclass(frozen=True)
class RowsFile:
    """A file of rows that looks right so far."""

    path: Path
    size_bytes: int
    first_row: Json

    @property
    def trainer_type(self) -> str:
        """The trainer type that rows like the first one are for."""
        names = self.first_row.keys()
        if "chosen" in names:
            return "dpo"
        if "label" in names and "completion" in names:
            return "kto"
        return "sft"


def check_rows_file(path: Path) -> RowsFile:
    """Check what is cheap to check. Raises CliError; the service checks every row."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(MAX_LINE_BYTES)
    lines = [line for line in start.removeprefix(b"\xef\xbb\xbf").splitlines() if line.strip()]
    if not lines:
        raise CliError("is empty" if not size else "has blank lines only", JSONL_HINT, param=str(path))
    for magic, kind in MAGIC.items():
        if start.startswith(magic):
            raise CliError(f"is {kind}, not JSON Lines", JSONL_HINT, param=str(path))
    if lines[0].lstrip().startswith(b"["):
        hint = f"write one row per line: jq -c '.[]' {path} > rows.jsonl"
        raise CliError("is one JSON array, not JSON Lines", hint, param=str(path))
    if len(lines) == 1 and size > MAX_LINE_BYTES:
        return RowsFile(path, size, {})  # the first row is longer than what was read
    try:
        row: object = json.loads(lines[0])
    except ValueError as error:
        reason = "is not text in UTF-8" if isinstance(error, UnicodeDecodeError) else f"has a first line that is not JSON: {error}"
        raise CliError(reason, JSONL_HINT, param=str(path)) from error
    if not isinstance(row, dict):
        raise CliError("has a first line that is not a JSON object", JSONL_HINT, param=str(path))
    return RowsFile(path, size, cast(Json, row))


@dataclass(frozen=True)
class UploadOptions:
    """How the service keeps the rows."""

    name: str | None = None
    eval_fraction: float = 0.1
    project: str | None = None

    @property
    def form_fields(self) -> dict[str, str]:
        """As `POST /datasets` takes them."""
        fields = {"eval_fraction": str(self.eval_fraction)}
        return fields | ({"name": self.name} if self.name else {}) | ({"project_id": self.project} if self.project else {})


def upload_rows(client: Client, path: Path, options: UploadOptions) -> Json:
    """Upload a file of rows, with a progress bar on a terminal if it is large. Returns the dataset."""
    size = path.stat().st_size
    columns = (TextColumn("uploading {task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    is_shown = err.is_terminal and size >= SHOWN_FROM_BYTES
    with path.open("rb") as stream, Progress(*columns, console=err, transient=True, disable=not is_shown) as bar:
        return client.upload(bar.wrap_file(stream, size, description=escape(path.name)), path.name, options.form_fields)


def find_uploaded(client: Client, path: Path, options: UploadOptions, settings: Settings) -> Json | None:
    """The dataset with the rows of a file that was uploaded before; None if it was not, or if that dataset is gone.

    TUNESMITH_HOME remembers by their digest which files became which datasets of which service.
    """
    dataset_id = _read_memory(settings).get(_compute_key(client, path, options, settings))
    if dataset_id is not None:
        with suppress(ApiError):  # it was deleted, or belongs to another caller
            return client.get(f"/datasets/{dataset_id}")
    return None


def remember_upload(client: Client, path: Path, options: UploadOptions, settings: Settings, dataset_id: str) -> None:
    """Remember which dataset a file became."""
    known = {**_read_memory(settings), _compute_key(client, path, options, settings): dataset_id}
    memory = settings.home_folder / MEMORY
    memory.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    part = memory.with_name(memory.name + ".part")
    part.write_text(json.dumps(dict(list(known.items())[-MAX_REMEMBERED:])))
    part.replace(memory)


def describe_rows(dataset: Json) -> str:
    """`118 rows of messages: 106 to train on, 12 held out; 82 duplicates dropped`."""
    splits: dict[str, int] = dataset["splits"]
    held_out = splits.get("eval", 0)
    parts = f"{splits.get('train', 0)} to train on, {held_out or 'none'} held out"
    dropped = f"; {dataset['duplicates_dropped']} duplicates dropped" if dataset["duplicates_dropped"] else ""
    return f"{dataset['rows']} rows of {format_rows(dataset).replace('_', ' ')}: {parts}{dropped}"


def find_row_warning(dataset: Json) -> str | None:
    """What is doubtful about so few rows."""
    rows = dataset["rows"]
    if rows >= FEW_ROWS:
        return None
    of_file = f" of {dataset['rows_uploaded']} in the file" if dataset["duplicates_dropped"] else ""
    subject = f"there is only 1 different row{of_file}" if rows == 1 else f"there are only {rows} different rows{of_file}"
    return f"{subject}: the model will repeat them rather than learn from them; a few hundred are a good start"


def _compute_key(client: Client, path: Path, options: UploadOptions, settings: Settings) -> str:
    """A digest of what makes a dataset: the service, the bytes and how they are split."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    service = "" if client.url == settings.service_url else client.url  # the port of this home's service changes
    return hashlib.sha256(json.dumps([service, options.project, options.eval_fraction, digest]).encode()).hexdigest()


def _read_memory(settings: Settings) -> dict[str, str]:
    """Datasets by key; empty if the file is missing or damaged: then a file is uploaded again."""
    try:
        content: object = json.loads((settings.home_folder / MEMORY).read_text())
    except (OSError, ValueError):
        return {}
    return {str(key): str(value) for key, value in cast(Json, content).items()} if isinstance(content, dict) else {}

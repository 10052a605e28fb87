"""Rows in a file or folder of this machine: what is checked before an upload, and how a file that was uploaded before is found again."""

import hashlib
import json
import tempfile
import zipfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from cli.errors import ApiError, CliError
from cli.http_client import Client, Json
from cli.row_options import RowOptions
from cli.settings import Settings

MEMORY = "uploads.json"  # in TUNESMITH_HOME
MAX_REMEMBERED = 200
SCHEMES = ("hf://", "gs://", "s3://", "https://", "http://")  # of sources that the service reads itself
SAVED_DATASET_FILES = ("dataset_dict.json", "dataset_info.json")  # `save_to_disk` writes one of them
FORMATS_HINT = "JSON Lines, JSON, CSV, TSV, Parquet, Arrow, XLSX, text and Markdown are read, also as .gz, .zst or in a .zip"


@dataclass(frozen=True)
class RowsFile:
    """A file of rows, or a folder of them."""

    path: Path

    @property
    def name(self) -> str:
        """The name under which it is sent: a folder becomes an archive."""
        return f"{self.path.resolve().name}.zip" if self.path.is_dir() else self.path.name

    @property
    def label(self) -> str:
        """The name without suffixes."""
        return self.path.resolve().name.partition(".")[0][:128] or "rows"

    @contextmanager
    def open(self) -> Generator[tuple[BinaryIO, int]]:
        """The bytes to send, and how many they are. A folder is archived first, the same way each time."""
        if not self.path.is_dir():
            with self.path.open("rb") as stream:
                yield stream, self.path.stat().st_size
            return
        with tempfile.TemporaryFile() as archive:
            _archive(self.path, archive)
            size = archive.tell()
            archive.seek(0)
            yield archive, size


def is_source(text: str) -> bool:
    """Whether it names rows elsewhere, which the service reads itself."""
    return text.lower().startswith(SCHEMES)


def find_rows(path: Path) -> RowsFile:
    """The rows at a path, which exists. Raises CliError if there are none at first sight; the service checks every row."""
    if not path.is_dir():
        if path.stat().st_size == 0:
            raise CliError("is empty", FORMATS_HINT, param=str(path))
        return RowsFile(path)
    if not any((path / name).is_file() for name in SAVED_DATASET_FILES):
        hint = "name one file, or a .zip of several; a folder must be what save_to_disk wrote; to start from a model in a folder: --base"
        raise CliError("is a folder, not rows", hint, param=str(path))
    return RowsFile(path)


def _archive(folder: Path, target: BinaryIO) -> None:
    """Write the files of a folder as a zip archive."""
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(path for path in folder.rglob("*") if path.is_file() and not _is_hidden(path.relative_to(folder))):
            entry = zipfile.ZipInfo(path.relative_to(folder).as_posix())  # without a time: the same files make the same archive
            entry.compress_type = zipfile.ZIP_DEFLATED
            with path.open("rb") as source, archive.open(entry, "w", force_zip64=True) as packed:
                while block := source.read(1 << 20):
                    packed.write(block)


def find_uploaded(client: Client, rows: RowsFile, options: RowOptions, settings: Settings) -> Json | None:
    """The dataset with the rows of a file that was uploaded before; None if it was not, or if that dataset is gone.

    TUNESMITH_HOME remembers by their digest which files became which datasets of which service.
    """
    dataset_id = _read_memory(settings).get(_compute_key(client, rows, options, settings))
    if dataset_id is not None:
        with suppress(ApiError):  # it was deleted, or belongs to another caller
            dataset = client.get(f"/datasets/{dataset_id}")
            return dataset if dataset.get("status") != "failed" else None
    return None


def remember_upload(client: Client, rows: RowsFile, options: RowOptions, settings: Settings, dataset_id: str) -> None:
    """Remember which dataset a file became."""
    known = {**_read_memory(settings), _compute_key(client, rows, options, settings): dataset_id}
    memory = settings.home_folder / MEMORY
    memory.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    part = memory.with_name(memory.name + ".part")
    part.write_text(json.dumps(dict(list(known.items())[-MAX_REMEMBERED:])))
    part.replace(memory)


def _compute_key(client: Client, rows: RowsFile, options: RowOptions, settings: Settings) -> str:
    """A digest of what makes a dataset: the service, the bytes, and how they are read and split."""
    with rows.open() as (stream, _):
        digest = _digest(stream)
    service = "" if client.url == settings.service_url else client.url  # the port of this home's service changes
    facts = [service, options.project, options.check_fields, rows.path.suffix, digest]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _digest(stream: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _read_memory(settings: Settings) -> dict[str, str]:
    """Datasets by key; empty if the file is missing or damaged: then a file is uploaded again."""
    try:
        content: object = json.loads((settings.home_folder / MEMORY).read_text())
    except (OSError, ValueError):
        return {}
    return {str(key): str(value) for key, value in cast(Json, content).items()} if isinstance(content, dict) else {}


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)

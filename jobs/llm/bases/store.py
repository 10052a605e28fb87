"""A base model's files in the model store. They are checked as a trainer checks them, before the first of them is stored.

A model counts once its config.json is there, which is written last and deleted first.
"""

import os
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from jobs.llm.base_files import copy_base_files
from jobs.runtime.errors import JobFailed
from jobs.runtime.files import sha256_of
from jobs.runtime.retry import retry_store, upload_with_retry
from schema.models import (
    COMPLETION_MARKER,
    MODEL_RECORD,
    ModelFile,
    ModelRecord,
    ModelSource,
    describe_model,
    model_prefix,
    read_model_record,
)
from storage import NoSuchObject, ObjectStore
from storage.file import LocalStore

Say = Callable[[str], None]


def find_model(store: ObjectStore, name: str) -> ModelRecord | None:
    """The model of that name in the store, or None. Raises JobFailed."""
    prefix = model_prefix(name)
    keys = _list_files(store, name)
    if COMPLETION_MARKER not in keys:
        return None
    try:
        record = read_model_record(store.read(prefix + MODEL_RECORD), name, keys)
    except NoSuchObject:
        record = None
    return record or ModelRecord(name=name)


def check_replaceable(store: ObjectStore, name: str, *, replace: bool) -> None:
    """Raise JobFailed if the store has a model of that name, unless it is to be replaced."""
    stored = find_model(store, name)
    if stored is not None and not replace:
        origin = {"hub": "from the Hub", "folder": "imported from a folder", "package": "from a package"}.get(
            stored.source, "put there by hand"
        )
        message = f"the model store has a model {name} already, {origin}"
        raise JobFailed("invalid_config", message, "--replace replaces it, or give yours another --name")


def store_model(
    folder: Path,
    store: ObjectStore,
    name: str,
    *,
    source: ModelSource,
    revision: str | None = None,
    note: str = "",
    links_within: Path | None = None,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
    say: Say,
) -> ModelRecord:
    """Check the model in a folder and store it, instead of one of the same name. Raises JobFailed before anything is stored."""
    with TemporaryDirectory() as scratch:
        checked = copy_base_files(folder, Path(scratch, "checked"), f"the model in {folder}", links_within=links_within)
        paths = {path.name: (folder / path.name).resolve() for path in sorted(checked.iterdir())}
    say("computing SHA-256 digests …")
    record = describe_model(
        name, {path: file.stat().st_size for path, file in paths.items()}, lambda path, count: _read_start(paths[path], count)
    )
    files = tuple(ModelFile(path=file.path, size_bytes=file.size_bytes, sha256=sha256_of(paths[file.path])) for file in record.files)
    update = {"source": source, "revision": revision, "note": note, "files": files, "imported_at": now()}
    record = record.model_copy(update=update)
    _delete_others(store, name, keep=set(paths) - {COMPLETION_MARKER})
    for file in files:
        if file.path != COMPLETION_MARKER:
            _store_file(paths[file.path], store, file, model_prefix(name), say)
    content = record.model_dump_json(indent=1).encode()
    retry_store(f"the record of {name} could not be stored", lambda: store.write(model_prefix(name) + MODEL_RECORD, content))
    marker = next(file for file in files if file.path == COMPLETION_MARKER)
    _store_file(paths[COMPLETION_MARKER], store, marker, model_prefix(name), say)
    return record


def remove_model(store: ObjectStore, name: str) -> int:
    """Delete a model; returns the bytes that its files had. Raises JobFailed if there is none."""
    sizes = _list_files(store, name)
    if not sizes:
        raise JobFailed("invalid_config", f"the model store has no model {name}", "`tunesmith models list` shows what it has")
    _delete_others(store, name, keep=set())
    return sum(sizes.values())


def _store_file(path: Path, store: ObjectStore, file: ModelFile, prefix: str, say: Say) -> None:
    if isinstance(store, LocalStore) and _hard_link(path, store.path_for_key(prefix + file.path)):
        return
    say(f"copying {file.path} …")
    upload_with_retry(f"{file.path} could not be stored", store, path, prefix + file.path, file.sha256 or "")


def _hard_link(source: Path, target: Path) -> bool:
    """Link a file instead of copying gigabytes; False on another file system."""
    target.parent.mkdir(parents=True, exist_ok=True)
    link = target.with_name(target.name + ".part")
    link.unlink(missing_ok=True)
    try:
        os.link(source, link)
    except OSError:
        return False
    link.replace(target)
    link.unlink(missing_ok=True)  # a rename does nothing when both names are links to one file
    return True


def _delete_others(store: ObjectStore, name: str, *, keep: set[str]) -> None:
    """Delete the files of a model but those named, in the order that leaves no half model that looks whole."""
    prefix = model_prefix(name)
    for path in sorted(_list_files(store, name).keys() - keep, key=lambda path: path != COMPLETION_MARKER):
        retry_store(f"{prefix}{path} could not be deleted", lambda path=path: store.delete(prefix + path))


def _list_files(store: ObjectStore, name: str) -> dict[str, int]:
    """The sizes of the files in a model's folder, by name, without those in folders below it: of a/b, b may be an owner too."""
    prefix = model_prefix(name)
    listed = retry_store(f"{prefix} cannot be listed", lambda: list(store.iter_objects(prefix)), code="internal")
    sizes = {stored.key.removeprefix(prefix): stored.size_bytes for stored in listed}
    return {path: size for path, size in sizes.items() if "/" not in path}


def _read_start(path: Path, max_bytes: int) -> bytes:
    with path.open("rb") as stream:
        return stream.read(max_bytes)


def make_work_folder(work: Path, name: str, revision: str) -> Path:
    """The folder into which a download goes; one of another revision of the model is deleted, one of this revision is continued."""
    parent = work / name.replace("/", "--")
    for folder in parent.iterdir() if parent.is_dir() else ():
        if folder.name != revision:
            shutil.rmtree(folder, ignore_errors=True)
    folder = parent / revision
    folder.mkdir(parents=True, exist_ok=True)
    return folder

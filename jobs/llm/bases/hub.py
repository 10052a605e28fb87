"""Pulling a base model from the Hub: the files that trainers use, continued after an interruption, each compared with the Hub's digest."""

import hashlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.llm.base_files import is_base_file
from jobs.llm.base_model import HUB_TRIES, explain_hub_errors
from jobs.llm.bases.store import Say, check_replaceable, find_model, make_work_folder, store_model
from jobs.runtime.errors import JobFailed
from jobs.runtime.files import sha256_of
from jobs.runtime.http_retry import retry_hub
from schema.models import ModelRecord
from storage import ObjectStore

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

SPARE_BYTES = 1 << 30  # of the disk, beside the download
GIGABYTE = 1e9


def pull_model(
    name: str, store: ObjectStore, work: Path, *, revision: str | None = None, token: str | None = None, replace: bool = False, say: Say
) -> ModelRecord:
    """Download a model below `work` and store it. One that is stored at the same commit is left as it is. Raises JobFailed."""
    from huggingface_hub import snapshot_download

    info = _ask_hub(name, revision, token)
    commit = info.sha or ""
    stored = find_model(store, name)
    if stored is not None and (stored.source, stored.revision) == ("hub", commit):
        say(f"{name} is in the model store already, at commit {commit[:12]}")
        return stored
    check_replaceable(store, name, replace=replace)
    files = [file for file in info.siblings or [] if is_base_file(file.rfilename) and not file.rfilename.startswith("consolidated")]
    if not any(file.rfilename.endswith(".safetensors") for file in files):
        hint = "choose a model with safetensors weights; pickled weights (.bin, .pt) are never loaded"
        raise JobFailed("invalid_config", f"{name} has no safetensors weights on the Hub", hint)
    size_bytes = sum(file.size or 0 for file in files)
    _describe(info, size_bytes, say)
    folder = make_work_folder(work, name, commit)
    _check_space(folder, size_bytes)
    with explain_hub_errors(name, token):
        retry_hub(
            lambda: snapshot_download(
                name, revision=commit, local_dir=folder, allow_patterns=[file.rfilename for file in files], token=token or False
            ),
            tries=HUB_TRIES,
        )
    for file in files:
        _check_digest(folder, file)
    record = store_model(folder, store, name, source="hub", revision=commit, say=say)
    shutil.rmtree(folder.parent, ignore_errors=True)
    return record


def _ask_hub(name: str, revision: str | None, token: str | None) -> "ModelInfo":
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionNotFoundError

    with explain_hub_errors(name, token):
        try:
            return retry_hub(
                lambda: HfApi().model_info(name, revision=revision, files_metadata=True, token=token or False), tries=HUB_TRIES
            )
        except RevisionNotFoundError as error:
            hint = f"https://huggingface.co/{name}/commits lists its commits; without --revision the newest is used"
            raise JobFailed("invalid_config", f"{name} has no revision {revision!r} on the Hub", hint) from error


def _describe(info: "ModelInfo", size_bytes: int, say: Say) -> None:
    """Say what is downloaded and under which license."""
    stated = (info.card_data.get("license_name") or info.card_data.get("license")) if info.card_data else None
    license_text = f", license {stated}" if stated else ""
    say(f"{info.id} at commit {(info.sha or '')[:12]}: {size_bytes / GIGABYTE:.2f} GB{license_text}")
    if info.gated:
        say(f"the model is gated: its license must be accepted at https://huggingface.co/{info.id}, by the account of --hf-token")


def _check_space(folder: Path, size_bytes: int) -> None:
    """Raise JobFailed when the download would not fit. What an earlier try has downloaded is not counted."""
    downloaded = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free_bytes = shutil.disk_usage(folder).free
    if size_bytes - downloaded + SPARE_BYTES > free_bytes:
        message = f"the model has {size_bytes / GIGABYTE:.1f} GB, and {folder} has room for {free_bytes / GIGABYTE:.1f} GB"
        raise JobFailed("internal", message, "free some space: `tunesmith prune`")


def _check_digest(folder: Path, file: "RepoSibling") -> None:
    """Compare a downloaded file with the Hub's digest: SHA-256 of a large file, git's own of a small one. Raises JobFailed."""
    path = folder / file.rfilename
    if file.lfs is not None:
        matches = sha256_of(path) == file.lfs.sha256
    else:
        content = path.read_bytes()  # a large file is never stored in git itself
        header = f"blob {len(content)}\0".encode()
        matches = file.blob_id is None or hashlib.sha1(header + content, usedforsecurity=False).hexdigest() == file.blob_id
    if not matches:
        path.unlink()
        raise JobFailed("internal", f"{file.rfilename} is not what the Hub says it is; it was deleted", "run the command again")

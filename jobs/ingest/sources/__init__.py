"""Sources of rows: what downloads the files of each kind to this machine. One module for each kind, and a line in `SOURCES`.

A source is read with the rights that the service chose (`IngestConfig.rights`): the caller's credentials, none, or the deployment's own.
What a file means does not belong here, and nothing of a source is ever executed.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name

from jobs.runtime.context import Secrets, Stores
from jobs.runtime.errors import JobFailed
from schema.egress import EgressPolicy
from schema.ingestion import InputFile
from schema.sources import parse_source
from schema.training.ingest import IngestConfig

# One line adds a kind of source: its name → "module:function". The function takes a SourceRequest and raises JobFailed.
SOURCES = {
    "incoming": "jobs.ingest.sources.incoming:download",
    "gs": "jobs.ingest.sources.gs:download",
    "s3": "jobs.ingest.sources.s3:download",
    "hf": "jobs.ingest.sources.hf:download",
    "https": "jobs.ingest.sources.https:download",
}

URL_SECRET = "source_url"  # an https URL with its query, which may be a signature
# What a caller can do about credentials, by whose rights the source was read with.
RIGHTS_HINTS = {
    "caller": "the credentials that came with the request may not read it, or have expired; retry the job with others",
    "anonymous": "it was read without credentials; send hf_token or source_credentials with POST /datasets",
    "deployment": "it was read with the deployment's own credentials; send your own, or let the operator grant access",
}


@dataclass(frozen=True)
class SourceRequest:
    """What to download, and with what. `check_stop` is called often and raises Stopped."""

    config: IngestConfig
    secrets: Secrets
    stores: Stores
    folder: Path  # empty; files are written below it
    policy: EgressPolicy
    check_stop: Callable[[], None]


@dataclass(frozen=True)
class Downloaded:
    """The files of a source on this machine, and the source as a record names it: without credentials, and with the revision."""

    files: tuple[InputFile, ...]
    source: str


def download(request: SourceRequest) -> Downloaded:
    """Download a source. Raises JobFailed for one that does not exist, may not be read or is too large."""
    return resolve_name(SOURCES[parse_source(request.config.source).kind])(request)


def check_size(request: SourceRequest, names: Sequence[str], size_bytes: int) -> None:
    """Raise JobFailed for a source without files, with too many, or with more bytes than the deployment downloads or this disk holds."""
    source, limits = request.config.source, request.config.limits
    if not names:
        raise JobFailed("invalid_data", f"{source} names no file that exists", "check the path; a folder ends in /")
    if len(names) > limits.max_parts:
        hint = "name fewer of them, or join them"
        raise JobFailed("invalid_data", f"{source} has {len(names):,} files; the limit is {limits.max_parts:,}", hint)
    if size_bytes > limits.max_source_bytes:
        raise too_large(request)
    free_bytes = shutil.disk_usage(request.folder).free
    if size_bytes > free_bytes:
        message = f"{source} has {size_bytes / 1e9:.1f} GB, and the attempt's disk has {free_bytes / 1e9:.1f} GB free"
        raise JobFailed("internal", message, "request hardware with a larger disk, or split the source")


def too_large(request: SourceRequest) -> JobFailed:
    """The failure for a source with more bytes than the deployment downloads."""
    limit = request.config.limits.max_source_bytes
    hint = "split it into several datasets; the operator can raise TUNESMITH_MAX_SOURCE_BYTES"
    return JobFailed("invalid_data", f"{request.config.source} is larger than {limit / 1e9:.1f} GB, the limit of this deployment", hint)


def local_path(request: SourceRequest, number: int) -> Path:
    """Where to write a file of the source. Its own name, which others chose, is not part of the path."""
    return request.folder / f"{number:05d}"

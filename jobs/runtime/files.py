"""The files of an artifact or a checkpoint: listing them, and the size and sha256 by which each is verified."""

import hashlib
from pathlib import Path

from schema.job import ArtifactFile


def list_files(root: Path) -> list[Path]:
    """Every file below a folder, sorted; `root` itself if it is a file."""
    return sorted(path for path in root.rglob("*") if path.is_file()) if root.is_dir() else [root]


def describe_file(path: Path, root: Path) -> ArtifactFile:
    """A file that is `root`, or is below it, with its path relative to `root`; that path is empty for `root` itself."""
    relative_path = "" if path == root else path.relative_to(root).as_posix()
    return ArtifactFile(path=relative_path, size_bytes=path.stat().st_size, sha256=sha256_of(path))


def sha256_of(path: Path) -> str:
    """The sha256 of a file of any size, as hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

"""What Tunesmith stores, on the service and on this machine: the commands `du` and `prune`."""

import shutil
from pathlib import Path

from cli.settings import Settings


def remove_local_copies(settings: Settings, job_id: str) -> int:
    """Delete this machine's copies of a job's files; returns how many bytes they had. 0 for a job that has none."""
    downloads = settings.home_folder / "downloads"
    folder = next((path for path in _list_folders(downloads) if path.name == job_id), None)  # an id never leads elsewhere
    if folder is None:
        return 0
    size_bytes = folder_size_bytes(folder)
    shutil.rmtree(folder)
    return size_bytes


def _list_folders(parent: Path) -> list[Path]:
    """The folders in a folder, which may not exist."""
    return sorted(path for path in parent.iterdir() if path.is_dir() and not path.is_symlink()) if parent.is_dir() else []


def folder_size_bytes(folder: Path) -> int:
    """The bytes of all files below a folder; 0 for one that does not exist."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())

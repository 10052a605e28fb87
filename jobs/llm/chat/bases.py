"""Where a model's files are on this machine; those in a remote store are downloaded once."""

import shutil
from pathlib import Path
from urllib.parse import unquote, urlsplit

from jobs.llm.base_files import is_base_file
from jobs.llm.chat.model import InvalidModel


def find_path(location: str, downloads: Path | None) -> Path:
    """The file or folder at a path, or at the URL of a model's folder in an object store. Raises InvalidModel.

    A folder of this machine is used where it is. A model in another store is downloaded below `downloads`.
    """
    if "://" not in location:
        return Path(location).expanduser()
    if location.startswith("file://"):
        path = Path(unquote(urlsplit(location).path))
        if not path.exists():
            raise InvalidModel(f"{path} is not on this machine; chat where the service runs, or pull the model there")
        return path
    if downloads is None:
        raise InvalidModel(f"{location} is in a remote store, and --downloads names no folder to copy it to")
    return _download(location.rstrip("/"), downloads)


def _download(url: str, downloads: Path) -> Path:
    """A copy of the model's files that are used. What an interrupted download left is downloaded again."""
    from storage import StorageError
    from storage.registry import open_store

    target = downloads.joinpath(*url.rsplit("/", 2)[1:])
    try:
        store = open_store(url)
        stored = {each.key: each.size_bytes for each in store.iter_objects("") if is_base_file(each.key)}
        if "config.json" not in stored:
            raise InvalidModel(f"the store has no model at {url}")
        if target.is_dir() and {path.name: path.stat().st_size for path in target.iterdir()} == stored:
            return target
        incomplete = target.with_name(f"{target.name}.part")
        shutil.rmtree(incomplete, ignore_errors=True)
        for key in stored:
            store.download(key, incomplete / key)
        shutil.rmtree(target, ignore_errors=True)
        return incomplete.rename(target)
    except StorageError as error:
        raise InvalidModel(f"the model at {url} cannot be read: {error}") from error

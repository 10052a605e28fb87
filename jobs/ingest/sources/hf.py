"""`hf://owner/dataset[:config[/split]][@revision]`: the data files of a dataset repository of the Hugging Face Hub.

Only files are read: a repository's script is never run, and one that has nothing else is refused. Every file is of one commit, which
the dataset's record names. Which files belong to a configuration and a split is what the repository's card says, or else what the names
of its files and folders say, as the Hub's own viewer reads them.
"""

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, TypeVar, cast

from jobs.ingest.sources import RIGHTS_HINTS, Downloaded, SourceRequest, check_size
from jobs.runtime.errors import JobFailed
from jobs.runtime.http_retry import retry_hub
from schema.ingestion import InputFile
from schema.sources import HubSource, parse_source

if TYPE_CHECKING:
    from huggingface_hub.hf_api import DatasetInfo

DATA_SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".arrow", ".txt", ".xlsx")
COMPRESSED_SUFFIXES = (".gz", ".zst", ".zip")
METADATA_NAMES = ("dataset_infos.json", "dataset_dict.json", "dataset_info.json", "state.json", "metadata.json", "croissant.json")
DEFAULT_CONFIG, TRAIN = "default", "train"
# The words in names of files and folders that say which split a file belongs to.
SPLIT_WORDS = {"train": ("train", "training"), "validation": ("validation", "valid", "dev", "val"), "test": ("test", "testing", "eval")}

ReturnT = TypeVar("ReturnT")


@dataclass(frozen=True)
class Selection:
    """The files of one configuration and one split."""

    config: str
    split: str
    paths: tuple[str, ...]


class NoSelection(ValueError):
    """A repository has no such files. The hint says which it has."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


def download(request: SourceRequest) -> Downloaded:
    """Download the files of the configuration and split. Raises JobFailed."""
    from huggingface_hub import HfApi

    source = parse_source(request.config.source)
    assert isinstance(source, HubSource)
    # Without a token of the caller, none is sent, unless the service lets the machine's own be used.
    token: str | bool | None = request.secrets.get("hf_token") or (None if request.config.rights == "deployment" else False)
    api = HfApi(token=token, library_name="tunesmith")
    info = _call(request, lambda: api.dataset_info(source.repo_id, revision=source.revision, files_metadata=True))
    sizes = {each.rfilename: each.size or 0 for each in info.siblings or [] if _is_safe(each.rfilename)}
    try:
        selection = select_files(tuple(sizes), _read_card(info), source)
    except NoSelection as error:
        raise JobFailed("invalid_data", f"{request.config.source}: {error}", error.hint) from error
    check_size(request, selection.paths, sum(sizes[path] for path in selection.paths))
    files: list[InputFile] = []
    for path in selection.paths:
        request.check_stop()
        local = _call(request, lambda path=path: _download_file(request, source, path, info.sha or "", token))
        files.append(InputFile(path=local, name=path))
    pinned = f"hf://{source.repo_id}:{selection.config}/{selection.split}@{info.sha}"
    return Downloaded(tuple(files), pinned)


def _download_file(request: SourceRequest, source: HubSource, path: str, revision: str, token: str | bool | None) -> str:
    from huggingface_hub import hf_hub_download

    return hf_hub_download(source.repo_id, path, repo_type="dataset", revision=revision, local_dir=request.folder, token=token)


def select_files(paths: Sequence[str], card_configs: Sequence[Mapping[str, object]], source: HubSource) -> Selection:
    """The files that a source names. Raises NoSelection."""
    files = [path for path in paths if _is_data(path)]
    if not files:
        if any(path.endswith(".py") for path in paths):
            raise NoSelection(
                "the repository has a script instead of data files, and scripts are never run", "name a repository with files"
            )
        raise NoSelection("the repository has no data files", f"it needs files such as {', '.join(DATA_SUFFIXES[:5])}")
    configs = _configs_of_card(card_configs, files) or _configs_of_folders(files)
    config = source.config or (DEFAULT_CONFIG if DEFAULT_CONFIG in configs or len(configs) > 1 else next(iter(configs)))
    if config not in configs:
        known = ", ".join(sorted(configs)[:20])
        message = f"it has no configuration {config!r}" if source.config else "it has several configurations"
        raise NoSelection(message, f"it has: {known}; write hf://{source.repo_id}:CONFIG")
    splits = configs[config]
    split = source.split or (TRAIN if TRAIN in splits or len(splits) > 1 else next(iter(splits)))
    if split not in splits:
        message = f"its configuration {config!r} has no split {split!r}"
        raise NoSelection(message, f"it has: {', '.join(sorted(splits)[:20])}; write hf://{source.repo_id}:{config}/SPLIT")
    return Selection(config, split, tuple(sorted(splits[split])))


def _configs_of_card(card_configs: Sequence[Mapping[str, object]], files: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """Configuration → split → files, as the card of the repository lists them."""
    configs: dict[str, dict[str, list[str]]] = {}
    for entry in card_configs:
        name, data_files = str(entry.get("config_name", DEFAULT_CONFIG)), entry.get("data_files")
        folder = str(entry.get("data_dir") or "").strip("/")
        splits = dict[str, list[str]]()
        for split, patterns in _list_patterns(data_files):
            wanted = [f"{folder}/{pattern}" if folder else pattern for pattern in patterns]
            splits[split] = [path for path in files if any(_matches(path, pattern) for pattern in wanted)]
        if not splits and folder:
            splits = _splits_of_names([path for path in files if path.startswith(f"{folder}/")])
        if any(splits.values()):
            configs[name] = {split: found for split, found in splits.items() if found}
    return configs


def _list_patterns(data_files: object) -> list[tuple[str, list[str]]]:
    """Split and patterns of the `data_files` of a card: one pattern, a list of them, or a list of {split, path}."""
    match data_files:
        case str(pattern):
            return [(TRAIN, [pattern])]
        case list():
            items = cast(list[object], data_files)
            named = [cast(dict[str, object], item) for item in items if isinstance(item, dict)]
            if named:
                return [(str(item.get("split", TRAIN)), _as_list(item.get("path"))) for item in named]
            return [(TRAIN, [str(item) for item in items])]
        case dict():
            return [(str(split), _as_list(paths)) for split, paths in cast(dict[str, object], data_files).items()]
        case _:
            return []


def _as_list(value: object) -> list[str]:
    return [str(item) for item in cast(list[object], value)] if isinstance(value, list) else [str(value)]


def _configs_of_folders(files: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """Without a card: the files of the folder `data`, of no folder, or of folders named as splits are the only configuration.

    Otherwise each folder at the top is one.
    """
    tops = {path.partition("/")[0] for path in files if "/" in path}
    if tops - {"data"} and not any(_find_split(top) for top in tops) and all("/" in path for path in files):
        return {top: _splits_of_names([path for path in files if path.startswith(f"{top}/")]) for top in sorted(tops)}
    return {DEFAULT_CONFIG: _splits_of_names(files)}


def _splits_of_names(files: Sequence[str]) -> dict[str, list[str]]:
    """Split → files, by the words in their names. Files without such a word are the training split, if no file has one."""
    splits = dict[str, list[str]]()
    for path in files:
        split = next((found for part in reversed(path.split("/")) if (found := _find_split(part))), None)
        if split:
            splits.setdefault(split, []).append(path)
    return splits or {TRAIN: list(files)}


def _find_split(name: str) -> str | None:
    """The split that the name of a file or folder says."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((split for split, known in SPLIT_WORDS.items() if any(word in known for word in words)), None)


def _matches(path: str, pattern: str) -> bool:
    """Whether a path matches a pattern, in which a folder stands for everything below it."""
    return fnmatch.fnmatchcase(path, pattern) or path.startswith(f"{pattern.rstrip('/')}/")


def _is_data(path: str) -> bool:
    name = PurePosixPath(path).name.lower()
    for suffix in COMPRESSED_SUFFIXES:
        name = name.removesuffix(suffix)
    return name.endswith(DATA_SUFFIXES) and name not in METADATA_NAMES and not name.startswith((".", "_")) and name != "requirements.txt"


def _is_safe(path: str) -> bool:
    """Whether the path stays below the folder that it is joined to."""
    return not path.startswith("/") and "\\" not in path and all(part not in ("", ".", "..") for part in path.split("/"))


def _read_card(info: "DatasetInfo") -> list[Mapping[str, object]]:
    """The configurations that the card lists."""
    card: Mapping[str, object] = info.card_data.to_dict() if info.card_data else {}
    configs = card.get("configs")
    items = cast(list[object], configs) if isinstance(configs, list) else []
    return [cast(dict[str, object], item) for item in items if isinstance(item, dict)]


def _call(request: SourceRequest, operation: Callable[[], ReturnT]) -> ReturnT:
    """Call the Hub, with retries. Raises JobFailed that says what the caller can do."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    source, hint = request.config.source, RIGHTS_HINTS[request.config.rights]
    try:
        return retry_hub(operation)
    except GatedRepoError as error:
        message = f"{source} is gated: its owner lets only accounts read it that have accepted its terms"
        raise JobFailed("auth", message, "accept them on the Hub, and send an hf_token of that account") from error
    except RepositoryNotFoundError as error:
        raise JobFailed("auth", f"{source} does not exist, or may not be read", f"check the name; {hint}") from error
    except RevisionNotFoundError as error:
        raise JobFailed("invalid_data", f"{source} has no such revision", "name a branch, a tag or a commit") from error
    except OfflineModeIsEnabled as error:
        message = f"{source} cannot be read: this deployment is not connected to the Hub"
        raise JobFailed("invalid_config", message, "the operator has set HF_HUB_OFFLINE; send the files as an upload") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise JobFailed("internal", f"{source} cannot be read now: {reason[:200]}", "retry the job") from error

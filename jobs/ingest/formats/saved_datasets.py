"""Folders that Hugging Face `datasets` wrote with `save_to_disk`, and descriptions beside data: which files hold records, in which order.

A folder of one dataset has state.json, which names its Arrow files in order. A folder of several splits has dataset_dict.json and one
such folder for each. All splits are read, `train` first: which rows are held out is decided for all of them together.
"""

import json
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import NamedTuple, cast

from jobs.ingest.formats.parts import Part

STATE_FILE = "state.json"
SPLITS_FILE = "dataset_dict.json"
METADATA_FILES = {STATE_FILE, SPLITS_FILE, "dataset_info.json", "dataset_infos.json"}
DESCRIPTION_NAMES = {"readme", "license", "licence", "notice", "citation"}  # files about data, beside it
MAX_STATE_BYTES = 1 << 20


class Arrangement(NamedTuple):
    """The parts with records, in the order in which they are read."""

    parts: tuple[Part, ...]
    note: str = ""  # for people


def arrange_parts(parts: Sequence[Part]) -> Arrangement:
    """Leave out what only describes the data, and put the files of a saved dataset in order. Raises InvalidInput."""
    if len(parts) < 2:
        return Arrangement(tuple(parts))
    states = [part for part in parts if _get_name(part) == STATE_FILE]
    if states and any(part.suffix == ".arrow" for part in parts):
        return _arrange_saved(parts, states)
    data = tuple(part for part in parts if not _is_description(part))
    return Arrangement(data or tuple(parts))


def _arrange_saved(parts: Sequence[Part], states: list[Part]) -> Arrangement:
    folders = {PurePosixPath(state.name).parent: state for state in states}
    by_path = {PurePosixPath(part.name): part for part in parts}
    ordered: list[Part] = []
    for folder in _order_splits(folders, by_path):
        for file in _read_file_names(folders[folder]):
            if folder / file not in by_path:
                raise folders[folder].refuse(f"names {file}, which is missing", "send all files of the folder that save_to_disk wrote")
            ordered.append(by_path[folder / file])
    splits = [folder.name for folder in _order_splits(folders, by_path)]
    return Arrangement(tuple(ordered), f"the splits {', '.join(splits)} are read as one dataset" if len(splits) > 1 else "")


def _order_splits(folders: dict[PurePosixPath, Part], by_path: dict[PurePosixPath, Part]) -> list[PurePosixPath]:
    listed: list[str] = []
    for path, part in by_path.items():
        if path.name == SPLITS_FILE:
            listed = [str(name) for name in _read_list(part, "splits")]
            if missing := [name for name in listed if path.parent / name not in folders]:
                raise part.refuse(f"names the split {missing[0]}, which is missing", "send all files of the folder that save_to_disk wrote")
    return sorted(
        folders, key=lambda folder: (folder.name != "train", listed.index(folder.name) if folder.name in listed else -1, str(folder))
    )


def _read_file_names(state: Part) -> list[str]:
    files = [cast(dict[str, object], file).get("filename") for file in _read_list(state, "_data_files") if isinstance(file, dict)]
    return [name for name in files if isinstance(name, str)]


def _read_list(part: Part, key: str) -> list[object]:
    """The list under a key of a small JSON file. Raises InvalidInput."""
    with part.open() as stream:
        content = stream.read(MAX_STATE_BYTES)
    try:
        value = json.loads(content)[key]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise part.refuse(f"is not what save_to_disk writes: it has no list {key!r}", "save the dataset again") from error
    if not isinstance(value, list):
        raise part.refuse(f"is not what save_to_disk writes: {key!r} is not a list", "save the dataset again")
    return cast(list[object], value)


def _get_name(part: Part) -> str:
    return PurePosixPath(part.name).name


def _is_description(part: Part) -> bool:
    name = _get_name(part).lower()
    return name in METADATA_FILES or name.partition(".")[0] in DESCRIPTION_NAMES

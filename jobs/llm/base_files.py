"""The files of a base model that are used, checked and copied to a folder of the attempt.

A base model comes from strangers. Only files of known names reach the libraries: weights as safetensors, configs without the keys that
name code, the tokenizer, and the license. Large files are linked. No other file is opened: no pickle, no Python, nothing that a link
fetches from elsewhere on this machine.
"""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jobs.llm.remote_code import names_code, remove_code_keys
from jobs.runtime.errors import JobFailed

MEBIBYTE = 1 << 20
# The largest sizes that exist are about a tenth of these: Gemma's tokenizer.json has 33 MB, its tokenizer_config.json 1.1 MB.
MAX_BYTES = {
    "config.json": 1 * MEBIBYTE,
    "generation_config.json": 1 * MEBIBYTE,
    "preprocessor_config.json": 1 * MEBIBYTE,
    "processor_config.json": 1 * MEBIBYTE,
    "tokenizer_config.json": 16 * MEBIBYTE,
    "special_tokens_map.json": 4 * MEBIBYTE,
    "added_tokens.json": 16 * MEBIBYTE,
    "model.safetensors.index.json": 64 * MEBIBYTE,
    "chat_template.json": 1 * MEBIBYTE,
    "chat_template.jinja": 1 * MEBIBYTE,
    "tokenizer.json": 256 * MEBIBYTE,
    "tokenizer.model": 256 * MEBIBYTE,
    "spiece.model": 256 * MEBIBYTE,
    "sentencepiece.bpe.model": 256 * MEBIBYTE,
    "vocab.json": 64 * MEBIBYTE,
    "vocab.txt": 64 * MEBIBYTE,
    "merges.txt": 64 * MEBIBYTE,
    "README.md": 4 * MEBIBYTE,
}
MAX_TERMS_BYTES = 4 * MEBIBYTE
TERMS_PATTERN = re.compile(r"(LICENSE|LICENCE|NOTICE|USE_POLICY|[A-Z_-]{0,32}TERMS)[A-Za-z0-9._-]{0,64}", re.IGNORECASE)
WEIGHTS_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}\.safetensors")
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
PICKLES_HINT = "use a model with safetensors weights; pickled weights (.bin, .pt) are never loaded"
INDEX_FILE = "model.safetensors.index.json"
CONFIGS = ("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json", "tokenizer_config.json")
# What the Hub is asked for: the same names. `*/*` is ignored, so no pattern reaches into a folder.
DOWNLOAD_PATTERNS = ("*.safetensors", *MAX_BYTES, "LICENSE*", "LICENCE*", "NOTICE*", "*TERMS*", "USE_POLICY*")


def is_base_file(name: str) -> bool:
    """Whether a file of this name is used; `name` is relative to the model's folder."""
    return name in MAX_BYTES or WEIGHTS_PATTERN.fullmatch(name) is not None or TERMS_PATTERN.fullmatch(name) is not None


def copy_base_files(source: Path, target: Path, model: str, *, links_within: Path | None = None) -> Path:
    """Copy the files of a base model that are used to a fresh folder `target`, without what names code; returns `target`.

    Raises JobFailed for a base that has no safetensors weights, needs its own code, or has a file that cannot be what its name says. A
    link must lead to a file below `links_within`, or else below the folder itself. `model` names it in messages.
    """
    root = (links_within or source).resolve()
    base = _BaseFiles(source.resolve(), root, model)
    base.require_weights()
    shutil.rmtree(target, ignore_errors=True)  # of an earlier try
    target.mkdir(parents=True)
    contents: dict[str, dict[str, Any]] = {}
    for path in base.list_files():
        content = contents[path.name] = base.read_json(path) if path.suffix == ".json" else {}
        cleaned = clean_config(path.name, content) if path.name in CONFIGS else content
        if cleaned != content:
            (target / path.name).write_text(json.dumps(cleaned, indent=2) + "\n")
        else:
            (target / path.name).symlink_to(path.resolve())
    base.check_weights(contents.get(INDEX_FILE))
    base.check_needs_no_code(contents["config.json"])
    return target


class _BaseFiles:
    """A base model's folder, read with suspicion. Every method raises JobFailed."""

    def __init__(self, folder: Path, root: Path, model: str) -> None:
        self._folder, self._root, self._model = folder, root, model

    def require_weights(self) -> None:
        if not (self._folder / "config.json").is_file() or not any(self._folder.glob("*.safetensors")):
            raise self._make_failure("has no config.json or no safetensors weights", PICKLES_HINT)

    def list_files(self) -> Iterator[Path]:
        """The files that are used, each within its size limit and below the root."""
        for path in sorted(self._folder.iterdir()):
            name = path.name
            if not is_base_file(name):
                if name.endswith(".safetensors"):
                    raise self._make_failure(f"has a file of weights with an unusual name: {name[:80]!r}", "rename the model's files")
                continue
            try:
                resolved = path.resolve()
            except RuntimeError:  # a link that leads to itself
                resolved = path
            if not resolved.is_relative_to(self._root):
                raise self._make_failure(f"has a link that leaves its folder: {name}", "replace the link by the file")
            if not resolved.is_file():
                raise self._make_failure(f"has no regular file at {name}", "replace it by the file")
            limit = None if name.endswith(".safetensors") else MAX_BYTES.get(name, MAX_TERMS_BYTES)
            size_bytes = resolved.stat().st_size
            if limit is not None and size_bytes > limit:
                raise self._make_failure(f"has a {name} of {size_bytes} bytes; the limit is {limit}")
            yield path

    def read_json(self, path: Path) -> dict[str, Any]:
        try:
            content = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:  # RecursionError: nested too deeply
            raise self._make_failure(f"has a {path.name} that is not valid JSON, or is nested too deeply") from error
        if not isinstance(content, dict):
            raise self._make_failure(f"has a {path.name} that is not a JSON object")
        return content

    def check_weights(self, index: dict[str, Any] | None) -> None:
        """The header of each safetensors file describes bytes of that file, and the index names files of this folder."""
        for path in sorted(self._folder.glob("*.safetensors")):
            self._check_header(path)
        if index is None:
            if not (self._folder / "model.safetensors").is_file():
                raise self._make_failure(f"has neither model.safetensors nor {INDEX_FILE}", PICKLES_HINT)
            return
        weight_map = index.get("weight_map")
        names = set(weight_map.values()) if isinstance(weight_map, dict) and all(isinstance(n, str) for n in weight_map.values()) else None
        if not names:
            raise self._make_failure(f"has no weight_map of names in {INDEX_FILE}")
        for name in sorted(names):
            if not WEIGHTS_PATTERN.fullmatch(name) or not (self._folder / name).is_file():
                raise self._make_failure(f"has weights elsewhere than in its safetensors files: {INDEX_FILE} names {name[:80]!r}")

    def check_needs_no_code(self, config: dict[str, Any]) -> None:
        """A base whose config names code is used only where transformers knows its model type."""
        from transformers import CONFIG_MAPPING

        if config.get("model_type") not in CONFIG_MAPPING and names_code(config):
            message = f"needs code of its own repository, which is never run: transformers has no model type {config.get('model_type')!r}"
            raise self._make_failure(message)

    def _check_header(self, path: Path) -> None:
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(MAX_HEADER_BYTES, size_bytes - 8):
                raise self._make_failure(f"has a damaged {path.name}: its header does not fit into the file")
            try:
                header: object = json.loads(file.read(length))
            except (ValueError, RecursionError) as error:
                raise self._make_failure(f"has a damaged {path.name}: its header is not JSON") from error
        data_bytes = size_bytes - 8 - length
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"} if isinstance(header, dict) else None
        if entries is None or not all(_is_tensor_entry(entry, data_bytes) for entry in entries.values()):
            raise self._make_failure(f"has a damaged {path.name}: its header describes bytes that the file does not have")

    def _make_failure(self, problem: str, hint: str = "use another base_model_id") -> JobFailed:
        return JobFailed("invalid_config", f"{self._model} {problem}", hint)


def clean_config(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """A config without what names code; a tokenizer's also without paths, which transformers would open wherever they lead."""
    cleaned = remove_code_keys(config)
    if name == "tokenizer_config.json":
        cleaned = {key: value for key, value in cleaned.items() if not key.endswith("_file") and key != "name_or_path"}
    return cleaned


def _is_tensor_entry(entry: object, data_bytes: int) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str) or not isinstance(entry.get("shape"), list):
        return False
    offsets = entry.get("data_offsets")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int for n in [*offsets, *entry["shape"]]):
        return False
    return 0 <= offsets[0] <= offsets[1] <= data_bytes and all(size >= 0 for size in entry["shape"])

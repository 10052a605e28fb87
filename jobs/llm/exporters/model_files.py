"""The files of a model folder: which are published, and what is corrected in them."""

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jobs.llm.base_files import CONFIGS, clean_config

if TYPE_CHECKING:
    import torch

Precision = Literal["f32", "f16", "bf16"]  # llama.cpp's names

TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    TOKENIZER_CONFIG_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
# transformers writes these about the machine on which a tokenizer was loaded; they are removed.
LOCAL_ONLY_KEYS = ("vocab_file", "tokenizer_file", "name_or_path", "is_local", "local_files_only")
LICENSE_FILES = ("LICENSE", "LICENCE", "NOTICE", "GEMMA_TERMS", "USE_POLICY")
FIDELITY_FILE = "fidelity.json"
WEIGHTS_INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILES = ("config.json", "generation_config.json")
MODEL_FILES = (*CONFIG_FILES, WEIGHTS_INDEX_FILE)
# A vision model's image preprocessing, which training does not change.
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def copy_files(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copy those of the named files that exist to another folder, as hard links where possible; configs without what names code."""
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (source / name).is_file():
            link_or_copy(source / name, target / name)
        if name in CONFIGS and (target / name).is_file():
            content: dict[str, Any] = json.loads((target / name).read_text())  # Any: JSON
            cleaned = clean_config(name, content)
            if cleaned != content:
                write_json(target / name, cleaned)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer to another folder, without this machine's paths and without what names code in its config."""
    copy_files(source, target, TOKENIZER_FILES)
    settings: dict[str, Any] = json.loads((target / TOKENIZER_CONFIG_FILE).read_text())  # Any: JSON
    write_json(target / TOKENIZER_CONFIG_FILE, {name: value for name, value in settings.items() if name not in LOCAL_ONLY_KEYS})


def copy_license(source: Path, target: Path) -> None:
    """Copy the base model's license files: terms such as Gemma's must accompany every copy of the weights, tuned or not."""
    copy_files(source, target, [path.name for path in source.iterdir() if path.name.upper().startswith(LICENSE_FILES)])


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link `target` to `source`; copy where the file system cannot link. Replaces an existing target."""
    target.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def list_weight_files(folder: Path) -> list[str]:
    """The names of a folder's safetensors files, sorted."""
    return sorted(path.name for path in folder.glob("*.safetensors"))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file; removes an existing file first, which may be a hard link to the source's."""
    path.unlink(missing_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def set_generation_eos(folder: Path, stop_token_ids: Sequence[int]) -> None:
    """Add the tokens that end an answer to generation_config.json: a base model's config has only the end of a text."""
    path = folder / "generation_config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    existing = config.get("eos_token_id")
    eos_ids = [*(existing if isinstance(existing, list) else [existing]), *stop_token_ids]
    write_json(path, config | {"eos_token_id": list(dict.fromkeys(token for token in eos_ids if token is not None))})


def set_config_dtype(folder: Path, dtype: str) -> None:
    """Set every dtype in a model's config.json to the dtype of its written weights."""

    def with_dtype(part: Any) -> Any:  # JSON
        if not isinstance(part, dict):
            return part
        return {name: dtype if name in ("dtype", "torch_dtype") and value else with_dtype(value) for name, value in part.items()}

    path = folder / "config.json"
    write_json(path, with_dtype(json.loads(path.read_text())))


def read_precision(folder: Path) -> Precision:
    """The precision of a model's weights in llama.cpp's names. A mixture counts as f32."""
    from safetensors import safe_open

    dtypes: set[str] = set()
    for name in list_weight_files(folder):
        with safe_open(folder / name, framework="pt") as tensors:  # reads headers only
            dtypes |= {tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118  # not a dict
    return "f16" if dtypes == {"F16"} else "bf16" if dtypes == {"BF16"} else "f32"


def to_torch_dtype(precision: Precision) -> "torch.dtype":
    """The torch dtype of a precision."""
    import torch

    return {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[precision]


def measure_weights_bytes(folder: Path) -> int:
    """The size of a folder's safetensors files, in bytes."""
    return sum((folder / name).stat().st_size for name in list_weight_files(folder))

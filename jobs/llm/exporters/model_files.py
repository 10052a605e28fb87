"""The files of a model folder: which are handed back, and what is mended in them on the way."""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

Precision = Literal["f32", "f16", "bf16"]  # as llama.cpp writes it

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
# What transformers notes about the machine on which a tokenizer was loaded.
LOCAL_ONLY_KEYS = ("vocab_file", "tokenizer_file", "name_or_path", "is_local", "local_files_only")
LICENSE_FILES = ("LICENSE", "LICENCE", "NOTICE", "GEMMA_TERMS", "USE_POLICY")
FIDELITY_FILE = "fidelity.json"
WEIGHTS_INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILES = ("config.json", "generation_config.json")
MODEL_FILES = (*CONFIG_FILES, WEIGHTS_INDEX_FILE)
# How a vision model cuts images up: nothing of it is trained.
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
# A turn ends a chat model's answer as surely as the text's end does.
TURN_END_TOKENS = ("<end_of_turn>",)


def copy_files(source: Path, target: Path, names: Iterable[str]) -> None:
    """Bring the named files that exist into another folder; large ones share their bytes with the source."""
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (source / name).is_file():
            link_or_copy(source / name, target / name)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Bring a tokenizer into another folder, without where it came from on this machine."""
    copy_files(source, target, TOKENIZER_FILES)
    settings: dict[str, Any] = json.loads((source / TOKENIZER_CONFIG_FILE).read_text())  # Any: JSON
    write_json(target / TOKENIZER_CONFIG_FILE, {name: value for name, value in settings.items() if name not in LOCAL_ONLY_KEYS})


def copy_license(source: Path, target: Path) -> None:
    """Bring the base model's licence along: terms such as Gemma's must go with every copy of the weights, tuned or not."""
    copy_files(source, target, [path.name for path in source.iterdir() if path.name.upper().startswith(LICENSE_FILES)])


def link_or_copy(source: Path, target: Path) -> None:
    """The same bytes under a second name; copied where the file system cannot link."""
    target.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def list_weight_files(folder: Path) -> list[str]:
    """The names of a folder's safetensors files, in order."""
    return sorted(path.name for path in folder.glob("*.safetensors"))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a settings file anew; a link to someone else's file is cut first."""
    path.unlink(missing_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def set_generation_eos(folder: Path, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Let generation stop where an answer ends: the base's config knows only the end of a text."""
    path = folder / "generation_config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    known = config.get("eos_token_id")
    ends = [*(known if isinstance(known, list) else [known]), tokenizer.eos_token_id]
    ends += [tokenizer.get_vocab().get(token) for token in TURN_END_TOKENS]
    write_json(path, config | {"eos_token_id": list(dict.fromkeys(token for token in ends if token is not None))})


def set_config_dtype(folder: Path, dtype: str) -> None:
    """Let a model's settings name the precision that its weights have now."""

    def renamed(part: Any) -> Any:  # JSON
        if not isinstance(part, dict):
            return part
        return {name: dtype if name in ("dtype", "torch_dtype") and value else renamed(value) for name, value in part.items()}

    path = folder / "config.json"
    write_json(path, renamed(json.loads(path.read_text())))


def read_precision(folder: Path) -> Precision:
    """The precision of a model's weights, in llama.cpp's words: f32, f16 or bf16. A mixture counts as its widest."""
    from safetensors import safe_open

    found: set[str] = set()
    for name in list_weight_files(folder):
        with safe_open(folder / name, framework="pt") as tensors:  # reads headers only
            found |= {tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118  # no dict
    return "f16" if found == {"F16"} else "bf16" if found == {"BF16"} else "f32"


def to_torch_dtype(precision: Precision) -> "torch.dtype":
    """The precision as torch has it."""
    import torch

    return {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[precision]


def measure_weights_bytes(folder: Path) -> int:
    """The size of a folder's weights."""
    return sum((folder / name).stat().st_size for name in list_weight_files(folder))

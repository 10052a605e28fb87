"""Base models as the model store has them: the record beside a model's files, and what the files themselves tell.

pretrained_weights/huggingface/{name}/            config.json, safetensors, tokenizer, …; complete once config.json is there
pretrained_weights/huggingface/{name}/tunesmith-model.json    the record, which trainers never read
"""

import json
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Annotated, Literal, cast

from pydantic import Field, StringConstraints, ValidationError

from schema.base import ForwardCompatible
from schema.migrations import VersionedRecord

MODELS_PREFIX = "pretrained_weights/huggingface/"
MODEL_RECORD = "tunesmith-model.json"
COMPLETION_MARKER = "config.json"  # written last and deleted first: a folder that has it is complete
# What a tokenizer is loaded from. A model may have others, which no tokenizer reads.
TOKENIZER_FILES = frozenset(
    {
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
        *("chat_template.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model"),
        *("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"),
    }
)

MODEL_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?$"  # as the Hub writes it: owner/name
ModelName = Annotated[str, StringConstraints(pattern=MODEL_NAME_PATTERN)]

# hub: pulled from the Hugging Face Hub. folder: imported from a folder. package: built from a Python package. unknown: put there by hand.
ModelSource = Literal["hub", "folder", "package", "unknown"]

# One line adds a family: its name → how the architectures of its models end, as config.json names them.
MODEL_FAMILIES: dict[str, tuple[str, ...]] = {
    "llm": ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForSequenceClassification", "ForImageTextToText"),
}

CONFIG_FILE, README_FILE = "config.json", "README.md"
WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
LICENSE_FILE = re.compile(r"(LICENSE|LICENCE)(\.(md|txt))?", re.IGNORECASE)
TERMS_FILE = re.compile(r".*(LICENSE|LICENCE|TERMS).*", re.IGNORECASE)
MAX_CONFIG_BYTES = 1 << 20
MAX_INDEX_BYTES = 16 << 20  # the index of a model of 700 GB has 9 MB
MAX_HEADER_BYTES = 16 << 20  # the header of a file with 100,000 tensors has 12 MB
MAX_README_BYTES = 16 << 10  # the front matter is at its beginning
MAX_TEXT = 120  # characters of a text that comes from a model's files
# safetensors' names of the types that weights have: their usual names, and bytes of one value.
DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8", 1),
    "F8_E5M2": ("float8", 1),
}

ReadFile = Callable[[str, int], bytes]  # the first bytes of one of the model's files: its name, and how many at most


class ModelFile(ForwardCompatible):
    """One file of a model."""

    path: str  # relative to the model's folder
    size_bytes: int
    sha256: str | None = None  # None: put there by hand


class ModelRecord(VersionedRecord):
    """A base model: where it comes from, and what it is. None: its files do not tell."""

    schema_version: int = 1
    name: ModelName
    family: str = "unknown"  # a key of MODEL_FAMILIES
    source: ModelSource = "unknown"
    revision: str | None = None  # the commit on the Hub, or the version of the package
    precision: str | None = None  # of most weights: "bfloat16"; of a quantized model the method
    note: str = ""  # what a user should know, such as how the weights were made
    parameters: int | None = None
    size_bytes: int = 0
    license: str | None = None
    architecture: str | None = None
    files: tuple[ModelFile, ...] = Field(default=())
    imported_at: datetime | None = None

    def matches(self, sizes: Mapping[str, int]) -> bool:
        """Whether the record still describes the files that are stored, given their sizes by name."""
        return bool(self.files) and all(sizes.get(file.path) == file.size_bytes for file in self.files)


def model_prefix(name: str) -> str:
    """The folder of a model in the model store."""
    return f"{MODELS_PREFIX}{name}/"


def is_model_name(name: str) -> bool:
    """Whether a model can have that name."""
    return re.fullmatch(MODEL_NAME_PATTERN, name) is not None


def describe_model(name: str, sizes: Mapping[str, int], read: ReadFile) -> ModelRecord:
    """What a model's files tell of it; reads no more than some megabytes. `sizes` has the bytes of each file by its name."""
    config = _read_object(read, CONFIG_FILE, MAX_CONFIG_BYTES, sizes)
    architectures = config.get("architectures")
    named: object = cast(list[object], architectures)[0] if isinstance(architectures, list) and architectures else config.get("model_type")
    architecture = _clean(named)
    precision, parameters = _describe_weights(config, sizes, read)
    return ModelRecord(
        name=name,
        family=find_family(architecture),
        precision=precision,
        parameters=parameters,
        size_bytes=sum(size for path, size in sizes.items() if path != MODEL_RECORD),
        license=_find_license(sizes, read),
        architecture=architecture,
        files=tuple(ModelFile(path=path, size_bytes=size) for path, size in sorted(sizes.items()) if path != MODEL_RECORD),
    )


def read_model_record(content: bytes, name: str, sizes: Mapping[str, int]) -> ModelRecord | None:
    """The stored record of a model; None for one that cannot be read, or that does not describe these files."""
    try:
        record = ModelRecord.load(content)
    except (ValidationError, ValueError, RecursionError):
        return None
    return record if record.name == name and record.matches(sizes) else None


def find_family(architecture: str | None) -> str:
    """The family that trains models of an architecture."""
    return next((family for family, endings in MODEL_FAMILIES.items() if architecture and architecture.endswith(endings)), "unknown")


def _describe_weights(config: Mapping[str, object], sizes: Mapping[str, int], read: ReadFile) -> tuple[str | None, int | None]:
    """The precision of most weights, and the number of parameters."""
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict):
        method = _clean(cast(dict[str, object], quantization).get("quant_method"))
        return method or "quantized", None  # several weights share a stored value
    single = WEIGHTS_FILE in sizes
    shards = sorted(path for path in sizes if path.endswith(".safetensors"))
    if not shards:
        return _clean(config.get("dtype") or config.get("torch_dtype")), None
    counts = _count_values(read, WEIGHTS_FILE if single else shards[0])
    if not counts:
        return _clean(config.get("dtype") or config.get("torch_dtype")), None
    dtype = max(counts, key=lambda name: counts[name])
    precision, value_bytes = DTYPES.get(dtype, (dtype.lower(), 0))
    return precision, sum(counts.values()) if single else _count_sharded(read, sizes, value_bytes)


def _count_values(read: ReadFile, path: str) -> dict[str, int]:
    """How many values a safetensors file has of each type; empty for a file whose header cannot be read."""
    length = int.from_bytes(read(path, 8), "little")
    if not 0 < length <= MAX_HEADER_BYTES:
        return {}
    header = _parse_object(read(path, 8 + length)[8:])
    counts: dict[str, int] = {}
    for name, entry in header.items():
        if name == "__metadata__" or not isinstance(entry, dict):
            continue
        tensor = cast(dict[str, object], entry)
        dtype, shape = tensor.get("dtype"), tensor.get("shape")
        if isinstance(dtype, str) and isinstance(shape, list):
            counts[dtype[:MAX_TEXT]] = counts.get(dtype[:MAX_TEXT], 0) + _count_elements(cast(list[object], shape))
    return counts


def _count_elements(shape: list[object]) -> int:
    elements = 1
    for size in shape:
        elements *= size if type(size) is int and 0 <= size < 1 << 40 else 0
    return min(elements, 1 << 60)


def _count_sharded(read: ReadFile, sizes: Mapping[str, int], value_bytes: int) -> int | None:
    """The parameters of a model in several files, as its index tells: their number, or else their bytes."""
    metadata = _read_object(read, INDEX_FILE, MAX_INDEX_BYTES, sizes).get("metadata")
    totals: dict[str, object] = cast(dict[str, object], metadata) if isinstance(metadata, dict) else {}
    total, total_bytes = totals.get("total_parameters"), totals.get("total_size")
    if type(total) is int and 0 < total < 1 << 60:
        return total
    return total_bytes // value_bytes if type(total_bytes) is int and 0 < total_bytes < 1 << 60 and value_bytes else None


def _find_license(sizes: Mapping[str, int], read: ReadFile) -> str | None:
    """The license as README's front matter names it, or else the first line of the license file, or the name of a file of terms."""
    if README_FILE in sizes:
        front_matter = re.match(r"---\r?\n(.*?)\r?\n---", read(README_FILE, MAX_README_BYTES).decode(errors="replace"), re.DOTALL)
        fields = dict(re.findall(r"^(license|license_name):[ \t]*(\S.*?)[ \t\r]*$", front_matter[1], re.MULTILINE)) if front_matter else {}
        found = fields.get("license_name") if fields.get("license") == "other" else fields.get("license")
        if found or fields:
            return _clean((found or "other").strip("'\""))
    path = next((path for path in sorted(sizes) if LICENSE_FILE.fullmatch(path)), None)
    if path is None:
        return next((path for path in sorted(sizes) if TERMS_FILE.fullmatch(path)), None)
    lines = read(path, MAX_README_BYTES).decode(errors="replace").splitlines()
    return _clean(next((line.strip() for line in lines if line.strip()), "")) or path


def _read_object(read: ReadFile, path: str, max_bytes: int, sizes: Mapping[str, int]) -> dict[str, object]:
    """A JSON object of a file; empty for one that is missing, too large or not a JSON object."""
    return _parse_object(read(path, max_bytes)) if 0 < sizes.get(path, 0) <= max_bytes else {}


def _parse_object(content: bytes) -> dict[str, object]:
    try:
        parsed: object = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return cast(dict[str, object], parsed) if isinstance(parsed, dict) else {}


def _clean(text: object) -> str | None:
    """A text that a stranger wrote, on one short line."""
    return "".join(c for c in text if c.isprintable())[:MAX_TEXT] or None if isinstance(text, str) else None

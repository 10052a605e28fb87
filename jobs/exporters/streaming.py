"""Adds an adapter to its base tensor by tensor: never more than one tensor of the model in memory.

The arithmetic is peft's own. Its layers stand around a skeleton of the base that has no weights (`changes_of`); each tensor of the
base's files is read, put into the one layer that changes it, merged there in float32, written and forgotten (`stream`). What no
layer changes is copied as it lies in the file. The result is bit by bit what peft makes of the whole model at once.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from jobs.exporters.folders import INDEX, weights, write_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Kind = Literal["causal", "score", "image_text"]
AUTO_CLASSES: dict[Kind, str] = {
    "causal": "AutoModelForCausalLM",
    "score": "AutoModelForSequenceClassification",
    "image_text": "AutoModelForImageTextToText",
}

CHUNK_BYTES = 16 << 20  # of what is copied or rounded in one go
ADAPTER = "default"  # peft's name for the only one


class Unmergeable(Exception):
    """The adapter cannot be added to the files of its base; the message says why."""


class NotFinite(Exception):
    """A tensor holds what is no number; the message names it."""


class TooLarge(Exception):
    """A tensor holds numbers that the wanted precision does not have; the message names it."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: `kind` is safetensors' word for its type, such as BF16, and `start` counts from the file's beginning."""

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    size_bytes: int


@dataclass(frozen=True)
class Rows:
    """Some rows of a matrix, anew: the embeddings of a few tokens."""

    indices: tuple[int, ...]
    values: "torch.Tensor"  # (len(indices), width)


@dataclass(frozen=True)
class Changes:
    """What training did to the tensors of a base, by the names that these have in its files."""

    merged: "Mapping[str, Callable[[torch.Tensor], torch.Tensor]]" = field(default_factory=dict)  # from the base's tensor, in float32
    rows: Mapping[str, Rows] = field(default_factory=dict)
    replaced: "Mapping[str, torch.Tensor]" = field(default_factory=dict)  # also tensors that the base does not have

    @property
    def names(self) -> set[str]:
        """Every tensor that changes."""
        return {*self.merged, *self.rows, *self.replaced}


NOTHING = Changes()


@dataclass(frozen=True)
class Plan:
    """How one file is written."""

    dtype: "torch.dtype"
    changes: Changes
    naming: Callable[[str], str]
    added: Sequence[str]  # of what is replaced, that which the base does not have: written last


def stream(base: Path, target: Path, dtype: "torch.dtype", changes: Changes = NOTHING, naming: Callable[[str], str] = str) -> None:
    """Write the weights of a folder into another folder, changed on the way and in the given precision; file by file.

    They keep their names, unless `naming` gives them others. Raises NotFinite, TooLarge, Unmergeable.
    """
    target.mkdir(parents=True, exist_ok=True)
    files = {name: read_header(base / name) for name in weights(base)}
    known = {tensor.name for tensors in files.values() for tensor in tensors}
    if missing := sorted({*changes.merged, *changes.rows} - known):
        raise Unmergeable(f"the base's files have no {', '.join(missing[:3])}")
    added = sorted(changes.replaced.keys() - known)
    sizes: dict[str, dict[str, int]] = {}
    for name, tensors in files.items():
        plan = Plan(dtype, changes, naming, added if name == max(files) else [])
        sizes[name] = _write_file(base / name, tensors, target / name, plan)
    if (base / INDEX).is_file():
        weight_map = {tensor: name for name, within in sizes.items() for tensor in within}
        total = sum(size for within in sizes.values() for size in within.values())
        write_json(target / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def changes_of(base: Path, adapter: Path, kind: Kind) -> "tuple[Changes, PreTrainedModel]":
    """What a peft adapter does to its base, and the base's model without weights, shaped as the adapter needs it. Raises Unmergeable."""
    from peft import PeftConfig, PeftModel

    settings = PeftConfig.from_pretrained(str(adapter))
    if getattr(settings, "bias", "none") != "none" or getattr(settings, "lora_bias", False):
        raise Unmergeable("the adapter trains biases, which no merge here knows")
    model = skeleton(base, kind, labels_of(adapter))
    names = stored_names(model, [tensor.name for name in weights(base) for tensor in read_header(base / name)])
    adapted = PeftModel.from_pretrained(model, str(adapter), ADAPTER, low_cpu_mem_usage=True, torch_device="cpu").eval()
    return _gather(adapted.get_base_model(), names), model


def skeleton(base: Path, kind: Kind, labels: int | None = None) -> "PreTrainedModel":
    """The base's model with every layer in place, and with one zero for all the numbers of a weight.

    On the meta device, where such a model is built, peft would move the adapter as well and lose it.
    """
    import torch
    import transformers

    options = {} if labels is None else {"num_labels": labels}
    config = transformers.AutoConfig.from_pretrained(base, local_files_only=True, **options)
    with torch.device("meta"):
        model = getattr(transformers, AUTO_CLASSES[kind]).from_config(config).eval()
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(torch.zeros(()).expand(weight.shape), requires_grad=False))
    return model


def labels_of(adapter: Path) -> int | None:
    """How many scores a reward model's adapter gives; None for a model that speaks."""
    heads = [tensor for name in weights(adapter) for tensor in read_header(adapter / name) if tensor.name.endswith("score.weight")]
    return heads[0].shape[0] if heads else None


def stored_names(model: "PreTrainedModel", stored: Sequence[str]) -> dict[str, str]:
    """The name of each parameter -> the name it has in a checkpoint's files: transformers renames some while it loads them."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [change for change in get_model_conversion_mapping(model) if isinstance(change, WeightRenaming)]
    parameters = model.state_dict()
    return {rename_source_key(name, renamings, [], model.base_model_prefix, parameters)[0]: name for name in stored}


def read_header(path: Path) -> list[Stored]:
    """What a safetensors file holds, in the order in which it lies there: eight bytes of length, JSON, then the bytes of the tensors."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        listed: dict[str, Any] = json.loads(file.read(length))  # Any: JSON
    found = [
        Stored(
            name,
            told["dtype"],
            tuple(told["shape"]),
            8 + length + told["data_offsets"][0],
            told["data_offsets"][1] - told["data_offsets"][0],
        )
        for name, told in listed.items()
        if name != "__metadata__"
    ]
    return sorted(found, key=lambda tensor: tensor.start)


# --- what peft's layers do ---


def _gather(model: "PreTrainedModel", names: Mapping[str, str]) -> Changes:
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    merged: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
    rows: dict[str, Rows] = {}
    replaced: dict[str, torch.Tensor] = {}
    for name, layer in model.named_modules():
        weight = f"{name}.weight"
        if isinstance(layer, LoraLayer):
            merged[names.get(weight, weight)] = _merging(layer)
        elif isinstance(layer, TrainableTokensWrapper):
            if layer.token_adapter.tied_adapter is None or weight in names:
                rows[names.get(weight, weight)] = _rows(layer.token_adapter)
        elif isinstance(layer, ModulesToSaveWrapper):
            own = layer.modules_to_save[ADAPTER].state_dict()
            replaced |= {names.get(f"{name}.{part}", f"{name}.{part}"): tensor for part, tensor in own.items()}
    return Changes(merged, rows, replaced)


def _merging(layer: Any) -> "Callable[[torch.Tensor], torch.Tensor]":  # noqa: ANN401  # one of peft's kinds of layer
    import torch

    def merge(weight: "torch.Tensor") -> "torch.Tensor":
        base = layer.get_base_layer()
        empty = base.weight
        base.weight = torch.nn.Parameter(weight, requires_grad=False)
        layer.merge()  # not safe_merge, which looks for what is no number in a copy: that is done where it is written
        merged, base.weight = base.weight.data, empty
        return merged

    return merge


def _rows(layer: Any) -> Rows:  # noqa: ANN401  # peft's TrainableTokensLayer
    return Rows(tuple(layer.token_indices[ADAPTER]), layer.trainable_tokens_delta[ADAPTER].detach())


# --- the files ---


def _write_file(source: Path, tensors: Sequence[Stored], target: Path, plan: Plan) -> dict[str, int]:
    """Write one file; returns the bytes of each tensor in it."""
    replaced = plan.changes.replaced
    planned = [_planned(tensor, plan) for tensor in tensors]
    planned += [(plan.naming(name), _word(plan.dtype), tuple(replaced[name].shape)) for name in plan.added]
    header, sizes = _header(planned)
    with source.open("rb") as reader, target.open("wb") as writer:
        writer.write(header)
        for tensor in tensors:
            _write_tensor(reader, tensor, writer, plan)
        for name in plan.added:
            _write(writer, replaced[name], plan.dtype, name)
    return sizes


def _planned(tensor: Stored, plan: Plan) -> tuple[str, str, tuple[int, ...]]:
    replaced = plan.changes.replaced
    shape = tuple(replaced[tensor.name].shape) if tensor.name in replaced else tensor.shape
    return plan.naming(tensor.name), _word(plan.dtype) if tensor.kind in _floats() else tensor.kind, shape


def _header(planned: Sequence[tuple[str, str, tuple[int, ...]]]) -> tuple[bytes, dict[str, int]]:
    listed: dict[str, object] = {"__metadata__": {"format": "pt"}}
    sizes, offset = {}, 0
    for name, kind, shape in planned:
        sizes[name] = prod(shape) * _width(kind)
        listed[name] = {"dtype": kind, "shape": shape, "data_offsets": [offset, offset + sizes[name]]}
        offset += sizes[name]
    text = json.dumps(listed, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of eight, as readers that map the file want it
    return len(text).to_bytes(8, "little") + text, sizes


def _write_tensor(reader: BinaryIO, tensor: Stored, writer: BinaryIO, plan: Plan) -> None:
    import torch

    name, changes, dtype = tensor.name, plan.changes, plan.dtype
    if name in changes.replaced:
        _write(writer, changes.replaced[name], dtype, name)
    elif name in changes.merged:
        (weight,) = _pieces(reader, tensor, tensor.size_bytes)
        _write(writer, changes.merged[name](weight.to(torch.float32).reshape(tensor.shape)), dtype, name)
    else:
        begin = writer.tell()
        _copy(reader, tensor, writer, dtype)
        if name in changes.rows:
            _overwrite_rows(writer, begin, tensor, changes.rows[name], dtype)


def _copy(reader: BinaryIO, tensor: Stored, writer: BinaryIO, dtype: "torch.dtype") -> None:
    for piece in _pieces(reader, tensor, CHUNK_BYTES):
        if _floats().get(tensor.kind) in (None, dtype):  # as it lies there
            _write_bytes(writer, piece)
        else:
            _write(writer, piece, dtype, tensor.name)


def _overwrite_rows(writer: BinaryIO, begin: int, tensor: Stored, rows: Rows, dtype: "torch.dtype") -> None:
    end, row_bytes = writer.tell(), prod(tensor.shape[1:]) * dtype.itemsize
    for index, row in zip(rows.indices, rows.values, strict=True):
        writer.seek(begin + index * row_bytes)
        _write(writer, row, dtype, tensor.name)
    writer.seek(end)


def _pieces(reader: BinaryIO, tensor: Stored, size_bytes: int) -> "Iterator[torch.Tensor]":
    """The tensor's numbers in order, so many bytes at a time. Read, not mapped: a mapped file stays in memory until it is closed."""
    import torch

    reader.seek(tensor.start)
    left = tensor.size_bytes
    while left:
        buffer = bytearray(min(size_bytes, left))
        if reader.readinto(buffer) != len(buffer):  # pyright: ignore[reportAttributeAccessIssue]  # a buffered file has it
            raise Unmergeable(f"the base's file ends inside {tensor.name}")
        left -= len(buffer)
        yield torch.frombuffer(buffer, dtype=_floats().get(tensor.kind, torch.uint8))


def _write(writer: BinaryIO, tensor: "torch.Tensor", dtype: "torch.dtype", name: str) -> None:
    rounded = tensor.detach().to(dtype).contiguous()
    if not rounded.isfinite().all():
        raise TooLarge(name) if tensor.isfinite().all() else NotFinite(name)
    _write_bytes(writer, rounded)


def _write_bytes(writer: BinaryIO, tensor: "torch.Tensor") -> None:
    import torch

    writer.write(memoryview(tensor.flatten().view(torch.uint8).numpy()))


def _floats() -> "dict[str, torch.dtype]":
    """The kinds of number that are rounded on the way; counts and masks stay what they are."""
    import torch

    return {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _word(dtype: "torch.dtype") -> str:
    return {known: word for word, known in _floats().items()}[dtype]


def _width(kind: str) -> int:
    """Bytes of one number."""
    widths = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2}
    widths |= {"U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8}
    if kind not in widths:
        raise Unmergeable(f"the base has numbers of kind {kind}, which cannot be written here")
    return widths[kind]

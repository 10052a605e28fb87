"""Merges an adapter into its base tensor by tensor, with at most one tensor of the model in memory.

peft does the arithmetic. `load_adapter_delta` puts peft's layers around a base model without weights; `merge_tensors` reads each
tensor of the base's files, puts it into the layer that changes it, merges it there in float32 and writes it. Other tensors are copied
as they are. The result is bit-identical to peft merging the whole model at once.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from jobs.llm.exporters.expert_merge import collect_expert_merges
from jobs.llm.exporters.model_files import WEIGHTS_INDEX_FILE, list_weight_files, write_json
from jobs.llm.model_kinds import AUTO_CLASSES, ModelKind

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

CHUNK_BYTES = 16 << 20  # copied or rounded at a time
ADAPTER_NAME = "default"  # peft's name for a single adapter


class MergeError(Exception):
    """The adapter cannot be merged into the base's files; the message says why."""


class NotFinite(Exception):
    """A tensor holds NaN or infinity; the message is its name."""


class DtypeOverflow(Exception):
    """A tensor holds numbers too large for the target dtype; the message is its name."""


@dataclass(frozen=True)
class TensorHeader:
    """A tensor in a safetensors file: `dtype` in safetensors' names, such as BF16; `offset` in bytes from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


@dataclass(frozen=True)
class RowUpdate:
    """New values for some rows of a matrix: the embeddings of a few tokens."""

    indices: tuple[int, ...]
    values: "torch.Tensor"  # (len(indices), width)


@dataclass(frozen=True)
class AdapterDelta:
    """What training changed in the base's tensors, by their names in its files."""

    # Each takes the base's tensor in float32 and returns the merged one.
    merge_functions: "Mapping[str, Callable[[torch.Tensor], torch.Tensor]]" = field(default_factory=dict)
    row_updates: Mapping[str, RowUpdate] = field(default_factory=dict)
    replacements: "Mapping[str, torch.Tensor]" = field(default_factory=dict)  # may include tensors that the base does not have

    @property
    def changed_names(self) -> set[str]:
        """The names of all tensors that change."""
        return {*self.merge_functions, *self.row_updates, *self.replacements}


NO_CHANGES = AdapterDelta()


@dataclass(frozen=True)
class FileWritePlan:
    """How to write one file."""

    dtype: "torch.dtype"
    delta: AdapterDelta
    rename_tensor: Callable[[str], str]
    added_names: Sequence[str]  # replacements that the base does not have, written last


def merge_tensors(
    base: Path, target: Path, dtype: "torch.dtype", delta: AdapterDelta = NO_CHANGES, rename_tensor: Callable[[str], str] = str
) -> None:
    """Write a folder's weights to another folder, file by file, with the delta applied and in the given dtype.

    `rename_tensor` maps each name to the written one. Raises NotFinite, DtypeOverflow, MergeError.
    """
    target.mkdir(parents=True, exist_ok=True)
    files = {name: read_header(base / name) for name in list_weight_files(base)}
    known = {tensor.name for tensors in files.values() for tensor in tensors}
    if missing := sorted({*delta.merge_functions, *delta.row_updates} - known):
        raise MergeError(f"the base's files have no {', '.join(missing[:3])}")
    added_names = sorted(delta.replacements.keys() - known)
    sizes: dict[str, dict[str, int]] = {}
    for name, tensors in files.items():
        plan = FileWritePlan(dtype, delta, rename_tensor, added_names if name == max(files) else [])
        sizes[name] = _write_file(base / name, tensors, target / name, plan)
    if (base / WEIGHTS_INDEX_FILE).is_file():
        weight_map = {tensor: name for name, tensor_sizes in sizes.items() for tensor in tensor_sizes}
        total = sum(size for tensor_sizes in sizes.values() for size in tensor_sizes.values())
        write_json(target / WEIGHTS_INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def load_adapter_delta(base: Path, adapter: Path, model_kind: ModelKind) -> "tuple[AdapterDelta, PreTrainedModel]":
    """A peft adapter's changes to its base, and the base model without weights, with the adapter's head. Raises MergeError."""
    from peft import PeftConfig, PeftModel

    settings = PeftConfig.from_pretrained(str(adapter))
    if getattr(settings, "bias", "none") != "none" or getattr(settings, "lora_bias", False):
        raise MergeError("the adapter trains biases, which the merge does not support")
    model = make_weightless_model(base, model_kind, read_num_labels(adapter))
    names = map_to_checkpoint_names(model, [tensor.name for name in list_weight_files(base) for tensor in read_header(base / name)])
    adapted = PeftModel.from_pretrained(model, str(adapter), ADAPTER_NAME, low_cpu_mem_usage=True, torch_device="cpu").eval()
    return _collect_delta(adapted.get_base_model(), names), model


def make_weightless_model(base: Path, model_kind: ModelKind, num_labels: int | None = None) -> "PreTrainedModel":
    """The base's model with every layer, and each weight a single zero expanded to its shape.

    The weights cannot stay on the meta device: peft would move the adapter there too and lose its values.
    """
    import torch
    import transformers

    options = {} if num_labels is None else {"num_labels": num_labels}
    config = transformers.AutoConfig.from_pretrained(base, trust_remote_code=False, local_files_only=True, **options)
    with torch.device("meta"):
        model = getattr(transformers, AUTO_CLASSES[model_kind]).from_config(config).eval()
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(torch.zeros(()).expand(weight.shape), requires_grad=False))
    return model


def read_num_labels(adapter: Path) -> int | None:
    """The number of scores of a reward model's adapter; None for an adapter without a score head."""
    heads = [
        tensor for name in list_weight_files(adapter) for tensor in read_header(adapter / name) if tensor.name.endswith("score.weight")
    ]
    return heads[0].shape[0] if heads else None


def map_to_checkpoint_names(model: "PreTrainedModel", checkpoint_names: Sequence[str]) -> dict[str, str]:
    """Maps each parameter's name to its name in the checkpoint's files: transformers renames some while loading."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [change for change in get_model_conversion_mapping(model) if isinstance(change, WeightRenaming)]
    parameters = model.state_dict()
    return {rename_source_key(name, renamings, [], model.base_model_prefix, parameters)[0]: name for name in checkpoint_names}


def read_header(path: Path) -> list[TensorHeader]:
    """The tensors of a safetensors file, in file order. The file is eight bytes of length, a JSON header, then the tensors' bytes."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")  # `copy_base_files` checked that it fits into the file
        header: dict[str, Any] = json.loads(file.read(length))  # Any: JSON
    header.pop("__metadata__", None)
    tensors: list[TensorHeader] = []
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        tensors.append(TensorHeader(name, entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin))
    return sorted(tensors, key=lambda tensor: tensor.offset)


# --- the changes of peft's layers ---


def _collect_delta(model: "PreTrainedModel", names: Mapping[str, str]) -> AdapterDelta:
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    merge_functions = collect_expert_merges(model, names)
    row_updates: dict[str, RowUpdate] = {}
    replacements: dict[str, torch.Tensor] = {}
    for name, layer in model.named_modules():
        weight = f"{name}.weight"
        if isinstance(layer, ParamWrapper):
            continue
        if isinstance(layer, LoraLayer):
            merge_functions[names.get(weight, weight)] = _make_merge_function(layer)
        elif isinstance(layer, TrainableTokensWrapper):
            if layer.token_adapter.tied_adapter is None or weight in names:
                adapter = layer.token_adapter
                indices, values = tuple(adapter.token_indices[ADAPTER_NAME]), adapter.trainable_tokens_delta[ADAPTER_NAME].detach()
                row_updates[names.get(weight, weight)] = RowUpdate(indices, values)
        elif isinstance(layer, ModulesToSaveWrapper):
            trained = layer.modules_to_save[ADAPTER_NAME].state_dict()
            replacements |= {names.get(f"{name}.{part}", f"{name}.{part}"): tensor for part, tensor in trained.items()}
    return AdapterDelta(merge_functions, row_updates, replacements)


def _make_merge_function(layer: Any) -> "Callable[[torch.Tensor], torch.Tensor]":  # any LoRA layer of peft
    import torch

    def merge(weight: "torch.Tensor") -> "torch.Tensor":
        base = layer.get_base_layer()
        empty = base.weight
        base.weight = torch.nn.Parameter(weight, requires_grad=False)
        layer.merge()  # not safe_merge, which copies the weight to check for NaN: _write_rounded checks
        merged, base.weight = base.weight.data, empty
        return merged

    return merge


# --- writing files ---


def _write_file(source: Path, tensors: Sequence[TensorHeader], target: Path, plan: FileWritePlan) -> dict[str, int]:
    """Write one file; returns the size of each tensor in bytes."""
    replacements = plan.delta.replacements
    planned = [_plan_tensor(tensor, plan) for tensor in tensors]
    planned += [(plan.rename_tensor(name), _dtype_name(plan.dtype), tuple(replacements[name].shape)) for name in plan.added_names]
    header, sizes = _make_header(planned)
    with source.open("rb") as reader, target.open("wb") as writer:
        writer.write(header)
        for tensor in tensors:
            _write_tensor(reader, tensor, writer, plan)
        for name in plan.added_names:
            _write_rounded(writer, replacements[name], plan.dtype, name)
    return sizes


def _plan_tensor(tensor: TensorHeader, plan: FileWritePlan) -> tuple[str, str, tuple[int, ...]]:
    """The written tensor's name, dtype and shape."""
    replacements = plan.delta.replacements
    shape = tuple(replacements[tensor.name].shape) if tensor.name in replacements else tensor.shape
    return plan.rename_tensor(tensor.name), _dtype_name(plan.dtype) if tensor.dtype in _float_dtypes() else tensor.dtype, shape


def _make_header(planned: Sequence[tuple[str, str, tuple[int, ...]]]) -> tuple[bytes, dict[str, int]]:
    """A safetensors header for tensors of these names, dtypes and shapes, and the size of each in bytes."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    sizes, offset = {}, 0
    for name, dtype, shape in planned:
        sizes[name] = prod(shape) * _item_bytes(dtype)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + sizes[name]]}
        offset += sizes[name]
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of eight bytes, for readers that memory-map the file
    return len(text).to_bytes(8, "little") + text, sizes


def _write_tensor(reader: BinaryIO, tensor: TensorHeader, writer: BinaryIO, plan: FileWritePlan) -> None:
    import torch

    name, delta, dtype = tensor.name, plan.delta, plan.dtype
    if name in delta.replacements:
        _write_rounded(writer, delta.replacements[name], dtype, name)
    elif name in delta.merge_functions:
        (weight,) = _iter_chunks(reader, tensor, tensor.size_bytes)
        _write_rounded(writer, delta.merge_functions[name](weight.to(torch.float32).reshape(tensor.shape)), dtype, name)
    else:
        begin = writer.tell()
        _copy_tensor(reader, tensor, writer, dtype)
        if name in delta.row_updates:
            _overwrite_rows(writer, begin, tensor, delta.row_updates[name], dtype)


def _copy_tensor(reader: BinaryIO, tensor: TensorHeader, writer: BinaryIO, dtype: "torch.dtype") -> None:
    for chunk in _iter_chunks(reader, tensor, CHUNK_BYTES):
        if _float_dtypes().get(tensor.dtype) in (None, dtype):  # copied unchanged
            _write_bytes(writer, chunk)
        else:
            _write_rounded(writer, chunk, dtype, tensor.name)


def _overwrite_rows(writer: BinaryIO, begin: int, tensor: TensorHeader, rows: RowUpdate, dtype: "torch.dtype") -> None:
    end, row_bytes = writer.tell(), prod(tensor.shape[1:]) * dtype.itemsize
    for index, row in zip(rows.indices, rows.values, strict=True):
        writer.seek(begin + index * row_bytes)
        _write_rounded(writer, row, dtype, tensor.name)
    writer.seek(end)


def _iter_chunks(reader: BinaryIO, tensor: TensorHeader, chunk_bytes: int) -> "Iterator[torch.Tensor]":
    """The tensor's numbers in order, `chunk_bytes` at a time. Read, not memory-mapped: mapped pages stay in memory until closing."""
    import torch

    reader.seek(tensor.offset)
    bytes_left = tensor.size_bytes
    while bytes_left:
        buffer = bytearray(min(chunk_bytes, bytes_left))
        if reader.readinto(buffer) != len(buffer):  # pyright: ignore[reportAttributeAccessIssue]  # a buffered file has it
            raise MergeError(f"the base's file ends inside {tensor.name}")
        bytes_left -= len(buffer)
        yield torch.frombuffer(buffer, dtype=_float_dtypes().get(tensor.dtype, torch.uint8))


def _write_rounded(writer: BinaryIO, tensor: "torch.Tensor", dtype: "torch.dtype", name: str) -> None:
    rounded = tensor.detach().to(dtype).contiguous()
    if not rounded.isfinite().all():
        raise DtypeOverflow(name) if tensor.isfinite().all() else NotFinite(name)
    _write_bytes(writer, rounded)


def _write_bytes(writer: BinaryIO, tensor: "torch.Tensor") -> None:
    import torch

    writer.write(memoryview(tensor.flatten().view(torch.uint8).numpy()))


def _float_dtypes() -> "dict[str, torch.dtype]":
    """The dtypes that are converted; integers and booleans are copied."""
    import torch

    return {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _dtype_name(dtype: "torch.dtype") -> str:
    return {dtype: name for name, dtype in _float_dtypes().items()}[dtype]


def _item_bytes(dtype: str) -> int:
    """The size of one number in bytes."""
    widths = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2}
    widths |= {"U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8}
    if dtype not in widths:
        raise MergeError(f"the base has tensors of dtype {dtype}, which the merge does not support")
    return widths[dtype]

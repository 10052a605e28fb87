"""The vision part of a multimodal model as a GGUF file: llama.cpp loads it beside the language part (--mmproj)."""

import json
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.llm.exporters.model_files import (
    CONFIG_FILES,
    PROCESSOR_FILES,
    copy_files,
    copy_tokenizer,
    list_weight_files,
    read_precision,
    to_torch_dtype,
)
from jobs.llm.exporters.tensor_merge import merge_tensors, read_header
from jobs.llm.llama_cpp.gguf_reader import count_weights
from jobs.llm.llama_cpp.runner import convert
from jobs.runtime.artifacts import ExportedArtifact
from jobs.runtime.errors import JobFailed
from jobs.runtime.subprocesses import SubprocessFailed

if TYPE_CHECKING:
    from jobs.llm.exporters.workspace import ExportWorkspace


def has_vision_tower(model_folder: Path) -> bool:
    """Whether a model folder has a vision part, trained or not."""
    return "vision_config" in json.loads((model_folder / "config.json").read_text())


def export_mmproj(workspace: "ExportWorkspace", model_folder: Path, staging: Path) -> list[ExportedArtifact]:
    """Write the vision part; empty, with a warning, where llama.cpp's converter does not support the model.

    The file is not run on an image: this checks only that it holds every weight of the model's vision part. Raises JobFailed.
    """
    precision = read_precision(model_folder)
    path = workspace.path(f"{workspace.model_name}-mmproj-{precision}.gguf")
    tensors = [tensor for name in list_weight_files(model_folder) for tensor in read_header(model_folder / name)]
    if any(_to_legacy_name(tensor.name) != tensor.name for tensor in tensors):
        staging = workspace.path("staging-vision")
        merge_tensors(model_folder, staging, to_torch_dtype(precision), rename_tensor=_to_legacy_name)
        copy_files(model_folder, staging, [*CONFIG_FILES, *PROCESSOR_FILES])
        copy_tokenizer(model_folder, staging)
    try:
        convert(staging, path, precision=precision, name=workspace.model_name, mmproj=True)
    except SubprocessFailed as error:
        message = f"llama.cpp's converter cannot write the vision part of this model; only the language part was exported: {error}"
        workspace.context.warn("mmproj_not_exported", message)
        return []
    written = count_weights(path)
    expected = sum(prod(tensor.shape) for tensor in tensors if "vision_tower." in tensor.name or "multi_modal_projector." in tensor.name)
    if written != expected:
        message = f"{path.name} has {written} weights, and the model's vision part has {expected}"
        raise JobFailed("export_failed", message, "leave include_gguf out; please report this with the job's log")
    return [ExportedArtifact(name="gguf-mmproj", kind="gguf", path=path, key=workspace.key("gguf", path.name))]


def _to_legacy_name(name: str) -> str:
    """The tensor name before transformers 5, which removed a level from Gemma's vision tower; llama.cpp's converter expects it."""
    tower, inner = "vision_tower.", "vision_tower.vision_model."
    return name.replace(tower, inner, 1) if name.startswith(tower) and not name.startswith(inner) else name

"""Turns a trained model into the artifacts that the job publishes: adapter, merged model, GGUF and ONNX files, each verified.

This folder has one file per kind of artifact, and what they share. Code that trains does not belong here, nor code that knows
the object store (`jobs/runtime/artifacts.py`) or llama.cpp's interface (`jobs/llm/llama_cpp/`).

    workspace.py     what the exporters of one attempt share: a folder, the merged model, the tokenizer
    model_files.py   the files of a model folder: which are published, and which are corrected
    merge.py         adapter + base -> merged model, verified against the two
    tensor_merge.py  the merge itself, tensor by tensor
    log_probs.py     the passages on which models are compared, and a model's log probabilities on them
    verify.py        runs a GGUF file, measures its fidelity, and accepts or rejects it
    staging.py, imatrix.py, mmproj.py  steps of the GGUF exporters
    usage.py         the files beside a GGUF file: Ollama's Modelfile, llama.cpp's command line, the measured fidelity
    adapter.py, merged.py, onnx.py, gguf.py, lora_gguf.py  the exporters
"""

from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING

from jobs.llm.llama_cpp import LLAMA_CPP_FOLDER, find_program
from jobs.runtime.errors import JobFailed
from schema.training import TrainingConfig
from schema.types import ArtifactKind

if TYPE_CHECKING:
    from jobs.llm.trained_model import TrainedModel
    from jobs.runtime.context import JobContext
    from jobs.runtime.family import FinalizeArtifacts
    from schema.job import Artifact
    from schema.provenance import RunRecord

# One line adds an exporter: kind -> "module:function". The function takes an ExportWorkspace and returns verified artifacts.
EXPORTERS: dict[ArtifactKind, str] = {
    "adapter": "jobs.llm.exporters.adapter:export",
    "merged": "jobs.llm.exporters.merged:export",
    "onnx": "jobs.llm.exporters.onnx:export",
    "gguf": "jobs.llm.exporters.gguf:export",
    "lora_gguf": "jobs.llm.exporters.lora_gguf:export",
}


def export_all(trained: "TrainedModel", context: "JobContext", finalize: "FinalizeArtifacts | None" = None) -> "tuple[Artifact, ...]":
    """Make, verify and upload every requested artifact. Raises JobFailed `export_failed`, `upload_failed`, and Stopped.

    The upload starts when every artifact is verified, and nothing is visible before the service accepts the result. `finalize`
    takes the exported artifacts, whose files still exist, the uploaded ones, and a function that renders the model card; it returns
    the artifacts of the result.
    """
    from jobs.llm.exporters.workspace import ExportWorkspace
    from jobs.llm.model_card import model_card, read_license
    from jobs.runtime.artifacts import upload_artifacts

    def render_model_card(record: "RunRecord", repo_id: str) -> str:
        return model_card(record, repo_id, read_license(trained.base_folder))

    check_exportable(context.spec.training_config)
    workspace = ExportWorkspace(trained, context)
    try:
        exporters = [resolve_name(EXPORTERS[kind]) for kind in list_requested_kinds(context.spec.training_config)]
        exported = [artifact for export in exporters for artifact in export(workspace)]
        artifacts = upload_artifacts(exported, context)
        return finalize(exported, artifacts, render_model_card) if finalize else artifacts
    finally:
        workspace.clear()


def list_requested_kinds(training_config: TrainingConfig) -> tuple[ArtifactKind, ...]:
    """The artifact kinds that a training config requests, in the order in which they are made."""
    export = training_config.export_config
    kinds: list[ArtifactKind] = list(training_config.export_formats)
    if export.include_gguf:
        kinds.append("gguf")
    if export.include_lora_gguf:
        kinds.append("lora_gguf")
    return tuple(kinds)


def check_exportable(training_config: TrainingConfig, base_folder: Path | None = None, llama_cpp_folder: Path = LLAMA_CPP_FOLDER) -> None:
    """Raise JobFailed for an export that is impossible in this environment. Called before training.

    `base_folder` is given once the base is downloaded: some exports have a size limit.
    """
    if base_folder is not None and "onnx" in training_config.export_formats:
        from jobs.llm.exporters.onnx import check_model_size

        check_model_size(base_folder)
    export = training_config.export_config
    if export.gguf_imatrix and find_program("llama-imatrix", llama_cpp_folder) is None:
        hint = "leave gguf_imatrix out, or install the program with infra/llama_cpp.sh and the trainer's python"
        raise JobFailed("invalid_config", "gguf_imatrix needs llama.cpp's llama-imatrix, which is not installed", hint)

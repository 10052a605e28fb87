"""Turns a trained model into what the job hands back: adapter, merged model, GGUF files; verified, then published.

Here belongs one file per kind of artifact, and what they share: the bench. Here belongs nothing that trains, and nothing
that knows a store (`jobs/runtime/artifacts.py`) or llama.cpp's interface (`jobs/llm/llama_cpp/`).

    bench.py      what the exporters of one attempt share: the whole model, made once, and how it speaks
    folders.py    which files of a model folder are worth handing back, and what must be mended in them
    merge.py      adapter + base -> a whole model, checked against the two
    streaming.py  the sum itself, tensor by tensor
    speech.py     the passages on which models are compared, and a model's log probabilities on them
    examiner.py   hears a GGUF file out, and decides whether it may go out
    howto.py      how to run a GGUF file: Ollama's Modelfile, llama.cpp's command line
    adapter.py, merged.py, onnx.py, gguf.py, lora_gguf.py  the exporters
"""

from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING

from jobs.llm.llama_cpp import LLAMA_CPP_FOLDER, find_program
from jobs.runtime.errors import JobFailed
from schema.job import ArtifactKind
from schema.training import TrainingConfig

if TYPE_CHECKING:
    from jobs.llm.trained_model import TrainedModel
    from jobs.runtime.context import JobContext
    from jobs.runtime.family import FinalizeArtifacts
    from schema.job import Artifact
    from schema.provenance import RunRecord

# One line adds an exporter: kind -> "module:function", called with a Bench, answering finished and verified products.
EXPORTERS: dict[ArtifactKind, str] = {
    "adapter": "jobs.llm.exporters.adapter:export",
    "merged": "jobs.llm.exporters.merged:export",
    "onnx": "jobs.llm.exporters.onnx:export",
    "gguf": "jobs.llm.exporters.gguf:export",
    "lora_gguf": "jobs.llm.exporters.lora_gguf:export",
}


def export_all(trained: "TrainedModel", context: "JobContext", finalize: "FinalizeArtifacts | None" = None) -> "tuple[Artifact, ...]":
    """Make, verify and upload everything that the job asked for. Raises JobFailed `export_failed`, `upload_failed`.

    Nothing is uploaded before everything is verified, and nothing is visible before the service has accepted the result. `finalize`
    gets the exported files while they still exist, and the uploaded artifacts.
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
        products = [product for export in exporters for product in export(workspace)]
        products += workspace.usage_artifacts()
        artifacts = upload_artifacts(products, context)
        return finalize(products, artifacts, render_model_card) if finalize else artifacts
    finally:
        workspace.clear()


def list_requested_kinds(training_config: TrainingConfig) -> tuple[ArtifactKind, ...]:
    """What a training config asks for."""
    export = training_config.export_config
    wanted: list[ArtifactKind] = list(training_config.export_formats)
    if export.include_gguf:
        wanted.append("gguf")
    if export.include_lora_gguf:
        wanted.append("lora_gguf")
    return tuple(wanted)


def check_exportable(training_config: TrainingConfig, base_folder: Path | None = None, llama_cpp_folder: Path = LLAMA_CPP_FOLDER) -> None:
    """Raises JobFailed for an export that cannot be made here, whatever is trained: to be asked before the training.

    `base` is the base's folder, once there is one: some exports are for small models. `programs` is where llama.cpp's are.
    """
    if base_folder is not None and "onnx" in training_config.export_formats:
        from jobs.llm.exporters.onnx import check_model_size

        check_model_size(base_folder)
    export = training_config.export_config
    if export.gguf_imatrix and find_program("llama-imatrix", llama_cpp_folder) is None:
        hint = "leave gguf_imatrix out, or run infra/llama_cpp.sh with the trainer's python"
        raise JobFailed("invalid_config", "gguf_imatrix needs llama.cpp's llama-imatrix, which is not installed here", hint)

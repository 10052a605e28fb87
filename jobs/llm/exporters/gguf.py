"""GGUF files for llama.cpp and Ollama: converted once, quantized for each requested name, each verified before it is uploaded.

merged model ── staging folder ── llama.cpp's converter ── one file in the model's own precision
training rows ── llama-imatrix ── importance matrix ──┐
                                                      llama.cpp's quantizer ── one file per quantization
"""

from pathlib import Path
from typing import TYPE_CHECKING

from jobs.llm.exporters.conversion import convert_model
from jobs.llm.exporters.imatrix import IMATRIX_QUANTIZATIONS, make_imatrix
from jobs.llm.exporters.merge import list_finer_precisions
from jobs.llm.exporters.mmproj import export_mmproj, has_vision_tower
from jobs.llm.exporters.model_files import link_or_copy, read_precision
from jobs.llm.exporters.staging import make_staging_folder
from jobs.llm.exporters.usage import write_usage
from jobs.llm.exporters.verify import ExportedFile, GgufVerifier
from jobs.llm.llama_cpp.runner import quantize
from jobs.runtime.artifacts import ExportedArtifact
from jobs.runtime.errors import JobFailed
from jobs.runtime.subprocesses import SubprocessFailed
from schema.types import ArtifactKind

if TYPE_CHECKING:
    from jobs.llm.exporters.workspace import ExportWorkspace


def export(workspace: "ExportWorkspace") -> tuple[ExportedArtifact, ...]:
    """One artifact for each quantization, in the requested order. Raises JobFailed `export_failed`."""
    model_folder = workspace.merged_model.folder  # merging enters its own phase, so it comes before "converting"
    workspace.context.enter_phase("converting")
    try:
        candidates = _write_files(workspace, model_folder)
    except SubprocessFailed as error:
        hint = "the attempt's log has the program's output"
        raise JobFailed("export_failed", f"the GGUF files could not be written: {error}", hint) from error
    workspace.context.enter_phase("verifying")
    verifier = GgufVerifier(workspace)
    artifacts: list[ExportedArtifact] = []
    for candidate in candidates:
        workspace.context.check_stop()
        artifacts.append(verify_file(workspace, verifier, candidate, f"gguf-{candidate.quantization}", "gguf"))
    if has_vision_tower(model_folder):
        artifacts += export_mmproj(workspace, model_folder, workspace.path("staging"))
    return tuple(artifacts)


def verify_file(
    workspace: "ExportWorkspace", verifier: GgufVerifier, candidate: ExportedFile, name: str, kind: ArtifactKind
) -> ExportedArtifact:
    """The artifact of a file that llama.cpp runs as trained, with the files that say how to run it. Raises JobFailed."""
    path, fidelity = candidate.path, verifier.verify(candidate).model_dump(mode="json")
    companions = write_usage(workspace, candidate, verifier.sample_prompt, fidelity)
    return ExportedArtifact(name, kind, path, workspace.key(kind, path.name), fidelity, companions=companions)


def _write_files(workspace: "ExportWorkspace", model_folder: Path) -> list[ExportedFile]:
    """One file for each quantization, in the requested order. Raises SubprocessFailed, JobFailed."""
    import torch

    precision, trained, threads = read_precision(model_folder), workspace.trained, torch.get_num_threads()
    converted = workspace.path(f"converted-{precision}.gguf")
    tokenizers = [trained.folder, trained.base_folder]
    staging = make_staging_folder(model_folder, model_folder, tokenizers, workspace.path("staging"))
    convert_model(workspace, staging, converted, precision)
    imatrix = make_imatrix(workspace, converted)
    candidates: list[ExportedFile] = []
    for quantization in workspace.export_config.gguf_quantizations:
        workspace.context.check_stop()
        path = workspace.gguf_path(quantization)
        own_imatrix = imatrix if quantization in IMATRIX_QUANTIZATIONS else None
        if quantization in ("none", precision):
            link_or_copy(converted, path)
        elif not path.is_file():  # make_imatrix may have written q8_0 already
            quantize(converted, path, file_type=quantization, threads=threads, imatrix=own_imatrix)
        too_coarse = quantization in ("bf16", "f16") and precision in list_finer_precisions(quantization)[1:]
        candidates.append(ExportedFile(path, quantization, imatrix=own_imatrix is not None, too_coarse=too_coarse))
    converted.unlink()
    return candidates

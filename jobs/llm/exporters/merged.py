"""Exports the merged model as a Hugging Face folder: safetensors, tokenizer, chat template, generation settings."""

from typing import TYPE_CHECKING

from jobs.llm.exporters.model_files import FIDELITY_FILE, write_json
from jobs.llm.exporters.verify import make_fidelity
from jobs.runtime.artifacts import ExportedArtifact

if TYPE_CHECKING:
    from jobs.llm.exporters.workspace import ExportWorkspace


def export(workspace: "ExportWorkspace") -> tuple[ExportedArtifact, ...]:
    """The merged model's folder; with its fidelity to the trained model where it was merged or rounded."""
    model = workspace.merged_model
    comparison = model.reference_log_probs and model.reference_log_probs.comparison
    fidelity = make_fidelity(comparison).model_dump(mode="json") if comparison else None
    if fidelity is not None:
        write_json(model.folder / FIDELITY_FILE, {"merged": fidelity})
    workspace.check_tokenizer(model.folder, "the merged model")
    return (ExportedArtifact(name="merged", kind="merged", path=model.folder, key=workspace.key("merged"), fidelity=fidelity),)

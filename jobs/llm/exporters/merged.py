"""The whole model as a Hugging Face folder: safetensors, tokenizer, chat template, generation settings."""

from typing import TYPE_CHECKING

from jobs.llm.exporters.model_files import FIDELITY_FILE, write_json
from jobs.llm.exporters.verify import make_fidelity
from jobs.runtime.artifacts import ExportedArtifact

if TYPE_CHECKING:
    from jobs.llm.exporters.workspace import ExportWorkspace


def export(workspace: "ExportWorkspace") -> tuple[ExportedArtifact, ...]:
    """The folder of the whole model; with how near it is to base and adapter, when it was merged from these."""
    whole = workspace.merged_model
    found = whole.reference_log_probs and whole.reference_log_probs.comparison
    fidelity = make_fidelity(found) if found else None
    if fidelity is not None:
        write_json(whole.folder / FIDELITY_FILE, {"merged": fidelity.model_dump(mode="json")})
    return (ExportedArtifact(name="merged", kind="merged", path=whole.folder, key=workspace.key("merged"), fidelity=fidelity),)

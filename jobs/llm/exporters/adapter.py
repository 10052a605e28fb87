"""Exports the LoRA adapter: its weights, its config and the tokenizer that it was trained with."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.llm.exporters.merge import DIVERGED_HINT
from jobs.llm.exporters.model_files import PROCESSOR_FILES, copy_files, copy_license, copy_tokenizer, write_json
from jobs.runtime.artifacts import ExportedArtifact
from jobs.runtime.errors import JobFailed

if TYPE_CHECKING:
    from jobs.llm.exporters.workspace import ExportWorkspace

ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"


def export(workspace: "ExportWorkspace") -> tuple[ExportedArtifact, ...]:
    """The adapter's folder without the trainer's own files. Raises JobFailed `export_failed` for weights that are not finite."""
    workspace.context.enter_phase("verifying")
    source, folder = workspace.trained.folder, workspace.path("adapter")
    _check_finite(source / ADAPTER_WEIGHTS_FILE)
    copy_files(source, folder, [ADAPTER_WEIGHTS_FILE, *PROCESSOR_FILES])
    copy_tokenizer(source, folder)
    copy_license(workspace.trained.base_folder, folder)
    workspace.check_tokenizer(folder, "the adapter")
    # The config names the trainer's local folder; the published adapter must name the model on the Hub.
    settings = json.loads((source / ADAPTER_CONFIG_FILE).read_text())
    base_model_id = workspace.context.spec.training_config.base_model_id
    write_json(folder / ADAPTER_CONFIG_FILE, settings | {"base_model_name_or_path": base_model_id})
    # In a repository on the Hub, a merged model takes the root.
    hub_folder = "adapter/" if "merged" in workspace.context.spec.training_config.export_formats else ""
    return (ExportedArtifact(name="adapter", kind="adapter", path=folder, key=workspace.key("adapter"), hub_folder=hub_folder),)


def _check_finite(weights: Path) -> None:
    import torch
    from safetensors import safe_open

    with safe_open(weights, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118  # not a dict
            if not torch.isfinite(tensors.get_tensor(name)).all():
                raise JobFailed("export_failed", f"the adapter's weights are not finite, {name} among them", DIVERGED_HINT)

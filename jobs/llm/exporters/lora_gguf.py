"""Exports the adapter alone as GGUF, for users who have the base's GGUF file: small, and verified with the base.

llama.cpp applies an adapter to the layers' matrices only. Such a file cannot hold trained embeddings of single tokens, which a base
without turn tokens needs to learn to chat: with the head tied to the embeddings, llama.cpp cannot apply them. The file is then published
with a warning, and its fidelity measures the difference.
"""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.llm.exporters.adapter import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE
from jobs.llm.exporters.conversion import convert_model
from jobs.llm.exporters.gguf import verify_file
from jobs.llm.exporters.model_files import read_precision, write_json
from jobs.llm.exporters.staging import make_staging_folder
from jobs.llm.exporters.verify import ExportedFile, GgufVerifier
from jobs.llm.llama_cpp.runner import convert_lora
from jobs.runtime.artifacts import ExportedArtifact
from jobs.runtime.errors import JobFailed
from jobs.runtime.subprocesses import SubprocessFailed

if TYPE_CHECKING:
    from jobs.llm.exporters.workspace import ExportWorkspace

ARTIFACT_NAME = "lora-gguf"
INCLUDE_GGUF_HINT = "use include_gguf: a full GGUF model holds every trained weight"
TRAINABLE_TOKENS_SUFFIX = ".token_adapter.trainable_tokens_delta"
LORA_WEIGHT_SUFFIXES = (".lora_A.weight", ".lora_B.weight")


def export(workspace: "ExportWorkspace") -> tuple[ExportedArtifact, ...]:
    """One file, in float16. Raises JobFailed `export_failed`."""
    trained = workspace.trained
    _ = workspace.merged_model  # merging enters its own phase, so it comes before "converting"
    workspace.context.enter_phase("converting")
    base = workspace.path(f"{workspace.model_name}-base.gguf")
    path = workspace.path(f"{workspace.model_name}-lora-f16.gguf")
    adapter, missing_weights = stage_adapter(trained.folder, workspace.path("adapter-staging"))
    try:
        staging = make_staging_folder(
            trained.base_folder,
            trained.folder,
            [trained.folder, trained.base_folder],
            workspace.path("base-staging"),
        )
        convert_model(workspace, staging, base, read_precision(trained.base_folder))
        convert_lora(adapter, staging, path)
    except SubprocessFailed as error:
        raise JobFailed("export_failed", f"the adapter could not be written as GGUF: {error}", INCLUDE_GGUF_HINT) from error
    workspace.context.enter_phase("verifying")
    verifier, candidate = GgufVerifier(workspace), ExportedFile(path, "f16", base=base, missing_weights=missing_weights)
    artifact = verify_file(workspace, verifier, candidate, ARTIFACT_NAME, "lora_gguf")
    base.unlink()
    return (artifact,)


def stage_adapter(adapter: Path, staging: Path) -> tuple[Path, str]:
    """Copy an adapter for llama.cpp's converter; returns the copy and, in words, the weights that it lacks. Raises JobFailed.

    llama.cpp scales by alpha / rank; a rank-stabilized adapter scales by alpha / sqrt(rank), so the copy gets another alpha.
    """
    from safetensors.torch import load_file, save_file

    staging.mkdir(parents=True)
    settings: dict[str, Any] = json.loads((adapter / ADAPTER_CONFIG_FILE).read_text())  # Any: JSON
    tensors = load_file(adapter / ADAPTER_WEIGHTS_FILE)
    matrices = {name: tensor for name, tensor in tensors.items() if name.endswith(LORA_WEIGHT_SUFFIXES)}
    rows = [tensor for name, tensor in tensors.items() if name.endswith(TRAINABLE_TOKENS_SUFFIX)]
    if len(matrices) + len(rows) < len(tensors) or settings.get("rank_pattern") or settings.get("alpha_pattern"):
        raise JobFailed(
            "export_failed", "the adapter has weights besides low-rank matrices, which a GGUF adapter cannot hold", INCLUDE_GGUF_HINT
        )
    if settings.get("use_rslora"):
        settings |= {"lora_alpha": settings["lora_alpha"] * math.sqrt(settings["r"]), "use_rslora": False}
    save_file(matrices, staging / ADAPTER_WEIGHTS_FILE)
    write_json(staging / ADAPTER_CONFIG_FILE, settings)
    count = sum(len(tensor) for tensor in rows)
    return staging, f"the trained embeddings of {count} tokens" if count else ""

"""The adapter alone as GGUF, for those who have the base's file already: small, and heard beside the base before it goes out.

llama.cpp adds an adapter to matrices of the layers. The embeddings of single tokens, which are trained when a base without turns
learns to chat, are in no such file: with the head tied to the embeddings llama.cpp cannot add to them. Then the file goes out with
a warning, and its fidelity says how far it is.
"""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.llm.exporters.adapter import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE
from jobs.llm.exporters.model_files import read_precision, write_json
from jobs.llm.exporters.staging import make_staging_folder
from jobs.llm.exporters.usage import record_fidelity, write_usage
from jobs.llm.exporters.verify import ExportedFile, GgufVerifier
from jobs.llm.llama_cpp.runner import convert, convert_lora
from jobs.runtime.artifacts import ExportedArtifact
from jobs.runtime.errors import JobFailed
from jobs.runtime.subprocesses import SubprocessFailed

if TYPE_CHECKING:
    from jobs.llm.exporters.workspace import ExportWorkspace

ARTIFACT_NAME = "lora-gguf"
INCLUDE_GGUF_HINT = "use include_gguf: a whole model holds everything that was trained"
TRAINABLE_TOKENS_SUFFIX = ".token_adapter.trainable_tokens_delta"
LORA_WEIGHT_SUFFIXES = (".lora_A.weight", ".lora_B.weight")


def export(workspace: "ExportWorkspace") -> tuple[ExportedArtifact, ...]:
    """One file, in float16. Raises JobFailed `export_failed`."""
    trained = workspace.trained
    _ = workspace.merged_model  # before the phase: making it is one of its own
    workspace.context.enter_phase("converting")
    base = workspace.path(f"{workspace.model_name}-base.gguf")
    path = workspace.path(f"{workspace.model_name}-lora-f16.gguf")
    adapter, lacks = stage_adapter(trained.folder, workspace.path("adapter-staging"))
    try:
        staging = make_staging_folder(
            trained.base_folder, trained.folder, [trained.folder, trained.base_folder], workspace.path("base-staging")
        )
        convert(staging, base, precision=read_precision(trained.base_folder), name=workspace.model_name)
        convert_lora(adapter, staging, path)
    except SubprocessFailed as error:
        raise JobFailed("export_failed", f"the adapter could not be written as GGUF: {error}", INCLUDE_GGUF_HINT) from error
    workspace.context.enter_phase("verifying")
    examiner, candidate = GgufVerifier(workspace), ExportedFile(path, "f16", base=base, missing_weights=lacks)
    product = ExportedArtifact(
        name=ARTIFACT_NAME, kind="lora_gguf", path=path, key=workspace.key("lora_gguf", path.name), fidelity=examiner.verify(candidate)
    )
    write_usage(workspace, candidate, examiner.sample_prompt)
    record_fidelity(workspace, [product])
    base.unlink()
    return (product,)


def stage_adapter(adapter: Path, staging: Path) -> tuple[Path, str]:
    """A copy of an adapter as llama.cpp's converter wants it, and what of it is not in the copy, in words. Raises JobFailed.

    llama.cpp scales by alpha / rank; a rank-stabilised adapter, whose scale is alpha / sqrt(rank), gets another alpha for it.
    """
    from safetensors.torch import load_file, save_file

    staging.mkdir(parents=True)
    settings: dict[str, Any] = json.loads((adapter / ADAPTER_CONFIG_FILE).read_text())  # Any: JSON
    tensors = load_file(adapter / ADAPTER_WEIGHTS_FILE)
    kept = {name: tensor for name, tensor in tensors.items() if name.endswith(LORA_WEIGHT_SUFFIXES)}
    rows = [tensor for name, tensor in tensors.items() if name.endswith(TRAINABLE_TOKENS_SUFFIX)]
    if len(kept) + len(rows) < len(tensors) or settings.get("rank_pattern") or settings.get("alpha_pattern"):
        raise JobFailed("export_failed", "the adapter holds more than matrices of low rank, and its GGUF file could not", INCLUDE_GGUF_HINT)
    if settings.get("use_rslora"):
        settings |= {"lora_alpha": settings["lora_alpha"] * math.sqrt(settings["r"]), "use_rslora": False}
    save_file(kept, staging / ADAPTER_WEIGHTS_FILE)
    write_json(staging / ADAPTER_CONFIG_FILE, settings)
    count = sum(len(tensor) for tensor in rows)
    return staging, f"the embeddings of {count} tokens that were trained as well" if count else ""

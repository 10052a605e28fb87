"""The whole model for ONNX Runtime: one graph from token ids to logits, in float32, heard through ONNX Runtime before it goes out.

Made by transformers' own exporter, for small models: tracing one takes five times its weights in memory, and minutes. The graph reads a
whole sequence at once and keeps nothing between two calls: for scoring texts and for short answers, not for long ones.
"""

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.llm.exporters.model_files import (
    CONFIG_FILES,
    FIDELITY_FILE,
    copy_files,
    copy_license,
    copy_tokenizer,
    list_weight_files,
    write_json,
)
from jobs.llm.exporters.onnx_process import OnnxEvalRequest
from jobs.llm.exporters.tensor_merge import read_header
from jobs.llm.exporters.verify import MAX_LOSSLESS_KL_NATS, MIN_LOSSLESS_AGREEMENT, is_within_tolerance, make_fidelity
from jobs.llm.llama_cpp.fidelity import Comparison
from jobs.runtime.artifacts import ExportedArtifact
from jobs.runtime.errors import JobFailed
from jobs.runtime.subprocesses import SubprocessFailed, exchange_json, run_module

if TYPE_CHECKING:
    from jobs.llm.exporters.workspace import ExportWorkspace

MAX_PARAMETERS = 1_500_000_000  # 6 GB of float32, and 30 while it is traced
OTHER_FORMATS_HINT = "use export format merged, or include_gguf"
ONNX_MODULE = "jobs.llm.exporters.onnx_process"


def check_model_size(base_folder: Path) -> None:
    """Raises JobFailed for a base that is too large to be traced: to be asked before the training."""
    parameters = sum(prod(tensor.shape) for name in list_weight_files(base_folder) for tensor in read_header(base_folder / name))
    if parameters > MAX_PARAMETERS:
        limit = f"export format onnx is for models of up to {MAX_PARAMETERS / 1e9:g} billion parameters"
        raise JobFailed("invalid_config", f"{limit}, and this one has {parameters / 1e9:.1f}", OTHER_FORMATS_HINT)


def export(workspace: "ExportWorkspace") -> tuple[ExportedArtifact, ...]:
    """The folder of the graph, its weights and the tokenizer. Raises JobFailed `export_failed`."""
    check_model_size(workspace.trained.base_folder)
    whole, folder = workspace.merged_model, workspace.path("onnx")
    if workspace.model_kind != "causal" or whole.reference_log_probs is None:
        raise JobFailed("invalid_config", "export format onnx is for models of text that speak", OTHER_FORMATS_HINT)
    workspace.context.enter_phase("converting")
    try:
        run_module("onnx", ONNX_MODULE, "export", whole.folder, folder)
        workspace.context.enter_phase("verifying")
        request = OnnxEvalRequest(graph_folder=str(folder), **whole.reference_log_probs.request_fields())
        found = exchange_json("onnx", ONNX_MODULE, request, Comparison, workspace.folder, ["evaluate"])
    except SubprocessFailed as error:
        raise JobFailed("export_failed", f"no ONNX file could be made: {error}", "the log of the attempt has all that it said") from error
    if not is_within_tolerance(found):
        message = (
            f"the ONNX file does not speak like the trained model: they agree on {found.argmax_agreement:.1%} of {found.positions} tokens "
            f"(at least {MIN_LOSSLESS_AGREEMENT:.0%}), mean KL {found.mean_kl_to_trained:.4f} nats (at most {MAX_LOSSLESS_KL_NATS})"
        )
        raise JobFailed("export_failed", message, OTHER_FORMATS_HINT)
    copy_files(whole.folder, folder, CONFIG_FILES)
    copy_tokenizer(whole.folder, folder)
    copy_license(whole.folder, folder)
    fidelity = make_fidelity(found)
    write_json(folder / FIDELITY_FILE, {"onnx": fidelity.model_dump(mode="json")})
    return (ExportedArtifact(name="onnx", kind="onnx", path=folder, key=workspace.key("onnx"), fidelity=fidelity),)

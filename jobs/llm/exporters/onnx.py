"""Exports the model for ONNX Runtime: one graph from token ids to logits, in float32, verified with ONNX Runtime.

transformers' own exporter makes it, for small models: tracing takes five times the weights in memory, and minutes. The graph reads a
whole sequence and has no key-value cache: it suits scoring and short answers, not long generations.
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
from schema.estimate.llm import ONNX_MAX_PARAMETERS

if TYPE_CHECKING:
    from jobs.llm.exporters.workspace import ExportWorkspace

OTHER_FORMATS_HINT = "use export format merged, or include_gguf"
ONNX_MODULE = "jobs.llm.exporters.onnx_process"


def check_model_size(base_folder: Path) -> None:
    """Raise JobFailed for a base that is too large to trace. Called before training."""
    parameters = sum(prod(tensor.shape) for name in list_weight_files(base_folder) for tensor in read_header(base_folder / name))
    if parameters > ONNX_MAX_PARAMETERS:
        limit = f"export format onnx supports models of up to {ONNX_MAX_PARAMETERS / 1e9:g} billion parameters"
        raise JobFailed("invalid_config", f"{limit}, and this one has {parameters / 1e9:.1f}", OTHER_FORMATS_HINT)


def export(workspace: "ExportWorkspace") -> tuple[ExportedArtifact, ...]:
    """The folder of the graph, its weights and the tokenizer. Raises JobFailed `export_failed`."""
    check_model_size(workspace.trained.base_folder)
    model, folder = workspace.merged_model, workspace.path("onnx")
    if workspace.model_kind != "causal" or model.reference_log_probs is None:
        hint = "use export format merged" if workspace.model_kind == "score" else OTHER_FORMATS_HINT
        raise JobFailed("invalid_config", "export format onnx supports only models that generate text from text", hint)
    workspace.context.enter_phase("converting")
    try:
        run_module("onnx", ONNX_MODULE, "export", model.folder, folder)
        workspace.context.enter_phase("verifying")
        request = OnnxEvalRequest(graph_folder=str(folder), **model.reference_log_probs.request_fields())
        comparison = exchange_json("onnx", ONNX_MODULE, request, Comparison, workspace.folder, ["evaluate"])
    except SubprocessFailed as error:
        raise JobFailed(
            "export_failed", f"the ONNX graph could not be made: {error}", "the attempt's log has the program's output"
        ) from error
    if not is_within_tolerance(comparison):
        message = (
            f"the ONNX graph's predictions differ from the trained model's: they agree on {comparison.argmax_agreement:.1%} of "
            f"{comparison.positions} tokens "
            f"(at least {MIN_LOSSLESS_AGREEMENT:.0%}), mean KL {comparison.mean_kl_to_trained:.4f} nats (at most {MAX_LOSSLESS_KL_NATS})"
        )
        raise JobFailed("export_failed", message, OTHER_FORMATS_HINT)
    copy_files(model.folder, folder, CONFIG_FILES)
    copy_tokenizer(model.folder, folder)
    copy_license(model.folder, folder)
    workspace.check_tokenizer(folder, "the ONNX model")
    fidelity = make_fidelity(comparison).model_dump(mode="json")
    write_json(folder / FIDELITY_FILE, {"onnx": fidelity})
    return (ExportedArtifact(name="onnx", kind="onnx", path=folder, key=workspace.key("onnx"), fidelity=fidelity, hub_folder="onnx/"),)

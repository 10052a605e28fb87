"""`python -m jobs.llm.exporters.onnx_process export MODEL TARGET`, and `… evaluate REQUEST RESPONSE`.

Each runs in a child process, which frees its memory at the end and may crash in native code. Exit code 0 means that the output is written.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.llm.llama_cpp.fidelity import ComparisonRequest, Passage, compare_with_files

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

GRAPH_FILE = "model.onnx"
TRACE_SHAPE = (2, 8)  # rows and tokens of the input for tracing; both are dynamic in the graph


class OnnxEvalRequest(ComparisonRequest):
    """The graph to evaluate, and what to compare it with."""

    graph_folder: str


def export_onnx(model: Path, target: Path) -> None:
    """Trace the model in a folder into a graph with its weights in a second file."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.exporters import OnnxConfig, OnnxExporter

    loaded = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, trust_remote_code=False, use_safetensors=True, local_files_only=True
    ).eval()
    loaded.config.use_cache = False
    ids = torch.arange(TRACE_SHAPE[0] * TRACE_SHAPE[1]).reshape(TRACE_SHAPE)
    sample: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    OnnxExporter().export(loaded, sample, OnnxConfig(dynamic=True)).save_pretrained(target)


def evaluate_onnx(request_path: Path, response_path: Path) -> None:
    """Run the graph on the passages and compare its logits with the trained model's log probabilities."""
    request = OnnxEvalRequest.load(request_path.read_bytes())
    rows = _iter_logits(Path(request.graph_folder) / GRAPH_FILE, request.passages)
    response_path.write_text(compare_with_files(rows, request).model_dump_json())


def _iter_logits(graph: Path, passages: list[Passage]) -> "Iterator[NDArray[np.float32]]":
    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    for passage in passages:
        ids = np.array([passage.ids], dtype=np.int64)
        (logits,) = session.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids)})
        yield from logits[0][len(passage.ids) - passage.compared_tokens :]


if __name__ == "__main__":
    program, *paths = sys.argv[1:]
    {"export": export_onnx, "evaluate": evaluate_onnx}[program](*map(Path, paths))

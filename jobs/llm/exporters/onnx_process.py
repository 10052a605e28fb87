"""`python -m jobs.llm.exporters.onnx_process write MODEL TARGET`, and `… hear TARGET QUESTION ANSWER`: in processes of their own, for what
they take in memory, and because native code may crash. Each exits 0 only when it has written what it was asked for.
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
TRACE_SHAPE = (2, 8)  # rows and tokens of what the graph is traced with; both may be others afterwards


class OnnxEvalRequest(ComparisonRequest):
    """Which graph to compare."""

    graph_folder: str


def export_onnx(model: Path, target: Path) -> None:
    """Trace a model folder into a graph with its weights beside it."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.exporters import OnnxConfig, OnnxExporter

    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, local_files_only=True).eval()
    whole.config.use_cache = False
    ids = torch.arange(TRACE_SHAPE[0] * TRACE_SHAPE[1]).reshape(TRACE_SHAPE)
    sample: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    OnnxExporter().export(whole, sample, OnnxConfig(dynamic=True)).save_pretrained(target)


def evaluate_onnx(request_path: Path, response_path: Path) -> None:
    """Let ONNX Runtime read the passages, and compare what it says with what the trained model said."""
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

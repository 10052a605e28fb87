"""The importance matrix: which weights the training rows use most, so that the quantizer rounds those more precisely."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.llm.llama_cpp import find_program
from jobs.llm.llama_cpp.runner import compute_imatrix, quantize
from jobs.runtime.errors import JobFailed
from jobs.runtime.subprocesses import SubprocessFailed
from schema.training.llm_export import GgufQuantization

if TYPE_CHECKING:
    from jobs.llm.exporters.workspace import ExportWorkspace

# The quantizations whose rounding llama.cpp weights; q8_0 loses too little precision to benefit.
IMATRIX_QUANTIZATIONS: tuple[GgufQuantization, ...] = ("q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q3_k_m", "q2_k")
# Reading 2048 tokens takes Gemma 270M 10 s on two cores, and a mean of squares over them is stable.
CALIBRATION_TOKENS = 2048
CHUNK_TOKENS = 256
MIN_CHUNK_TOKENS = 16
RETOKENIZED_FRACTION = 0.9  # decoding the rows and tokenizing the text again may give fewer tokens


def make_imatrix(workspace: "ExportWorkspace", converted: Path) -> Path | None:
    """Compute the importance matrix of a converted GGUF file; None when it is not used, with the reason logged.

    Raises JobFailed where the request asks for a matrix and llama-imatrix fails.
    """
    requested, context = workspace.export_config.gguf_imatrix, workspace.context
    eligible = [name for name in workspace.export_config.gguf_quantizations if name in IMATRIX_QUANTIZATIONS]
    text, chunk_tokens = _make_calibration_text(workspace)
    reason = _imatrix_skipped_reason(requested, eligible, chunk_tokens)
    if reason:
        if requested:
            context.warn("imatrix_skipped", f"the files were quantized without an importance matrix: {reason}")
        elif eligible:
            context.log_decision("gguf_imatrix", "false", reason)
        return None
    context.log_decision(
        "gguf_imatrix", "true", f"it improves {', '.join(eligible)}" if requested is None else "the request sets gguf_imatrix"
    )
    try:
        return _run_imatrix(workspace, converted, text, chunk_tokens)
    except SubprocessFailed as error:
        if requested:
            raise JobFailed("export_failed", f"the importance matrix could not be computed: {error}", "leave gguf_imatrix out") from error
        context.warn("imatrix_skipped", f"the files were quantized without an importance matrix: {error}")
        return None


def _imatrix_skipped_reason(requested: bool | None, eligible: Sequence[str], chunk_tokens: int) -> str:
    """Why no matrix is computed; empty when one is."""
    if requested is False:
        return "the request sets gguf_imatrix to false"
    if not eligible:
        return f"it improves none of the requested quantizations, only {', '.join(IMATRIX_QUANTIZATIONS)}"
    if find_program("llama-imatrix") is None:
        return "llama.cpp's llama-imatrix is not installed; infra/llama_cpp.sh builds it"
    return "" if chunk_tokens >= MIN_CHUNK_TOKENS else "the training rows have too little text"


def _make_calibration_text(workspace: "ExportWorkspace") -> tuple[str, int]:
    """Training rows as text, and the chunk length in tokens: llama-imatrix needs at least two chunks."""
    texts, count = [], 0
    for ids in workspace.trained.calibration:
        texts.append(str(workspace.tokenizer.decode(list(ids[: CALIBRATION_TOKENS - count]))))
        count += len(ids)
        if count >= CALIBRATION_TOKENS:
            break
    return "\n".join(texts), min(CHUNK_TOKENS, int(min(count, CALIBRATION_TOKENS) * RETOKENIZED_FRACTION) // 2)


def _run_imatrix(workspace: "ExportWorkspace", converted: Path, text: str, chunk_tokens: int) -> Path:
    """Run the model over the text at q8_0: three times as fast as bf16, and the means stay the same."""
    import torch

    threads, q8_path, text_path = torch.get_num_threads(), workspace.gguf_path("q8_0"), workspace.path("calibration.txt")
    text_path.write_text(text)
    quantize(converted, q8_path, file_type="q8_0", threads=threads)
    workspace.context.check_stop()
    compute_imatrix(q8_path, text_path, workspace.path("imatrix.gguf"), chunk_tokens=chunk_tokens, threads=threads)
    if "q8_0" not in workspace.export_config.gguf_quantizations:
        q8_path.unlink()
    return workspace.path("imatrix.gguf")

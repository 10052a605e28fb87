"""Starts llama.cpp's programs, each in a process of its own, and waits for them."""

import sys
from pathlib import Path
from typing import Literal

from jobs.llm.llama_cpp import find_program, get_converter_path
from jobs.llm.llama_cpp.evaluate import EvalRequest, EvalResponse
from jobs.runtime.subprocesses import SubprocessFailed, exchange_json, run_module, run_program


def convert(model_folder: Path, target: Path, *, precision: Literal["f32", "f16", "bf16"], name: str, mmproj: bool = False) -> None:
    """Write a Hugging Face model folder as one GGUF file, with llama.cpp's own converter; `sees`: its vision part alone.

    Raises ProgramFailed.
    """
    options = ["--outtype", precision, "--outfile", str(target), "--model-name", name, *(["--mmproj"] if mmproj else [])]
    _require_tool(get_converter_path())
    run_module("convert", "jobs.llm.llama_cpp.convert", model_folder, *options)


def convert_lora(adapter: Path, base: Path, target: Path) -> None:
    """Write a LoRA adapter as GGUF in float16; of the base only the settings are read. Raises ProgramFailed."""
    options = ["--base", str(base), "--outtype", "f16", "--outfile", str(target)]
    run_program("convert", [sys.executable, str(_require_tool(get_converter_path("lora"))), *options, str(adapter)])


def compute_imatrix(model: Path, text: Path, target: Path, *, chunk_tokens: int, threads: int) -> None:
    """Read a text with a model, and keep how much each input of each matrix matters. Raises ProgramFailed."""
    tool = find_program("llama-imatrix")
    if tool is None:
        raise SubprocessFailed("llama-imatrix is not installed; infra/llama_cpp.sh builds it")
    # A batch of one chunk: the logits of every position are computed, and a row of Gemma's is 1 MB.
    sizes = [word for option in ("-c", "-b", "-ub") for word in (option, str(chunk_tokens))]
    options = ["-o", str(target), "--no-ppl", "--parse-special", "-ngl", "0", "-t", str(threads), *sizes]
    run_program("imatrix", [str(tool), "-m", str(model), "-f", str(text), *options])


def quantize(source: Path, target: Path, *, file_type: str, threads: int, imatrix: Path | None = None) -> None:
    """Write a GGUF file in another precision, rounded with care for what an importance matrix says. Raises ProgramFailed."""
    run_module("quantize", "jobs.llm.llama_cpp.quantize", source, target, file_type, str(threads), *([imatrix] if imatrix else []))


def evaluate(request: EvalRequest, workdir: Path) -> EvalResponse:
    """Ask a GGUF file. Raises ProgramFailed."""
    return exchange_json("evaluate", "jobs.llm.llama_cpp.evaluate", request, EvalResponse, workdir)


def _require_tool(script: Path) -> Path:
    if not script.is_file():
        raise SubprocessFailed(f"llama.cpp's converter is not installed at {script}")
    return script

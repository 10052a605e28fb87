"""Runs llama.cpp's programs, each in a child process. Every function raises SubprocessFailed when its program fails."""

from pathlib import Path
from typing import Literal

from jobs.llm.llama_cpp import find_program, get_converter_path
from jobs.llm.llama_cpp.draft_head import list_draft_head_options
from jobs.llm.llama_cpp.evaluate import EvalRequest, EvalResponse
from jobs.llm.llama_cpp.vocabulary import NO_SETTINGS, VocabularyReport, VocabularyRequest, VocabularySettings, VocabularyTexts
from jobs.runtime.subprocesses import SubprocessFailed, exchange_json, run_module, run_program

CONVERT_MODULE = "jobs.llm.llama_cpp.convert"


def convert(
    model_folder: Path,
    target: Path,
    *,
    precision: Literal["f32", "f16", "bf16"],
    name: str,
    mmproj: bool = False,
    vocabulary: VocabularySettings = NO_SETTINGS,
) -> None:
    """Convert a Hugging Face model folder to one GGUF file; `mmproj` converts only its vision part."""
    options = ["--outtype", precision, "--outfile", str(target), "--model-name", name, *(["--mmproj"] if mmproj else [])]
    options += [] if mmproj else list_draft_head_options(model_folder)
    _require_script(get_converter_path())
    run_module("convert", CONVERT_MODULE, "hf", model_folder, *options, *vocabulary.options())


def convert_vocabulary(model_folder: Path, target: Path, vocabulary: VocabularySettings = NO_SETTINGS) -> None:
    """Convert only the tokenizer of a model folder; of the weights, the headers are read."""
    options = ["--outfile", str(target), "--vocab-only", *list_draft_head_options(model_folder)]
    _require_script(get_converter_path())
    run_module("convert", CONVERT_MODULE, "hf", model_folder, *options, *vocabulary.options())


def read_vocabulary(path: Path, asked: VocabularyTexts, workdir: Path) -> VocabularyReport:
    """Tokenize with a GGUF file's vocabulary."""
    request = VocabularyRequest(model_path=str(path), **asked.model_dump())
    return exchange_json("vocabulary", "jobs.llm.llama_cpp.vocabulary", request, VocabularyReport, workdir)


def convert_lora(adapter: Path, base: Path, target: Path) -> None:
    """Convert a LoRA adapter to GGUF in float16; of the base only the config is read."""
    options = ["--base", str(base), "--outtype", "f16", "--outfile", str(target)]
    _require_script(get_converter_path("lora"))
    run_module("convert", CONVERT_MODULE, "lora", *options, adapter)


def compute_imatrix(model: Path, text: Path, target: Path, *, chunk_tokens: int, threads: int) -> None:
    """Compute the importance matrix of a GGUF model on a text."""
    program = find_program("llama-imatrix")
    if program is None:
        raise SubprocessFailed("llama-imatrix is not installed; infra/llama_cpp.sh builds it")
    # One chunk per batch: llama-imatrix computes logits at every position, 1 MB each for Gemma.
    sizes = [argument for option in ("-c", "-b", "-ub") for argument in (option, str(chunk_tokens))]
    options = ["-o", str(target), "--no-ppl", "--parse-special", "-ngl", "0", "-t", str(threads), *sizes]
    run_program("imatrix", [str(program), "-m", str(model), "-f", str(text), *options])


def quantize(source: Path, target: Path, *, file_type: str, threads: int, imatrix: Path | None = None) -> None:
    """Quantize a GGUF file, weighted by an importance matrix where given."""
    run_module("quantize", "jobs.llm.llama_cpp.quantize", source, target, file_type, str(threads), *([imatrix] if imatrix else []))


def evaluate(request: EvalRequest, workdir: Path) -> EvalResponse:
    """Evaluate a GGUF file."""
    return exchange_json("evaluate", "jobs.llm.llama_cpp.evaluate", request, EvalResponse, workdir)


def _require_script(script: Path) -> None:
    if not script.is_file():
        raise SubprocessFailed(f"llama.cpp's converter is not installed at {script}")

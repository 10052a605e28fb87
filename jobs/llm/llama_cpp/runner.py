"""Starts llama.cpp's programs, each in a process of its own, and waits for them.

A wait that is interrupted, by a cancel or anything else, kills the process: `subprocess.run` does so for every exception.
"""

import logging
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jobs
from jobs.llm.llama_cpp import find_program, get_converter_path
from jobs.llm.llama_cpp.evaluate import EvalRequest, EvalResponse

log = logging.getLogger(__name__)

REPOSITORY = Path(jobs.__file__).parent.parent  # where `-m jobs...` is found, whatever the attempt's own folder
MAX_MESSAGE_CHARACTERS = 300  # of what a program said last


class SubprocessFailed(Exception):
    """A program crashed or refused; the message holds how it ended and its last line."""


def convert(model_folder: Path, target: Path, *, precision: Literal["f32", "f16", "bf16"], name: str, mmproj: bool = False) -> None:
    """Write a Hugging Face model folder as one GGUF file, with llama.cpp's own converter; `sees`: its vision part alone.

    Raises ProgramFailed.
    """
    options = ["--outtype", precision, "--outfile", str(target), "--model-name", name, *(["--mmproj"] if mmproj else [])]
    _require_tool(get_converter_path())
    run_program("convert", [sys.executable, "-m", "jobs.llm.llama_cpp.convert", str(model_folder), *options])


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
    weighed = [str(imatrix)] if imatrix else []
    run_program(
        "quantize", [sys.executable, "-m", "jobs.llm.llama_cpp.quantize", str(source), str(target), file_type, str(threads), *weighed]
    )


def evaluate(request: EvalRequest, workdir: Path) -> EvalResponse:
    """Ask a GGUF file. Raises ProgramFailed."""
    asked, answered = workdir / "request.json", workdir / "response.json"
    asked.write_text(request.model_dump_json())
    run_program("evaluate", [sys.executable, "-m", "jobs.llm.llama_cpp.evaluate", str(asked), str(answered)])
    return EvalResponse.load(answered.read_bytes())


def run_program(name: str, command: Sequence[str], cwd: Path = REPOSITORY) -> None:
    """Wait for a program's end. Raises ProgramFailed unless that was a good one."""
    started = time.monotonic()
    ended = subprocess.run(command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    log.info("program ended", extra={"program": name, "code": ended.returncode, "seconds": round(time.monotonic() - started, 2)})
    if ended.returncode != 0:
        said = ended.stdout.decode(errors="replace").strip()
        log.error("program failed", extra={"program": name, "output": said[-4000:]})
        raise SubprocessFailed(f"{name} {_describe_exit(ended.returncode)}: {said.rpartition(chr(10))[2][-MAX_MESSAGE_CHARACTERS:]}")


def _require_tool(script: Path) -> Path:
    if not script.is_file():
        raise SubprocessFailed(f"llama.cpp's converter is not installed at {script}")
    return script


def _describe_exit(code: int) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with code {code}"

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
from jobs.llama import converter, program
from jobs.llama.evaluate import Answer, Question

log = logging.getLogger(__name__)

REPOSITORY = Path(jobs.__file__).parent.parent  # where `-m jobs...` is found, whatever the attempt's own folder
TOLD_CHARACTERS = 300  # of what a program said last


class ProgramFailed(Exception):
    """A program crashed or refused; the message holds how it ended and its last line."""


def convert(model_folder: Path, target: Path, *, precision: Literal["f32", "f16", "bf16"], name: str, sees: bool = False) -> None:
    """Write a Hugging Face model folder as one GGUF file, with llama.cpp's own converter; `sees`: its vision part alone.

    Raises ProgramFailed.
    """
    options = ["--outtype", precision, "--outfile", str(target), "--model-name", name, *(["--mmproj"] if sees else [])]
    _installed(converter())
    run("convert", [sys.executable, "-m", "jobs.llama.convert", str(model_folder), *options])


def convert_lora(adapter: Path, base: Path, target: Path) -> None:
    """Write a LoRA adapter as GGUF in float16; of the base only the settings are read. Raises ProgramFailed."""
    options = ["--base", str(base), "--outtype", "f16", "--outfile", str(target)]
    run("convert", [sys.executable, str(_installed(converter("lora"))), *options, str(adapter)])


def importance(model: Path, text: Path, target: Path, *, chunk_tokens: int, threads: int) -> None:
    """Read a text with a model, and keep how much each input of each matrix matters. Raises ProgramFailed."""
    tool = program("llama-imatrix")
    if tool is None:
        raise ProgramFailed("llama-imatrix is not installed; infra/llama_cpp.sh builds it")
    # A batch of one chunk: the logits of every position are computed, and a row of Gemma's is 1 MB.
    sizes = [word for option in ("-c", "-b", "-ub") for word in (option, str(chunk_tokens))]
    options = ["-o", str(target), "--no-ppl", "--parse-special", "-ngl", "0", "-t", str(threads), *sizes]
    run("imatrix", [str(tool), "-m", str(model), "-f", str(text), *options])


def quantize(source: Path, target: Path, *, file_type: str, threads: int, imatrix: Path | None = None) -> None:
    """Write a GGUF file in another precision, rounded with care for what an importance matrix says. Raises ProgramFailed."""
    weighed = [str(imatrix)] if imatrix else []
    run("quantize", [sys.executable, "-m", "jobs.llama.quantize", str(source), str(target), file_type, str(threads), *weighed])


def evaluate(question: Question, workdir: Path) -> Answer:
    """Ask a GGUF file. Raises ProgramFailed."""
    asked, answered = workdir / "question.json", workdir / "answer.json"
    asked.write_text(question.model_dump_json())
    run("evaluate", [sys.executable, "-m", "jobs.llama.evaluate", str(asked), str(answered)])
    return Answer.load(answered.read_bytes())


def run(name: str, command: Sequence[str], cwd: Path = REPOSITORY) -> None:
    """Wait for a program's end. Raises ProgramFailed unless that was a good one."""
    started = time.monotonic()
    ended = subprocess.run(command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    log.info("program ended", extra={"program": name, "code": ended.returncode, "seconds": round(time.monotonic() - started, 2)})
    if ended.returncode != 0:
        said = ended.stdout.decode(errors="replace").strip()
        log.error("program failed", extra={"program": name, "output": said[-4000:]})
        raise ProgramFailed(f"{name} {_ending(ended.returncode)}: {said.rpartition(chr(10))[2][-TOLD_CHARACTERS:]}")


def _installed(script: Path) -> Path:
    if not script.is_file():
        raise ProgramFailed(f"llama.cpp's converter is not installed at {script}")
    return script


def _ending(code: int) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with code {code}"

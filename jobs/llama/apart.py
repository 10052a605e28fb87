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
from jobs.llama import converter
from jobs.llama.evaluate import Answer, Question

log = logging.getLogger(__name__)

REPOSITORY = Path(jobs.__file__).parent.parent  # where `-m jobs...` is found, whatever the attempt's own folder
TOLD_CHARACTERS = 300  # of what a program said last


class ProgramFailed(Exception):
    """A program crashed or refused; the message holds how it ended and its last line."""


def convert(model_folder: Path, target: Path, *, precision: Literal["f32", "f16", "bf16"], name: str) -> None:
    """Write a Hugging Face model folder as one GGUF file, with llama.cpp's own converter. Raises ProgramFailed."""
    if not converter().is_file():
        raise ProgramFailed(f"llama.cpp's converter is not installed at {converter()}")
    options = ["--outtype", precision, "--outfile", str(target), "--model-name", name]
    run("convert", [sys.executable, str(converter()), str(model_folder), *options])


def quantize(source: Path, target: Path, *, file_type: str, threads: int) -> None:
    """Write a GGUF file in another precision. Raises ProgramFailed."""
    run("quantize", [sys.executable, "-m", "jobs.llama.quantize", str(source), str(target), file_type, str(threads)])


def evaluate(question: Question, workdir: Path) -> Answer:
    """Ask a GGUF file. Raises ProgramFailed."""
    asked, answered = workdir / "question.json", workdir / "answer.json"
    asked.write_text(question.model_dump_json())
    run("evaluate", [sys.executable, "-m", "jobs.llama.evaluate", str(asked), str(answered)])
    return Answer.load(answered.read_bytes())


def run(program: str, command: Sequence[str]) -> None:
    """Wait for a program's end. Raises ProgramFailed unless that was a good one."""
    started = time.monotonic()
    ended = subprocess.run(command, cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    log.info("program ended", extra={"program": program, "code": ended.returncode, "seconds": round(time.monotonic() - started, 2)})
    if ended.returncode != 0:
        said = ended.stdout.decode(errors="replace").strip()
        log.error("program failed", extra={"program": program, "output": said[-4000:]})
        raise ProgramFailed(f"{program} {_ending(ended.returncode)}: {said.rpartition(chr(10))[2][-TOLD_CHARACTERS:]}")


def _ending(code: int) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with code {code}"

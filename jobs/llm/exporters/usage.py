"""How to run a GGUF file: a Modelfile for Ollama, and a llama.cpp command line that was run successfully.

Ollama is not installed where files are exported. What can be checked without it is checked: the Modelfile's template (`modelfile.py`)
writes the same turns as the chat template used in training.
"""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.llm.exporters.model_files import FIDELITY_FILE, write_json
from jobs.llm.exporters.modelfile import make_modelfile, read_sampling
from jobs.llm.exporters.verify import ExportedFile
from jobs.llm.llama_cpp import find_program
from jobs.runtime.artifacts import ExportedArtifact
from jobs.runtime.errors import JobFailed
from jobs.runtime.subprocesses import SubprocessFailed, run_program

if TYPE_CHECKING:
    from jobs.llm.exporters.workspace import ExportWorkspace

VERIFICATION_TOKENS = 16


def write_usage(workspace: "ExportWorkspace", candidate: ExportedFile, prompt: str) -> None:
    """Write a file's Modelfile and run script to the usage folder. Raises JobFailed when the command fails."""
    from importlib.metadata import version

    import torch

    folder, path = workspace.usage_folder(), candidate.path
    base, adapter = (candidate.base, path) if candidate.base else (path, None)
    stop_tokens = [str(workspace.tokenizer.convert_ids_to_tokens(token)) for token in workspace.trained.chat_format.stop_token_ids]
    sampling = read_sampling(workspace.trained.base_folder)
    modelfile = make_modelfile(base.name, workspace.ollama_template, stop_tokens, sampling, adapter and adapter.name)
    (folder / f"{path.stem}.Modelfile").write_text(modelfile)
    bos = str(workspace.tokenizer.bos_token or "")
    command = verify_command(base, prompt, bos, threads=torch.get_num_threads(), adapter=adapter)
    if command is not None:
        comment = (
            f"# This command was run with llama.cpp as packaged in llama-cpp-python {version('llama_cpp_python')} and exited with code 0."
        )
        (folder / f"{path.stem}.sh").write_text(f"#!/bin/sh\n{comment}\n{command}\n")


def record_fidelity(workspace: "ExportWorkspace", artifacts: Sequence[ExportedArtifact]) -> None:
    """Add the measured fidelity of these artifacts to the usage folder's fidelity.json."""
    path = workspace.usage_folder() / FIDELITY_FILE
    recorded: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}  # Any: JSON
    write_json(path, recorded | {artifact.name: artifact.fidelity for artifact in artifacts if artifact.fidelity})


def verify_command(model: Path, prompt: str, bos: str | None, *, threads: int, adapter: Path | None = None) -> str | None:
    """Run llama-completion on a held-out prompt and return its command line; None where the program is not installed.

    The command runs in the model's folder, as a user would run it. Raises JobFailed when it fails.
    """
    program = find_program("llama-completion")
    if program is None:
        return None
    text = prompt.removeprefix(bos) if bos else prompt  # the GGUF file says whether llama.cpp adds a BOS token
    arguments = ["-m", model.name, *(["--lora", adapter.name] if adapter else []), "-p", text, "-n", str(VERIFICATION_TOKENS)]
    # A context of the prompt's and the answer's length: the default reserves memory for the longest possible conversation.
    arguments += ["--temp", "0", "-c", str(max(512, 2 * len(text.encode()))), "-no-cnv", "-t", str(threads), "-ngl", "0"]
    try:
        run_program("llama-completion", [str(program), *arguments], cwd=model.parent)
    except SubprocessFailed as error:
        raise JobFailed("export_failed", f"llama-completion failed to run {model.name}: {error}") from error
    return shlex.join([program.name, *arguments])

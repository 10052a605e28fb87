"""The files beside a GGUF file: a Modelfile for Ollama, a llama.cpp command line that was run successfully, and the measured fidelity.

They name the GGUF file by its name alone, so they work wherever the artifact's files lie together: in the bucket, on the Hub, downloaded.
Ollama is not installed where files are exported. What can be checked without it is checked: the Modelfile's template (`modelfile.py`)
writes the same turns as the chat template used in training.
"""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.llm.exporters.model_files import FIDELITY_FILE, write_json
from jobs.llm.exporters.modelfile import MODELFILE_SUFFIX, make_modelfile, read_sampling
from jobs.llm.exporters.verify import ExportedFile
from jobs.llm.llama_cpp import find_program
from jobs.runtime.errors import JobFailed
from jobs.runtime.subprocesses import SubprocessFailed, run_program

if TYPE_CHECKING:
    from jobs.llm.exporters.workspace import ExportWorkspace

VERIFICATION_TOKENS = 16


def write_usage(
    workspace: "ExportWorkspace",
    candidate: ExportedFile,
    prompt: str,
    fidelity: dict[str, Any],  # Any: JSON
) -> tuple[Path, ...]:
    """Write what belongs beside a GGUF file; returns the written files. Raises JobFailed when the command fails."""
    from importlib.metadata import version

    import torch

    path = candidate.path
    modelfile_path, script_path, fidelity_path = (path.with_suffix(suffix) for suffix in (MODELFILE_SUFFIX, ".sh", f".{FIDELITY_FILE}"))
    base, adapter = (candidate.base, path) if candidate.base else (path, None)
    stop_tokens = [str(workspace.tokenizer.convert_ids_to_tokens(token)) for token in workspace.trained.chat_format.stop_token_ids]
    sampling = read_sampling(workspace.trained.base_folder)
    modelfile = make_modelfile(base.name, workspace.ollama_template, stop_tokens, sampling, adapter and adapter.name)
    modelfile_path.write_text(modelfile)
    write_json(fidelity_path, fidelity)
    bos = str(workspace.tokenizer.bos_token or "")
    command = verify_command(base, prompt, bos, threads=torch.get_num_threads(), adapter=adapter)
    if command is None:
        return (modelfile_path, fidelity_path)
    comment = f"# This command was run with llama.cpp as packaged in llama-cpp-python {version('llama_cpp_python')} and exited with code 0."
    script_path.write_text(f'#!/bin/sh\n{comment}\ncd "$(dirname "$0")" || exit\n{command}\n')
    return (modelfile_path, script_path, fidelity_path)


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

"""How to run a GGUF file: a Modelfile for Ollama, and a llama.cpp command line that was run successfully.

Ollama is not installed where files are exported. What can be checked without it is checked: the Modelfile's template writes the
same turns as the chat template used in training.
"""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.llm.chat_templates import TEMPLATE_ERRORS
from jobs.llm.exporters.model_files import FIDELITY_FILE, write_json
from jobs.llm.exporters.verify import ExportedFile
from jobs.llm.llama_cpp import find_program
from jobs.runtime.artifacts import ExportedArtifact
from jobs.runtime.errors import JobFailed
from jobs.runtime.subprocesses import SubprocessFailed, run_program

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jobs.llm.exporters.workspace import ExportWorkspace

VERIFICATION_TOKENS = 16

# Gemma's turns in Ollama's template language. A system message opens the first user turn, as in Gemma's own template.
GEMMA_TEMPLATE = """\
{{- $system := "" }}
{{- range $message := .Messages }}
{{- if eq $message.Role "system" }}{{ $system = print $message.Content "\\n\\n" }}
{{- else if eq $message.Role "user" }}{{ print "<start_of_turn>user\\n" $system $message.Content "<end_of_turn>\\n" }}{{ $system = "" }}
{{- else }}{{ print "<start_of_turn>model\\n" $message.Content "<end_of_turn>\\n" }}
{{- end }}
{{- end }}{{ print "<start_of_turn>model\\n" }}"""
# Google's recommendation for Gemma 3.
GEMMA_SAMPLING = ("temperature 1.0", "top_k 64", "top_p 0.95")

TEMPLATE_TEST_CONVERSATIONS = (
    [("user", "What is 1 + 1?")],
    [("user", "Hello."), ("assistant", "Good morning."), ("user", "Bye.")],
    [("system", "Be brief."), ("user", "Hello.")],
)


def write_usage(workspace: "ExportWorkspace", candidate: ExportedFile, prompt: str) -> None:
    """Write a file's Modelfile and run script to the usage folder. Raises JobFailed when the command fails."""
    from importlib.metadata import version

    import torch

    folder, path = workspace.usage_folder(), candidate.path
    base, adapter = (candidate.base, path) if candidate.base else (path, None)
    (folder / f"{path.stem}.Modelfile").write_text(make_modelfile(base.name, workspace.tokenizer, adapter and adapter.name))
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


def make_modelfile(name: str, tokenizer: "PreTrainedTokenizerBase", adapter: str | None = None) -> str:
    """The Modelfile that `ollama create` reads, for a GGUF file of that name and, where given, an adapter file."""
    lines = [f"# Put this file beside {adapter or name} and run: ollama create NAME -f THIS_FILE", f"FROM ./{name}"]
    if adapter:
        lines.append(f"ADAPTER ./{adapter}")
    if uses_gemma_template(tokenizer):
        lines += [f'TEMPLATE """{GEMMA_TEMPLATE}"""', 'PARAMETER stop "<end_of_turn>"', *(f"PARAMETER {line}" for line in GEMMA_SAMPLING)]
    elif tokenizer.chat_template is None:
        lines.append('TEMPLATE "{{ .Prompt }}"')
    else:
        lines.append("# Ollama uses the chat template stored in the GGUF file.")
    return "\n".join(lines) + "\n"


def uses_gemma_template(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the tokenizer's chat template renders the test conversations exactly as GEMMA_TEMPLATE does."""
    if tokenizer.chat_template is None:
        return False
    try:
        for turns in TEMPLATE_TEST_CONVERSATIONS:
            messages = [{"role": role, "content": content} for role, content in turns]
            text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
            if text.removeprefix(str(tokenizer.bos_token)) != render_gemma_turns(turns):
                return False
    except TEMPLATE_ERRORS:  # the template rejects one of them, such as a system message
        return False
    return True


def render_gemma_turns(turns: list[tuple[str, str]]) -> str:
    """What GEMMA_TEMPLATE renders for a conversation: the same steps in the same order."""
    system, text = "", ""
    for role, content in turns:
        if role == "system":
            system = content + "\n\n"
        elif role == "user":
            text += f"<start_of_turn>user\n{system}{content}<end_of_turn>\n"
            system = ""
        else:
            text += f"<start_of_turn>model\n{content}<end_of_turn>\n"
    return text + "<start_of_turn>model\n"


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

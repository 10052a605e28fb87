"""How to run a GGUF file: a Modelfile for Ollama, and a command line of llama.cpp's that has just been run and did work.

Ollama is not at hand where files are made. What can be known without it is checked: the Modelfile's turns are the ones that the
trainer's own chat template writes.
"""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.llm.llama_cpp import find_program
from jobs.runtime.errors import JobFailed
from jobs.runtime.subprocesses import SubprocessFailed, run_program

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERIFICATION_TOKENS = 16

# Gemma's turns as Ollama writes templates. What the system says opens the first turn of the user, as Gemma's own template has it.
GEMMA_TEMPLATE = """\
{{- $system := "" }}
{{- range $message := .Messages }}
{{- if eq $message.Role "system" }}{{ $system = print $message.Content "\\n\\n" }}
{{- else if eq $message.Role "user" }}{{ print "<start_of_turn>user\\n" $system $message.Content "<end_of_turn>\\n" }}{{ $system = "" }}
{{- else }}{{ print "<start_of_turn>model\\n" $message.Content "<end_of_turn>\\n" }}
{{- end }}
{{- end }}{{ print "<start_of_turn>model\\n" }}"""
END_OF_TURN = "<end_of_turn>"
# What Google recommends for Gemma 3.
GEMMA_SAMPLING = ("temperature 1.0", "top_k 64", "top_p 0.95")

TEMPLATE_TEST_CONVERSATIONS = (
    [("user", "What is 1 + 1?")],
    [("user", "Hello."), ("assistant", "Good morning."), ("user", "Bye.")],
    [("system", "Be brief."), ("user", "Hello.")],
)


def make_modelfile(name: str, tokenizer: "PreTrainedTokenizerBase", adapter: str | None = None) -> str:
    """What `ollama create` reads for a file of that name, and for an adapter beside it."""
    lines = [f"# Beside {adapter or name}: ollama create NAME -f THIS_FILE", f"FROM ./{name}"]
    if adapter:
        lines.append(f"ADAPTER ./{adapter}")
    if uses_gemma_template(tokenizer):
        lines += [f'TEMPLATE """{GEMMA_TEMPLATE}"""', f'PARAMETER stop "{END_OF_TURN}"', *(f"PARAMETER {line}" for line in GEMMA_SAMPLING)]
    elif tokenizer.chat_template is None:
        lines.append('TEMPLATE "{{ .Prompt }}"')
    else:
        lines.append("# The turns are those of the chat template in the file.")
    return "\n".join(lines) + "\n"


def uses_gemma_template(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the tokenizer's chat template writes conversations as GEMMA_TEMPLATE does."""
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        return False
    try:
        return all(_render_chat(tokenizer, turns) == render_gemma_turns(turns) for turns in TEMPLATE_TEST_CONVERSATIONS)
    except TemplateError:  # it refuses one of them
        return False


def render_gemma_turns(turns: list[tuple[str, str]]) -> str:
    """What GEMMA_TEMPLATE makes of a conversation: the same steps in the same order."""
    said, text = "", ""
    for role, content in turns:
        if role == "system":
            said = content + "\n\n"
        elif role == "user":
            text += f"<start_of_turn>user\n{said}{content}<end_of_turn>\n"
            said = ""
        else:
            text += f"<start_of_turn>model\n{content}<end_of_turn>\n"
    return text + "<start_of_turn>model\n"


def verify_command(model: Path, prompt: str, bos: str | None, *, threads: int, adapter: Path | None = None) -> str | None:
    """A command that lets the file answer a held-out prompt, as a shell writes it, after it was run; None without llama.cpp's program.

    Raises JobFailed when it does not work. It is run in the model's folder, as a user would.
    """
    tool = find_program("llama-completion")
    if tool is None:
        return None
    # The file itself says whether a text begins with a token of its own.
    text = prompt.removeprefix(bos) if bos else prompt
    told = ["-m", model.name, *(["--lora", adapter.name] if adapter else []), "-p", text, "-n", str(VERIFICATION_TOKENS), "--temp", "0"]
    # One sequence of the prompt's length and the answer's: without it memory for the longest possible conversation is taken.
    told += ["-c", str(max(512, 2 * len(text.encode()))), "-no-cnv", "-t", str(threads), "-ngl", "0"]
    try:
        run_program("llama-completion", [str(tool), *told], cwd=model.parent)
    except SubprocessFailed as error:
        raise JobFailed("export_failed", f"{model.name} does not answer in llama.cpp's own program: {error}") from error
    return shlex.join([tool.name, *told])


def make_run_script(command: str, version: str) -> str:
    """The command as a file to be run beside the model."""
    return (
        f"#!/bin/sh\n# Run with llama.cpp as llama-cpp-python {version} has it, when this file was made; it ended with code 0.\n{command}\n"
    )


def _render_chat(tokenizer: "PreTrainedTokenizerBase", turns: list[tuple[str, str]]) -> str:
    messages = [{"role": role, "content": content} for role, content in turns]
    text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    return text.removeprefix(str(tokenizer.bos_token))

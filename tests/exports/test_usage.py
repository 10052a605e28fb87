"""The Modelfile and the run script written for a GGUF file."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from jobs.llm.chat_format import ChatFormat
from jobs.llm.exporters.go_template import Turn, render_go_template, write_go_template
from jobs.llm.exporters.modelfile import OllamaTemplate, make_modelfile, make_ollama_template, read_sampling
from jobs.llm.exporters.usage import verify_command
from jobs.llm.trained_model import UserPrompt
from jobs.runtime.errors import JobFailed

RAW = ChatFormat("raw", "raw", None, None, (1,), (), turn_tokens_are_trained=True)
CONVERSATIONS: tuple[list[Turn], ...] = (
    [("user", "What is 1 + 1?")],
    [("user", "Hello."), ("assistant", "Good\nmorning."), ("user", "Bye.")],
    [
        ("system", "Be brief."),
        ("user", "Hello."),
        ("assistant", 'A "quoted" \\ 模型'),
        ("user", "Bye."),
        ("assistant", "Bye."),
        ("user", "?"),
    ],
)
# Of TRL's templates for text, those that no Go template can replace.
WITHOUT_GO_TEMPLATE = {"gptoss", "llama3_2", "muse_glimmer"}
VISION_TEMPLATES = {"idefics3", "llava_next", "smolvlm"}  # they read messages that are lists of parts
TEMPLATE_NAMES = sorted(
    path.name.removesuffix(".jinja")
    for path in files("trl").joinpath("chat_templates").iterdir()
    if path.name.endswith(".jinja") and "_training" not in path.name
)


class FakeTokenizer:
    """The part of a tokenizer that a chat template needs."""

    bos_token = "<s>"

    def apply_chat_template(
        self, messages: list[dict[str, Any]], chat_template: str, *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        assert not tokenize
        tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
        options = {"chat_template": chat_template, "add_generation_prompt": add_generation_prompt}
        return render_jinja_template(conversations=[messages], **options, **tokens)[0][0]


def read_template(name: str) -> str:
    return (files("trl") / f"chat_templates/{name}.jinja").read_text()


def make_template(template: str, prompts: Sequence[UserPrompt] = ()) -> OllamaTemplate:
    chat_format = replace(RAW, source="base", name="test", template=template)
    return make_ollama_template(chat_format, FakeTokenizer(), prompts)  # pyright: ignore[reportArgumentType]  # a fake with what it uses


@pytest.mark.parametrize("name", [name for name in TEMPLATE_NAMES if name not in WITHOUT_GO_TEMPLATE | VISION_TEMPLATES])
def test_go_template_writes_what_the_chat_template_writes(name: str) -> None:
    template = make_template(read_template(name))
    assert template.pieces is not None
    go_template = write_go_template(template.pieces)
    for turns in CONVERSATIONS:
        messages: list[dict[str, Any]] = [{"role": role, "content": content} for role, content in turns]
        if turns[0][0] == "system" and not template.pieces.has_system:
            messages, turns = messages[1:], turns[1:]
        expected = FakeTokenizer().apply_chat_template(messages, read_template(name), tokenize=False, add_generation_prompt=True)
        assert execute_go_template(go_template, turns) == expected.removeprefix("<s>")
        assert render_go_template(template.pieces, turns) == expected.removeprefix("<s>")


@pytest.mark.parametrize("name", sorted(WITHOUT_GO_TEMPLATE))
def test_template_that_writes_a_date_is_left_to_the_gguf(name: str) -> None:
    template = make_template(read_template(name))
    modelfile = make_modelfile("x.gguf", template, ["<|eot_id|>"], {})
    assert template.pieces is None
    assert "because the chat template writes the date: Ollama uses the chat template stored in the GGUF file" in modelfile
    assert "TEMPLATE" not in modelfile.replace("# ", "").replace("template", "")
    assert 'PARAMETER stop "<|eot_id|>"' in modelfile


@pytest.mark.parametrize(
    "template",
    [
        "{% for message in messages %}{{ loop.index }}: {{ message.content }}{% endfor %}",  # the place changes the text
        "{% for message in messages %}{{ message.content | upper }}{% endfor %}",
        "{{ messages[-1].content }}{{ messages[-1].content }}",
        "{{ raise_exception('nothing is good enough') }}",
    ],
)
def test_template_without_equivalent_is_left_to_the_gguf(template: str) -> None:
    assert make_template(template).pieces is None


def test_modelfile_names_file_template_stops_and_sampling() -> None:
    modelfile = make_modelfile("tuned-q8_0.gguf", make_template(read_template("gemma3")), ["<eos>", "<end_of_turn>"], {"temperature": 0.7})
    assert modelfile.startswith("# In the folder of this file, run: ollama create NAME -f tuned-q8_0.Modelfile\nFROM ./tuned-q8_0.gguf\n")
    assert 'TEMPLATE """{{- $previous := "" }}\n' in modelfile
    assert modelfile.endswith('\nPARAMETER stop "<eos>"\nPARAMETER stop "<end_of_turn>"\nPARAMETER temperature 0.7\n')


def test_template_without_system_messages_leaves_them_out() -> None:
    template = make_template(read_template("gemma"))
    assert template.pieces is not None
    question = [("user", "Hello.")]
    assert execute_go_template(write_go_template(template.pieces), [("system", "Be brief."), *question]) == execute_go_template(
        write_go_template(template.pieces), question
    )
    assert "no system messages" in make_modelfile("x.gguf", template, [], {})


def test_model_trained_with_tools_is_left_to_the_gguf() -> None:
    prompt = UserPrompt(({"role": "user", "content": "hi"},), ({"type": "function"},), None, (1, 2), 2)
    assert "trained with tools" in make_template(read_template("qwen3"), [prompt]).notes[0]


def test_raw_model_passes_prompt_through() -> None:
    template = make_ollama_template(RAW, FakeTokenizer())  # pyright: ignore[reportArgumentType]
    modelfile = make_modelfile("x.gguf", template, ["<eos>"], {})
    assert 'TEMPLATE "{{ .Prompt }}"\nPARAMETER stop "<eos>"\n' in modelfile
    assert template.render(UserPrompt((), (), "once upon", (2, 3), 2)) == "once upon"


def test_adapter_modelfile_names_its_base_file() -> None:
    modelfile = make_modelfile("base.gguf", make_template(read_template("gemma3")), [], {}, "tuned-lora-f16.gguf")
    assert "FROM ./base.gguf\nADAPTER ./tuned-lora-f16.gguf\n" in modelfile


def test_sampling_parameters_are_those_of_the_base(tmp_path: Path) -> None:
    assert read_sampling(tmp_path) == {}
    config = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": None, "do_sample": True, "eos_token_id": [1]}
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    assert read_sampling(tmp_path) == {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    (tmp_path / "generation_config.json").write_text(json.dumps(config | {"do_sample": False}))
    assert read_sampling(tmp_path) == {}


def test_failing_command_is_not_written(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(JobFailed, match=r"llama-completion failed to run broken\.gguf") as caught:
        verify_command(tmp_path / "broken.gguf", "<bos>hello", "<bos>", threads=1)
    assert caught.value.failure.code == "export_failed"


# --- an interpreter of the part of Go's template language that the Modelfiles use ---


def execute_go_template(template: str, turns: Sequence[Turn]) -> str:
    """The text that Go would render for these messages."""
    tokens: list[str] = []
    for part in re.split(r"(\{\{.*?\}\}(?!\}))", template, flags=re.DOTALL):
        if tokens and part.startswith("{{-"):
            tokens[-1] = tokens[-1] if tokens[-1].startswith("{{") else tokens[-1].rstrip()
        tokens.append(part)
    nodes = iter([token for token in tokens if token])
    program, ending = parse_block(nodes)
    assert ending == ""
    output: list[str] = []
    run_block(program, {"$previous": None}, {"Messages": [{"Role": role, "Content": content} for role, content in turns]}, output)
    return "".join(output)


def parse_block(nodes: Iterator[str]) -> tuple[list[Any], str]:
    """The statements up to `end`, `else` or the end of the text, and that ending."""
    block: list[Any] = []
    for node in nodes:
        if not node.startswith("{{"):
            block.append(("text", node))
            continue
        action = node[2:-2].removeprefix("-").strip()
        word = action.split()[0]
        if action == "end" or word == "else":
            return block, action
        if word in ("range", "if"):
            branches, ending = [(action, *parse_block(nodes))], "?"
            while (ending := branches[-1][2]) != "end":
                branches.append((ending.removeprefix("else").strip(), *parse_block(nodes)))
            block.append((word, [(condition, body) for condition, body, _ in branches]))
        else:
            block.append(("action", action))
    return block, ""


def run_block(block: list[Any], variables: dict[str, Any], dot: dict[str, Any], output: list[str]) -> None:
    for kind, content in block:
        if kind == "text":
            output.append(content)
        elif kind == "range":
            for item in dot[content[0][0].split()[1].removeprefix(".")]:
                run_block(content[0][1], variables, item, output)
        elif kind == "if":
            for condition, body in content:
                if not condition or evaluate_condition(condition.removeprefix("if").strip(), variables, dot):
                    run_block(body, variables, dot, output)
                    break
        elif match := re.fullmatch(r"(\$\w+) :?= (.*)", content):
            variables[match[1]] = evaluate(match[2], variables, dot)
        else:
            output.append(evaluate(content, variables, dot))


def evaluate_condition(condition: str, variables: dict[str, Any], dot: dict[str, Any]) -> bool:
    function, left, right = condition.split(" ", 2)
    equal = evaluate(left, variables, dot) == evaluate(right, variables, dot)
    return {"eq": equal, "ne": not equal}[function]


def evaluate(expression: str, variables: dict[str, Any], dot: dict[str, Any]) -> str:
    if expression.startswith("$"):
        return variables[expression]
    return dot[expression[1:]] if expression.startswith(".") else json.loads(expression)

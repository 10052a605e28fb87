"""Chatting with a GGUF file of the tiny model, as text and as JSON lines."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pytest

from jobs.llm.chat.conversation import Conversation
from jobs.llm.chat.gguf_model import open_gguf
from jobs.llm.chat.model import InvalidModel, InvalidPrompt, Message
from jobs.llm.chat.opening import open_both, open_model, read_template_of
from jobs.llm.chat.output import Speaker, answer_line
from jobs.llm.llama_cpp import get_converter_path
from jobs.llm.llama_cpp.model import token_to_bytes
from jobs.runtime.settings import cpu_thread_count

REPOSITORY = Path(__file__).parents[2]
TURN = [{"role": "user", "content": "what does the function do"}]
TEMPLATE = """{{ bos_token }}{% for message in messages %}<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}
{{ message.content | trim }}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""


@pytest.fixture(scope="module")
def model_folder(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a chat template like Gemma's, changed so that it ends its turns."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(tiny_base, folder)
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_base), AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("<end_of_turn>")] *= 16
    model.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    mark_turn_tokens_as_special(folder)
    return folder


@pytest.fixture(scope="module")
def gguf(model_folder: Path) -> Path:
    return convert(model_folder, model_folder / "model.gguf")


# --- tests with a model ---


def test_model_tokenizes_conversation_with_chat_template(model_folder: Path, gguf: Path) -> None:
    from transformers import AutoTokenizer

    turns = [*TURN, {"role": "assistant", "content": "copy"}, {"role": "user", "content": "and  then?"}]
    expected = AutoTokenizer.from_pretrained(model_folder).apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    with open_gguf(gguf, threads=1) as model:
        assert model.tokenize(turns) == expected


def test_temperature_zero_matches_greedy_generation(model_folder: Path, gguf: Path) -> None:
    expected = generate_greedy(model_folder, TURN[0]["content"])
    assert expected[-1] == "<end_of_turn>"
    completed = run_chat(gguf, "--prompt", TURN[0]["content"], "--temperature", "0", "--json")
    *tokens, done = parse_json_lines(completed.stdout)
    assert (completed.returncode, completed.stderr) == (0, "")
    assert [token["token"] for token in tokens] == expected[:-1]
    assert done["tokens"] == len(expected) - 1


def test_answer_is_plain_text_on_stdout(model_folder: Path, gguf: Path) -> None:
    completed = run_chat(gguf, "--prompt", TURN[0]["content"], "--temperature", "0", "--max-tokens", "3")
    assert (completed.returncode, completed.stderr) == (0, "")
    assert completed.stdout == "".join(generate_greedy(model_folder, TURN[0]["content"])[:3]) + "\n"


def test_json_lines_mode_answers_each_line(gguf: Path) -> None:
    prompts = "".join(json.dumps({"prompt": text}) + "\n" for text in ("what", "does"))
    completed = run_chat(gguf, "--json", "--max-tokens", "4", "--temperature", "0", stdin=prompts)
    summaries = [line for line in parse_json_lines(completed.stdout) if "done" in line]
    assert completed.returncode == 0
    assert [summary["tokens"] for summary in summaries] == [4, 4]
    assert all(summary["done"] is True and summary["seconds"] >= 0 for summary in summaries)


def test_invalid_line_does_not_end_the_conversation(gguf: Path) -> None:
    completed = run_chat(gguf, "--json", "--max-tokens", "2", stdin='{"prompt": 1}\nnonsense\n\n{"prompt": "what"}\n')
    lines = parse_json_lines(completed.stdout)
    assert completed.returncode == 0
    assert "a turn is like" in lines[0]["error"]
    assert "not JSON" in lines[1]["error"]
    assert lines[-1]["done"]


def test_plain_text_lines_are_turns(gguf: Path) -> None:
    completed = run_chat(gguf, "--max-tokens", "3", "--temperature", "0", stdin="what\n\ndoes\n")
    assert completed.returncode == 0
    assert len(completed.stdout.splitlines()) >= 2


def test_multi_token_characters_are_not_split(gguf: Path) -> None:
    import llama_cpp

    with open_gguf(gguf, threads=1) as model:
        vocabulary = llama_cpp.llama_model_get_vocab(model._llama.model)
        tokens = model._llama.tokenize("模型 🙂 Ünï  x".encode(), add_bos=False)
        assert b"".join(token_to_bytes(vocabulary, token) for token in tokens).decode() == "模型 🙂 Ünï  x"


def test_prompt_longer_than_context_is_rejected(gguf: Path) -> None:
    rejected = run_chat(gguf, "--prompt", "what " * 5000)
    assert rejected.returncode == 2
    assert rejected.stderr.startswith("error: the prompt has")


def test_base_answers_beside_a_gguf_file_with_its_template(gguf: Path, tiny_base: Path) -> None:
    with open_both(gguf, base=tiny_base, threads=1) as (base, tuned):
        assert base.template == tuned.template == TEMPLATE
        assert base.tokenize(TURN) == tuned.tokenize(TURN)
        assert "".join(base.generate(base.tokenize(TURN), 4, 0.0))


def test_template_of_a_gguf_file_is_read(gguf: Path, base_gguf: Path) -> None:
    assert read_template_of(gguf) == TEMPLATE
    assert read_template_of(base_gguf) is None


def test_folder_with_one_gguf_file_is_its_model(gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").hardlink_to(gguf)
    (tmp_path / "m.Modelfile").write_text("FROM ./m.gguf")
    with open_model(tmp_path, base=None, template_of=None, threads=1) as model:
        assert model.tokenize(TURN)
    (tmp_path / "n.gguf").hardlink_to(gguf)
    with pytest.raises(InvalidModel, match=r"several GGUF files: name one of m\.gguf, n\.gguf"):
        open_model(tmp_path, base=None, template_of=None, threads=1).__enter__()


# --- tests with an unusable file ---


@pytest.mark.parametrize(
    ("architecture", "kind", "problem"),
    [("gemma3", "adapter", "is an adapter for the GGUF file"), ("clip", "mmproj", "is the vision part")],
)
def test_gguf_file_that_is_a_part_says_so(architecture: str, kind: str, problem: str, tmp_path: Path) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "part.gguf", architecture)
    writer.add_type(kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InvalidModel, match=rf"part\.gguf {problem}"), open_gguf(tmp_path / "part.gguf", threads=1):
        pass


def test_unusable_file_gives_one_line_error(gguf: Path, tmp_path: Path) -> None:
    cases = {"cannot read": tmp_path / "missing.gguf", "not a GGUF file": tmp_path / "text.gguf", "cannot load": tmp_path / "cut.gguf"}
    cases["not a GGUF file"].write_text("hello")
    cases["cannot load"].write_bytes(gguf.read_bytes()[:-1000])
    for message, path in cases.items():
        rejected = run_chat(path, "--prompt", "hi")
        assert (rejected.returncode, rejected.stdout) == (2, "")
        assert rejected.stderr.startswith("error: ")
        assert message in rejected.stderr
        assert str(path) in rejected.stderr
        assert rejected.stderr.count("\n") == 1


def test_file_without_chat_template_continues_each_text(base_gguf: Path) -> None:
    from transformers import AutoTokenizer

    options = ("--json", "--temperature", "0", "--max-tokens", "3")
    completed = run_chat(base_gguf, *options, stdin='{"prompt": "what does it"}\n{"prompt": "what does it"}\n')
    assert completed.returncode == 0
    assert completed.stderr == "the model has no chat template: it continues each text that you write\n"
    texts = [line["token"] for line in parse_json_lines(completed.stdout) if "token" in line]
    assert texts
    assert texts[: len(texts) // 2] == texts[len(texts) // 2 :]  # the second text is not a turn after the first
    with open_gguf(base_gguf, threads=1) as model:
        assert model.template is None
        tokenizer = AutoTokenizer.from_pretrained(base_gguf.parent / "staging")
        assert model.tokenize([{"role": "user", "content": "what does it"}]) == tokenizer.encode("what does it")


@pytest.mark.parametrize("options", [["--temperature", "nan"], ["--temperature", "-1"], ["--max-tokens", "0"], ["--max-tokens", "x"]])
def test_invalid_options_are_rejected(options: list[str], tmp_path: Path) -> None:
    rejected = run_chat(tmp_path / "any.gguf", *options)
    assert rejected.returncode == 2
    assert options[0] in rejected.stderr


# --- tests without a model ---


class FakeChatModel:
    """A model that always answers `yes`, with one token for each character."""

    context_tokens = 20
    runs_as = "a fake"
    template = "any"

    def __init__(self) -> None:
        self.answer: Sequence[str] = "yes"

    def tokenize(self, messages: Sequence[Message]) -> list[int]:
        return [ord(character) for message in messages for character in message["content"]]

    def generate(self, tokens: list[int], max_tokens: int, temperature: float) -> Generator[str]:
        yield from self.answer[:max_tokens]


def test_conversation_keeps_earlier_turns() -> None:
    conversation = Conversation(FakeChatModel(), max_tokens=3, temperature=0)
    assert list(conversation.answer("one")) == ["y", "e", "s"]
    list(conversation.answer("two"))
    assert [message["content"] for message in conversation.messages] == ["one", "yes", "two", "yes"]


def test_oldest_turns_are_dropped_when_context_is_full() -> None:
    conversation = Conversation(FakeChatModel(), max_tokens=3, temperature=0)
    for prompt in ("a" * 8, "b" * 8, "c" * 8):
        list(conversation.answer(prompt))
    assert [message["content"] for message in conversation.messages] == ["c" * 8, "yes"]


def test_rejected_turn_does_not_change_the_conversation() -> None:
    conversation = Conversation(FakeChatModel(), max_tokens=3, temperature=0)
    list(conversation.answer("a"))
    with pytest.raises(InvalidPrompt, match="20 tokens"):
        list(conversation.answer("b" * 20))
    assert [message["content"] for message in conversation.messages] == ["a", "yes"]


def test_control_characters_are_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    model = FakeChatModel()
    model.answer = ("\x1b[2J", "a\n\tb", "\x9b1A", "模\r")
    answer_line([Speaker("", Conversation(model, max_tokens=4, temperature=0))], "hi")
    assert capsys.readouterr().out == "[2Ja\n\tb1A模\n"


def test_thread_count_comes_from_launcher_or_cpu_count() -> None:
    assert cpu_thread_count({"OMP_NUM_THREADS": "3"}) == 3
    assert cpu_thread_count({}) == cpu_thread_count({"OMP_NUM_THREADS": "0"}) == os.cpu_count()


# --- helpers ---


def run_chat(gguf: Path, *options: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jobs.llm.chat", "--model", str(gguf), *options]
    return subprocess.run(command, input=stdin, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=60)


def parse_json_lines(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines()]


def convert(folder: Path, target: Path) -> Path:
    subprocess.run([sys.executable, get_converter_path(), folder, "--outtype", "f32", "--outfile", target], check=True, capture_output=True)
    return target


def mark_turn_tokens_as_special(folder: Path) -> None:
    """Write the added tokens to tokenizer_config.json: llama.cpp's converter reads them there, transformers 5 does not write them."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    added_tokens = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    config["added_tokens_decoder"] = {
        str(token["id"]): {name: value for name, value in token.items() if name != "id"} for token in added_tokens
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def generate_greedy(folder: Path, prompt: str) -> list[str]:
    """The greedy answer of transformers, token by token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    turns = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    eos_token_ids = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")]
    generated = model.generate(**inputs, max_new_tokens=64, do_sample=False, eos_token_id=eos_token_ids)[0, inputs["input_ids"].shape[1] :]
    return [tokenizer.decode([token]) for token in generated]

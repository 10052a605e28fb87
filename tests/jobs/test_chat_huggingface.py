"""Chatting with Hugging Face folders: the tiny Gemma as a base, as a tuned model and with an adapter."""

import io
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.llm.chat.bases import _download, find_path
from jobs.llm.chat.command_line import main
from jobs.llm.chat.conversation import Conversation
from jobs.llm.chat.huggingface_model import HuggingFaceChatModel, open_adapter, open_folder
from jobs.llm.chat.model import InvalidModel
from jobs.llm.chat.opening import open_model, read_template_of

QUESTION = [{"role": "user", "content": "what does the function do"}]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}\n{{ message.content }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


@pytest.fixture(scope="module")
def tuned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with other weights and a chat template, as a merged model."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("tuned") / "merged"
    shutil.copytree(base, folder)
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that changes the base clearly, with a tokenizer that has a chat template."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(1)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tuned_model(tuned: Path) -> Iterator[HuggingFaceChatModel]:
    with open_folder(tuned) as model:
        yield model


@pytest.fixture
def type_lines(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replaces stdin by a pipe with these lines."""

    def type_(*lines: str) -> None:
        text = "".join(f"{line}\n" for line in lines)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))

    return type_


def ask(model: HuggingFaceChatModel, max_tokens: int = 8) -> str:
    return "".join(model.generate(model.tokenize(QUESTION), max_tokens, 0.0))


def generate_greedy(model: Any, tokenizer: Any, ids: list[int], count: int) -> str:
    import torch

    generated = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=count, do_sample=False, eos_token_id=1)
    return tokenizer.decode(generated[0, len(ids) :], skip_special_tokens=True)


def test_folder_answers_as_transformers_does(tuned: Path, tuned_model: HuggingFaceChatModel) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tuned)
    ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)["input_ids"]
    assert tuned_model.tokenize(QUESTION) == ids
    assert ask(tuned_model) == generate_greedy(tuned_model.model, tokenizer, ids, 8)


def test_answer_ends_at_the_end_of_a_turn(tuned_model: HuggingFaceChatModel) -> None:
    assert tuned_model.tokenizer.convert_tokens_to_ids("<end_of_turn>") in tuned_model.stop_ids


def test_closed_answer_ends_the_generation(tuned_model: HuggingFaceChatModel) -> None:
    from threading import enumerate as list_threads

    conversation = Conversation(tuned_model, max_tokens=1000, temperature=0)
    answer = conversation.answer("what")
    said = next(answer) + next(answer)
    answer.close()
    assert [thread.name for thread in list_threads() if thread.name == "generate"] == []
    assert conversation.messages[-1] == {"role": "assistant", "content": said}


def test_base_without_template_continues_text_or_uses_the_trained_one(base: Path, tuned: Path) -> None:
    with open_model(base, base=None, template_of=None, threads=1) as alone:
        assert alone.template is None
        assert alone.tokenize(QUESTION)[0] == 2  # only a BOS token before the text
    with open_model(base, base=None, template_of=tuned, threads=1) as asked:
        assert asked.template == TEMPLATE
        assert len(asked.tokenize(QUESTION)) > len(alone.tokenize(QUESTION)) + 4


def test_adapter_answers_with_and_without_itself(base: Path, adapter: Path) -> None:
    with open_folder(base, TEMPLATE) as plain:
        expected = ask(plain)
    with open_adapter(adapter, base) as (base_model, tuned):
        assert (base_model.template, tuned.template) == (TEMPLATE, TEMPLATE)
        adapted = ask(tuned)
        assert ask(base_model) == expected != adapted
        assert ask(tuned) == adapted
    assert read_template_of(adapter) == TEMPLATE


def test_comparison_labels_both_answers(
    base: Path, adapter: Path, type_lines: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    type_lines()
    words = ["--model", str(adapter), "--base", base.as_uri(), "--compare", "--max-tokens", "4", "--temperature", "0", "--prompt", "what"]
    assert main(words) == 0
    base_line, tuned_line = capsys.readouterr().out.split("tuned: ")
    assert base_line.startswith("base: ")
    assert main([*words, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["model"] for line in lines if "done" in line] == ["base", "tuned"]
    answers = {label: "".join(line.get("token", "") for line in lines if line["model"] == label) for label in ("base", "tuned")}
    assert (base_line, tuned_line) == (f"base: {answers['base']}\n", f"{answers['tuned']}\n")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--system", "Be brief."], "System role not supported"),
        (["--compare"], "--compare needs the base"),
        (["--max-tokens", "0"], "at least 1"),
        (["--prompt", "  "], "is empty"),
    ],
)
def test_wrong_options_end_with_2(
    tuned: Path, words: list[str], problem: str, type_lines: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    type_lines()
    try:
        code = main(["--model", str(tuned), "--prompt", "hi", *words])
    except SystemExit as exit_:
        code = exit_.code
    printed = capsys.readouterr()
    assert (code, printed.out) == (2, "")
    assert problem in printed.err


def test_folders_that_cannot_talk_say_why(base: Path, tuned: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx/model.onnx").touch()
    (tmp_path / "onnx/config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    reward = shutil.copytree(tuned, tmp_path / "reward")
    config = json.loads((reward / "config.json").read_text())
    (reward / "config.json").write_text(json.dumps(config | {"architectures": ["Gemma3ForSequenceClassification"]}))
    pickled = shutil.copytree(base, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    broken = shutil.copytree(adapter, tmp_path / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"no weights")
    cases = {
        "onnx": "made for scoring",
        "empty": "holds no model",
        "reward": "rates answers",
        "pickled": "safetensors",
        "broken": "cannot be applied",
    }
    for name, problem in cases.items():
        with pytest.raises(InvalidModel, match=problem), open_model(tmp_path / name, base=base, template_of=None, threads=1):
            pass
    with pytest.raises(InvalidModel, match="needs its base"), open_model(adapter, base=None, template_of=None, threads=1):
        pass


def test_lines_of_stdin_are_turns(tuned: Path, type_lines: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    type_lines('{"prompt": "what"}', '{"prompt": ""}', '{"prompt": "does"}')
    assert main(["--model", str(tuned), "--json", "--max-tokens", "2", "--temperature", "0"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line for line in lines if "done" in line or "error" in line][1]["error"].startswith("a turn is like")
    assert sum("done" in line for line in lines) == 2


def test_model_of_a_remote_store_is_downloaded_once(base: Path, tmp_path: Path) -> None:
    source = tmp_path / "store/tiny/gemma"
    source.parent.mkdir(parents=True)
    shutil.copytree(base, source)
    (source / "pickle.bin").write_bytes(b"never read")
    target = _download(source.as_uri(), tmp_path / "downloads")
    assert target == tmp_path / "downloads/tiny/gemma"
    assert {path.name for path in target.iterdir()} == {path.name for path in base.iterdir()}
    unchanged = (target / "config.json").stat().st_ino
    assert (_download(source.as_uri(), tmp_path / "downloads") / "config.json").stat().st_ino == unchanged
    (source / "config.json").write_text((source / "config.json").read_text() + "\n")
    assert (_download(source.as_uri(), tmp_path / "downloads") / "config.json").stat().st_ino != unchanged
    (source / "config.json").unlink()
    with pytest.raises(InvalidModel, match="the store has no model"):
        _download(source.as_uri(), tmp_path / "downloads")


def test_location_that_is_not_here_says_so(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match="is not on this machine"):
        find_path((tmp_path / "none").as_uri(), None)
    with pytest.raises(InvalidModel, match="--downloads names no folder"):
        find_path("gs://bucket/model", None)

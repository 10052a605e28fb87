"""Every way in which a user asks a model gives it the tokens of its training, and an export that does not is refused."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from jobs.llm.chat_format import ChatFormat
from jobs.llm.data.tokenize import RowTokenizer
from jobs.llm.data.user_prompts import iter_user_prompts, make_user_prompts
from jobs.llm.exporters import export_all
from jobs.llm.exporters.preflight import start_export_check
from jobs.llm.exporters.user_path import GgufQuestions, find_gguf_problem, find_mismatch
from jobs.llm.llama_cpp import list_convertible_architectures
from jobs.llm.llama_cpp.vocabulary import AskedPrompt, VocabularyReport
from jobs.llm.trained_model import TrainedModel, UserPrompt
from jobs.llm.training_context import TrainingContext
from jobs.runtime.context import JobContext
from jobs.runtime.errors import JobFailed
from tests.exports.conftest import CHAT_TEMPLATE
from tests.jobs.conftest import make_context as make_job_context
from tests.jobs.conftest import make_spec

MakeContext = Callable[..., JobContext]
MakeTraining = Callable[..., TrainingContext]

# TRL's template, the token that ends its turns.
TEMPLATES = {"gemma3": "<end_of_turn>", "qwen2_5": "<|im_end|>", "llama3": "<|eot_id|>", "phi3": "<|end|>"}
RAW = ChatFormat("raw", "raw", None, None, (1,), (), turn_tokens_are_trained=True)


# --- rows ---


def test_user_prompts_are_the_questions_of_learned_answers(tiny_tokenizer: Any) -> None:
    rows = [
        {"messages": [turn("user", "what"), turn("assistant", "it"), turn("user", "does"), turn("assistant", "copy")]},
        {
            "messages": [
                turn("user", "what"),
                turn("assistant", "it") | {"weight": 0},
                turn("user", "<end_of_turn>"),
                turn("assistant", "x"),
            ]
        },
        {"messages": [turn("system", "be"), turn("user", "path"), turn("assistant", "name")]},
    ]
    first, second = iter_user_prompts(rows, "messages", RowTokenizer(tiny_tokenizer, make_format(tiny_tokenizer, CHAT_TEMPLATE)))
    assert [message["content"] for message in first.messages] == ["what"]
    assert [message["content"] for message in second.messages] == ["be", "path"]  # the row with a literal control token is left out
    assert tiny_tokenizer.decode(first.input_ids[: first.prompt_tokens]).endswith("what<end_of_turn>\n<start_of_turn>model\n")


def test_raw_row_is_a_text_to_continue(tiny_tokenizer: Any) -> None:
    (prompt,) = iter_user_prompts([{"text": "copy the list of files"}], "text", RowTokenizer(tiny_tokenizer, RAW))
    assert prompt.text == "copy the list of files"
    assert prompt.input_ids[: prompt.prompt_tokens] == tuple(tiny_tokenizer.encode(prompt.text))


def test_prompts_without_answers_are_asked_to_their_end(tiny_tokenizer: Any) -> None:
    row_tokenizer = RowTokenizer(tiny_tokenizer, make_format(tiny_tokenizer, CHAT_TEMPLATE))
    (prompt,) = iter_user_prompts([{"prompt": [turn("user", "copy it")]}], "prompt", row_tokenizer)
    assert prompt.messages == (turn("user", "copy it"),)
    assert prompt.prompt_tokens == len(prompt.input_ids)


# --- the comparison ---


def test_prompt_matches_the_row_or_more_of_it() -> None:
    prompt = UserPrompt((turn("user", "hi"),), (), None, (2, 7, 8, 9), 2)
    assert find_mismatch(prompt, [2, 7], str) is None
    assert find_mismatch(prompt, [2, 7, 8], str) is None  # the template writes the beginning of the answer
    assert find_mismatch(prompt, [2], str) == "in the prompt 'hi' token 2 is the end, and was '7' in training"
    assert find_mismatch(prompt, [2, 5], str) == "in the prompt 'hi' token 2 is '5', and was '7' in training"
    assert find_mismatch(prompt, [2, 7, 5], str) == "in the prompt 'hi' token 3 is '5', and was '8' in training"


@pytest.mark.parametrize(
    ("report", "problem"),
    [
        ({}, None),
        ({"token_ids": [[5]]}, "splits 1 of 1 texts into other tokens"),
        ({"prompts": [AskedPrompt(problem="the chat template is invalid")]}, "cannot ask the prompt 'hi': the chat template is invalid"),
        ({"prompts": [AskedPrompt(ids=[7], served_ids=[2, 7])]}, "by its chat template in another way"),
        ({"prompts": [AskedPrompt(ids=[2, 7], served_ids=[2, 2, 7])]}, r"by its chat template in llama\.cpp's server in another way"),
        ({"raw_prompt_ids": [[2, 2, 7]]}, "by its Modelfile in another way"),
        ({"missing_stops": [9]}, "does not end an answer at '9'"),
    ],
)
def test_gguf_that_differs_from_training_is_described(report: dict[str, Any], problem: str | None) -> None:
    prompt = UserPrompt((turn("user", "hi"),), (), None, (2, 7, 8), 2)
    questions = GgufQuestions(("a",), ((4,),), (prompt,), ((prompt, "hi"),), (9,))
    good = {"token_ids": [[4]], "prompts": [AskedPrompt(ids=[2, 7], served_ids=[2, 7])], "raw_prompt_ids": [[2, 7]]}
    found = find_gguf_problem(questions, VocabularyReport.model_validate(good | report), str)
    assert found is None if problem is None else re.search(problem, found or "")


# --- exports ---


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_published_tokenizer_that_asks_otherwise_fails_the_export(adapter: TrainedModel, make_context: MakeContext, kind: str) -> None:
    (prompt, *_) = adapter.user_prompts
    trained_otherwise = replace(prompt, input_ids=(2, *prompt.input_ids), prompt_tokens=prompt.prompt_tokens + 1)
    with pytest.raises(JobFailed, match="asks the model in another way than the training did: in the prompt 'what does") as caught:
        export_all(replace(adapter, user_prompts=(trained_otherwise,)), make_context(format=kind))
    assert "token 2 is '<start_of_turn>', and was '<bos>' in training" in caught.value.failure.message
    assert caught.value.failure.code == "export_failed"


def test_raw_model_is_exported_without_template(adapter: TrainedModel, make_context: MakeContext, tmp_path: Path) -> None:
    from gguf import GGUFReader
    from transformers import AutoTokenizer

    folder = Path(shutil.copytree(adapter.folder, tmp_path / "raw"))
    (folder / "chat_template.jinja").unlink()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (prompt,) = iter_user_prompts([{"prompt": "what does ", "completion": "it do"}], "prompt_completion", RowTokenizer(tokenizer, RAW))
    raw = replace(adapter, folder=folder, chat_format=RAW, user_prompts=(prompt,))
    context = make_context(include_gguf=True, gguf_quantization="f16")
    artifacts = {artifact.name: artifact for artifact in export_all(raw, context)}
    reader = GGUFReader(context.stores.models.download(artifacts["gguf-f16"].key, tmp_path / "raw.gguf"))
    assert "tokenizer.chat_template" not in reader.fields
    companion = next(file for file in artifacts["gguf-f16"].files if file.path.endswith(".Modelfile"))
    modelfile = context.stores.models.download(artifacts["gguf-f16"].file_key(companion), tmp_path / "Modelfile")
    assert 'TEMPLATE "{{ .Prompt }}"\nPARAMETER stop "<eos>"\n' in modelfile.read_text()


# --- before the first step ---


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_base)


@pytest.fixture
def make_training(tiny_base: Path, tmp_path: Path) -> MakeTraining:
    """Makes a training of the tiny base with one of TRL's templates, whose tokens are added to its tokenizer."""

    def make(name: str, stop: str, **config: Any) -> TrainingContext:
        from transformers import AutoTokenizer

        template = (files("trl") / f"chat_templates/{name}.jinja").read_text()
        base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.add_special_tokens({"additional_special_tokens": sorted({*re.findall(r"<\|\w+\|>", template), stop})})
        tokenizer.chat_template = template
        settings = json.loads((base / "config.json").read_text())
        (base / "config.json").unlink()
        (base / "config.json").write_text(json.dumps(settings | {"vocab_size": len(tokenizer)}))
        spec = make_spec(tmp_path / "store", **config)
        splits = {name: tmp_path / "store" / split.key for name, split in spec.dataset.splits.items()}
        context = make_job_context(spec, tmp_path / "work")
        chat_format = make_format(tokenizer, template, stop)
        device: Any = None  # nothing is computed
        training_config: Any = spec.training_config
        return TrainingContext(training_config, context, base, splits, tokenizer, chat_format, device, resume_checkpoint=None)

    return make


@pytest.mark.parametrize(("name", "stop"), TEMPLATES.items())
def test_every_path_of_a_gguf_asks_as_trained(make_training: MakeTraining, name: str, stop: str) -> None:
    try_export_plan(make_training(name, stop, export_config={"include_gguf": True}))


def test_unknown_end_of_turn_is_written_into_the_file(make_training: MakeTraining) -> None:
    training = make_training("gemma3", "<eot-of-nobody>", export_config={"include_gguf": True, "include_lora_gguf": True})
    try_export_plan(training)
    unknown = training.tokenizer.convert_tokens_to_ids(["<start_of_turn>", "<eot-of-nobody>", "<bos>"])
    three = replace(training, chat_format=replace(training.chat_format, stop_token_ids=tuple(unknown)))
    with pytest.raises(JobFailed, match="does not end an answer at") as caught:
        try_export_plan(three)
    assert caught.value.failure.code == "invalid_config"


def test_template_that_asks_otherwise_than_the_rows_is_refused(make_training: MakeTraining) -> None:
    training = make_training("gemma3", "<end_of_turn>")
    training.tokenizer.chat_template = CHAT_TEMPLATE.replace("<start_of_turn>model", "<start_of_turn>assistant")
    with pytest.raises(JobFailed, match="the chat template asks the model in another way than the training did") as caught:
        try_export_plan(training)
    assert caught.value.failure.code == "invalid_config"
    assert "chat_template" in caught.value.failure.hint


def test_architecture_that_llama_cpp_does_not_know_is_refused(make_training: MakeTraining) -> None:
    training = make_training("gemma3", "<end_of_turn>", export_config={"include_gguf": True})
    config = json.loads((training.base_folder / "config.json").read_text())
    (training.base_folder / "config.json").write_text(json.dumps(config | {"architectures": ["StrangeForCausalLM"]}))
    with pytest.raises(JobFailed, match="does not know the architecture StrangeForCausalLM") as caught:
        try_export_plan(training)
    assert "format 'merged'" in caught.value.failure.hint


def test_exports_that_do_not_fit_on_the_disk_are_refused(make_training: MakeTraining, monkeypatch: pytest.MonkeyPatch) -> None:
    training = make_training("gemma3", "<end_of_turn>", export_config={"format": "merged"})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10**5))  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(JobFailed, match=r"about 0\.0 GB of disk, and 0\.0 GB are free"):
        try_export_plan(training)


def test_converter_table_is_read_without_importing_it() -> None:
    assert {"Gemma3ForCausalLM", "LlamaForCausalLM", "Qwen3ForCausalLM"} <= list_convertible_architectures("TEXT")
    assert "Gemma3ForConditionalGeneration" in list_convertible_architectures("MMPROJ")


def try_export_plan(training: TrainingContext) -> None:
    check = start_export_check(training, make_user_prompts(training))
    if check is not None:
        check.wait()


def turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def make_format(tokenizer: Any, template: str, stop: str = "<end_of_turn>") -> ChatFormat:
    stop_id = tokenizer.convert_tokens_to_ids(stop)
    return ChatFormat("base", "test", template, None, (1, stop_id), (stop_id,), turn_tokens_are_trained=True)

"""How conversations become text: the templates of common bases, bases without one, and templates that cannot be used."""

import pickle
import random
import re
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from jobs.llm.chat_format import ChatFormat, choose_chat_format
from jobs.llm.data.tokenize import IGNORE_INDEX, RowTokenizer, TokenizedExample
from jobs.llm.data.turns import Turns
from jobs.runtime.errors import JobFailed
from schema.training import TRAINING_CONFIG

TURNS = [
    {"role": "user", "content": "what does open do"},
    {"role": "assistant", "content": "it returns a file"},
    {"role": "user", "content": "and close"},
    {"role": "assistant", "content": "it returns the path"},
]
TEMPLATES = files("trl") / "chat_templates"
TRL_TEMPLATES = sorted(path.name.removesuffix(".jinja") for path in TEMPLATES.iterdir() if path.name.endswith(".jinja"))
INFERENCE_TEMPLATES = [name for name in TRL_TEMPLATES if not name.endswith("_training")]
# Tokens as templates write them: <|im_start|>, <｜User｜>, <start_of_turn>, [INST], <think>.
TOKEN = re.compile(r"<[|｜]?[\w▁ ]{2,40}[|｜]?>|\[/?[A-Z_]{3,}\]|\[gMASK\]")


def read_trl_template(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


LLAMA3_SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2_SPLIT = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # splits line breaks otherwise at the end of a text


@cache
def train_backend(split: str) -> str:
    """A byte-level tokenizer without special tokens, as JSON."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(split), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    texts = ["what does open do it returns a file and close the path of user assistant system model\n\nfinal think", "a\n\n"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(texts * 9, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False))
    return str(backend.to_str())


def make_tokenizer(
    template: str | None, *special_tokens: str, bos: str | None = "<s>", eos: str = "</s>", split: str = LLAMA3_SPLIT
) -> Any:
    """A tokenizer with a chat template and the special tokens that it writes."""
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokens = set(TOKEN.findall(template or "")) - {"<think>", "</think>", "<s>", "</s>"}
    backend = Tokenizer.from_str(train_backend(split))
    names = [token for token in (bos, eos, *sorted(tokens), *special_tokens) if token]
    backend.add_tokens(["<think>", "</think>"])
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in names])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


def make_config(**fields: Any) -> Any:
    return TRAINING_CONFIG.validate_python({"base_model_id": "some/base", **fields})


def choose(tokenizer: Any, *rows: Turns | str, **fields: Any) -> ChatFormat:
    return choose_chat_format(tokenizer, make_config(**fields), rows)


def tokenize(tokenizer: Any, messages: list[dict[str, Any]], **row: Any) -> tuple[TokenizedExample, RowTokenizer]:
    """A row under the format that is chosen for it."""
    row_tokenizer = RowTokenizer(tokenizer, choose(tokenizer, Turns(messages, row.get("tools"))))
    return row_tokenizer.tokenize({"messages": messages, **row}, "messages"), row_tokenizer


def decode_labels(row: TokenizedExample, tokenizer: Any) -> list[str]:
    """The text of each run of labels."""
    runs: list[list[int]] = [[]]
    for label in row.labels:
        if label == IGNORE_INDEX:
            runs.append([])
        else:
            runs[-1].append(label)
    return [tokenizer.decode(run) for run in runs if run]


# --- known templates ---


@pytest.mark.parametrize("turns", [TURNS[:2], TURNS], ids=["single turn", "multi-turn"])
@pytest.mark.parametrize("name", INFERENCE_TEMPLATES)
def test_known_template_asks_as_it_trains(name: str, turns: list[dict[str, Any]]) -> None:
    tokenizer = make_tokenizer(read_trl_template(name))
    row, row_tokenizer = tokenize(tokenizer, turns)
    answers = decode_labels(row, tokenizer)
    assert len(answers) == len(turns) // 2
    for turn, answer in zip(turns[1::2], answers, strict=True):
        assert turn["content"] in answer
        assert not answer.strip().endswith(turn["content"])  # the end of the turn is learned
    stops = set(row_tokenizer.chat_format.stop_token_ids)
    assert stops & set(row.labels[-3:])
    for n in range(1, len(turns), 2):  # as the exported model is asked
        prompt_ids = row_tokenizer.tokenize_prompt(turns[:n]).input_ids
        assert row.input_ids[: len(prompt_ids)] == prompt_ids
        assert row.labels[len(prompt_ids) - 1] == IGNORE_INDEX
        assert row.labels[len(prompt_ids)] != IGNORE_INDEX
    if not row_tokenizer.chat_format.content_parts:
        asked = tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
        assert row.input_ids[: len(asked)] == asked


def test_thinking_template_is_exported_without_thinking(tokenizer: Any) -> None:
    qwen = make_tokenizer(read_trl_template("qwen3_5_think"))
    chat_format = choose(qwen, Turns(TURNS[:2]))
    assert chat_format.template == "{%- set enable_thinking = false %}" + read_trl_template("qwen3_5_think")
    assert chat_format.generation_prompt == "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert "without reasoning" in chat_format.reason
    assert qwen.chat_template == chat_format.template


def test_rows_with_reasoning_are_asked_with_it() -> None:
    qwen = make_tokenizer(read_trl_template("qwen3_5_think"))
    answer = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nit returns a file"}
    row, row_tokenizer = tokenize(qwen, [TURNS[0], answer])
    assert row_tokenizer.chat_format.template == read_trl_template("qwen3_5_think")
    assert decode_labels(row, qwen) == ["hm\n</think>\n\nit returns a file<|im_end|>\n"]


def test_rows_with_and_without_reasoning_are_asked_without_either() -> None:
    qwen = make_tokenizer(read_trl_template("qwen3_5_think"))
    answers = [{"role": "assistant", "content": content} for content in ("<think>\nhm\n</think>\n\nit returns", "it returns")]
    chat_format = choose(qwen, *(Turns([TURNS[0], answer]) for answer in answers))
    assert chat_format.generation_prompt == "<|im_start|>assistant\n"
    asked = RowTokenizer(qwen, chat_format).tokenize_prompt([TURNS[0]])
    assert asked.prompt_text == "<|im_start|>user\nwhat does open do<|im_end|>\n<|im_start|>assistant\n"


def test_rows_are_tokenized_in_pieces_where_tokens_depend_on_what_follows() -> None:
    tokenizer = make_tokenizer(read_trl_template("llama3"), split=GPT2_SPLIT)
    row, row_tokenizer = tokenize(tokenizer, TURNS[:2])
    asked = tokenizer.apply_chat_template(TURNS[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert row_tokenizer.chat_format.in_pieces
    assert row.input_ids[: row.prompt_tokens] == asked
    assert decode_labels(row, tokenizer) == ["it returns a file<|eot_id|>"]


def test_own_marks_of_an_unknown_template_are_used() -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|bot|>{% generation %}{{ m.content }}<|stop|>{% endgeneration %}"
        "{% else %}<|you|>{{ m.content }}<|stop|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|bot|>{% endif %}"
    )
    tokenizer = make_tokenizer(template, "<|bot|>", "<|you|>", "<|stop|>")
    row, row_tokenizer = tokenize(tokenizer, TURNS)
    assert decode_labels(row, tokenizer) == ["it returns a file<|stop|>", "it returns the path<|stop|>"]
    assert row_tokenizer.chat_format.training_template == template
    stop = tokenizer.convert_tokens_to_ids("<|stop|>")
    assert row_tokenizer.chat_format.stop_token_ids == tuple(sorted((tokenizer.eos_token_id, stop)))


# --- bases without a template ---

NEUTRAL_TOKENS = {
    "gemma3": ("<start_of_turn>", "<end_of_turn>"),
    "gemma4": ("<|turn>", "<turn|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "phi3": ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
    "glm4": ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>", "<|observation|>"),
    "deepseek": ("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
    "cohere": ("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"),
    "mistral": ("[INST]", "[/INST]"),
    "plain": (),
}


@pytest.mark.parametrize("name", NEUTRAL_TOKENS)
def test_neutral_template_has_only_tokens_that_the_tokenizer_has(name: str) -> None:
    eos = "<｜end▁of▁sentence｜>" if name == "deepseek" else "</s>"
    tokenizer = make_tokenizer(None, *NEUTRAL_TOKENS[name], eos=eos)
    row, row_tokenizer = tokenize(tokenizer, TURNS)
    chat_format = row_tokenizer.chat_format
    assert (chat_format.source, chat_format.name) == ("neutral", name)
    assert chat_format.turn_tokens_are_trained == (not chat_format.turn_token_ids)
    text = tokenizer.decode(row.input_ids)
    written = {token for token in TOKEN.findall(text) if token not in ("<think>", "</think>")}
    assert written <= set(NEUTRAL_TOKENS[name]) | {"<s>", "</s>"}
    assert [label in chat_format.stop_token_ids for label in row.labels if label != IGNORE_INDEX].count(True) >= 2
    assert "generation %}" not in str(chat_format.template)


def test_plain_words_are_chosen_in_words() -> None:
    tokenizer = make_tokenizer(None)
    row, row_tokenizer = tokenize(tokenizer, TURNS)
    assert tokenizer.decode(row.input_ids) == (
        "<s>User:\nwhat does open do\n\nAssistant:\nit returns a file</s>\n\nUser:\nand close\n\nAssistant:\nit returns the path</s>"
    )
    assert row_tokenizer.chat_format.stop_token_ids == (tokenizer.eos_token_id,)
    assert "plain words" in row_tokenizer.chat_format.reason


def test_gemma_base_gets_gemma_turns(base: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    chat_format = choose(tokenizer)
    assert (chat_format.name, chat_format.template) == ("gemma3", read_trl_template("gemma3"))
    start, end = tokenizer.convert_tokens_to_ids(["<start_of_turn>", "<end_of_turn>"])
    assert chat_format.turn_token_ids == (start, end)
    assert chat_format.stop_token_ids == (tokenizer.eos_token_id, end)
    assert not chat_format.turn_tokens_are_trained


def test_eos_of_the_generation_config_are_stops(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(None, "<|im_start|>", "<|im_end|>", "<|other|>")
    other = tokenizer.convert_tokens_to_ids("<|other|>")
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": [{other}, 99999]}}')
    tokenizer.name_or_path = str(tmp_path)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert choose(tokenizer).stop_token_ids == tuple(sorted((tokenizer.eos_token_id, end, other)))


# --- raw rows and texts ---


def test_strings_are_a_user_and_an_assistant() -> None:
    tokenizer = make_tokenizer(read_trl_template("gemma3"))
    row_tokenizer = RowTokenizer(tokenizer, choose(tokenizer))
    strings = {"prompt": TURNS[0]["content"], "completion": TURNS[1]["content"]}
    assert row_tokenizer.tokenize(strings, "prompt_completion") == row_tokenizer.tokenize({"messages": TURNS[:2]}, "messages")
    assert row_tokenizer.tokenize_prompt(strings["prompt"]).input_ids == row_tokenizer.tokenize_prompt(TURNS[:1]).input_ids
    assert row_tokenizer.read_turns(strings, "prompt_completion") == Turns(TURNS[:2], None, 1)


def test_raw_strings_are_joined_and_nothing_is_exported() -> None:
    tokenizer = make_tokenizer(read_trl_template("gemma3"))
    row_tokenizer = RowTokenizer(tokenizer, choose(tokenizer, "a text", prompt_format="raw"))
    row = row_tokenizer.tokenize({"prompt": "open the ", "completion": "path"}, "prompt_completion")
    assert tokenizer.decode(row.input_ids) == "<s>open the path</s>"
    assert decode_labels(row, tokenizer) == ["path</s>"]  # though the tokenizer joins the space to the next word
    assert row.input_ids[: row.prompt_tokens] == row_tokenizer.tokenize_prompt("open the ").input_ids
    assert (row_tokenizer.chat_format.template, tokenizer.chat_template) == (None, None)
    assert row_tokenizer.read_turns({"prompt": "a", "completion": "b"}, "prompt_completion") == "a"


def test_raw_conversations_are_refused() -> None:
    with pytest.raises(JobFailed, match=r"training_config\.prompt_format 'raw'") as failed:
        choose(make_tokenizer(read_trl_template("gemma3")), Turns(TURNS), prompt_format="raw")
    assert failed.value.failure.code == "invalid_config"


RENDERED = "<s><start_of_turn>user\nwhat<end_of_turn>\n<start_of_turn>model\nit returns<end_of_turn>\n"


def test_rendered_texts_keep_the_template_and_its_tokens() -> None:
    tokenizer = make_tokenizer(read_trl_template("gemma3"))
    row_tokenizer = RowTokenizer(tokenizer, choose(tokenizer, RENDERED, RENDERED))
    row = row_tokenizer.tokenize({"text": RENDERED}, "text")
    assert row_tokenizer.chat_format.source == "base"
    assert row.input_ids == tokenizer(RENDERED, add_special_tokens=False)["input_ids"]  # neither BOS nor an end is added
    assert row.labels[0] == IGNORE_INDEX
    assert row.labels[1:] == row.input_ids[1:]


@pytest.mark.parametrize("texts", [("plain text",), (RENDERED, "plain text")])
def test_other_texts_are_raw(texts: tuple[str, ...]) -> None:
    tokenizer = make_tokenizer(read_trl_template("gemma3"))
    row_tokenizer = RowTokenizer(tokenizer, choose(tokenizer, *texts))
    row = row_tokenizer.tokenize({"text": RENDERED}, "text")
    assert row_tokenizer.chat_format.source == "raw"
    specials = set(tokenizer.all_special_ids) | {tokenizer.convert_tokens_to_ids("<end_of_turn>")}
    assert [token for token in row.input_ids if token in specials] == [tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert tokenizer.decode(row.input_ids) == f"<s>{RENDERED}</s>"


def test_requested_chat_form_of_texts_is_obeyed() -> None:
    tokenizer = make_tokenizer(read_trl_template("gemma3"))
    chat_format = choose(tokenizer, "plain text", prompt_format="chat")
    assert (chat_format.source, tokenizer.chat_template) == ("base", read_trl_template("gemma3"))
    row = RowTokenizer(tokenizer, chat_format).tokenize({"text": "plain text"}, "text")
    assert tokenizer.decode(row.input_ids) == "<s>plain text</s>"


# --- literal control tokens ---


@pytest.mark.parametrize("name", ["gemma3", "llama3", "qwen3", "gemma4_v5", "deepseekv3"])
def test_control_tokens_in_contents_stay_text(name: str) -> None:
    tokenizer = make_tokenizer(read_trl_template(name))
    row_tokenizer = RowTokenizer(tokenizer, choose(tokenizer))
    specials = {n: token.content for n, token in tokenizer.added_tokens_decoder.items() if token.special}
    plain = row_tokenizer.tokenize({"messages": TURNS}, "messages")
    expected = [token for token in plain.input_ids if token in specials]
    source = random.Random(7)
    pieces = [*specials.values(), "<end_of_turn", "<", ">", "|>", "what ", "open ", "\n", "é🙂", "<|"]
    for _ in range(60):
        contents = ["x" + "".join(source.choices(pieces, k=source.randrange(6))) + "y" for _ in TURNS]
        messages = [turn | {"content": content} for turn, content in zip(TURNS, contents, strict=True)]
        row = row_tokenizer.tokenize({"messages": messages}, "messages")
        assert [token for token in row.input_ids if token in specials] == expected
        text = tokenizer.decode(row.input_ids)
        assert all(content in text for content in contents)
        for content, answer in zip(contents[1::2], decode_labels(row, tokenizer), strict=True):
            assert content in answer
        assert row.prompt_text == text[: len(row.prompt_text)]


def test_rows_without_control_tokens_are_tokenized_at_once(tokenizer: Any) -> None:
    row_tokenizer = RowTokenizer(tokenizer, choose(tokenizer))
    source = random.Random(7)
    for _ in range(40):
        messages = [turn | {"content": "x" + "".join(source.choices("<>| abé\n🙂", k=9)) + "y"} for turn in TURNS]
        row = row_tokenizer.tokenize({"messages": messages}, "messages")
        assert row.input_ids == tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]


def test_control_tokens_stay_text_in_gemma_tokenizer(tokenizer: Any) -> None:
    row_tokenizer = RowTokenizer(tokenizer, choose(tokenizer))
    row = row_tokenizer.tokenize({"prompt": "what is <end_of_turn>?<eos>", "completion": "it ends <start_of_turn>"}, "prompt_completion")
    assert tokenizer.decode(row.input_ids) == (
        "<bos><start_of_turn>user\nwhat is <end_of_turn>?<eos><end_of_turn>\n<start_of_turn>model\nit ends <start_of_turn><end_of_turn>\n"
    )
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert (row.input_ids.count(end), row.input_ids.count(tokenizer.eos_token_id)) == (2, 0)
    assert row_tokenizer.tokenize_prompt("what is <end_of_turn>?<eos>").input_ids == row.input_ids[: row.prompt_tokens]


def test_private_characters_beside_control_tokens_are_refused(tokenizer: Any) -> None:
    row_tokenizer = RowTokenizer(tokenizer, choose(tokenizer))
    assert row_tokenizer.tokenize_prompt("\U000f0000 alone is text").input_ids
    with pytest.raises(JobFailed, match="private-use"):
        row_tokenizer.tokenize_prompt("<eos> and \U000f0000")


# --- which messages are learned ---


def make_row_tokenizer_with(tokenizer: Any, **options: Any) -> RowTokenizer:
    return RowTokenizer(tokenizer, choose(tokenizer), **options)


@pytest.mark.parametrize("name", ["gemma3", "gemma4_v5"])  # with marks, and by rendering the turns before
def test_only_chosen_answers_are_learned(name: str) -> None:
    tokenizer = make_tokenizer(read_trl_template(name))
    last = make_row_tokenizer_with(tokenizer, last_turn_only=True).tokenize({"messages": TURNS}, "messages")
    weighted = [*TURNS[:3], TURNS[3] | {"weight": 0}]
    first = make_row_tokenizer_with(tokenizer).tokenize({"messages": [TURNS[0], TURNS[1] | {"weight": 1}, *weighted[2:]]}, "messages")
    assert [text.split("<")[0] for text in decode_labels(last, tokenizer)] == ["it returns the path"]
    assert [text.split("<")[0] for text in decode_labels(first, tokenizer)] == ["it returns a file"]
    assert last.input_ids == first.input_ids
    assert "weight" not in tokenizer.decode(first.input_ids)


def test_training_on_inputs_labels_all_but_bos() -> None:
    from jobs.llm.evaluation.prompts import make_eval_prompts

    tokenizer = make_tokenizer(read_trl_template("gemma3"))
    row = make_row_tokenizer_with(tokenizer, train_on_inputs=True).tokenize({"messages": TURNS}, "messages")
    assert row.labels == [IGNORE_INDEX, *row.input_ids[1:]]
    (prompt,) = make_eval_prompts([row], tokenizer, 9)  # the last answer
    assert prompt.prompt_text.endswith("and close<end_of_turn>\n<start_of_turn>model\n")
    assert prompt.reference.startswith("it returns the path")


# --- tools ---

TOOL = {"type": "function", "function": {"name": "open_file", "description": "Opens.", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "open_file", "arguments": {"path": "a.txt"}}}
TOOL_TURNS = [
    TURNS[0],
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "name": "open_file", "content": "the text"},
    TURNS[1],
]


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_nothink", "gemma4_v5", "llama3_1", "glm4moe", "gptoss", "nemotron_3_nano"])
def test_tools_are_rendered_and_calls_are_learned(name: str) -> None:
    tokenizer = make_tokenizer(read_trl_template(name))
    row, _ = tokenize(tokenizer, TOOL_TURNS, tools=[TOOL])
    text, answers = tokenizer.decode(row.input_ids), decode_labels(row, tokenizer)
    assert text.count("open_file") >= 2
    assert "a.txt" in answers[0]
    assert "it returns a file" in answers[-1]
    assert not any("the text" in answer for answer in answers)


@pytest.mark.parametrize("name", ["gemma3", "phi3", "llama3", "deepseekv3"])
def test_template_without_tools_is_refused_in_words(name: str) -> None:
    tokenizer = make_tokenizer(read_trl_template(name))
    with pytest.raises(JobFailed) as failed:
        tokenize(tokenizer, TOOL_TURNS, tools=[TOOL])
    assert failed.value.failure.code in ("invalid_config", "invalid_data")
    assert "chat template" in failed.value.failure.message


def test_template_that_leaves_out_arguments_of_calls_is_refused() -> None:
    tokenizer = make_tokenizer(read_trl_template("lfm2"))
    with pytest.raises(JobFailed, match=r"calls of tools|the arguments of calls"):
        tokenize(tokenizer, TOOL_TURNS, tools=[TOOL])


def test_tools_are_part_of_the_prompt_of_a_pair() -> None:
    from jobs.llm.data.preference import tokenize_pairs

    tokenizer = make_tokenizer(read_trl_template("qwen3"))
    row_tokenizer = RowTokenizer(tokenizer, choose(tokenizer))
    row = {"prompt": [TURNS[0]], "chosen": [TOOL_TURNS[1]], "rejected": [TURNS[1]], "tools": [TOOL]}
    (pair,) = tokenize_pairs([row], row_tokenizer, 1000).rows
    assert all("Opens." in answer.prompt_text for answer in (pair.chosen, pair.rejected))


def test_calls_without_tools_are_learned() -> None:
    tokenizer = make_tokenizer(read_trl_template("deepseekv3"))
    row, row_tokenizer = tokenize(tokenizer, TOOL_TURNS)
    assert "a.txt" in decode_labels(row, tokenizer)[0]
    assert "do not have to begin with reasoning" in row_tokenizer.chat_format.reason


def test_ignored_tools_are_refused() -> None:
    tokenizer = make_tokenizer(read_trl_template("gemma3"))
    with pytest.raises(JobFailed, match="does not render tools"):
        tokenize(tokenizer, TURNS, tools=[TOOL])


# --- templates that cannot be used ---

HEAD = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|stop|>{% endfor %}"
ASK = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
BAD_TEMPLATES = {
    "rejects the roles": "{{ raise_exception('not today') }}",
    "leaves out the content of messages of the role user": HEAD.replace("m.content", "m.content if m.role == 'assistant'") + ASK,
    "renders no end after an answer": HEAD.replace("<|stop|>", "\n") + ASK,
    "renders no end after": HEAD.replace("<|stop|>", "(end)") + ASK,
    "changes earlier turns": HEAD.replace("<|stop|>", "<|stop|>{{ '!' if loop.last }}") + ASK,
}


@pytest.mark.parametrize("problem", BAD_TEMPLATES)
@pytest.mark.parametrize("requested", [False, True])
def test_bad_template_is_refused_before_training(problem: str, requested: bool) -> None:
    template = BAD_TEMPLATES[problem]
    tokenizer = make_tokenizer(None if requested else template, "<|user|>", "<|assistant|>", "<|stop|>")
    with pytest.raises(JobFailed, match=re.escape(problem)) as failed:
        choose(tokenizer, Turns(TURNS), **({"chat_template": template} if requested else {}))
    owner = "training_config.chat_template" if requested else "the base model's chat template"
    assert failed.value.failure.message.startswith(owner)


def test_requested_template_replaces_the_base_one() -> None:
    tokenizer = make_tokenizer(read_trl_template("gemma3"), "<|user|>", "<|assistant|>", "<|stop|>")
    chat_format = choose(tokenizer, Turns(TURNS), chat_template=HEAD + ASK)
    assert (chat_format.source, chat_format.template, tokenizer.chat_template) == ("request", HEAD + ASK, HEAD + ASK)


def test_row_tokenizer_can_be_pickled(tokenizer: Any) -> None:
    row_tokenizer = RowTokenizer(tokenizer, choose(tokenizer))
    row = {"messages": [TURNS[0] | {"content": "<eos>"}, TURNS[1]]}
    expected = row_tokenizer.tokenize(row, "messages")
    assert pickle.loads(pickle.dumps(row_tokenizer)).tokenize(row, "messages") == expected

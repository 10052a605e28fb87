"""Generation during training: answers are greedy, and the training does not change."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.llm.chat_format import ChatFormat
from jobs.llm.data.tokenize import tokenize_split
from jobs.llm.evaluation.generation import (
    generate_batch,
    make_samples,
    max_generation_batch,
)
from jobs.llm.evaluation.prompts import make_eval_prompts
from jobs.runtime.errors import JobFailed
from schema.estimate.llm import MAX_BATCH_PROMPTS, MAX_BATCH_TOKENS, MIN_BATCH_PROMPTS
from tests.jobs.conftest import make_chat_format, make_row_tokenizer

PROMPTS = ["what does files do", "it", "open close read write path name value number string", "call", "what does copy do 17", "a list of"]
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def model(base: Path) -> Any:
    """The tiny base in training mode. Tests must not change it."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(base)
    loaded.config.use_cache = False
    return loaded.train()


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> list[list[int]]:
    return [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]


@pytest.fixture(scope="module")
def expected_answers(model: Any, tokenizer: Any, prompts: list[list[int]]) -> list[str]:
    """Greedy answers, each token computed by a full forward pass without a cache."""
    return [generate_greedy(model, tokenizer, prompt) for prompt in prompts]


def generate_greedy(model: Any, tokenizer: Any, prompt: list[int], ends: tuple[int, ...] = (1,)) -> str:
    import torch

    generated: list[int] = []
    model.eval()
    while len(generated) < NEW_TOKENS:
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([[*prompt, *generated]], device=model.device)).logits[0, -1].argmax())
        if token in ends:
            break
        generated.append(token)
    model.train()
    return tokenizer.decode(generated, skip_special_tokens=True)


def generate_answers(model: Any, tokenizer: Any, prompts: list[list[int]], batch_size: int = 4, **options: Any) -> list[str]:
    return generate_batch(model, tokenizer, prompts, max_new_tokens=NEW_TOKENS, batch_size=batch_size, **options)


def load_with_lora(base: Path, **options: Any) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.5, init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(AutoModelForCausalLM.from_pretrained(base, **options), config)


def capture_rng_state() -> tuple[Any, ...]:
    import numpy
    import torch

    return random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
def test_answers_are_greedy_for_any_batch_size(
    model: Any, tokenizer: Any, prompts: list[list[int]], expected_answers: list[str], batch_size: int
) -> None:
    assert len(set(expected_answers)) > 1
    assert generate_answers(model, tokenizer, prompts, batch_size) == expected_answers


def test_adapter_is_used_without_dropout(base: Path, tokenizer: Any, prompts: list[list[int]], expected_answers: list[str]) -> None:
    adapted = load_with_lora(base).train()
    generated = generate_answers(adapted, tokenizer, prompts)
    assert generated == [generate_greedy(adapted, tokenizer, prompt) for prompt in prompts]
    assert generated != expected_answers


def test_bf16_model_matches_greedy_generation(base: Path, tokenizer: Any, prompts: list[list[int]]) -> None:
    import torch

    adapted = load_with_lora(base, dtype=torch.bfloat16)
    assert generate_answers(adapted, tokenizer, prompts[:1]) == [generate_greedy(adapted, tokenizer, prompts[0])]


def test_sampling_settings_of_generation_config_are_ignored(
    model: Any, tokenizer: Any, prompts: list[list[int]], expected_answers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import GenerationConfig

    sampling = GenerationConfig(do_sample=True, temperature=5.0, top_k=50, repetition_penalty=3.0, no_repeat_ngram_size=1, eos_token_id=1)
    monkeypatch.setattr(model, "generation_config", sampling)
    assert generate_answers(model, tokenizer, prompts) == expected_answers


@pytest.mark.parametrize("as_list", [True, False])
def test_generation_stops_at_eos_of_generation_config(
    model: Any, tokenizer: Any, prompts: list[list[int]], expected_answers: list[str], monkeypatch: pytest.MonkeyPatch, as_list: bool
) -> None:
    end = tokenizer(expected_answers[0], add_special_tokens=False)["input_ids"][2]  # a token inside an answer
    monkeypatch.setattr(model.generation_config, "eos_token_id", [1, end] if as_list else end)
    generated = generate_answers(model, tokenizer, prompts)
    assert generated == [generate_greedy(model, tokenizer, prompt, (1, end) if as_list else (end,)) for prompt in prompts]
    assert generated[0] != expected_answers[0]


def test_special_tokens_are_removed_from_answers(
    model: Any, tokenizer: Any, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    start_of_turn = tokenizer.convert_tokens_to_ids("<start_of_turn>")
    head = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda hidden: head(hidden).index_fill(-1, torch.tensor([start_of_turn]), 1e4))
    assert generate_answers(model, tokenizer, prompts) == [""] * len(prompts)


@pytest.mark.parametrize(
    ("train_batch", "longest", "expected"),
    [(1, 20, MAX_BATCH_PROMPTS), (1, 4000, MIN_BATCH_PROMPTS), (1, 1000, MAX_BATCH_TOKENS // 1064), (64, 20, 64), (16, 4000, 16)],
)
def test_generation_batch_is_larger_than_training_batch(train_batch: int, longest: int, expected: int) -> None:
    assert max_generation_batch(train_batch, [[1], [1] * longest], 64) == expected


def test_no_prompts_give_no_answers(model: Any, tokenizer: Any) -> None:
    assert generate_answers(model, tokenizer, []) == []


def test_generation_does_not_change_training(base: Path, tokenizer: Any, prompts: list[list[int]]) -> None:
    import torch

    def train_two_steps(*, generate: bool) -> dict[str, Any]:
        adapted = load_with_lora(base).train()
        optimizer = torch.optim.SGD([part for part in adapted.parameters() if part.requires_grad], lr=0.1)
        torch.manual_seed(11)
        for _ in range(2):
            if generate:
                generate_answers(adapted, tokenizer, prompts)
            rows = torch.tensor([prompts[2]])
            adapted(input_ids=rows, labels=rows).loss.backward()
            optimizer.step()
        return {name: part.detach() for name, part in adapted.named_parameters() if part.requires_grad}

    alone, interrupted = train_two_steps(generate=False), train_two_steps(generate=True)
    assert all(torch.equal(alone[name], interrupted[name]) for name in alone)


def test_generation_restores_model_and_rng_state(base: Path, tokenizer: Any, prompts: list[list[int]]) -> None:
    adapted = load_with_lora(base).train()
    adapted.activation_checkpointing_enable()
    adapted.config.use_cache = False
    frozen = adapted.get_input_embeddings().eval()  # one module stays in evaluation mode during training
    before = capture_rng_state(), [(part.training, getattr(part, "gradient_checkpointing", None)) for part in adapted.modules()]
    config = adapted.generation_config.to_dict()

    generate_answers(adapted, tokenizer, prompts)

    assert (capture_rng_state(), [(part.training, getattr(part, "gradient_checkpointing", None)) for part in adapted.modules()]) == before
    assert not frozen.training
    assert any(checkpointing for _, checkpointing in before[1])
    assert adapted.config.use_cache is False
    assert adapted.generation_config.to_dict() == config


def test_rng_state_changed_by_callback_is_restored(model: Any, tokenizer: Any, prompts: list[list[int]]) -> None:
    import numpy
    import torch

    def draw() -> None:
        random.random()
        numpy.random.rand()
        torch.rand(1)

    before = capture_rng_state()
    generate_answers(model, tokenizer, prompts, check_stop=draw)
    assert capture_rng_state() == before


@pytest.mark.parametrize("calls", [1, 3, 9])
def test_generation_can_be_interrupted(model: Any, tokenizer: Any, prompts: list[list[int]], calls: int) -> None:
    class Interrupted(Exception):
        pass

    called = 0

    def check_stop() -> None:
        nonlocal called
        called += 1
        if called == calls:
            raise Interrupted

    before = capture_rng_state()
    with pytest.raises(Interrupted):
        generate_answers(model, tokenizer, prompts, 2, check_stop=check_stop)
    assert called == calls
    assert model.training
    assert capture_rng_state() == before


@pytest.fixture
def limit_batch_rows(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Simulates memory for a number of rows per batch; returns the list of attempted batch sizes."""
    import torch

    embedding = torch.nn.functional.embedding

    def make(rows: int) -> list[int]:
        tried: list[int] = []

        def look_up(tokens: Any, *rest: Any, **named: Any) -> Any:
            if tokens.shape[1] > 1:  # a prompt, not a token of an answer
                tried.append(len(tokens))
            if len(tokens) > rows:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return embedding(tokens, *rest, **named)

        monkeypatch.setattr(torch.nn.functional, "embedding", look_up)
        return tried

    return make


def test_generation_batch_shrinks_when_memory_is_short(
    model: Any, tokenizer: Any, prompts: list[list[int]], expected_answers: list[str], limit_batch_rows: Callable[[int], list[int]]
) -> None:
    tried = limit_batch_rows(2)
    assert generate_answers(model, tokenizer, prompts, 6) == expected_answers
    assert tried == [6, 3, 1, 1, 1, 1, 1, 1]


def test_oom_with_single_prompt_fails_with_reason(
    model: Any, tokenizer: Any, prompts: list[list[int]], limit_batch_rows: Callable[[int], list[int]]
) -> None:
    limit_batch_rows(0)
    with pytest.raises(JobFailed, match="single held-out prompt") as failed:
        generate_answers(model, tokenizer, prompts, 2)
    assert failed.value.failure.code == "out_of_memory"
    assert model.training


def test_other_errors_are_not_treated_as_oom(model: Any, tokenizer: Any) -> None:
    with pytest.raises((IndexError, RuntimeError), match="index out of range"):
        generate_answers(model, tokenizer, [[2, 10**6]])


class FakeImageTextModel:
    """An image-text model that stores its inputs and generates nothing."""

    training = True
    device = "cpu"

    def __init__(self) -> None:
        from transformers import GenerationConfig

        self.generation_config = GenerationConfig(eos_token_id=1)
        self.inputs: list[dict[str, Any]] = []

    def modules(self) -> list[Any]:
        return []

    def eval(self) -> None:
        pass

    def generate(self, *, generation_config: Any, stopping_criteria: Any, **inputs: Any) -> Any:
        import torch

        self.inputs.append(inputs)
        return torch.cat([inputs["input_ids"], torch.ones(len(inputs["input_ids"]), 1).long()], dim=1)


def test_image_features_follow_their_prompts(tokenizer: Any) -> None:
    import torch

    model = FakeImageTextModel()
    first_features = {"token_type_ids": torch.tensor([0, 1]), "pixel_values": torch.full((1, 3, 2, 2), 1.0)}
    last_features = {"token_type_ids": torch.tensor([0, 1, 1]), "pixel_values": torch.full((2, 3, 2, 2), 2.0)}
    generate_answers(model, tokenizer, [[2, 9], [2, 9, 9, 9], [2, 9, 9]], features=[first_features, {}, last_features])

    (inputs,) = model.inputs
    assert inputs["input_ids"].tolist() == [[2, 9, 9, 9], [0, 2, 9, 9], [0, 0, 2, 9]]  # longest first
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1]]
    assert inputs["token_type_ids"].tolist() == [[0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 0, 1]]
    assert inputs["pixel_values"][:, 0, 0, 0].tolist() == [2.0, 2.0, 1.0]


# --- prompts ---


def tokenize_rows(rows: list[dict[str, Any]], dataset_type: Any, tokenizer: Any, max_length: int = 512) -> Any:
    return tokenize_split(iter(rows), dataset_type, make_row_tokenizer(tokenizer), max_length).rows


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_each_assistant_turn_gives_one_eval_prompt(tokenizer: Any) -> None:
    conversation = [
        turn("user", "what does copy do"),
        turn("assistant", "it returns a list"),
        turn("user", "call"),
        turn("assistant", "a name"),
    ]
    first, second = make_eval_prompts(tokenize_rows([{"messages": conversation}], "messages", tokenizer), tokenizer, 9)
    assert [first.reference, second.reference] == ["it returns a list", "a name"]
    assert first.prompt_text == "<bos><start_of_turn>user\nwhat does copy do<end_of_turn>\n<start_of_turn>model\n"
    assert (
        second.prompt_text
        == first.prompt_text + "it returns a list<end_of_turn>\n<start_of_turn>user\ncall<end_of_turn>\n<start_of_turn>model\n"
    )
    for prompt in (first, second):
        assert tokenizer.decode(prompt.prompt_ids) == prompt.prompt_text
        assert prompt.row_index == 0


def test_completion_is_reference_of_its_prompt(tokenizer: Any) -> None:
    (prompt,) = make_eval_prompts(
        tokenize_rows([{"prompt": "open the", "completion": " path"}], "prompt_completion", tokenizer), tokenizer, 9
    )
    assert prompt.prompt_text == "<bos><start_of_turn>user\nopen the<end_of_turn>\n<start_of_turn>model\n"
    assert prompt.reference == "path"
    assert prompt.prompt_ids == tuple(make_row_tokenizer(tokenizer).tokenize_prompt("open the").input_ids)


def test_text_rows_give_no_eval_prompts(tokenizer: Any) -> None:
    assert make_eval_prompts(tokenize_rows([{"text": "it returns a list of files"}], "text", tokenizer), tokenizer, 9) == []


def test_blank_answers_are_not_references(tokenizer: Any) -> None:
    rows = [{"prompt": "what", "completion": " "}, {"prompt": "what", "completion": " call"}]
    assert [prompt.row_index for prompt in make_eval_prompts(tokenize_rows(rows, "prompt_completion", tokenizer), tokenizer, 9)] == [1]


def test_eval_prompts_are_first_rows_and_deterministic(tokenizer: Any) -> None:
    rows = tokenize_rows([{"prompt": f"what {n}", "completion": f" name {n}"} for n in range(9)], "prompt_completion", tokenizer)
    chosen = make_eval_prompts(rows, tokenizer, 3)
    assert [prompt.reference.strip() for prompt in chosen] == ["name 0", "name 1", "name 2"]
    assert make_eval_prompts(rows, tokenizer, 3) == chosen
    assert make_eval_prompts(rows, tokenizer, 0) == []


# --- samples ---


def test_samples_are_first_rows_with_control_characters_replaced(tokenizer: Any) -> None:
    chat_format = make_chat_format(tokenizer)
    samples = make_samples(chat_format, tokenizer, ["a\nb", "c", "d"], ["ref\x1b[2J", None, "e"], ["x" * 3000, "y", "z"], 2)
    assert [sample.prompt for sample in samples] == ["a\nb", "c"]
    assert [sample.reference for sample in samples] == ["ref\N{REPLACEMENT CHARACTER}[2J", None]
    assert samples[0].text == "x" * 1999 + "…"


def test_sample_shows_the_question_as_its_user_wrote_it(tokenizer: Any) -> None:
    chat_format = make_chat_format(tokenizer)
    question = "def f(x):\n    if x:\n\treturn 1\n\n\n    # 模型\N{IDEOGRAPHIC SPACE}\N{NO-BREAK SPACE}👩\N{ZERO WIDTH JOINER}🚀"
    rows = tokenize_rows([{"messages": [message("user", question), message("assistant", "it returns")]}], "messages", tokenizer)
    (prompt,) = make_eval_prompts(rows, tokenizer, 1)
    assert prompt.prompt_text.startswith("<bos><start_of_turn>user\n")
    (sample,) = make_samples(chat_format, tokenizer, [prompt.prompt_text], [prompt.reference], ["  a\n    b"], 1)
    assert (sample.prompt, sample.text) == (question, "  a\n    b")


def test_sample_of_several_turns_names_their_roles(tokenizer: Any) -> None:
    turns = [message("user", "what is\nit"), message("assistant", "a list"), message("user", "of files")]
    rows = tokenize_rows([{"messages": [*turns, message("assistant", "yes")]}], "messages", tokenizer)
    *_, prompt = make_eval_prompts(rows, tokenizer, 2)
    (sample,) = make_samples(make_chat_format(tokenizer), tokenizer, [prompt.prompt_text], [None], ["yes"], 1)
    assert sample.prompt == "user: what is\nit\n\nassistant: a list\n\nuser: of files"


def test_sample_of_a_raw_prompt_is_its_text(tokenizer: Any) -> None:
    raw = ChatFormat("raw", "raw", None, None, (1,), (), turn_tokens_are_trained=True)
    (sample,) = make_samples(raw, tokenizer, ["<bos>    return\n"], [None], ["x"], 1)
    assert sample.prompt == "    return\n"


def test_sample_of_an_unknown_form_loses_only_special_tokens(tokenizer: Any) -> None:
    (sample,) = make_samples(make_chat_format(tokenizer), tokenizer, ["<bos><start_of_turn>tool\nname<end_of_turn>\n"], [None], ["x"], 1)
    assert sample.prompt == "tool\nname"


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}

"""Greedy generation in batches, during training or after it."""

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jobs.llm.evaluation.readable_prompts import make_readable
from jobs.llm.evaluation.state import evaluation_state
from jobs.llm.oom import free_memory, is_out_of_memory
from jobs.runtime.errors import JobFailed
from schema.estimate.llm import limit_generation_batch
from schema.job import Sample

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import GenerationConfig, PreTrainedTokenizerBase

    from jobs.llm.chat_format import ChatFormat

# Beside printable ones: line breaks, tabs, and what joins letters and emoji.
KEPT_CHARACTERS = "\n\t\N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}"
MAX_SAMPLE_CHARACTERS = 2000  # of a prompt, a reference or an answer in an event

Features = Mapping[str, "Tensor"]


def generate_batch(
    model: Any,  # any model of transformers or peft
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    check_stop: Callable[[], None] = lambda: None,
    features: Sequence[Features] | None = None,
) -> list[str]:
    """The model's greedy answer to each prompt (token ids, at least one), in the order of the prompts.

    An answer ends at the generation config's EOS tokens, such as the end of a turn, and contains no special tokens. The model and every
    random number generator are restored. `check_stop` is called before each batch and each token, and may raise.

    `features` are a prompt's inputs besides its tokens. Tensors with one number per token of the prompt, such as token_type_ids, are
    padded like the tokens; others, such as pixel_values, are concatenated along their first dimension.

    When memory runs out, the batch is halved. Raises JobFailed when a single prompt is too large.
    """
    # Longest first: there is little padding, and memory runs out in the first batch if at all.
    longest_first = sorted(range(len(prompts)), key=lambda n: -len(prompts[n]))
    config = _greedy_config(model, tokenizer, max_new_tokens)
    answers: dict[int, str] = {}
    with evaluation_state(model):
        while len(answers) < len(prompts):
            check_stop()
            batch = longest_first[len(answers) : len(answers) + batch_size]
            inputs = _collate_left_padded(
                [prompts[n] for n in batch], [features[n] for n in batch] if features else [], config.pad_token_id
            )
            generated = _generate_or_none(model, inputs, config, check_stop)
            if generated is not None:
                answers |= {n: _decode_answer(tokens, config, tokenizer) for n, tokens in zip(batch, generated, strict=True)}
            elif batch_size == 1:
                hint = "lower max_seq_length or eval_config.max_new_tokens, or choose hardware with more memory"
                raise JobFailed("out_of_memory", "memory ran out while generating the answer to a single held-out prompt", hint)
            else:
                batch_size //= 2
                free_memory()
    return [answers[n] for n in range(len(prompts))]


def max_generation_batch(train_batch_size: int, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> int:
    """The number of prompts per batch, at least the training batch size."""
    return limit_generation_batch(train_batch_size, max(map(len, prompts)), max_new_tokens)


def make_samples(
    chat_format: "ChatFormat",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    references: Sequence[str | None],
    generations: Sequence[str],
    count: int,
) -> tuple[Sample, ...]:
    """The first `count` prompts, as users wrote them, with their references and generations; shortened, without control characters."""
    rows = zip(make_readable(prompts[:count], chat_format, tokenizer), references[:count], generations[:count], strict=True)
    return tuple(
        Sample(
            prompt=_make_sample_text(prompt),
            reference=None if reference is None else _make_sample_text(reference),
            text=_make_sample_text(text),
        )
        for prompt, reference, text in rows
    )


def _greedy_config(model: Any, tokenizer: "PreTrainedTokenizerBase", max_new_tokens: int) -> "GenerationConfig":  # any model
    """A greedy config. It sets every field that would otherwise come from the base's own config, which often samples."""
    from transformers import GenerationConfig

    eos_ids = model.generation_config.eos_token_id
    eos_ids = tokenizer.eos_token_id if eos_ids is None else eos_ids
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        temperature=1.0,  # these three defaults prevent warnings about sampling options
        top_k=50,
        top_p=1.0,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=list(eos_ids) if isinstance(eos_ids, list | tuple) else [eos_ids],
        pad_token_id=tokenizer.pad_token_id or 0,
        use_cache=True,  # training disables it in the model's config
    )


def _collate_left_padded(prompts: list[Sequence[int]], features: list[Features], pad_id: int) -> dict[str, "Tensor"]:
    """A batch (batch, tokens), padded on the left, so that every answer starts right after its prompt."""
    import torch

    length = max(map(len, prompts))
    inputs = {"input_ids": torch.full((len(prompts), length), pad_id), "attention_mask": torch.zeros(len(prompts), length).long()}
    for n, prompt in enumerate(prompts):
        inputs["input_ids"][n, length - len(prompt) :] = torch.tensor(prompt)
        inputs["attention_mask"][n, length - len(prompt) :] = 1
    for name in {name for prompt_features in features for name in prompt_features}:
        tensors = [(n, prompt_features[name]) for n, prompt_features in enumerate(features) if name in prompt_features]
        if all(tensor.shape == (len(prompts[n]),) for n, tensor in tensors):
            inputs[name] = torch.zeros(len(prompts), length, dtype=tensors[0][1].dtype)
            for n, tensor in tensors:
                inputs[name][n, length - len(tensor) :] = tensor
        else:
            inputs[name] = torch.cat([tensor for _, tensor in tensors])
    return inputs


def _generate_or_none(
    model: Any,  # any model
    inputs: dict[str, "Tensor"],
    config: "GenerationConfig",
    check_stop: Callable[[], None],
) -> list[list[int]] | None:
    """The new tokens of each row of a batch; None when memory runs out."""
    import torch

    def check_stop_at_each_token(tokens: "Tensor", *_: object, **__: object) -> "Tensor":
        check_stop()
        return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)

    try:
        on_device = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        tokens = model.generate(**on_device, generation_config=config, stopping_criteria=[check_stop_at_each_token])
        return tokens[:, inputs["input_ids"].shape[1] :].tolist()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None


def _decode_answer(tokens: list[int], config: "GenerationConfig", tokenizer: "PreTrainedTokenizerBase") -> str:
    end = next((n for n, token in enumerate(tokens) if token in config.eos_token_id), len(tokens))  # padding follows it
    return str(tokenizer.decode(tokens[:end], skip_special_tokens=True))


def _make_sample_text(text: str) -> str:
    return make_printable(text if len(text) <= MAX_SAMPLE_CHARACTERS else text[: MAX_SAMPLE_CHARACTERS - 1] + "…")


def make_printable(text: str) -> str:
    """Replace control characters: a barely trained model may generate some that move a terminal's cursor. Spaces of every kind stay."""
    return "".join(_replace_unprintable(character) for character in text.replace("\r\n", "\n"))


def _replace_unprintable(character: str) -> str:
    is_text = character.isprintable() or character in KEPT_CHARACTERS or unicodedata.category(character) == "Zs"
    return character if is_text else "\N{REPLACEMENT CHARACTER}"

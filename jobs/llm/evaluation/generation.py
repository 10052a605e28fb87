"""What a model answers, while it is being trained or after."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jobs.llm.evaluation.state import evaluation_state
from jobs.llm.oom import free_memory, is_out_of_memory
from jobs.runtime.errors import JobFailed
from schema.job import Sample

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import GenerationConfig, PreTrainedTokenizerBase

MAX_SAMPLE_CHARACTERS = 2000  # of a prompt, a reference or an answer in an event

# Of prompts at once: a token costs less the more of them there are, and all of them keep their keys and values.
MIN_BATCH_PROMPTS, MAX_BATCH_PROMPTS, MAX_BATCH_TOKENS = 8, 32, 16_384

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
    """What the model says to each prompt (token ids, one at least), in the order of the prompts: the likeliest token at every step.

    An answer ends where the model's generation config says, such as at the end of a turn, and has no special tokens. The model is
    left as it was found, and so is every random number generator. `pulse` is called before each batch and each token, and may raise.

    `features` are what a prompt has beside its tokens. Tensors with one number per token of the prompt, such as token_type_ids, are
    padded like the tokens; others, such as pixel_values, are put one behind the other along their first dimension.

    When memory runs out, fewer prompts are answered at once. Raises JobFailed when a single one is too many.
    """
    longest_first = sorted(range(len(prompts)), key=lambda n: -len(prompts[n]))  # little padding, and a lack of memory shows at once
    config = _greedy_config(model, tokenizer, max_new_tokens)
    size = batch_size
    found: dict[int, str] = {}
    with evaluation_state(model):
        while len(found) < len(prompts):
            check_stop()
            batch = longest_first[len(found) : len(found) + size]
            inputs = _collate_left_padded(
                [prompts[n] for n in batch], [features[n] for n in batch] if features else [], config.pad_token_id
            )
            said = _generate_or_none(model, inputs, config, check_stop)
            if said is not None:
                found |= {n: _decode_answer(tokens, config, tokenizer) for n, tokens in zip(batch, said, strict=True)}
            elif size == 1:
                hint = "lower max_seq_length or eval_config.max_new_tokens, or ask for hardware with more memory"
                raise JobFailed("out_of_memory", "memory ran out while a single held-out prompt was answered", hint)
            else:
                size //= 2
                free_memory()
    return [found[n] for n in range(len(prompts))]


def max_generation_batch(train_batch_size: int, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> int:
    """How many prompts to answer together, where so many rows are trained together."""
    return max(train_batch_size, MIN_BATCH_PROMPTS, min(MAX_BATCH_PROMPTS, MAX_BATCH_TOKENS // (max(map(len, prompts)) + max_new_tokens)))


def make_samples(prompts: Sequence[str], references: Sequence[str | None], generations: Sequence[str], count: int) -> tuple[Sample, ...]:
    """The first `count` prompts with the rows' own answers and the model's, fit to be shown."""
    rows = list(zip(prompts, references, generations, strict=True))[:count]
    return tuple(
        Sample(
            prompt=_make_sample_text(prompt),
            reference=None if reference is None else _make_sample_text(reference),
            text=_make_sample_text(text),
        )
        for prompt, reference, text in rows
    )


def _greedy_config(model: Any, tokenizer: "PreTrainedTokenizerBase", max_new_tokens: int) -> "GenerationConfig":  # any model
    """The likeliest token at every step. What is not said here would be taken from the base's own config, which often samples."""
    from transformers import GenerationConfig

    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        temperature=1.0,  # with these three it is silent about what greedy search does not use
        top_k=50,
        top_p=1.0,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=list(ends) if isinstance(ends, list | tuple) else [ends],
        pad_token_id=tokenizer.pad_token_id or 0,
        use_cache=True,  # a training turns it off in the model's config
    )


def _collate_left_padded(prompts: list[Sequence[int]], features: list[Features], pad_id: int) -> dict[str, "Tensor"]:
    """A batch (B, T), padded on the left: every prompt ends where its answer begins."""
    import torch

    longest = max(map(len, prompts))
    inputs = {"input_ids": torch.full((len(prompts), longest), pad_id), "attention_mask": torch.zeros(len(prompts), longest).long()}
    for n, prompt in enumerate(prompts):
        inputs["input_ids"][n, longest - len(prompt) :] = torch.tensor(prompt)
        inputs["attention_mask"][n, longest - len(prompt) :] = 1
    for name in {name for of_prompt in features for name in of_prompt}:
        parts = [(n, of_prompt[name]) for n, of_prompt in enumerate(features) if name in of_prompt]
        if all(part.shape == (len(prompts[n]),) for n, part in parts):
            inputs[name] = torch.zeros(len(prompts), longest, dtype=parts[0][1].dtype)
            for n, part in parts:
                inputs[name][n, longest - len(part) :] = part
        else:
            inputs[name] = torch.cat([part for _, part in parts])
    return inputs


def _generate_or_none(
    model: Any,  # any model
    inputs: dict[str, "Tensor"],
    config: "GenerationConfig",
    check_stop: Callable[[], None],
) -> list[list[int]] | None:
    """The new tokens of each row of a batch; None when there is not enough memory for it."""
    import torch

    def never(tokens: "Tensor", *_: object, **__: object) -> "Tensor":
        check_stop()
        return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)

    try:
        on_device = {name: part.to(model.device) for name, part in inputs.items()}
        tokens = model.generate(**on_device, generation_config=config, stopping_criteria=[never])
        return tokens[:, inputs["input_ids"].shape[1] :].tolist()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None


def _decode_answer(tokens: list[int], config: "GenerationConfig", tokenizer: "PreTrainedTokenizerBase") -> str:
    end = next((n for n, token in enumerate(tokens) if token in config.eos_token_id), len(tokens))  # padding comes after it
    return str(tokenizer.decode(tokens[:end], skip_special_tokens=True))


def _make_sample_text(text: str) -> str:
    return make_printable(text if len(text) <= MAX_SAMPLE_CHARACTERS else text[: MAX_SAMPLE_CHARACTERS - 1] + "…")


def make_printable(text: str) -> str:
    """Replace control characters: a barely trained model may generate some that move a terminal's cursor."""
    return "".join(character if character.isprintable() or character in "\n\t" else "\N{REPLACEMENT CHARACTER}" for character in text)

"""The passages on which models are compared, a model's next-token log probabilities on them, and its answer to a held-out question."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.llm.exporters.user_path import encode_with_tokenizer
from jobs.llm.llama_cpp.fidelity import Passage, log_softmax
from jobs.llm.model_kinds import AUTO_CLASSES, ModelKind

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from jobs.llm.chat_format import ChatFormat
    from jobs.llm.trained_model import HeldOutExample, UserPrompt

# Limits of time and memory: with Gemma's vocabulary of 262,144, a position takes 1 MB of float32 and 0.3 GFLOP in the head.
MAX_PASSAGES = 8
MAX_PASSAGE_TOKENS = 256  # of one passage
MAX_POSITIONS = 256  # compared positions, over all passages
ANSWER_TOKENS = 8  # of the greedy answers that are compared: an error in the model or its prompt changes the first ones

# A job without held-out rows is verified on these: prose, code, names and numbers.
FALLBACK_TEXTS = (
    "The quick brown fox jumps over the lazy dog, and the dog does not mind. It is a warm day, and nothing else happens until the evening.",
    "def mean(values: list[float]) -> float:\n    return sum(values) / len(values)\n\n\nprint(mean([1.0, 2.5, 4.0]))\n",
    "In 1969 three people flew to the Moon. Two of them walked on it for 2 hours and 31 minutes; the third one waited in orbit.",
)
FALLBACK_PROMPT = "Once upon a time"


def make_passages(examples: "Sequence[HeldOutExample]", tokenizer: "PreTrainedTokenizerBase") -> tuple[Passage, ...]:
    """The passages that every model reads: held-out rows cut around the start of the answer, or the fallback texts."""
    held_out = [_make_passage(example) for example in examples if example.input_ids]
    fallback = [Passage(ids=tuple(tokenizer.encode(text)), compared_tokens=0) for text in FALLBACK_TEXTS] if not held_out else []
    passages = (held_out or fallback)[:MAX_PASSAGES]
    positions = MAX_POSITIONS // len(passages)
    return tuple(passage.model_copy(update={"compared_tokens": min(positions, len(passage.ids))}) for passage in passages)


def select_sample_prompt(
    prompts: "Sequence[UserPrompt]",
    examples: "Sequence[HeldOutExample]",
    tokenizer: "PreTrainedTokenizerBase",
    chat_format: "ChatFormat",
) -> tuple[str, tuple[int, ...]]:
    """The shortest question as a user asks it, or held-out prompt, for a sample generation, as text and as token ids."""
    questions = [tuple(encode_with_tokenizer(tokenizer, chat_format, prompt)) for prompt in prompts if prompt.text is None]
    if questions:
        ids = min(questions, key=len)
        return str(tokenizer.decode(list(ids))), _truncate(ids, len(ids))
    held_out = [example for example in examples if example.prompt_tokens]
    if not held_out:
        return FALLBACK_PROMPT, tuple(tokenizer.encode(FALLBACK_PROMPT))
    shortest = min(held_out, key=lambda example: example.prompt_tokens)
    return shortest.prompt_text, _truncate(shortest.input_ids[: shortest.prompt_tokens], shortest.prompt_tokens)


@dataclass(frozen=True)
class GreedyAnswer:
    """The first tokens of a model's most likely answer, and its log probabilities (tokens, vocabulary) before each of them."""

    ids: tuple[int, ...]
    log_probs: "NDArray[np.float32]"

    def find_difference(self, ids: Sequence[int], tolerance_nats: float) -> int | None:
        """Where another model's answer differs first; None for the same tokens, or where the two were nearly as likely."""
        position = next((n for n, (own, other) in enumerate(zip(self.ids, ids, strict=False)) if own != other), None)
        if position is None:
            return None
        row = self.log_probs[position]
        return position if float(row.max() - row[ids[position]]) > tolerance_nats else None


def answer_greedily(model: "torch.nn.Module", prompt_ids: Sequence[int], stop_token_ids: Sequence[int]) -> GreedyAnswer:
    """A model's answer to a prompt, up to ANSWER_TOKENS tokens or the first stop token."""
    import numpy as np
    import torch

    device = next(model.parameters()).device
    answer: list[int] = []
    rows: list[NDArray[np.float32]] = []
    with torch.inference_mode():
        while len(answer) < ANSWER_TOKENS and not (answer and answer[-1] in stop_token_ids):
            ids = torch.tensor([[*prompt_ids, *answer]], device=device)
            # Without a cache: architectures with a state have caches of other kinds, and these are few tokens.
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
            rows.append(log_softmax(logits[0, -1].float().cpu().numpy()))
            answer.append(int(rows[-1].argmax()))
    return GreedyAnswer(tuple(answer), np.stack(rows))


def load_model(
    folder: Path, dtype: "torch.dtype", device: str, model_kind: ModelKind = "causal", num_labels: int | None = None
) -> "torch.nn.Module":
    """Load a model from a local folder for inference; `num_labels` is a reward model's number of scores, where the config lacks it."""
    import transformers

    options: dict[str, Any] = {} if num_labels is None else {"num_labels": num_labels}
    options |= {"trust_remote_code": False, "use_safetensors": True, "local_files_only": True}
    model = getattr(transformers, AUTO_CLASSES[model_kind]).from_pretrained(folder, dtype=dtype, **options)
    return model.to(device).eval()


def write_log_probs(model: "torch.nn.Module", passages: Sequence[Passage], path: Path) -> Path:
    """Write a model's log probabilities at the compared positions to a .npy file (positions, vocabulary), float32; returns `path`.

    Raises FloatingPointError when logits are not finite.
    """
    import numpy as np

    positions, rows = 0, None
    for logits in _iter_logits(model, passages):
        if not np.isfinite(logits).all():
            raise FloatingPointError("logits are not finite")
        if rows is None:
            shape = (sum(passage.compared_tokens for passage in passages), logits.shape[-1])
            rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
        rows[positions : positions + len(logits)] = log_softmax(logits)
        positions += len(logits)
    return path


def load_log_probs(path: Path) -> "NDArray[np.float32]":
    """The stored log probabilities (positions, vocabulary), memory-mapped."""
    import numpy as np

    return np.load(path, mmap_mode="r")


def compute_scores(model: "torch.nn.Module", passages: Sequence[Passage]) -> list[float]:
    """A reward model's score for each passage."""
    import torch

    device = next(model.parameters()).device
    with torch.inference_mode():
        outputs = [model(input_ids=torch.tensor([passage.ids], device=device), use_cache=False) for passage in passages]
    return [float(score) for output in outputs for score in output.logits.flatten()]


def _make_passage(example: "HeldOutExample") -> Passage:
    start = _find_truncation_start(len(example.input_ids), example.prompt_tokens)
    answer_start = max(1, example.prompt_tokens - (start - 1 if start else 0))
    return Passage(ids=_truncate(example.input_ids, example.prompt_tokens), compared_tokens=0, answer_start=answer_start)


def _truncate(ids: tuple[int, ...], prompt_tokens: int) -> tuple[int, ...]:
    """At most MAX_PASSAGE_TOKENS: the first token, which Gemma requires, and those on both sides of the answer's start."""
    start = _find_truncation_start(len(ids), prompt_tokens)
    return ids[:1] + ids[start : start + MAX_PASSAGE_TOKENS - 1] if start else ids


def _find_truncation_start(length: int, prompt_tokens: int) -> int:
    """The index of the first token kept after the initial one; 0 where nothing is cut."""
    if length <= MAX_PASSAGE_TOKENS:
        return 0
    return min(max(1, prompt_tokens - MAX_PASSAGE_TOKENS // 2), length - MAX_PASSAGE_TOKENS + 1)


def _iter_logits(model: "torch.nn.Module", passages: Sequence[Passage]) -> "Iterator[NDArray[np.float32]]":
    import torch

    device = next(model.parameters()).device
    for passage in passages:
        ids = torch.tensor([passage.ids], device=device)
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=passage.compared_tokens).logits
        yield logits[0].float().cpu().numpy()

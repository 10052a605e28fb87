"""How a model speaks: its next-token probabilities on held-out passages, computed once and kept in a file."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.llm.exporters.tensor_merge import AUTO_CLASSES, ModelKind
from jobs.llm.llama_cpp.fidelity import Passage, log_softmax

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from jobs.llm.trained_model import HeldOutExample

# Time and memory: with Gemma's vocabulary of 262,144 a position is 1 MB of numbers and 0.3 GFLOP of head.
MAX_PASSAGES = 8
MAX_PASSAGE_TOKENS = 256  # of one passage
MAX_POSITIONS = 256  # compared, of all passages together

# A job without held-out rows is verified on these: prose, code, names and figures.
FALLBACK_TEXTS = (
    "The quick brown fox jumps over the lazy dog, and the dog does not mind. It is a warm day, and nothing else happens until the evening.",
    "def mean(values: list[float]) -> float:\n    return sum(values) / len(values)\n\n\nprint(mean([1.0, 2.5, 4.0]))\n",
    "In 1969 three people flew to the Moon. Two of them walked on it for 2 hours and 31 minutes; the third one waited in orbit.",
)
FALLBACK_PROMPT = "Once upon a time"


def make_passages(examples: "Sequence[HeldOutExample]", tokenizer: "PreTrainedTokenizerBase") -> tuple[Passage, ...]:
    """What the models are asked to read: the ends of held-out rows, where the answers are, within the limits above."""
    held_out = [_make_passage(probe) for probe in examples if probe.input_ids]
    fallback = [Passage(ids=tuple(tokenizer.encode(text)), compared_tokens=0) for text in FALLBACK_TEXTS] if not held_out else []
    passages = (held_out or fallback)[:MAX_PASSAGES]
    share = MAX_POSITIONS // len(passages)
    return tuple(passage.model_copy(update={"compared_tokens": min(share, len(passage.ids))}) for passage in passages)


def select_sample_prompt(examples: "Sequence[HeldOutExample]", tokenizer: "PreTrainedTokenizerBase") -> tuple[str, tuple[int, ...]]:
    """A prompt to be continued, as text and as ids: the shortest of the held-out ones."""
    prompts = [probe for probe in examples if probe.prompt_tokens]
    if not prompts:
        return FALLBACK_PROMPT, tuple(tokenizer.encode(FALLBACK_PROMPT))
    shortest = min(prompts, key=lambda probe: probe.prompt_tokens)
    return shortest.prompt_text, _truncate(shortest.input_ids[: shortest.prompt_tokens], shortest.prompt_tokens)


def load_model(
    folder: Path, dtype: "torch.dtype", device: str, kind: ModelKind = "causal", num_labels: int | None = None
) -> "torch.nn.Module":
    """A model from a folder on this machine, for reading only; `labels` is the number of scores, where the folder does not tell."""
    import transformers

    options = {} if num_labels is None else {"num_labels": num_labels}
    model = getattr(transformers, AUTO_CLASSES[kind]).from_pretrained(folder, dtype=dtype, local_files_only=True, **options)
    return model.to(device).eval()


def write_log_probs(model: "torch.nn.Module", passages: Sequence[Passage], path: Path) -> Path:
    """Let a model read the passages, and keep its log probabilities at the compared positions as rows of a .npy file.

    Raises FloatingPointError when some are not finite.
    """
    import numpy as np

    positions, kept = 0, None
    for logits in _iter_logits(model, passages):
        if not np.isfinite(logits).all():
            raise FloatingPointError("logits are not finite")
        if kept is None:
            shape = (sum(passage.compared_tokens for passage in passages), logits.shape[-1])
            kept = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
        kept[positions : positions + len(logits)] = log_softmax(logits)
        positions += len(logits)
    return path


def load_log_probs(path: Path) -> "NDArray[np.float32]":
    """What was kept, one row per position, read from the file as it is needed."""
    import numpy as np

    return np.load(path, mmap_mode="r")


def compute_scores(model: "torch.nn.Module", passages: Sequence[Passage]) -> list[float]:
    """What a reward model gives for each passage."""
    import torch

    device = next(model.parameters()).device
    with torch.inference_mode():
        read = [model(input_ids=torch.tensor([passage.ids], device=device), use_cache=False) for passage in passages]
    return [float(score) for answer in read for score in answer.logits.flatten()]


def _make_passage(example: "HeldOutExample") -> Passage:
    start = _find_truncation_start(len(example.input_ids), example.prompt_tokens)
    ids = _truncate(example.input_ids, example.prompt_tokens)
    return Passage(ids=ids, compared_tokens=0, answer_start=max(1, example.prompt_tokens - (start - 1 if start else 0)))


def _truncate(ids: tuple[int, ...], prompt_tokens: int) -> tuple[int, ...]:
    """At most MOST_TOKENS: the first one, which Gemma cannot do without, and those on both sides of the answer's start."""
    start = _find_truncation_start(len(ids), prompt_tokens)
    return ids[:1] + ids[start : start + MAX_PASSAGE_TOKENS - 1] if start else ids


def _find_truncation_start(length: int, prompt_tokens: int) -> int:
    """Where what follows the first token begins; 0 where nothing is cut."""
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

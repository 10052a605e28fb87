"""Measures how close two models' next-token probabilities are at the same positions. Pure functions; numpy only."""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from schema.base import ForwardCompatible

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# When the file prefers another token than the model, but the model gives both nearly the same probability (10 % apart), only rounding
# decides between them, and the position counts as agreement. Small or barely trained models have many such ties.
TIE_NATS = 0.1
MAX_EXPONENT = 700.0  # exp of more overflows a float


class Passage(ForwardCompatible):
    """Token ids that every model reads; the next-token probabilities at the last `compared_tokens` positions are compared.

    The tokens from `answer_start` on are a held-out row's answer; None for a passage without one.
    """

    ids: tuple[int, ...]
    compared_tokens: int
    answer_start: int | None = None


class ComparisonRequest(ForwardCompatible):
    """What to compare a model with. The log probabilities are .npy files of one row for each compared position, in order."""

    passages: list[Passage]
    trained_log_probs: str
    base_log_probs: str | None


class Comparison(ForwardCompatible):
    """A model compared with the trained model, and with the base model."""

    positions: int
    argmax_agreement: float  # fraction of positions with the same most likely token; near ties agree
    mean_kl_to_trained: float  # nats
    mean_kl_to_base: float | None  # nats
    max_difference_nats: float  # the largest difference of any token's log probability
    labeled_positions: int = 0  # positions whose next token belongs to a held-out answer
    perplexity: float | None = None  # on these tokens
    perplexity_trained: float | None = None
    perplexity_base: float | None = None


def has_agreement(comparison: Comparison, min_agreement: float) -> bool:
    """Whether the models agree on `min_agreement` of all positions, within three standard deviations for so few positions."""
    disagreements = (1 - comparison.argmax_agreement) * comparison.positions
    return disagreements <= (1 - min_agreement) * comparison.positions + 3 * math.sqrt(
        min_agreement * (1 - min_agreement) * comparison.positions
    )


def list_targets(passages: Sequence[Passage]) -> list[int | None]:
    """For each compared position, in order, the next token of the answer; None outside an answer."""
    targets: list[int | None] = []
    for passage in passages:
        for next_position in range(len(passage.ids) - passage.compared_tokens + 1, len(passage.ids) + 1):
            in_answer = passage.answer_start is not None and passage.answer_start <= next_position < len(passage.ids)
            targets.append(passage.ids[next_position] if in_answer else None)
    return targets


def log_softmax(logits: "NDArray[np.float32]") -> "NDArray[np.float32]":
    """Log probabilities over the last axis; exact to 1e-6 for any vocabulary size."""
    import numpy as np

    shifted = logits - logits.max(axis=-1, keepdims=True)
    normalizer = np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)
    return (shifted - np.log(normalizer)).astype(np.float32)


def compare(
    logit_rows: "Iterable[NDArray[np.float32]]",
    trained: "NDArray[np.float32]",
    base: "NDArray[np.float32] | None" = None,
    targets: Sequence[int | None] | None = None,
) -> Comparison:
    """Compare a model's logits, one row per position, with the log probabilities of the trained model and of the base.

    Only one row at a time is in memory: 256 rows of Gemma's vocabulary are 268 MB. Raises ValueError for rows that are
    not finite or have another shape.
    """
    import numpy as np

    agreements, kl_to_trained, kl_to_base, difference, position = 0, 0.0, 0.0, 0.0, -1
    losses: list[tuple[float, float, float]] = []  # of this model, the trained one and the base
    for position, logits in enumerate(logit_rows):
        _check_comparable(position, logits, trained)
        log_probs, trained_row = log_softmax(logits), np.asarray(trained[position])
        base_row = np.asarray(base[position]) if base is not None else None
        agreements += bool(trained_row.max() - trained_row[log_probs.argmax()] <= TIE_NATS)
        kl_to_trained += compute_kl_nats(trained_row, log_probs)
        kl_to_base += compute_kl_nats(base_row, log_probs) if base_row is not None else 0.0
        difference = max(difference, float(np.abs(log_probs - trained_row).max()))
        target = targets[position] if targets is not None else None
        if target is not None:
            losses.append(
                (-float(log_probs[target]), -float(trained_row[target]), -float(base_row[target]) if base_row is not None else 0.0)
            )
    positions = position + 1
    if positions != len(trained):
        raise ValueError(f"{positions} positions, where the trained model has {len(trained)}")
    perplexity, perplexity_trained, perplexity_base = (_perplexity([loss[model] for loss in losses]) for model in range(3))
    return Comparison(
        positions=positions,
        argmax_agreement=agreements / positions,
        mean_kl_to_trained=kl_to_trained / positions,
        mean_kl_to_base=kl_to_base / positions if base is not None else None,
        max_difference_nats=difference,
        labeled_positions=len(losses),
        perplexity=perplexity,
        perplexity_trained=perplexity_trained,
        perplexity_base=perplexity_base if base is not None else None,
    )


def compare_with_files(logit_rows: "Iterable[NDArray[np.float32]]", request: ComparisonRequest) -> Comparison:
    """`compare`, with the log probabilities read from the request's files as they are needed."""
    import numpy as np

    trained = np.load(request.trained_log_probs, mmap_mode="r")
    base = np.load(request.base_log_probs, mmap_mode="r") if request.base_log_probs else None
    return compare(logit_rows, trained, base, list_targets(request.passages))


def compute_kl_nats(reference_log_probs: "NDArray[np.float32]", log_probs: "NDArray[np.float32]") -> float:
    """KL(reference || model) in nats, from log probabilities; never negative."""
    import numpy as np

    return max(0.0, float((np.exp(reference_log_probs) * (reference_log_probs - log_probs)).sum(dtype=np.float64)))


def _perplexity(losses: Sequence[float]) -> float | None:
    """exp of the mean loss; None without tokens, or where it overflows."""
    if not losses:
        return None
    mean = math.fsum(losses) / len(losses)
    return math.exp(mean) if mean < MAX_EXPONENT else None


def _check_comparable(position: int, logits: "NDArray[np.float32]", trained: "NDArray[np.float32]") -> None:
    import numpy as np

    if position >= len(trained):
        raise ValueError(f"more positions than the {len(trained)} of the trained model")
    if logits.shape != trained.shape[1:]:
        raise ValueError(f"a vocabulary of {logits.shape[-1]} tokens where the trained model has {trained.shape[-1]}")
    if not np.isfinite(logits).all():
        raise ValueError(f"the logits at position {position} are not finite")

"""How many rows of each dataset an epoch takes when a job mixes several: the service checks by it, and the trainer counts by it."""

from collections.abc import Sequence


def count_mixed_rows(row_counts: Sequence[int], weights: Sequence[float]) -> list[int]:
    """The rows to take from each dataset: together as many as there are, in proportion to the weights.

    What rounding down leaves goes to the datasets that lost most by it, of equal ones to the first.
    """
    total, sum_of_weights = sum(row_counts), sum(weights)
    exact = [total * (weight / sum_of_weights) for weight in weights]
    counts = [int(share) for share in exact]
    by_loss = sorted(range(len(exact)), key=lambda index: counts[index] - exact[index])
    for index in by_loss[: total - sum(counts)]:
        counts[index] += 1
    return counts

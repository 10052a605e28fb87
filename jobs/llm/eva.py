"""EVA (arXiv 2410.07170): a LoRA adapter starts with the directions in which the inputs of its layers vary most.

Peft's own function repeats the training rows until every direction has converged, however long that takes. Here one sample of labeled
tokens gives all layers their directions. B starts at zero, so the model starts as the base.
"""

from collections.abc import Callable, Iterator
from typing import Any

from jobs.llm.data.tokenize import IGNORE_INDEX
from jobs.llm.evaluation.state import preserve_rng_state
from jobs.llm.lora_init import ADAPTER, list_adapted_layers
from jobs.runtime.errors import JobFailed

MIN_SAMPLE_TOKENS = 1024
SAMPLE_TOKENS_PER_RANK = 8
OVERSAMPLING = 8  # singular vectors computed beyond the rank, which makes those within it accurate
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")


def initialize_from_activations(trainer: Any, seed: int, check_stop: Callable[[], None]) -> int:
    """Give the adapter of a trainer's model its initial A. Returns the number of sampled tokens. Raises JobFailed and Stopped."""
    import torch

    layers = list_adapted_layers(trainer.model)
    rank = len(layers[0].lora_A[ADAPTER].weight)
    wanted = max(MIN_SAMPLE_TOKENS, SAMPLE_TOKENS_PER_RANK * rank)
    sample = _LayerInputs()
    hooks = [layer.register_forward_pre_hook(sample.record) for layer in layers]
    decoder, was_training = trainer.model.get_base_model().base_model, trainer.model.training
    with preserve_rng_state(), torch.no_grad():
        trainer.model.eval()
        for batch in _shuffled_batches(trainer, seed):
            check_stop()
            sample.select(batch["labels"] != IGNORE_INDEX, wanted)
            decoder(**{name: batch[name].to(trainer.model.device) for name in MODEL_INPUTS if name in batch})
            if sample.tokens >= wanted:
                break
        for hook in hooks:
            hook.remove()
        if sample.tokens < rank:
            message = f"lora_init 'eva' needs at least lora_rank ({rank}) labeled tokens, and the training rows have {sample.tokens}"
            raise JobFailed("invalid_data", message, "use lora_init 'default', or more rows")
        torch.manual_seed(seed)  # of the randomized decomposition
        for inputs, sharing_layers in sample.groups():
            directions = principal_directions(inputs.to(trainer.model.device), rank)
            for layer in sharing_layers:
                layer.lora_A[ADAPTER].weight.copy_(directions)
        trainer.model.train(was_training)
    return sample.tokens


def principal_directions(inputs: Any, rank: int) -> Any:
    """The leading right singular vectors (rank, width) of inputs (N, width)."""
    import torch

    _, _, vectors = torch.svd_lowrank(inputs.float(), min(rank + OVERSAMPLING, *inputs.shape), niter=4)
    return vectors[:, :rank].T


class _LayerInputs:
    """The inputs of layers at labeled positions. Layers that get the same tensor, such as q, k and v of a block, share them."""

    def __init__(self) -> None:
        self.tokens = 0
        self._positions: Any = None  # of the current batch
        self._first_layers: dict[Any, Any] = {}  # layer -> the layer whose inputs it shares
        self._inputs: dict[Any, list[Any]] = {}
        self._last: tuple[Any, Any] = (None, None)  # the last layer that recorded, and its input

    def select(self, is_labeled: Any, wanted: int) -> None:
        """Choose the positions of the next batch: the labeled ones, up to `wanted` tokens in all."""
        self._positions = is_labeled.nonzero()[: wanted - self.tokens]
        self.tokens += len(self._positions)

    def record(self, layer: Any, arguments: tuple[Any, ...]) -> None:
        """A forward pre-hook."""
        first, last_input = self._last
        if arguments[0] is last_input:
            self._first_layers[layer] = first
            return
        self._last = layer, arguments[0]
        self._first_layers[layer] = layer
        rows, columns = self._positions.T.to(arguments[0].device)
        self._inputs.setdefault(layer, []).append(arguments[0][rows, columns].cpu())

    def groups(self) -> Iterator[tuple[Any, list[Any]]]:
        """The inputs (N, width) of each group of layers that share them."""
        import torch

        for first, parts in self._inputs.items():
            yield torch.cat(parts), [layer for layer, owner in self._first_layers.items() if owner is first]


def _shuffled_batches(trainer: Any, seed: int) -> Iterator[dict[str, Any]]:
    """The training rows once, in an order that depends on the seed only."""
    import torch

    rows, size = trainer.train_dataset, trainer.args.per_device_train_batch_size
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    for start in range(0, len(order), size):
        yield trainer.data_collator([rows[index] for index in order[start : start + size]])

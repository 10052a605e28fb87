"""Training the embeddings of a few tokens at the price of a few tokens.

peft trains rows of an embedding through a copy of the whole matrix, in which it puts the trained rows: for Gemma's 262,144 rows,
tied to the head, that is a third of a training step. Here the frozen matrix is used as it is and only the trained rows are put
in, into what comes out. The numbers are the same; parameters, saving, loading and merging stay peft's own.
"""

from types import MethodType
from typing import Any


def patch_trainable_token_embedding(model: Any) -> int:  # any peft model
    """Let peft's trainable tokens compute their own rows only; how many layers do so."""
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer

    layers = [layer for layer in model.modules() if isinstance(layer, TrainableTokensLayer)]
    for layer in layers:
        layer.forward_adapters = MethodType(_forward, layer)
    return len(layers)


def _forward(layer: Any, x: Any, active_adapters: list[str], *args: Any, **kwargs: Any) -> Any:  # peft's own signature
    """`x` is tokens (B, T) for an embedding, and hidden states (..., H) for the head that is tied to it."""
    import torch

    result = layer.base_layer(x, *args, **kwargs)
    if layer.disable_adapters or layer.merged:
        return result
    for name in active_adapters:
        tokens = torch.tensor(layer.token_indices[name], device=x.device)
        rows = layer.trainable_tokens_delta[name].to(result.dtype)  # (len(tokens), H): the rows themselves, not differences
        if isinstance(layer.base_layer, torch.nn.Embedding):
            scale = layer._get_embed_scale()
            rows = rows if scale is None else rows * scale.to(rows.dtype)
            for token, row in zip(tokens, rows, strict=True):
                result = torch.where((x == token).unsqueeze(-1), row, result)
        else:
            result = result.index_copy(-1, tokens, torch.nn.functional.linear(x, rows))
    return result

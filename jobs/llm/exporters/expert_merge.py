"""Merges the adapters of a mixture of experts: transformers fuses a layer's experts into one tensor, and most files hold one per expert.

peft adapts the fused tensors. What it adds to one of them is converted as transformers converts the tensor itself when it saves a model:
cutting, joining and transposing treat a sum as they treat its parts.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

ADAPTER_NAME = "default"  # peft's name for a single adapter
# Fused tensors whose change stays in memory. A file lists gate, up and down of an expert together, which come from two of them.
CACHED_TENSORS = 2


def collect_expert_merges(
    model: "PreTrainedModel", checkpoint_names: Mapping[str, str]
) -> "dict[str, Callable[[torch.Tensor], torch.Tensor]]":
    """By their names in the base's files, functions that take an expert's tensor in float32 and return the merged one.

    `checkpoint_names` maps the names of the model's parameters to those in the files, where a file holds the parameter as it is.
    """
    import torch
    from peft.tuners.lora.layer import ParamWrapper
    from transformers.core_model_loading import revert_weight_conversion

    wrappers = {
        f"{path.replace('.base_layer', '')}.{layer.parameter_name}": layer
        for path, layer in model.named_modules()
        if isinstance(layer, ParamWrapper)
    }

    @lru_cache(maxsize=CACHED_TENSORS)
    def compute_changes(parameter: str) -> "dict[str, torch.Tensor]":
        delta = wrappers[parameter].get_delta_weight(ADAPTER_NAME).detach()
        if parameter in checkpoint_names:
            return {checkpoint_names[parameter]: delta}
        return revert_weight_conversion(model, {parameter: delta})

    def make_merge_function(parameter: str, name: str) -> "Callable[[torch.Tensor], torch.Tensor]":
        return lambda weight: weight + compute_changes(parameter)[name]

    merges: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
    for parameter, wrapper in wrappers.items():
        if parameter in checkpoint_names:
            names = [checkpoint_names[parameter]]
        else:
            names = list(revert_weight_conversion(model, {parameter: torch.empty(wrapper.get_param().shape, device="meta")}))
        merges |= {name: make_merge_function(parameter, name) for name in names}
    return merges

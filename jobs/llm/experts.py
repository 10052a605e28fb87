"""What adapters train of a mixture of experts, and what they leave out.

The experts of a layer are not linear layers in transformers 5, but two parameters of three dimensions (experts, out, in). peft adapts
them by name (`target_parameters`), with matrices of their own for each expert. It has neither dropout nor DoRA for them, so a request
with one of these trains the other layers only, and gets a warning. Routers are left as they are: a changed router makes the choice of
experts less stable for every token, and its few weights need no low-rank update.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from schema.training.llm_hyperparameters import Hyperparameters

ROUTER_NAMES = frozenset({"gate", "router"})  # where an architecture has a linear layer for it
# A linear layer with so few outputs for its inputs computes one number per head or per expert; it counts as a gate.
GATE_RATIO = 16
RANDOM_INITS = ("default", "gaussian")


@dataclass(frozen=True)
class ExpertAdapters:
    """Which parameters of a model's experts an adapter trains."""

    target_parameters: tuple[str, ...] = ()  # in peft's form; empty without experts, or where they cannot be adapted
    problem: str | None = None  # why the experts are not adapted, in words
    count: int = 0  # numbers in all experts together


def choose_expert_adapters(model: Any, hyperparameters: Hyperparameters) -> ExpertAdapters:
    """Whether the experts of the model are adapted; `target_modules` of a request decides alone."""
    parameters = list_expert_parameters(model)
    if not parameters:
        return ExpertAdapters()
    count = sum(parameter.numel() for parameter in parameters.values())
    if problem := _find_problem(parameters, hyperparameters):
        return ExpertAdapters(problem=problem, count=count)
    return ExpertAdapters(tuple(sorted({".".join(name.split(".")[-2:]) for name in parameters})), count=count)


def list_expert_parameters(model: Any) -> dict[str, Any]:
    """The fused parameters of all experts of a model, with or without an adapter, by name."""
    return {
        name: parameter
        for name, parameter in ((name.replace(".base_layer", ""), parameter) for name, parameter in model.named_parameters())
        if parameter.dim() == 3 and name.split(".")[-2].endswith("experts")
    }


def find_unadapted_gates(linear_layers: Mapping[str, Any], lora_rank: int) -> set[str]:
    """Names of linear layers that adapters leave out unless a request names them: routers, and gates narrower than the rank.

    A gate computes one number per head or per expert: adapters of a higher rank than its width add no capacity.
    """
    gates: set[str] = set()
    for path, layer in linear_layers.items():
        name = path.rpartition(".")[2]
        is_narrow = layer.out_features < lora_rank and layer.out_features * GATE_RATIO <= layer.in_features
        if name in ROUTER_NAMES or is_narrow:
            gates.add(name)
    return gates


def find_setting_problem(hyperparameters: Hyperparameters) -> str | None:
    """Which of the request's settings leaves the experts out, whatever the model; None if none does."""
    if hyperparameters.target_modules is not None:
        return "target_modules names the layers to adapt, and experts are not linear layers"
    if hyperparameters.use_dora:
        return "DoRA cannot adapt experts; set use_dora to false"
    if hyperparameters.lora_dropout:
        return "adapters of experts have no dropout; set lora_dropout to 0"
    if hyperparameters.lora_init not in RANDOM_INITS:
        return f"lora_init {hyperparameters.lora_init!r} starts from the matrix of a linear layer, which experts are not; use 'default'"
    return None


def _find_problem(parameters: dict[str, Any], hyperparameters: Hyperparameters) -> str | None:
    """Why the experts cannot be adapted as requested."""
    if problem := find_setting_problem(hyperparameters):
        return problem
    width = min(min(parameter.shape[1:]) for parameter in parameters.values())
    if hyperparameters.lora_rank > width:
        return f"lora_rank {hyperparameters.lora_rank} is above the width of the experts, which is {width}"
    return None

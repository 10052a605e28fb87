"""Reports what the base's architecture decided: how attention is computed, and which layers the adapter trains."""

from typing import TYPE_CHECKING, Any

from jobs.llm.experts import choose_expert_adapters

if TYPE_CHECKING:
    from jobs.llm.training_context import TrainingContext


def log_model_choices(model: Any, training: "TrainingContext") -> None:
    """Log the choices that the loaded model made, once per attempt. `model` has its adapter, if one is trained."""
    context, hyperparameters = training.context, training.config.hyperparameters
    if "attn_implementation" in context.state.decisions:
        return
    implementation = str(model.config.get_text_config()._attn_implementation)
    context.log_decision("attn_implementation", implementation, _explain_attention(model, implementation))
    if not training.trains_adapter:
        return
    adapted, others = _list_layers(model)
    reason = "named in the request" if hyperparameters.target_modules else "every linear layer except the head"
    if others and not hyperparameters.target_modules:
        reason += f"; not {', '.join(others)}: routers, gates narrower than lora_rank, and other towers are left as they are"
    context.log_decision("target_modules", ", ".join(adapted), reason)
    experts = choose_expert_adapters(_get_base(model), hyperparameters)
    if experts.target_parameters:
        names = ", ".join(experts.target_parameters)
        reason = f"{experts.count / 1e6:,.1f} million numbers of the experts, with an adapter for each expert; the router is not adapted"
        context.log_decision("target_parameters", names, reason)
    elif experts.problem:
        message = (
            f"the experts, {experts.count / 1e6:,.1f} million numbers, are not adapted, only the layers around them: {experts.problem}"
        )
        context.warn("experts_not_adapted", message)


def _explain_attention(model: Any, implementation: str) -> str:
    if implementation == "eager":
        return f"{model.config.model_type} has no other: its attention has a soft cap or sinks, which sdpa does not compute"
    return (
        "set in the request" if implementation.startswith("flash") else "the fastest that every machine has and the architecture supports"
    )


def _list_layers(model: Any) -> tuple[list[str], list[str]]:
    """The names of linear layers with an adapter, and of those without one."""
    import torch
    from peft.tuners.lora import LoraLayer

    adapted: set[str] = set()
    others: set[str] = set()
    for path, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and isinstance(layer.get_base_layer(), torch.nn.Linear):
            adapted.add(path.rpartition(".")[2])
        elif isinstance(layer, torch.nn.Linear) and not path.endswith(".base_layer") and ".lora_" not in path:
            others.add(path.rpartition(".")[2])
    return sorted(adapted), sorted(others - adapted - {"lm_head", "score"})


def _get_base(model: Any) -> Any:
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model

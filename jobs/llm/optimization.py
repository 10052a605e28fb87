"""The optimizer and the learning rate schedule of a training: their arguments, what they need, and how gradients are clipped."""

import math
from typing import Any

from jobs.llm.hardware import DeviceConfig
from jobs.runtime.errors import JobFailed
from schema.training.llm_hyperparameters import Hyperparameters
from schema.training.llm_optimization import CPU_OPTIMIZERS, GPU_OPTIMIZERS, SCHEDULE_PARAMETERS, SHARDABLE_OPTIMIZERS

TOKEN_EMBEDDINGS = "trainable_tokens_"  # in the names of the embeddings that peft trains beside an adapter


def make_optimizer_arguments(hyperparameters: Hyperparameters) -> dict[str, Any]:
    """The arguments of optimizer and schedule, by the names of transformers.TrainingArguments."""
    parameters = SCHEDULE_PARAMETERS[hyperparameters.lr_scheduler_type]
    return {
        "learning_rate": hyperparameters.learning_rate,
        "lr_scheduler_type": hyperparameters.lr_scheduler_type,
        "lr_scheduler_kwargs": {
            name: int(value) if parameters[name].is_whole else value for name, value in hyperparameters.lr_scheduler_kwargs.items()
        },
        "warmup_steps": hyperparameters.warmup_ratio,  # below 1 it is a fraction of all steps
        "optim": hyperparameters.optim,
        "adam_beta1": hyperparameters.adam_beta1,
        "adam_beta2": hyperparameters.adam_beta2,
        "adam_epsilon": hyperparameters.adam_epsilon,
        "weight_decay": hyperparameters.weight_decay,
        "max_grad_norm": hyperparameters.max_grad_norm,
    }


def check_optimizer(hyperparameters: Hyperparameters, device_config: DeviceConfig, *, sharded: bool) -> None:
    """Raises JobFailed for an optimizer, or an initialization, that cannot run on this machine or not on a sharded model."""
    from importlib.util import find_spec

    optim = hyperparameters.optim
    if optim in GPU_OPTIMIZERS:
        hint = f"use one of {', '.join(CPU_OPTIMIZERS)}"
        if not device_config.on_gpu:
            raise JobFailed("invalid_config", f"optim {optim!r} needs an NVIDIA GPU, and this machine has none", hint)
        if find_spec("bitsandbytes") is None:
            raise JobFailed("invalid_config", f"optim {optim!r} needs the package bitsandbytes, which this image does not include", hint)
    if sharded and optim not in SHARDABLE_OPTIMIZERS:
        message = f"optim {optim!r} cannot train a model that is sharded over several GPUs, and this one does not fit into one of them"
        raise JobFailed("invalid_config", message, f"use one of {', '.join(SHARDABLE_OPTIMIZERS)}, or GPUs with more memory")
    if sharded and hyperparameters.lora_init == "eva":
        message = "lora_init 'eva' needs the whole model on one GPU, and this one is sharded over several"
        raise JobFailed("invalid_config", message, "use lora_init 'default' or 'pissa_niter_16', or GPUs with more memory")


def check_schedule_length(hyperparameters: Hyperparameters, total_steps: int) -> None:
    """Raises JobFailed where the warm-up and the decay of a schedule are longer than the training."""
    decay = hyperparameters.lr_scheduler_kwargs.get("num_decay_steps", 0)
    warmup = math.ceil(total_steps * hyperparameters.warmup_ratio)
    if decay + warmup > total_steps:
        message = (
            f"lr_scheduler_kwargs asks for {decay:g} num_decay_steps, and the training has {total_steps} steps, {warmup} of them warm-up"
        )
        raise JobFailed("invalid_config", message, f"use at most {total_steps - warmup} num_decay_steps")


def clip_gradients(model: Any, max_norm: float) -> tuple[Any, Any]:
    """Clip the gradients of a model in place, those of trained token embeddings apart. Returns both norms before clipping.

    Embeddings of tokens that the base never used have gradients that are much larger than the adapter's; clipped together, they would
    take the adapter's share of `max_norm`. The second norm is None for a model without trained embeddings.
    """
    from torch.nn.utils import clip_grad_norm_

    weights = [(TOKEN_EMBEDDINGS in name, weight) for name, weight in model.named_parameters() if weight.grad is not None]
    norm = clip_grad_norm_([weight for is_embedding, weight in weights if not is_embedding], max_norm)
    embeddings = [weight for is_embedding, weight in weights if is_embedding]
    return norm, clip_grad_norm_(embeddings, max_norm) if embeddings else None

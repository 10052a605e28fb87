"""Load the model to train, in the right precision, and add the LoRA adapter when only an adapter is trained.

    Full    all weights, in fp32 (bf16 weights lose small updates)
    LoRA    low-rank adapters beside the frozen base, in bf16 where the device computes it natively
    QLoRA   the same beside a base in 4 bits: NF4 with double quantization

Torch, transformers and peft are imported inside the functions that use them.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.llm.experts import choose_expert_adapters, find_unadapted_gates
from jobs.llm.hardware import DeviceConfig
from jobs.llm.lora_init import adapter_arguments
from jobs.llm.model_kinds import AUTO_CLASSES, ModelKind
from jobs.llm.trainable_tokens import patch_trainable_token_embedding
from jobs.runtime.errors import JobFailed
from jobs.runtime.settings import enable_unsloth_logits
from jobs.runtime.training_control import make_divergence_error
from schema.training import TrainingConfig

VISION_MODULES_PATTERN = r".*(vision_tower|vision_model|multi_modal_projector|embed_vision).*"


def import_unsloth(config: TrainingConfig) -> None:
    """Import unsloth if it is the provider: it must be imported before the other libraries. Raises JobFailed where it cannot run."""
    if config.provider != "unsloth":
        return
    from importlib import import_module
    from importlib.util import find_spec

    import torch

    hint = "use provider 'huggingface': the same request trains the same way"
    if not torch.cuda.is_available():
        raise JobFailed("invalid_config", "provider 'unsloth' needs an NVIDIA GPU, and this machine has none", hint)
    if find_spec("unsloth") is None:
        raise JobFailed("invalid_config", "provider 'unsloth' needs the package unsloth, which this image does not include", hint)
    if config.trainer_type != "sft" or config.modality != "text":
        raise JobFailed("invalid_config", "provider 'unsloth' supports only trainer_type 'sft' on text", hint)
    if config.hyperparameters.use_dora:
        raise JobFailed("invalid_config", "provider 'unsloth' does not support DoRA", hint)
    enable_unsloth_logits()
    import_module("unsloth")


def load_base(config: TrainingConfig, device_config: DeviceConfig, weights: Path, model_kind: ModelKind = "causal", **options: Any) -> Any:
    """The model in folder `weights`, on the device, ready to be trained or adapted. Raises JobFailed."""
    import transformers
    from transformers import set_seed

    set_seed(config.hyperparameters.seed)
    if config.provider == "unsloth":
        return _load_with_unsloth(config, device_config, weights)
    options |= {"dtype": device_config.dtype, "trust_remote_code": False, "use_safetensors": True, "local_files_only": True}
    # None: sdpa where the architecture supports it, else eager, which computes soft caps (Gemma 2) and attention sinks (gpt-oss).
    options["attn_implementation"] = "flash_attention_2" if config.hyperparameters.use_fa2 else None
    if config.method == "QLoRA":
        options |= {"quantization_config": _make_bnb_config(device_config, model_kind), "device_map": {"": device_config.device}}
    try:
        model = getattr(transformers, AUTO_CLASSES[model_kind]).from_pretrained(weights, **options)
    except ImportError as error:
        if config.method == "QLoRA" and "bitsandbytes" in str(error):
            raise JobFailed("invalid_config", "QLoRA needs the package bitsandbytes, which is not installed", "use method LoRA") from error
        raise JobFailed(
            "invalid_config", "use_fa2 needs the flash-attn package and an Ampere or newer GPU", "set use_fa2 to false"
        ) from error
    except (ValueError, KeyError) as error:  # transformers raises these for a model type that it, or the auto class, does not know
        reason = str(error).partition("\n")[0][:200]
        if config.hyperparameters.use_fa2 and "Flash" in reason:
            message = f"base model {config.base_model_id} does not support FlashAttention 2: {reason}"
            raise JobFailed("invalid_config", message, "set use_fa2 to false") from error
        description = "a vision-language model" if model_kind == "image_text" else "a language model"
        message = f"base model {config.base_model_id} is not {description} that this image can load: {reason}"
        raise JobFailed("invalid_config", message, "use another base_model_id") from error
    if config.method == "QLoRA":
        _disable_avx512_repacking(model)
    else:
        model.to(device_config.device)
    model.config.get_text_config().use_cache = False
    if model.can_generate():
        model.get_output_embeddings().register_forward_pre_hook(_make_contiguous)
    return model


def _make_bnb_config(device_config: DeviceConfig, model_kind: ModelKind) -> Any:
    """The quantization of QLoRA. A vision tower stays unquantized: it is small, a text adapter cannot correct its rounding errors, and
    the exported model uses the unquantized tower."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=device_config.dtype,
        llm_int8_skip_modules=[VISION_MODULES_PATTERN, "lm_head"] if model_kind == "image_text" else None,
    )


def _disable_avx512_repacking(model: Any) -> None:
    """Keep bitsandbytes from repacking weights on CPUs with AVX512-BF16.

    It repacks a layer permanently at the first forward pass in eval mode, and the kernel for repacked weights has no backward: after
    an evaluation, layers below would silently get no gradient.
    """
    from bitsandbytes.nn import Linear4bit

    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False


def _make_contiguous(_: Any, states: tuple[Any, ...]) -> tuple[Any, ...]:
    """A forward pre-hook of the LM head: generation passes the last position of each row, which is not contiguous.

    For a frozen head torch then multiplies row by row, and on a CPU copies the whole head for each row first: for Gemma 270M that
    takes a second and 335 MB per row.
    """
    return (states[0].contiguous(), *states[1:])


def lora_config(config: TrainingConfig, model: Any, *, task_type: str = "CAUSAL_LM", trainable_token_ids: Sequence[int] = ()) -> Any:
    """The peft config of the adapter. Raises JobFailed for a target module that does not exist, and for a rank above a layer's width."""
    import torch
    from peft import LoraConfig

    hyperparameters = config.hyperparameters
    trains_vision = bool(getattr(hyperparameters, "train_vision_tower", False))  # only SFT has the field
    linear_layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)]
    linear = {name: layer for name, layer in linear_layers if trains_vision or not _is_vision_module(name)}
    layer_names = {name.rpartition(".")[2] for name in linear} - {"lm_head", "score"}
    if hyperparameters.target_modules is None:
        layer_names -= find_unadapted_gates(linear, hyperparameters.lora_rank)
    targets = sorted(hyperparameters.target_modules or layer_names)
    for target in targets:
        if not any(name == target or name.endswith("." + target) for name in linear):
            message = f"target_modules names {target!r}, which is not a linear layer of this model"
            raise JobFailed("invalid_config", message, f"it has: {', '.join(sorted(layer_names))}")
        if target.rpartition(".")[2] == "lm_head":
            raise JobFailed("invalid_config", "target_modules names lm_head, which is tied to the embeddings", "leave it out")
    width, narrowest = min(
        (min(layer.in_features, layer.out_features), name) for name, layer in linear.items() if name.endswith(tuple(targets))
    )
    if hyperparameters.lora_rank > width:
        message = f"lora_rank {hyperparameters.lora_rank} is above the width of {narrowest.rpartition('.')[2]}, which is {width}"
        raise JobFailed("invalid_config", message, f"use a rank of at most {width}: a higher rank adds no capacity")
    has_vision = any(_is_vision_module(name) for name, _ in linear_layers)
    return LoraConfig(
        **adapter_arguments(hyperparameters),
        lora_dropout=hyperparameters.lora_dropout,
        use_dora=hyperparameters.use_dora,
        use_rslora=hyperparameters.use_rslora,
        target_modules=targets,
        target_parameters=list(choose_expert_adapters(model, hyperparameters).target_parameters) or None,
        exclude_modules=VISION_MODULES_PATTERN if has_vision and not trains_vision else None,
        trainable_token_indices=list(trainable_token_ids) or None,
        task_type=task_type,
    )


def _is_vision_module(name: str) -> bool:
    return re.fullmatch(VISION_MODULES_PATTERN, name) is not None


def add_adapter(model: Any, config: TrainingConfig, peft_config: Any) -> Any:
    """The model with a new adapter. Only the adapter is trainable."""
    if config.provider == "unsloth":
        return _adapt_with_unsloth(model, config, peft_config)
    from peft import get_peft_model

    adapted = get_peft_model(model, peft_config)
    patch_trainable_token_embedding(adapted)
    return adapted


def load_adapter(model: Any, checkpoint: Path) -> None:
    """Load the adapter weights of a checkpoint into the model's adapter. Raises JobFailed unless they are safetensors."""
    if not (checkpoint / "adapter_model.safetensors").is_file():  # peft would load a pickle instead
        message = "the checkpoint has no adapter_model.safetensors, and other formats are never loaded"
        raise JobFailed("internal", message, "retry the job from another checkpoint")
    model.load_adapter(str(checkpoint), "default", is_trainable=True, torch_device=str(model.device))
    patch_trainable_token_embedding(model)


def set_eos_tokens(model: Any, stop_token_ids: Sequence[int]) -> None:
    """Make generation stop at these tokens: the end of a turn, and the end of a text."""
    if stop_token_ids:
        model.generation_config.eos_token_id = list(stop_token_ids)


def check_finite_weights(model: Any, step: int, full_weights: Mapping[str, Any] | None = None) -> None:
    """Raises JobFailed when a trained weight is NaN or infinite. The last update has no later loss that would reveal it.

    `full_weights` are the gathered weights of a sharded model.
    """
    trained = (weight for weight in model.parameters() if weight.requires_grad) if full_weights is None else full_weights.values()
    if not all(bool(weight.isfinite().all()) for weight in trained):
        raise make_divergence_error(f"the weights are NaN or infinite after step {step}")


# --- unsloth: the same request with faster kernels -----------------------------------------------------------------------


def _load_with_unsloth(config: TrainingConfig, device_config: DeviceConfig, weights: Path) -> Any:
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        model_name=str(weights),
        max_seq_length=config.hyperparameters.max_seq_length,
        dtype=device_config.dtype,
        load_in_4bit=config.method == "QLoRA",
        full_finetuning=config.method == "Full",
        trust_remote_code=False,
    )
    model.config.get_text_config().use_cache = False
    return model


def _adapt_with_unsloth(model: Any, config: TrainingConfig, peft_config: Any) -> Any:
    from unsloth import FastLanguageModel

    return FastLanguageModel.get_peft_model(
        model,
        r=peft_config.r,
        lora_alpha=peft_config.lora_alpha,
        lora_dropout=peft_config.lora_dropout,
        target_modules=sorted(peft_config.target_modules),
        use_rslora=peft_config.use_rslora,
        use_gradient_checkpointing=False,  # the training arguments set it
        random_state=config.hyperparameters.seed,
        max_seq_length=config.hyperparameters.max_seq_length,
    )

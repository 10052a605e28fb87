"""The model that is trained: what it runs on, the base in the right precision, and the adapter, if only that is trained.

    Full    all weights, in fp32 (small updates are lost in bf16)
    LoRA    low-rank adapters beside the frozen base, in bf16 where the machine does it well
    QLoRA   the same beside a base of 4 bits: nf4 with double quantization

Torch, transformers and peft are imported where they are used.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jobs.llm.exporters.model_files import measure_weights_bytes
from jobs.llm.probe import has_native_bf16
from jobs.llm.trainable_tokens import patch_trainable_token_embedding
from jobs.runtime.errors import JobFailed
from jobs.runtime.settings import enable_unsloth_logits
from schema.training import TrainingConfig

if TYPE_CHECKING:
    from jobs.runtime.context import JobContext

ModelKind = Literal["causal", "score", "image_text"]

# Of what a training needs beside the weights, in bytes per token and unit of width and layer: measured for Gemma, bf16, without
# recomputation; the head's logits of labelled positions come on top.
ACTIVATION_BYTES = 40
UNSHARDED_LAYERS = 3  # of a divided model: the one that computes, the one that comes next, and gradients of the one before
CHECKPOINTED_ACTIVATION_BYTES = (
    4  # per token, width and layer, of what is left of these when they are computed a second time: a layer's input
)
USABLE_MEMORY_FRACTION = 0.8  # of the memory that is free; the rest is the allocator's

# torch.compile takes a minute or more, and then saves a share of each step.
COMPILE_S = 300.0
COMPILE_SAVED_FRACTION = 0.15
GPU_FLOP_PER_S = 40e12  # an L4 at a third of its peak; a faster one is through sooner, and compiles less often

VISION_MODULES_PATTERN = r".*(vision_tower|vision_model|multi_modal_projector|embed_vision).*"


@dataclass(frozen=True)
class DeviceConfig:
    """What the attempt runs on, and how: in which precision, and whether activations are computed twice to save memory."""

    device: Any
    dtype: Any
    autocast: bool
    on_gpu: bool
    gradient_checkpointing: bool
    torch_compile: bool = False
    dataloader_num_workers: int = 0


def detect_device(config: TrainingConfig, context: "JobContext", base_folder: Path) -> DeviceConfig:
    """The device, the precision, and what is traded for memory; each is told with its reason."""
    import torch

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    context.log_decision("device", str(device), torch.cuda.get_device_name() if on_gpu else "no GPU was found")
    bf16 = torch.cuda.is_bf16_supported() if on_gpu else has_native_bf16()
    adapts = config.method != "Full"
    # Full fine-tuning in pure bf16 loses small updates; with fp32 weights autocast does the products in bf16.
    dtype = torch.bfloat16 if bf16 and adapts else torch.float32
    why = "the processor multiplies bf16 fast" if bf16 else "the processor is slow at bf16"
    context.log_decision("dtype", str(dtype).removeprefix("torch."), why if adapts else "all weights are trained: small updates need fp32")
    recomputes = _choose_gradient_checkpointing(config, context, base_folder, on_gpu=on_gpu)
    return DeviceConfig(
        device,
        dtype,
        autocast=bf16 and not adapts and on_gpu,
        on_gpu=on_gpu,
        gradient_checkpointing=recomputes,
        dataloader_num_workers=_choose_dataloader_num_workers(config, context, on_gpu=on_gpu),
    )


def _choose_gradient_checkpointing(config: TrainingConfig, context: "JobContext", base_folder: Path, *, on_gpu: bool) -> bool:
    """Whether activations are computed a second time on the way back: a third of the speed, for most of their memory."""
    import psutil
    import torch

    knobs = config.hyperparameters
    if knobs.gradient_checkpointing is not None:
        context.log_decision("gradient_checkpointing", str(knobs.gradient_checkpointing).lower(), "the request says so")
        return knobs.gradient_checkpointing
    free = torch.cuda.mem_get_info()[0] if on_gpu else psutil.virtual_memory().available
    needed = estimate_training_bytes(config, base_folder)
    fits = needed < free * USABLE_MEMORY_FRACTION
    why = f"about {needed / 1e9:.1f} GB are needed without it, and {free / 1e9:.1f} GB are free"
    context.log_decision("gradient_checkpointing", str(not fits).lower(), why)
    return not fits


def estimate_training_bytes(
    config: TrainingConfig, base_folder: Path, *, gradient_checkpointing: bool = False, num_shards: int = 1
) -> float:
    """Roughly what a training keeps in memory: weights, gradients, optimizer, activations.

    Activations are kept, or computed a second time; the rest is whole, or one of so many parts, of which a layer after the other and the
    embeddings are whole all the same.
    """
    whole = json.loads((base_folder / "config.json").read_text())
    shape = whole.get("text_config", whole)
    knobs = config.hyperparameters
    parameters = measure_weights_bytes(base_folder) / 2  # bf16 on disk, as bases are; fp32 ones are counted twice, on the safe side
    per_parameter = {"Full": 16.0, "LoRA": 2.0, "QLoRA": 0.6}[config.method]
    if config.method == "Full" and config.trainer_type in ("dpo", "kto"):
        per_parameter += 4  # the base stays beside it, to compare with
    width, layers, words = shape.get("hidden_size", 4096), shape.get("num_hidden_layers", 32), shape.get("vocab_size", 262_144)
    sequences = 2 if config.trainer_type in ("dpo", "orpo", "reward") else 1  # of a row: a pair is two
    tokens = knobs.batch_size * knobs.max_seq_length * sequences
    activations = tokens * (width * _activation_bytes_per_token(layers, gradient_checkpointing=gradient_checkpointing) + 6 * words)
    if getattr(knobs, "train_vision_tower", False):  # one that is not trained keeps none
        activations += knobs.batch_size * _vision_activation_bytes(
            whole.get("vision_config", {}), gradient_checkpointing=gradient_checkpointing
        )
    lent = 0.0 if num_shards == 1 else 8 * words * width + UNSHARDED_LAYERS * 4 * parameters / layers
    return parameters * per_parameter / num_shards + lent + activations


def _activation_bytes_per_token(layers: int, *, gradient_checkpointing: bool) -> float:
    """Of each token, in all layers together, for each unit of width."""
    return layers * CHECKPOINTED_ACTIVATION_BYTES + ACTIVATION_BYTES if gradient_checkpointing else layers * ACTIVATION_BYTES


def _vision_activation_bytes(vision_config: dict[str, Any], *, gradient_checkpointing: bool) -> float:
    """The activations of an image in a vision tower."""
    patches = (vision_config.get("image_size", 896) // vision_config.get("patch_size", 14)) ** 2
    return (
        patches
        * vision_config.get("hidden_size", 1152)
        * _activation_bytes_per_token(vision_config.get("num_hidden_layers", 27), gradient_checkpointing=gradient_checkpointing)
    )


def _choose_dataloader_num_workers(config: TrainingConfig, context: "JobContext", *, on_gpu: bool) -> int:
    """Processes that prepare batches. Rows are tokens already: one hides what is left, and on a CPU it would take cores away."""
    asked = config.hyperparameters.dataloader_num_workers
    if asked is not None:
        return asked
    count = 2 if on_gpu and config.modality == "vision" else 0
    why = "images are decoded beside the training" if count else "the rows are tokens in memory: there is nothing to prepare"
    context.log_decision("dataloader_num_workers", str(count), why)
    return count


def import_unsloth(config: TrainingConfig) -> None:
    """Load unsloth, if it is the provider: it must be the first of the libraries. Raises JobFailed where it cannot be used."""
    if config.provider != "unsloth":
        return
    from importlib import import_module
    from importlib.util import find_spec

    import torch

    hint = "use provider 'huggingface': the same request, and the same result"
    if not torch.cuda.is_available():
        raise JobFailed("invalid_config", "provider 'unsloth' needs an NVIDIA GPU, and this machine has none", hint)
    if find_spec("unsloth") is None:
        raise JobFailed("invalid_config", "provider 'unsloth' needs the package unsloth, which is not in this image", hint)
    if config.trainer_type != "sft" or config.modality != "text":
        raise JobFailed("invalid_config", "provider 'unsloth' trains trainer_type 'sft' on text", hint)
    if config.hyperparameters.use_dora:
        raise JobFailed("invalid_config", "provider 'unsloth' has no DoRA", hint)
    enable_unsloth_logits()
    import_module("unsloth")


def load_base(config: TrainingConfig, device_config: DeviceConfig, weights: Path, model_kind: ModelKind = "causal", **options: Any) -> Any:
    """The model of a folder, on the machine's device, ready to be trained or adapted. Raises JobFailed."""
    import transformers
    from transformers import set_seed

    set_seed(config.hyperparameters.seed)
    if config.provider == "unsloth":
        return _load_with_unsloth(config, device_config, weights)
    classes = {"causal": "AutoModelForCausalLM", "score": "AutoModelForSequenceClassification", "image_text": "AutoModelForImageTextToText"}
    options |= {"dtype": device_config.dtype, "trust_remote_code": False, "local_files_only": True}
    options["attn_implementation"] = "flash_attention_2" if config.hyperparameters.use_fa2 else "sdpa"
    if config.method == "QLoRA":
        options |= {"quantization_config": _make_bnb_config(device_config, model_kind), "device_map": {"": device_config.device}}
    try:
        model = getattr(transformers, classes[model_kind]).from_pretrained(weights, **options)
    except ImportError as error:
        if config.method == "QLoRA" and "bitsandbytes" in str(error):
            raise JobFailed("invalid_config", "QLoRA needs the package bitsandbytes, which is not here", "use method LoRA") from error
        raise JobFailed(
            "invalid_config", "use_fa2 needs the flash-attn package and an Ampere or newer GPU", "set use_fa2 to false"
        ) from error
    except (ValueError, KeyError) as error:  # transformers' words for a model type that it, or this class, does not know
        raise JobFailed("invalid_config", *_describe_load_error(config, model_kind, error)) from error
    if config.method == "QLoRA":
        _disable_avx512_repacking(model)
    else:
        model.to(device_config.device)
    model.config.get_text_config().use_cache = False
    if model.can_generate():
        model.get_output_embeddings().register_forward_pre_hook(_make_contiguous)
    return model


def _make_contiguous(_: Any, states: tuple[Any, ...]) -> tuple[Any, ...]:
    """Generation asks the head for the last position of each row. Where these lie apart and the head is frozen, torch multiplies row by
    row, and on a processor copies the whole head for each of them first: for Gemma 270M a second and 335 MB a row."""
    return (states[0].contiguous(), *states[1:])


def lora_config(config: TrainingConfig, model: Any, *, task_type: str = "CAUSAL_LM", trainable_token_ids: Sequence[int] = ()) -> Any:
    """What peft shall add to the model. Raises JobFailed for layers that are not there, and a rank above a layer's width."""
    from peft import LoraConfig

    knobs = config.hyperparameters
    sees = bool(getattr(knobs, "train_vision_tower", False))  # only trainer type sft has it
    linear = {name: part for name, part in _linear_layers(model) if sees or not _is_vision_module(name)}
    known = {name.rpartition(".")[2] for name in linear} - {"lm_head", "score"}
    targets = sorted(knobs.target_modules or known)
    for target in targets:
        if not any(name == target or name.endswith("." + target) for name in linear):
            raise JobFailed(
                "invalid_config",
                f"target_modules names {target!r}, which is no linear layer of this model",
                f"it has: {', '.join(sorted(known))}",
            )
        if target.rpartition(".")[2] == "lm_head":
            raise JobFailed("invalid_config", "target_modules names lm_head, which is tied to the embeddings", "leave it out")
    narrow = min((min(part.in_features, part.out_features), name) for name, part in linear.items() if name.endswith(tuple(targets)))
    if knobs.lora_rank > narrow[0]:
        message = f"lora_rank {knobs.lora_rank} is above the width of {narrow[1].rpartition('.')[2]}, which is {narrow[0]}"
        raise JobFailed("invalid_config", message, f"use a rank of at most {narrow[0]}: more can represent nothing more")
    return LoraConfig(
        r=knobs.lora_rank,
        lora_alpha=knobs.lora_alpha,
        lora_dropout=knobs.lora_dropout,
        use_dora=knobs.use_dora,
        use_rslora=knobs.use_rslora,
        target_modules=targets,
        exclude_modules=VISION_MODULES_PATTERN if any(_is_vision_module(name) for name, _ in _linear_layers(model)) and not sees else None,
        trainable_token_indices=list(trainable_token_ids) or None,
        task_type=task_type,
    )


def add_adapter(model: Any, config: TrainingConfig, peft_config: Any) -> Any:
    """The model with a fresh adapter, of which alone is trained."""
    if config.provider == "unsloth":
        return _adapt_with_unsloth(model, config, peft_config)
    from peft import get_peft_model

    adapted = get_peft_model(model, peft_config)
    patch_trainable_token_embedding(adapted)
    return adapted


def load_adapter(model: Any, checkpoint: Path) -> None:
    """Give a model's adapter the weights of a checkpoint."""
    model.load_adapter(str(checkpoint), "default", is_trainable=True, torch_device=str(model.device))
    patch_trainable_token_embedding(model)


def check_finite_weights(model: Any, step: int, full_weights: Mapping[str, Any] | None = None) -> None:
    """The last update has no loss after it that would show what it did. Raises JobFailed when a trained weight is no number.

    `whole` are the weights of a model that several processes hold parts of."""
    from jobs.runtime.training_control import make_divergence_error

    trained = (part for part in model.parameters() if part.requires_grad) if full_weights is None else full_weights.values()
    if not all(bool(part.isfinite().all()) for part in trained):
        raise make_divergence_error(f"the weights are no numbers any more after step {step}")


def set_eos_tokens(model: Any, tokenizer: Any) -> None:
    """Let the model's generation stop at the end of a turn as well as at the end of a text."""
    end_of_turn = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    if end_of_turn not in (None, tokenizer.unk_token_id):
        model.generation_config.eos_token_id = sorted({tokenizer.eos_token_id, end_of_turn})


def choose_torch_compile(config: TrainingConfig, context: "JobContext", device_config: DeviceConfig, base_folder: Path, steps: int) -> bool:
    """Whether the model is compiled first, for so many optimizer steps; told with its reason."""
    import shutil

    asked = config.hyperparameters.torch_compile
    if asked and not (shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")):
        context.warn("torch_compile_skipped", "torch_compile needs a C compiler, and this machine has none; the training goes on without")
        return False
    if asked is not None:
        context.log_decision("torch_compile", str(asked).lower(), "the request says so")
        return asked
    if not device_config.on_gpu:
        context.log_decision("torch_compile", "false", "on a processor it is done only when asked for")
        return False
    saved_s = estimate_training_s(config, base_folder, steps) * COMPILE_SAVED_FRACTION
    why = f"it would save about {saved_s:.0f} s of {steps} steps, and take about {COMPILE_S:.0f} s"
    context.log_decision("torch_compile", str(saved_s > COMPILE_S).lower(), why)
    return saved_s > COMPILE_S


def estimate_training_s(config: TrainingConfig, base_folder: Path, steps: int) -> float:
    """Roughly how long so many optimizer steps take on a data centre's GPU at a third of its peak."""
    knobs = config.hyperparameters
    tokens = steps * knobs.batch_size * knobs.gradient_accumulation_steps * knobs.max_seq_length
    per_token = (6 if config.method == "Full" else 4) * measure_weights_bytes(base_folder) / 2
    return tokens * per_token / GPU_FLOP_PER_S


def _linear_layers(model: Any) -> list[tuple[str, Any]]:
    import torch

    return [(name, part) for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)]


def _is_vision_module(name: str) -> bool:
    import re

    return re.fullmatch(VISION_MODULES_PATTERN, name) is not None


def _make_bnb_config(device_config: DeviceConfig, model_kind: ModelKind) -> Any:
    """What looks at images keeps its precision: it is a small part, the words' adapter cannot mend what it sees amiss, and the exported
    model sees with the unrounded one."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=device_config.dtype,
        llm_int8_skip_modules=[VISION_MODULES_PATTERN, "lm_head"] if model_kind == "image_text" else None,
    )


def _disable_avx512_repacking(model: Any) -> None:
    """On a processor with AVX512-BF16, bitsandbytes repacks a layer's weights at its first forward in evaluation, for good, and what
    multiplies by the repacked ones has no backward: after a measurement no gradient would reach the layers below, without an error."""
    from bitsandbytes.nn import Linear4bit

    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False


def _describe_load_error(config: TrainingConfig, model_kind: ModelKind, error: Exception) -> tuple[str, str]:
    what = {"causal": "a language model", "score": "a language model", "image_text": "a model of images and text"}[model_kind]
    first = str(error).partition("\n")[0][:200]
    return f"base model {config.base_model_id} is not {what} that this image can load: {first}", "use another base_model_id"


# --- unsloth: the same request, faster kernels --------------------------------------------------------------------------


def _load_with_unsloth(config: TrainingConfig, device_config: DeviceConfig, weights: Path) -> Any:
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        model_name=str(weights),
        max_seq_length=config.hyperparameters.max_seq_length,
        dtype=device_config.dtype,
        load_in_4bit=config.method == "QLoRA",
        full_finetuning=config.method == "Full",
    )
    model.config.get_text_config().use_cache = False
    return model


def _adapt_with_unsloth(model: Any, config: TrainingConfig, peft_config: Any) -> Any:
    from unsloth import FastLanguageModel

    knobs = config.hyperparameters
    return FastLanguageModel.get_peft_model(
        model,
        r=peft_config.r,
        lora_alpha=peft_config.lora_alpha,
        lora_dropout=peft_config.lora_dropout,
        target_modules=sorted(peft_config.target_modules),
        use_rslora=peft_config.use_rslora,
        use_gradient_checkpointing=False,  # the library's trainer says when
        random_state=knobs.seed,
        max_seq_length=knobs.max_seq_length,
    )

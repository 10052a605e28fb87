"""Whether a language model job can run at a placement: the packages of its environment, and the hardware of its profile."""

from schema.capabilities import FamilyCapabilities
from schema.estimate.llm_memory import TrainingShape, explain_misfit
from schema.estimate.llm_models import find_known_shape
from schema.training import LlmTrainingConfig
from service.core.errors import Unsupported
from service.core.ports import Profile
from service.core.problems import Problems
from service.core.validation.llm_optimizers import check_optimizer

MIN_FLASH_ATTENTION_CAPABILITY = 8.0  # Ampere


def check_support(config: LlmTrainingConfig, capabilities: FamilyCapabilities, profile: Profile) -> None:
    """Raise Unsupported when the job needs what the placement does not have; the message lists what it has."""
    problems = Problems()
    for field, value in (("provider", config.provider), ("method", config.method), ("modality", config.modality)):
        known = list_options(field, capabilities, profile)
        if value not in known:
            message = f"{field} {value!r} is not available on {profile.name}; it supports: {', '.join(known)}"
            problems.add(_unsupported(field, message, capabilities, profile))
    export, features = config.export_config, capabilities.features
    if (export.include_gguf or export.include_lora_gguf) and not features.get("gguf"):
        field = "include_gguf" if export.include_gguf else "include_lora_gguf"
        message = "this deployment cannot write GGUF: llama.cpp is not installed in its trainer environment"
        problems.add(_unsupported(f"export_config.{field}", message, capabilities, profile))
    if "onnx" in export.formats and not features.get("onnx"):
        message = "this deployment cannot write ONNX: its exporter is not installed in the trainer environment"
        problems.add(_unsupported("export_config.format", message, capabilities, profile))
    if config.eval_config.lm_eval_tasks and not features.get("lm_eval"):
        message = "this deployment cannot run lm-eval tasks: lm-evaluation-harness is not installed in its trainer environment"
        problems.add(_unsupported("eval_config.lm_eval_tasks", message, capabilities, profile))
    if config.hyperparameters.use_fa2 and not has_flash_attention(capabilities, profile):
        message = f"use_fa2 needs FlashAttention 2 and an Ampere or newer GPU; {profile.name} is {profile.device_name}"
        problems.add(_unsupported("hyperparameters.use_fa2", message, capabilities, profile))
    with problems.collect():
        check_optimizer(config, profile)
    with problems.collect():
        check_memory(config, capabilities, profile)
    problems.raise_found()


def check_memory(config: LlmTrainingConfig, capabilities: FamilyCapabilities, profile: Profile) -> None:
    """Raise Unsupported when the training of a known model cannot fit into the profile's memory, however small its batches are."""
    on_gpu = profile.device == "cuda"
    model, memory_bytes = find_known_shape(config.base_model_id), profile.gpu_memory_bytes if on_gpu else profile.memory_bytes
    if model is None or memory_bytes is None:
        return
    hyperparameters = config.hyperparameters
    training = TrainingShape(
        config.trainer_type_name(),
        config.method,
        hyperparameters.batch_size,
        hyperparameters.max_seq_length,
        lora_rank=hyperparameters.lora_rank,
        optimizer=hyperparameters.optim,
        on_gpu=on_gpu,
    )
    can_shard = config.trainer_type_name() == "sft" and config.modality == "text" and config.method != "QLoRA"
    device = f"a GPU of {profile.name}" if on_gpu else profile.name
    num_shards = max(1, profile.gpus) if can_shard else 1
    methods = list_options("method", capabilities, profile)
    problem = explain_misfit(model, training, memory_bytes, device=device, methods=methods, num_shards=num_shards)
    if problem is not None:
        raise _unsupported("method", f"{config.base_model_id} cannot be trained there: {problem}", capabilities, profile)


def list_options(field: str, capabilities: FamilyCapabilities, profile: Profile) -> tuple[str, ...]:
    """The values of a field that are possible on the profile."""
    on_gpu = profile.device == "cuda"
    return tuple(value for value in capabilities.options.get(field, ()) if on_gpu or value not in capabilities.needs_gpu)


def has_flash_attention(capabilities: FamilyCapabilities, profile: Profile) -> bool:
    """Whether FlashAttention 2 is installed and the GPU can run it."""
    capability = profile.compute_capability or 0.0
    return capabilities.features.get("flash_attention_2", False) and capability >= MIN_FLASH_ATTENTION_CAPABILITY


def list_notes(capabilities: FamilyCapabilities, profile: Profile) -> dict[str, str]:
    """Why something is missing on the profile, by the name of the field that asks for it."""
    notes = dict(capabilities.notes)
    if profile.device != "cuda":
        notes |= {"provider": "unsloth needs a GPU", "use_fa2": "FlashAttention 2 needs an Ampere or newer GPU"}
    return notes


def _unsupported(field: str, message: str, capabilities: FamilyCapabilities, profile: Profile) -> Unsupported:
    note = list_notes(capabilities, profile).get(field.rpartition(".")[2], "")
    return Unsupported(message, hint=note or "GET /capabilities lists what this deployment can do", param=f"training_config.{field}")

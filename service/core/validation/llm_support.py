"""Whether a language model job can run at a placement: the packages of its environment, and the hardware of its profile."""

from schema.capabilities import FamilyCapabilities
from schema.estimate.llm_export import estimate_export_memory, explain_impossible_export
from schema.estimate.llm_memory import explain_misfit
from schema.training import LlmTrainingConfig
from service.core.dry_run.llm_facts import find_shape, make_device, make_export_plan, make_training_shape
from service.core.errors import DoesNotFit, Unsupported
from service.core.models.sizes import StoredBase
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
    problems.raise_found()


def check_memory(config: LlmTrainingConfig, capabilities: FamilyCapabilities, profile: Profile, base: StoredBase | None = None) -> None:
    """Raise DoesNotFit when a training or its exports cannot fit into the profile's memory, however small the batches are.

    Only a base whose sizes are known is checked: one that the model store has, or that is known by name.
    """
    on_gpu = profile.device == "cuda"
    memory_bytes = profile.gpu_memory_bytes if on_gpu else profile.memory_bytes
    model, _ = find_shape(config.base_model_id, base)
    if model is None:
        return
    export_plan = make_export_plan(config, model)
    if problem := explain_impossible_export(model, export_plan):
        raise _misfit("export_config.format", f"{config.base_model_id} cannot be exported: {problem}")
    if memory_bytes is None:
        return
    device = f"a GPU of {profile.name}" if on_gpu else profile.name
    num_shards = max(1, profile.gpus) if can_shard(config) else 1
    methods = list_options("method", capabilities, profile)
    training = make_training_shape(config, make_device(profile))
    problem = explain_misfit(model, training, memory_bytes, device=device, methods=methods, num_shards=num_shards)
    if problem is not None:
        raise _misfit("method", f"{config.base_model_id} cannot be trained there: {problem}")
    export = estimate_export_memory(model, export_plan, on_gpu=on_gpu)
    for needed, available, place in ((export.device, memory_bytes, device), (export.host, profile.memory_bytes, "main memory")):
        if available is not None and needed > available:
            message = f"the export of {config.base_model_id} needs {needed / 1e9:.1f} GB, and {place} has {available / 1e9:.1f} GB"
            raise _misfit("export_config.format", f"{message}; export format 'adapter' needs no memory for the whole model")


def can_shard(config: LlmTrainingConfig) -> bool:
    """Whether several GPUs can share the weights of the training."""
    return config.trainer_type_name() == "sft" and config.modality == "text" and config.method != "QLoRA"


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


def _misfit(field: str, message: str) -> DoesNotFit:
    return DoesNotFit(message, param=f"training_config.{field}")

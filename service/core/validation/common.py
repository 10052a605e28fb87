"""Checks for every job: what the deployment supports, the dataset's type, and which models are stored."""

from schema.dataset import Dataset
from schema.training import TRAINER_TYPES, BaseTrainingConfig, TrainingConfig
from service.core.errors import InvalidRequest, Unsupported
from service.core.ports import RuntimeCapabilities
from storage import ObjectStore


def check_supported(config: TrainingConfig, capabilities: RuntimeCapabilities) -> None:
    """Raise Unsupported when the request needs something that this deployment does not have; the message lists what it has."""
    export = config.export_config
    for field, value, known in (
        ("trainer_type", config.trainer_type, capabilities.trainer_types),
        ("provider", config.provider, capabilities.providers),
        ("method", config.method, capabilities.methods),
        ("modality", config.modality, capabilities.modalities),
    ):
        if value not in known:
            raise _unsupported(
                field, f"{field} {value!r} is not available in this deployment; it supports: {', '.join(known)}", capabilities
            )
    if (export.include_gguf or export.include_lora_gguf) and not capabilities.gguf:
        field = "include_gguf" if export.include_gguf else "include_lora_gguf"
        message = "this deployment cannot write GGUF: llama.cpp is not installed in its trainer environment"
        raise _unsupported(f"export_config.{field}", message, capabilities)
    if "onnx" in export.formats and not capabilities.onnx:
        message = "this deployment cannot write ONNX: its exporter is not installed in the trainer environment"
        raise _unsupported("export_config.format", message, capabilities)
    if config.eval_config.lm_eval_tasks and not capabilities.lm_eval:
        message = "this deployment cannot run lm-eval tasks: lm-evaluation-harness is not installed in its trainer environment"
        raise _unsupported("eval_config.lm_eval_tasks", message, capabilities)
    if config.hyperparameters.use_fa2 and not capabilities.flash_attention_2:
        message = f"use_fa2 needs FlashAttention 2 and an Ampere or newer GPU; this deployment trains on {capabilities.device_name}"
        raise _unsupported("hyperparameters.use_fa2", message, capabilities)


def check_dataset_type(config: BaseTrainingConfig, dataset: Dataset) -> None:
    """Raise InvalidRequest when the trainer cannot train on a dataset of that type."""
    if dataset.dataset_type not in config.dataset_types:
        matching = [name for name, trainer in TRAINER_TYPES.items() if dataset.dataset_type in trainer.dataset_types]
        raise InvalidRequest(
            f"trainer_type {config.trainer_type_name()!r} needs a dataset of {' or '.join(config.dataset_types)}; "
            f"{dataset.processed_dataset_id} is {dataset.dataset_type}",
            hint=f"trainer_type {' or '.join(matching)} trains on {dataset.dataset_type}" if matching else "",
            param="processed_dataset_id",
        )


def is_stored(models: ObjectStore, model_id: str) -> bool:
    """Whether the deployment's model store has a copy of a model of the Hub. Raises StorageError."""
    return models.stat(f"pretrained_weights/huggingface/{model_id}/config.json") is not None


def _unsupported(field: str, message: str, capabilities: RuntimeCapabilities) -> Unsupported:
    note = capabilities.notes.get(field.rpartition(".")[2], "")
    return Unsupported(message, hint=note or "GET /capabilities lists what this deployment can do", param=f"training_config.{field}")

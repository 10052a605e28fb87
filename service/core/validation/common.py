"""Checks for every job: what the deployment supports, the dataset's type, and whether the requested metrics will be measured."""

from schema.dataset import Dataset
from schema.training import TRAINER_TYPES, TrainingConfig
from schema.training.evaluation import EvalConfig
from service.core.errors import InvalidRequest, Unsupported
from service.core.ports import RuntimeCapabilities

LM_EVAL_PREFIX = "lm_eval/"  # prefix of the metrics of lm-evaluation-harness
# Metrics that only compute_eval_metrics measures, by how their names begin.
OPTIONAL_METRIC_PREFIXES = ("accuracy", "exact_match", "rouge", "bleu", "chrf", "f1")


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


def check_dataset_type(config: TrainingConfig, dataset: Dataset) -> None:
    """Raise InvalidRequest when the trainer cannot train on a dataset of that type."""
    if dataset.dataset_type not in config.dataset_types:
        matching = [name for name, trainer in TRAINER_TYPES.items() if dataset.dataset_type in trainer.dataset_types]
        raise InvalidRequest(
            f"trainer_type {config.trainer_type!r} needs a dataset of {' or '.join(config.dataset_types)}; "
            f"{dataset.processed_dataset_id} is {dataset.dataset_type}",
            hint=f"trainer_type {' or '.join(matching)} trains on {dataset.dataset_type}" if matching else "",
            param="processed_dataset_id",
        )


def check_eval_split(eval_config: EvalConfig, dataset_id: str) -> None:
    """Raise InvalidRequest for anything that is measured on held-out rows: the dataset has none."""
    for field, requested, alternative in (
        ("eval_strategy", eval_config.eval_strategy != "no", "set eval_strategy to 'no'"),
        ("compute_eval_metrics", eval_config.compute_eval_metrics, "set compute_eval_metrics to false"),
        ("promotion_gate", any(not check.metric.startswith(LM_EVAL_PREFIX) for check in eval_config.promotion_gate), "leave out the gate"),
    ):
        if requested:
            value = f" {eval_config.eval_strategy!r}" if field == "eval_strategy" else ""
            raise InvalidRequest(
                f"{field}{value} needs held-out rows, and {dataset_id} has none",
                hint=f"upload the dataset with eval_fraction above 0, or {alternative}",
                param=f"training_config.eval_config.{field}",
            )


def check_gate(eval_config: EvalConfig) -> None:
    """Raise InvalidRequest for a gate on a metric that the job will not measure: it could never pass."""
    for index, check in enumerate(eval_config.promotion_gate):
        param = f"training_config.eval_config.promotion_gate.{index}.metric"
        if check.metric.startswith(OPTIONAL_METRIC_PREFIXES) and not eval_config.compute_eval_metrics:
            message = f"the gate checks {check.metric}, which is only measured with compute_eval_metrics"
            raise InvalidRequest(message, hint="set eval_config.compute_eval_metrics to true", param=param)
        task = check.metric.removeprefix(LM_EVAL_PREFIX).partition("/")[0]
        if check.metric.startswith(LM_EVAL_PREFIX) and task not in eval_config.lm_eval_tasks:
            message = f"the gate checks {check.metric}, and {task!r} is not in lm_eval_tasks"
            raise InvalidRequest(message, hint=f"add {task} to eval_config.lm_eval_tasks", param=param)


def _unsupported(field: str, message: str, capabilities: RuntimeCapabilities) -> Unsupported:
    note = capabilities.notes.get(field.rpartition(".")[2], "")
    return Unsupported(message, hint=note or "GET /capabilities lists what this deployment can do", param=f"training_config.{field}")

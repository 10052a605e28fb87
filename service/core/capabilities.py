"""What this deployment can do: told to programs by `GET /capabilities`, and asked of every request before it costs anything."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import get_args

from schema.dataset import EVAL_SPLIT, Dataset
from schema.job import ArtifactKind
from schema.training import TRAINER_TYPES, GrpoConfig, TrainingConfig
from schema.training.evaluation import EvalConfig
from schema.training.export import ExportFormat, GgufQuantization
from schema.training.graders import (
    GRADER_TYPES,
    ExpressionGrader,
    Grader,
    NumericGrader,
    ScoreModelGrader,
    StringCheckGrader,
    TextSimilarityGrader,
)
from service.core.errors import InvalidRequest, Unsupported
from service.core.ports import RuntimeCapabilities
from service.core.validation.models import find_known_model

TRACKERS = ("wandb", "mlflow", "tensorboard", "trackio")
DESTINATIONS = ("gcs", "hfhub")
LM_EVAL_PREFIX = "lm_eval/"  # how the metrics of lm-evaluation-harness begin
# What only compute_eval_metrics measures, by how the metric's name begins.
OPTIONAL_METRIC_PREFIXES = ("accuracy", "exact_match", "rouge", "bleu", "chrf", "f1")


def capabilities_response(profiles: Mapping[str, RuntimeCapabilities], launcher_name: str) -> dict[str, object]:
    """The whole answer of `GET /capabilities`. What is said outside `profiles` is said of the first, which is the default."""
    hardware = next(iter(profiles.values()))
    return {
        "launcher": launcher_name,
        "profiles": {name: asdict(facts) for name, facts in profiles.items()},
        "trainer_types": {
            name: {"dataset_types": list(config.dataset_types), "modalities": list(config.modalities)}
            for name, config in TRAINER_TYPES.items()
            if name in hardware.trainer_types
        },
        "providers": list(hardware.providers),
        "methods": list(hardware.methods),
        "modalities": list(hardware.modalities),
        "graders": list(GRADER_TYPES),
        "export": {
            "formats": [name for name in get_args(ExportFormat) if name != "onnx" or hardware.onnx],
            "destinations": list(DESTINATIONS),
            "gguf_quantizations": list(get_args(GgufQuantization)) if hardware.gguf else [],
            "artifacts": list(get_args(ArtifactKind)),
        },
        "trackers": list(TRACKERS),
        "lm_eval": hardware.lm_eval,
        "use_fa2": hardware.flash_attention_2,
        "hardware": asdict(hardware),
    }


def check_supported(config: TrainingConfig, capabilities: RuntimeCapabilities) -> None:
    """Raise Unsupported when the request needs what this deployment does not have, naming what it has."""
    export = config.export_config
    for field, wanted, known in (
        ("trainer_type", config.trainer_type, capabilities.trainer_types),
        ("provider", config.provider, capabilities.providers),
        ("method", config.method, capabilities.methods),
        ("modality", config.modality, capabilities.modalities),
    ):
        if wanted not in known:
            raise _unsupported(
                field, f"{field} {wanted!r} is not available in this deployment; it can do: {', '.join(known)}", capabilities
            )
    if (export.include_gguf or export.include_lora_gguf) and not capabilities.gguf:
        field = "include_gguf" if export.include_gguf else "include_lora_gguf"
        message = "this deployment cannot write GGUF: llama.cpp is not installed there"
        raise _unsupported(f"export_config.{field}", message, capabilities)
    if "onnx" in export.formats and not capabilities.onnx:
        message = "this deployment cannot write ONNX: its exporter is not installed there"
        raise _unsupported("export_config.format", message, capabilities)
    if config.eval_config.lm_eval_tasks and not capabilities.lm_eval:
        message = "this deployment cannot run lm-eval tasks: lm-evaluation-harness is not installed there"
        raise _unsupported("eval_config.lm_eval_tasks", message, capabilities)
    if config.hyperparameters.use_fa2 and not capabilities.flash_attention_2:
        message = f"use_fa2 needs FlashAttention 2 and an Ampere or newer GPU; this deployment trains on {capabilities.device_name}"
        raise _unsupported("hyperparameters.use_fa2", message, capabilities)


def check_dataset_compatible(config: TrainingConfig, dataset: Dataset) -> None:
    """Raise InvalidRequest when the trainer cannot learn from that dataset, as far as it shows before any compute is spent."""
    if dataset.dataset_type not in config.dataset_types:
        able = [name for name, trainer in TRAINER_TYPES.items() if dataset.dataset_type in trainer.dataset_types]
        raise InvalidRequest(
            f"trainer_type {config.trainer_type!r} needs a dataset of {' or '.join(config.dataset_types)}; "
            f"{dataset.processed_dataset_id} is {dataset.dataset_type}",
            hint=f"trainer_type {' or '.join(able)} learns from {dataset.dataset_type}" if able else "",
            param="processed_dataset_id",
        )
    _check_images(config, dataset)
    _check_base(config)
    if isinstance(config, GrpoConfig):
        _check_grader_columns(config, dataset)
    if EVAL_SPLIT not in dataset.splits:
        _reject_eval_without_eval_split(config.eval_config, dataset.processed_dataset_id)
    _check_gate(config.eval_config)


def _check_images(config: TrainingConfig, dataset: Dataset) -> None:
    if config.modality == "text" and dataset.images:
        message = f"{dataset.processed_dataset_id} has {dataset.images} images, and modality 'text' has no eyes for them"
        raise InvalidRequest(message, hint="set modality to 'vision', with a base that takes images", param="training_config.modality")
    if config.modality == "vision" and not dataset.images:
        message = f"modality 'vision' needs images, and {dataset.processed_dataset_id} has none"
        raise InvalidRequest(message, hint="set modality to 'text', or upload rows with images", param="training_config.modality")


def _check_base(config: TrainingConfig) -> None:
    base, rank = find_known_model(config.base_model_id), config.hyperparameters.lora_rank
    if base is None:
        return
    if config.modality == "vision" and not base.has_vision:
        message = f"{config.base_model_id} is a text model; it cannot take images"
        hint = "google/gemma-3-4b-it and larger ones take images"
        raise InvalidRequest(message, hint=hint, param="training_config.modality")
    if config.method != "Full" and rank > base.hidden_size:
        message = f"lora_rank {rank} is above {base.hidden_size}, the width of {config.base_model_id}'s layers"
        hint = f"8 to 64 is usual; at most {base.hidden_size}"
        raise InvalidRequest(message, hint=hint, param="training_config.hyperparameters.lora_rank")


def _check_grader_columns(config: GrpoConfig, dataset: Dataset) -> None:
    """What graders read must be in the rows."""
    known = dataset.columns if dataset.dataset_type == "prompt" else ("completion",)
    for n, grader in enumerate(config.reward_config):
        for field, column in _grader_columns(grader):
            if column not in known:
                message = f"grader {grader.name!r} reads the column {column!r}; the rows of {dataset.processed_dataset_id} have: "
                raise InvalidRequest(
                    message + (", ".join(known) or "none beside the prompt"),
                    hint=f"name one of them in {field}, or upload rows that have the column",
                    param=f"training_config.reward_config.{n}.{field}",
                )


def _grader_columns(grader: Grader) -> Iterator[tuple[str, str]]:
    """The columns that a grader reads, by the field that names them."""
    match grader:
        case StringCheckGrader() | NumericGrader() | ExpressionGrader() | TextSimilarityGrader():
            yield "reference_field", grader.reference_field
        case ScoreModelGrader():
            yield from (("prompt", name) for name in re.findall(r"\{\{(\w+)\}\}", grader.prompt) if name not in ("prompt", "completion"))
        case _:
            return


def _reject_eval_without_eval_split(eval_config: EvalConfig, dataset_id: str) -> None:
    """What is measured on held-out rows cannot be measured on none."""
    for field, asked, instead in (
        ("eval_strategy", eval_config.eval_strategy != "no", "set eval_strategy to 'no'"),
        ("compute_eval_metrics", eval_config.compute_eval_metrics, "set compute_eval_metrics to false"),
        ("promotion_gate", any(not check.metric.startswith(LM_EVAL_PREFIX) for check in eval_config.promotion_gate), "leave the gate out"),
    ):
        if asked:
            value = f" {eval_config.eval_strategy!r}" if field == "eval_strategy" else ""
            raise InvalidRequest(
                f"{field}{value} needs held-out rows, and {dataset_id} has none",
                hint=f"upload the dataset with eval_fraction above 0, or {instead}",
                param=f"training_config.eval_config.{field}",
            )


def _check_gate(eval_config: EvalConfig) -> None:
    """A gate on what is not measured would never open."""
    for n, check in enumerate(eval_config.promotion_gate):
        param = f"training_config.eval_config.promotion_gate.{n}.metric"
        if check.metric.startswith(OPTIONAL_METRIC_PREFIXES) and not eval_config.compute_eval_metrics:
            message = f"the gate asks for {check.metric}, which is only measured with compute_eval_metrics"
            raise InvalidRequest(message, hint="set eval_config.compute_eval_metrics to true", param=param)
        task = check.metric.removeprefix(LM_EVAL_PREFIX).partition("/")[0]
        if check.metric.startswith(LM_EVAL_PREFIX) and task not in eval_config.lm_eval_tasks:
            message = f"the gate asks for {check.metric}, and {task!r} is not among lm_eval_tasks"
            raise InvalidRequest(message, hint=f"add {task} to eval_config.lm_eval_tasks", param=param)


def _unsupported(field: str, message: str, capabilities: RuntimeCapabilities) -> Unsupported:
    why = capabilities.notes.get(field.rpartition(".")[2], "")
    return Unsupported(message, hint=why or "GET /capabilities lists what this deployment can do", param=f"training_config.{field}")

"""Checks for language models: the base model, the images and columns of the dataset, the graders, the requested metrics.

Nothing is downloaded: an unknown model name passes, and the job checks it again.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from schema.dataset import EVAL_SPLIT, Dataset
from schema.training.llm import GrpoConfig, LlmTrainingConfig
from schema.training.llm_evaluation import EvalConfig
from schema.training.llm_graders import (
    ExpressionGrader,
    Grader,
    NumericGrader,
    ScoreModelGrader,
    StringCheckGrader,
    TextSimilarityGrader,
)
from service.core.errors import InvalidRequest
from service.core.validation.common import check_dataset_type, is_stored
from storage import ObjectStore

LM_EVAL_PREFIX = "lm_eval/"  # prefix of the metrics of lm-evaluation-harness
# Metrics that only compute_eval_metrics measures, by how their names begin.
OPTIONAL_METRIC_PREFIXES = ("accuracy", "exact_match", "rouge", "bleu", "chrf", "f1")


@dataclass(frozen=True)
class KnownModel:
    """A family of models, recognized by how their names begin, whichever account publishes the copy."""

    name: str
    has_vision: bool  # accepts images beside text
    hidden_size: int  # of the hidden states; the rank of a LoRA must not exceed it


# https://huggingface.co/google: `hidden_size` (of the text part) and the presence of a vision tower, in each config.json.
KNOWN_MODELS = (
    KnownModel("gemma-3-270m", has_vision=False, hidden_size=640),
    KnownModel("gemma-3-1b", has_vision=False, hidden_size=1152),
    KnownModel("gemma-3-4b", has_vision=True, hidden_size=2560),
    KnownModel("gemma-3-12b", has_vision=True, hidden_size=3840),
    KnownModel("gemma-3-27b", has_vision=True, hidden_size=5376),
)


def check_job(config: LlmTrainingConfig, dataset: Dataset, models: ObjectStore) -> None:
    """Raise InvalidRequest when the trainer cannot train on that dataset, or a grader's model is missing. Raises StorageError."""
    check_dataset_compatible(config, dataset)
    check_embedding_models(config, models)


def check_dataset_compatible(config: LlmTrainingConfig, dataset: Dataset) -> None:
    """Raise InvalidRequest when the trainer cannot train on that dataset, as far as that shows before any compute is spent."""
    check_dataset_type(config, dataset)
    _check_images(config, dataset)
    _check_base(config)
    if isinstance(config, GrpoConfig):
        _check_grader_columns(config, dataset)
    if EVAL_SPLIT not in dataset.splits:
        check_eval_split(config.eval_config, dataset.processed_dataset_id)
    check_gate(config.eval_config)


def check_embedding_models(config: LlmTrainingConfig, models: ObjectStore) -> None:
    """Raise InvalidRequest when a grader's embedding model is not in the model store: jobs never download embedding models."""
    for index, grader in enumerate(config.reward_config if isinstance(config, GrpoConfig) else []):
        if not isinstance(grader, TextSimilarityGrader) or grader.embedding_model is None or grader.base_url is not None:
            continue
        if not is_stored(models, grader.embedding_model):
            folder = f"{models.url}/pretrained_weights/huggingface/{grader.embedding_model}/"
            raise InvalidRequest(
                f"grader {grader.name!r} uses {grader.embedding_model}, which is not in this deployment's model store",
                hint=f"set base_url to an endpoint that serves it, or put its files at {folder}",
                param=f"training_config.reward_config.{index}.embedding_model",
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


def find_known_model(base_model_id: str) -> KnownModel | None:
    """The family of a model by its name, or None."""
    name = base_model_id.rpartition("/")[2].lower()
    return next((base for base in KNOWN_MODELS if re.match(rf"{re.escape(base.name)}(?![a-z0-9])", name)), None)


def _check_images(config: LlmTrainingConfig, dataset: Dataset) -> None:
    if config.modality == "text" and dataset.images:
        message = f"{dataset.processed_dataset_id} has {dataset.images} images, and modality 'text' does not accept images"
        raise InvalidRequest(
            message, hint="set modality to 'vision', with a base model that accepts images", param="training_config.modality"
        )
    if config.modality == "vision" and not dataset.images:
        message = f"modality 'vision' needs images, and {dataset.processed_dataset_id} has none"
        raise InvalidRequest(message, hint="set modality to 'text', or upload rows with images", param="training_config.modality")


def _check_base(config: LlmTrainingConfig) -> None:
    base, rank = find_known_model(config.base_model_id), config.hyperparameters.lora_rank
    if base is None:
        return
    if config.modality == "vision" and not base.has_vision:
        message = f"{config.base_model_id} is a text model; it does not accept images"
        hint = "google/gemma-3-4b-it and larger ones accept images"
        raise InvalidRequest(message, hint=hint, param="training_config.modality")
    if config.method != "Full" and rank > base.hidden_size:
        message = f"lora_rank {rank} is above {base.hidden_size}, the width of {config.base_model_id}'s layers"
        hint = f"8 to 64 is usual; at most {base.hidden_size}"
        raise InvalidRequest(message, hint=hint, param="training_config.hyperparameters.lora_rank")


def _check_grader_columns(config: GrpoConfig, dataset: Dataset) -> None:
    """Raise InvalidRequest when a grader reads a column that the rows do not have."""
    known = dataset.columns if dataset.dataset_type == "prompt" else ("completion",)
    for index, grader in enumerate(config.reward_config):
        for field, column in _grader_columns(grader):
            if column not in known:
                message = f"grader {grader.name!r} reads the column {column!r}; the rows of {dataset.processed_dataset_id} have: "
                raise InvalidRequest(
                    message + (", ".join(known) or "none beside the prompt"),
                    hint=f"name one of them in {field}, or upload rows that have the column",
                    param=f"training_config.reward_config.{index}.{field}",
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

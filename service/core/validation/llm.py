"""Checks for language models: the base model, the rows of the dataset and their form, the chat template, the graders, the metrics.

Nothing is downloaded: an unknown model name passes, and the job checks it again.
"""

import re
from collections.abc import Iterator

from schema.dataset import EVAL_SPLIT, Dataset
from schema.training.llm import GrpoConfig, LlmTrainingConfig, SftConfig
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
from service.core.problems import Problems
from service.core.suggestions import did_you_mean
from service.core.validation.chat_template import check_chat_template
from service.core.validation.common import check_dataset_type, is_stored
from service.core.validation.known_models import find_known_model, is_stateful_name
from storage import ObjectStore

LM_EVAL_PREFIX = "lm_eval/"  # prefix of the metrics of lm-evaluation-harness
# Metrics that only compute_eval_metrics measures, by how their names begin.
OPTIONAL_METRIC_PREFIXES = ("accuracy", "exact_match", "rouge", "bleu", "chrf", "f1")


def check_job(config: LlmTrainingConfig, dataset: Dataset, models: ObjectStore) -> None:
    """Raise InvalidRequest when the trainer cannot train on that dataset, or a grader's model is missing. Raises StorageError."""
    problems = Problems()
    with problems.collect():
        check_dataset_compatible(config, dataset)
    with problems.collect():
        check_embedding_models(config, models)
    problems.raise_found()


def check_dataset_compatible(config: LlmTrainingConfig, dataset: Dataset) -> None:
    """Raise InvalidRequest when the trainer cannot train on that dataset, as far as that shows before any compute is spent."""
    problems = Problems()
    with problems.collect():
        check_dataset_type(config, dataset)
        # Only of rows that the trainer reads: another dataset is needed anyway.
        with problems.collect():
            _check_images(config, dataset)
        with problems.collect():
            _check_form(config, dataset)
        if isinstance(config, SftConfig):
            with problems.collect():
                _check_learned_messages(config, dataset)
        if isinstance(config, GrpoConfig):
            _check_grader_columns(config, dataset)
    if config.chat_template is not None:
        with problems.collect():
            check_chat_template(config.chat_template)
    with problems.collect():
        _check_base(config)
    if EVAL_SPLIT not in dataset.splits:
        with problems.collect():
            check_eval_split(config.eval_config, dataset.processed_dataset_id)
    with problems.collect():
        check_gate(config.eval_config)
    problems.raise_found()


def check_embedding_models(config: LlmTrainingConfig, models: ObjectStore) -> None:
    """Raise InvalidRequest when a grader's embedding model is not in the model store: jobs never download embedding models."""
    problems = Problems()
    for index, grader in enumerate(config.reward_config if isinstance(config, GrpoConfig) else []):
        if not isinstance(grader, TextSimilarityGrader) or grader.embedding_model is None or grader.base_url is not None:
            continue
        if not is_stored(models, grader.embedding_model):
            folder = f"{models.url}/pretrained_weights/huggingface/{grader.embedding_model}/"
            message = f"grader {grader.name!r} uses {grader.embedding_model}, which is not in this deployment's model store"
            hint = f"set base_url to an endpoint that serves it, or put its files at {folder}"
            problems.add(InvalidRequest(message, hint=hint, param=f"training_config.reward_config.{index}.embedding_model"))
    problems.raise_found()


def check_eval_split(eval_config: EvalConfig, dataset_id: str) -> None:
    """Raise InvalidRequest for anything that is measured on held-out rows: the dataset has none."""
    problems = Problems()
    for field, requested, alternative in (
        ("eval_strategy", eval_config.eval_strategy != "no", "set eval_strategy to 'no'"),
        ("compute_eval_metrics", eval_config.compute_eval_metrics, "set compute_eval_metrics to false"),
        ("promotion_gate", any(not check.metric.startswith(LM_EVAL_PREFIX) for check in eval_config.promotion_gate), "leave out the gate"),
    ):
        if requested:
            value = f" {eval_config.eval_strategy!r}" if field == "eval_strategy" else ""
            message = f"{field}{value} needs held-out rows, and {dataset_id} has none"
            hint = f"upload the dataset with eval_fraction above 0, or {alternative}"
            problems.add(InvalidRequest(message, hint=hint, param=f"training_config.eval_config.{field}"))
    problems.raise_found()


def check_gate(eval_config: EvalConfig) -> None:
    """Raise InvalidRequest for a gate on a metric that the job will not measure: it could never pass."""
    problems = Problems()
    for index, check in enumerate(eval_config.promotion_gate):
        param = f"training_config.eval_config.promotion_gate.{index}.metric"
        if check.metric.startswith(OPTIONAL_METRIC_PREFIXES) and not eval_config.compute_eval_metrics:
            message = f"the gate checks {check.metric}, which is only measured with compute_eval_metrics"
            problems.add(InvalidRequest(message, hint="set eval_config.compute_eval_metrics to true", param=param))
        task = check.metric.removeprefix(LM_EVAL_PREFIX).partition("/")[0]
        if check.metric.startswith(LM_EVAL_PREFIX) and task not in eval_config.lm_eval_tasks:
            message = f"the gate checks {check.metric}, and {task!r} is not in lm_eval_tasks"
            problems.add(InvalidRequest(message, hint=f"add {task} to eval_config.lm_eval_tasks", param=param))
    problems.raise_found()


def _check_images(config: LlmTrainingConfig, dataset: Dataset) -> None:
    if config.modality == "text" and dataset.images:
        message = f"{dataset.processed_dataset_id} has {dataset.images} images, and modality 'text' does not accept images"
        raise InvalidRequest(
            message, hint="set modality to 'vision', with a base model that accepts images", param="training_config.modality"
        )
    if config.modality == "vision" and not dataset.images:
        message = f"modality 'vision' needs images, and {dataset.processed_dataset_id} has none"
        raise InvalidRequest(message, hint="set modality to 'text', or upload rows with images", param="training_config.modality")


def _check_form(config: LlmTrainingConfig, dataset: Dataset) -> None:
    """Raise InvalidRequest when rows with turns are to be trained without a template."""
    if config.prompt_format == "raw" and "messages" in (dataset.dataset_type, dataset.prompt_form):
        message = f"prompt_format 'raw' joins strings, and the rows of {dataset.processed_dataset_id} are lists of messages"
        hint = "leave prompt_format out, or upload rows whose prompts and answers are strings"
        raise InvalidRequest(message, hint=hint, param="training_config.prompt_format")


def _check_learned_messages(config: SftConfig, dataset: Dataset) -> None:
    """Raise InvalidRequest when the messages to learn are chosen in a way that the rows do not allow."""
    field = "train_on_inputs" if config.train_on_inputs else "last_turn_only"
    if not (config.train_on_inputs or config.last_turn_only):
        return
    if dataset.dataset_type == "text":
        message = (
            f"{field} chooses between messages, and the rows of {dataset.processed_dataset_id} are texts, which are learned as a whole"
        )
        raise InvalidRequest(message, hint=f"leave {field} out", param=f"training_config.{field}")
    if dataset.has_weights:
        message = f"{field} would overrule the weights of messages in {dataset.processed_dataset_id}"
        raise InvalidRequest(message, hint=f"leave {field} out, or upload the rows without weights", param=f"training_config.{field}")


def _check_base(config: LlmTrainingConfig) -> None:
    problems = Problems()
    base, rank = find_known_model(config.base_model_id), config.hyperparameters.lora_rank
    if config.hyperparameters.packing and is_stateful_name(config.base_model_id):
        message = f"{config.base_model_id} carries a state along the sequence, so that packed rows would reach each other"
        problems.add(InvalidRequest(message, hint="set packing to false", param="training_config.hyperparameters.packing"))
    if base is not None and config.modality == "vision" and base.images != "trained":
        reason = "is a text model; it does not accept images" if base.images == "none" else "has images that this trainer does not know"
        hint = "modality 'vision' trains multimodal Gemma 3: google/gemma-3-4b-it and larger"
        problems.add(InvalidRequest(f"{config.base_model_id} {reason}", hint=hint, param="training_config.modality"))
    if base is not None and config.method != "Full" and base.hidden_size is not None and rank > base.hidden_size:
        message = f"lora_rank {rank} is above {base.hidden_size}, the width of {config.base_model_id}'s layers"
        hint = f"8 to 64 is usual; at most {base.hidden_size}"
        problems.add(InvalidRequest(message, hint=hint, param="training_config.hyperparameters.lora_rank"))
    problems.raise_found()


def _check_grader_columns(config: GrpoConfig, dataset: Dataset) -> None:
    """Raise InvalidRequest when a grader reads a column that the rows do not have."""
    known = dataset.columns if dataset.dataset_type == "prompt" else ("completion",)
    problems = Problems()
    for index, grader in enumerate(config.reward_config):
        for field, column in _grader_columns(grader):
            if column not in known:
                message = f"grader {grader.name!r} reads the column {column!r}; the rows of {dataset.processed_dataset_id} have: "
                hint = did_you_mean(column, known, f"name one of them in {field}, or upload rows that have the column")
                param = f"training_config.reward_config.{index}.{field}"
                problems.add(InvalidRequest(message + (", ".join(known) or "none beside the prompt"), hint=hint, param=param))
    problems.raise_found()


def _grader_columns(grader: Grader) -> Iterator[tuple[str, str]]:
    """The columns that a grader reads, by the field that names them."""
    match grader:
        case StringCheckGrader() | NumericGrader() | ExpressionGrader() | TextSimilarityGrader():
            yield "reference_field", grader.reference_field
        case ScoreModelGrader():
            yield from (("prompt", name) for name in re.findall(r"\{\{(\w+)\}\}", grader.prompt) if name not in ("prompt", "completion"))
        case _:
            return

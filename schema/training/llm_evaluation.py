"""Evaluation of language models on the held-out rows: when, and which metrics."""

from typing import Literal, Self

from pydantic import Field, model_validator

from schema.base import field_error
from schema.training.evaluation import BaseEvalConfig, MetricName


class EvalConfig(BaseEvalConfig):
    """When to evaluate on the held-out rows during training. If there are any, they are also evaluated before and after training."""

    eval_strategy: Literal["no", "steps", "epoch"] = "no"
    eval_steps: int = Field(50, ge=1, le=1_000_000, description="Optimizer steps between evaluations, with eval_strategy `steps`.")
    compute_eval_metrics: bool = Field(
        False,
        description="Also measure token accuracy, and generate answers to held-out prompts to compare with the references: "
        "exact match, ROUGE, BLEU, and F1 where the answers are labels.",
    )
    batch_eval_metrics: bool = Field(False, description="Compute accuracy batch by batch: less memory, the same result.")
    task_rows: int = Field(64, ge=1, le=100_000, description="The maximum number of held-out prompts to answer for compute_eval_metrics.")
    sample_prompts: int = Field(
        3, ge=0, le=32, description="Held-out prompts whose answers appear in the events at each evaluation; 0 for none."
    )
    max_new_tokens: int = Field(64, ge=1, le=4096, description="The maximum number of tokens of a generated answer.")
    load_best_model_at_end: bool = Field(False, description="Publish the checkpoint with the lowest eval_loss instead of the last one.")
    early_stopping_patience: int | None = Field(
        None, ge=1, le=1000, description="End the training after this many evaluations in a row without a lower eval_loss."
    )
    early_stopping_threshold: float = Field(0.0, ge=0, le=100, description="How much eval_loss must fall to count as lower, in nats.")
    lm_eval_tasks: list[MetricName] = Field(
        [], max_length=32, description="Tasks of lm-evaluation-harness to run on the base and the trained model, where it is installed."
    )
    lm_eval_limit: int | None = Field(None, ge=1, le=1_000_000, description="The maximum number of rows of each lm-eval task.")

    @model_validator(mode="after")
    def _check_compatibility(self) -> Self:
        if self.batch_eval_metrics and not self.compute_eval_metrics:
            raise field_error("batch_eval_metrics", "batch_eval_metrics needs compute_eval_metrics: true")
        if self.eval_strategy == "no":
            if self.load_best_model_at_end:
                raise field_error("load_best_model_at_end", "load_best_model_at_end needs eval_strategy 'steps' or 'epoch'")
            if self.early_stopping_patience is not None:
                raise field_error("early_stopping_patience", "early_stopping_patience needs eval_strategy 'steps' or 'epoch'")
        if self.early_stopping_threshold and self.early_stopping_patience is None:
            raise field_error("early_stopping_threshold", "early_stopping_threshold needs early_stopping_patience")
        if self.lm_eval_limit is not None and not self.lm_eval_tasks:
            raise field_error("lm_eval_limit", "lm_eval_limit needs lm_eval_tasks")
        if len(set(self.lm_eval_tasks)) != len(self.lm_eval_tasks):
            raise field_error("lm_eval_tasks", "lm_eval_tasks names the same task twice")
        return self

    def for_export(self) -> Self:
        return super().for_export().model_copy(update={"lm_eval_tasks": [], "lm_eval_limit": None})

"""Evaluation on the held-out rows: when, which metrics, and what the model must reach to be published."""

from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from schema.base import Strict, field_error

MetricName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_/.,:-]{1,128}$")]


class Threshold(Strict):
    """One condition of the promotion gate, such as: perplexity at most 0.9 times the base model's."""

    metric: MetricName = Field(
        description="`eval_loss`, `perplexity`, `accuracy`, or a name of the job's other metrics, such as `exact_match`, "
        "`rewards/accuracies`, `reward` or `lm_eval/arc_easy/acc`."
    )
    at_most: float | None = Field(None, description="The largest value that passes.")
    at_least: float | None = Field(None, description="The smallest value that passes.")
    relative_to_base: bool = Field(False, description="The bound is a factor of the base model's value on the same rows.")

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        if self.at_most is None and self.at_least is None:
            raise field_error("at_most", f"the threshold of {self.metric} has neither at_most nor at_least")
        if self.at_most is not None and self.at_least is not None and self.at_most < self.at_least:
            raise field_error("at_most", f"at_most ({self.at_most}) is below at_least ({self.at_least}): nothing can pass")
        return self


class EvalConfig(Strict):
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
    promotion_gate: list[Threshold] = Field(
        [], max_length=32, description="What the trained model must reach. A model that does not is reported and not published."
    )

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

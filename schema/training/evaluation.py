"""What every evaluation configuration has: what the model must reach to be published."""

from typing import Annotated, Self

from pydantic import Field, StringConstraints, model_validator

from schema.base import Strict, field_error

MetricName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_/.,:-]{1,128}$")]


class Threshold(Strict):
    """One condition of the promotion gate, such as: perplexity at most 0.9 times the base model's."""

    metric: MetricName = Field(
        description="`eval_loss`, `perplexity`, `content_perplexity`, `accuracy`, or a name of the job's other metrics, such as "
        "`exact_match`, `rewards/accuracies`, `reward` or `lm_eval/arc_easy/acc`."
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


class BaseEvalConfig(Strict):
    """The evaluation settings of every family. A family's own adds when and what it measures."""

    promotion_gate: list[Threshold] = Field(
        [], max_length=32, description="What the trained model must reach. A model that does not is reported and not published."
    )

    def for_export(self) -> Self:
        """What still applies to a job that only exports a checkpoint: no gate, because the caller asked for this very model."""
        return self.model_copy(update={"promotion_gate": []})

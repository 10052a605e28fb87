"""A grader as a TRL reward function, and what happens when it fails."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from jobs.llm.graders.base import FailedGrade, Grade, Grader, GradingInput
from jobs.runtime.errors import JobFailed

if TYPE_CHECKING:
    from torch import Tensor

    from jobs.runtime.context import JobContext
    from schema.training.llm_graders import Grader as GraderConfig

MAX_CONSECUTIVE_FAILURES = 10  # calls without a single grade; then the training fails, because waiting does not help
WARN_EVERY = 50  # calls with failures, between two warnings

TextOrMessages = str | list[dict[str, Any]]


class RewardFunction:
    """A grader, with its weight, as a reward function of TRL's GRPOTrainer.

    A completion that could not be graded gets None. Logs the mean of the other grades, and the fraction that failed, as metrics.
    """

    def __init__(self, config: "GraderConfig", grader: Grader, context: "JobContext") -> None:
        self.__name__ = config.name
        self.weight = config.weight
        self._reference_field: str | None = getattr(config, "reference_field", None)  # some kinds have none
        self._grader = grader
        self._context = context
        self._consecutive_failures = 0
        self._failed_calls_since_warning = WARN_EVERY

    def __call__(
        self,
        prompts: Sequence[TextOrMessages],
        completions: Sequence[TextOrMessages],
        completion_ids: object = None,  # TRL passes it by name
        *,
        row: Sequence[dict[str, Any]] | None = None,
        log_metric: Callable[[str, float], None] = lambda *_: None,
        **_: object,
    ) -> list[float | None]:
        """The grades of these completions; `row` holds each row's other columns. Raises JobFailed after repeated failures."""
        rows = row or [{}] * len(prompts)
        cases = [GradingInput(*case) for case in zip(map(to_text, prompts), map(to_text, completions), rows, strict=True)]
        grades = self.grade(cases)
        for name, value in summarize_grades(self.__name__, grades).items():
            log_metric(name, float("nan") if value is None else value)
        self._fail_after_repeated_failures(grades)
        return [None if isinstance(grade, FailedGrade) else grade for grade in grades]

    def grade(self, cases: Sequence[GradingInput]) -> list[Grade]:
        """The grader's grades. Warns of failures the first time, and then after every WARN_EVERY calls with failures."""
        grades = [reject_non_finite(grade) for grade in self._grader.grade(cases)]
        failures = [grade for grade in grades if isinstance(grade, FailedGrade)]
        if failures:
            self._failed_calls_since_warning += 1
            if self._failed_calls_since_warning > WARN_EVERY:
                self._failed_calls_since_warning = 0
                count = f"{len(failures)} of {len(grades)} completions"
                self._context.warn("grader_failed", f"grader {self.__name__!r} could not grade {count}: {failures[0].reason}")
        return grades

    def check(self, cases: Sequence[GradingInput]) -> None:
        """Raise JobFailed when the grader cannot grade completions of these rows."""
        field = self._reference_field
        if field is not None:
            missing = sum(case.columns.get(field) is None for case in cases)
            if missing == len(cases):
                columns = ", ".join(sorted({name for case in cases for name in case.columns})) or "no column but the prompt"
                message = f"grader {self.__name__!r} compares with column {field!r}, which no row has"
                raise JobFailed("invalid_config", message, f"set reference_field to one of: {columns}")
            if missing:
                self._context.warn("reference_missing", f"{missing} of {len(cases)} rows have no {field!r} for grader {self.__name__!r}")
        self._grader.check(cases)

    def close(self) -> None:
        """Close the grader."""
        self._grader.close()

    def _fail_after_repeated_failures(self, grades: Sequence[Grade]) -> None:
        failures = [grade for grade in grades if isinstance(grade, FailedGrade)]
        self._consecutive_failures = self._consecutive_failures + 1 if failures and len(failures) == len(grades) else 0
        if self._consecutive_failures >= MAX_CONSECUTIVE_FAILURES:
            message = (
                f"grader {self.__name__!r} failed on every completion {MAX_CONSECUTIVE_FAILURES} times in a row: {failures[-1].reason}"
            )
            raise JobFailed("invalid_config", message, "fix the grader or its endpoint, and resume the job")


def reject_non_finite(grade: Grade) -> Grade:
    """The grade; a FailedGrade instead of NaN or infinity."""
    return grade if isinstance(grade, FailedGrade) or math.isfinite(grade) else FailedGrade("it did not return a finite number")


def summarize_grades(name: str, grades: Sequence[Grade]) -> dict[str, float | None]:
    """The mean of the grades (None without any), and the fraction that failed."""
    if not grades:
        return {}
    numbers = [grade for grade in grades if not isinstance(grade, FailedGrade)]
    mean = sum(numbers) / len(numbers) if numbers else None
    return {f"graders/{name}/mean": mean, f"graders/{name}/failed": 1 - len(numbers) / len(grades)}


def to_text(messages: TextOrMessages) -> str:
    """A prompt or a completion as text: the content of a single message; several messages are prefixed with their roles."""
    if isinstance(messages, str):
        return messages
    if len(messages) == 1:
        return get_message_text(messages[0])
    return "\n\n".join(f"{message['role']}: {get_message_text(message)}" for message in messages)


def get_message_text(message: dict[str, Any]) -> str:
    """The text of a message, whose content may be a list of parts."""
    content = message.get("content") or ""  # null beside calls of tools
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def mask_incomparable(rewards: "Tensor", group_size: int) -> "Tensor":
    """Set all rewards of an incomparable completion to NaN; `rewards` is (completions, graders), NaN where a grader failed.

    Without one grader's part a completion's sum is too low, as if the grader had given 0. So where a grader failed on some completions
    of a prompt's group of `group_size`, those are excluded. A grader that failed on the whole group is missing from every sum, and
    the sums remain comparable.
    """
    failed = rewards.isnan().view(-1, group_size, rewards.shape[-1])
    partial = failed.any(dim=1, keepdim=True) & ~failed.all(dim=1, keepdim=True)
    incomparable = (failed & partial).any(dim=2).view(-1, 1)
    return rewards.masked_fill(incomparable, float("nan"))

"""A grader as TRL calls it, and what is done when it fails."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from jobs.llm.graders.base import FailedGrade, Grade, Grader, GradingInput
from jobs.runtime.errors import JobFailed

if TYPE_CHECKING:
    from torch import Tensor

    from jobs.runtime.context import JobContext
    from schema.training.graders import Grader as GraderConfig

MAX_CONSECUTIVE_FAILURES = 10  # calls in a row in which not a single completion could be graded: whatever is wrong will not mend itself
WARN_EVERY = 50  # calls with failures between two warnings

TextOrMessages = str | list[dict[str, Any]]


class RewardFunction:
    """A grader, with its weight, as a reward function of TRL's GRPOTrainer.

    A completion that could not be graded gets None. The mean over the others, and the share that failed, go to the curves.
    """

    def __init__(self, config: "GraderConfig", grader: Grader, context: "JobContext") -> None:
        self.__name__ = config.name
        self.weight = config.weight
        self._reference_field: str | None = getattr(config, "reference_field", None)  # not every kind has one
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
        """The grades of these completions; `row` holds each one's other columns. Raises JobFailed when there is no hope left."""
        rows = row or [{}] * len(prompts)
        cases = [GradingInput(*texts) for texts in zip(map(to_text, prompts), map(to_text, completions), rows, strict=True)]
        grades = self.grade(cases)
        for name, value in summarize_grades(self.__name__, grades).items():
            log_metric(name, float("nan") if value is None else value)
        self._fail_after_repeated_failures(grades)
        return [None if isinstance(grade, FailedGrade) else grade for grade in grades]

    def grade(self, cases: Sequence[GradingInput]) -> list[Grade]:
        """What the grader gives to each. Failures are told, the first time and then now and again."""
        grades = [reject_non_finite(grade) for grade in self._grader.grade(cases)]
        failures = [grade for grade in grades if isinstance(grade, FailedGrade)]
        if failures:
            self._failed_calls_since_warning += 1
            if self._failed_calls_since_warning > WARN_EVERY:
                self._failed_calls_since_warning = 0
                share = f"{len(failures)} of {len(grades)} completions"
                self._context.warn("grader_failed", f"grader {self.__name__!r} could not grade {share}: {failures[0].reason}")
        return grades

    def check(self, cases: Sequence[GradingInput]) -> None:
        """Ask the grader whether it can judge completions of such rows. Raises JobFailed."""
        field = self._reference_field
        if field is not None:
            missing = sum(case.columns.get(field) is None for case in cases)
            if missing == len(cases):
                known = ", ".join(sorted({name for case in cases for name in case.columns})) or "no column but the prompt"
                message = f"grader {self.__name__!r} compares with column {field!r}, which no row has"
                raise JobFailed("invalid_config", message, f"set reference_field to one of: {known}")
            if missing:
                self._context.warn("reference_missing", f"{missing} of {len(cases)} rows have no {field!r} for grader {self.__name__!r}")
        self._grader.check(cases)

    def close(self) -> None:
        """End what the grader started."""
        self._grader.close()

    def _fail_after_repeated_failures(self, grades: Sequence[Grade]) -> None:
        failures = [grade for grade in grades if isinstance(grade, FailedGrade)]
        self._consecutive_failures = self._consecutive_failures + 1 if failures and len(failures) == len(grades) else 0
        if self._consecutive_failures >= MAX_CONSECUTIVE_FAILURES:
            message = (
                f"grader {self.__name__!r} has failed on every completion {MAX_CONSECUTIVE_FAILURES} times in a row: {failures[-1].reason}"
            )
            raise JobFailed("invalid_config", message, "mend the grader, or what it asks, and resume the job")


def reject_non_finite(grade: Grade) -> Grade:
    """The grade, unless it is no number."""
    return grade if isinstance(grade, FailedGrade) or math.isfinite(grade) else FailedGrade("it gave no finite number")


def summarize_grades(name: str, grades: Sequence[Grade]) -> dict[str, float | None]:
    """The mean over what could be graded (None: nothing could), and the share that could not."""
    if not grades:
        return {}
    known = [grade for grade in grades if not isinstance(grade, FailedGrade)]
    mean = sum(known) / len(known) if known else None
    return {f"graders/{name}/mean": mean, f"graders/{name}/failed": 1 - len(known) / len(grades)}


def to_text(messages: TextOrMessages) -> str:
    """A prompt or a completion as text: a single message is its content; several are told apart by who speaks."""
    if isinstance(messages, str):
        return messages
    if len(messages) == 1:
        return get_message_text(messages[0])
    return "\n\n".join(f"{message['role']}: {get_message_text(message)}" for message in messages)


def get_message_text(message: dict[str, Any]) -> str:
    """The text of a message, whose content may be in parts."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def mask_incomparable(rewards: "Tensor", group_size: int) -> "Tensor":
    """Rewards (completions, graders) with NaN where a grader failed, in groups of one prompt; returns which of them can be compared.

    Without one grader's part a completion's sum is not what it is worth: as if the grader had given 0. So a completion that a grader
    failed on, but not on all of its group, is left out: all of its rewards are NaN. A grader that failed on the whole group is
    missing from every sum alike, and the rest of them can be compared.
    """
    failed = rewards.isnan().view(-1, group_size, rewards.shape[-1])
    for_some = failed.any(dim=1, keepdim=True) & ~failed.all(dim=1, keepdim=True)
    unknown = (failed & for_some).any(dim=2).view(-1, 1)
    return rewards.masked_fill(unknown, float("nan"))

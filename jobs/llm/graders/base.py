"""The interface of graders: their input, their grades, and parsing that several share."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class GradingInput:
    """A completion to grade, with its row: the prompt as text, and the other columns."""

    prompt: str
    completion: str
    columns: Mapping[str, Any] = field(default_factory=dict)  # strings, numbers, booleans or None


@dataclass(frozen=True)
class FailedGrade:
    """The grader could not grade a completion. The reason contains no row data and no secret."""

    reason: str


Grade = float | FailedGrade


class Grader(Protocol):
    """Grades completions."""

    def check(self, cases: Sequence[GradingInput], /) -> None:
        """Raise JobFailed when it is already certain that completions of these rows cannot be graded."""
        ...

    def grade(self, cases: Sequence[GradingInput]) -> list[Grade]:
        """One grade for each completion, in order. A failure is a FailedGrade, not an exception."""
        ...

    def close(self) -> None:
        """Close child processes and connections."""
        ...


@dataclass(frozen=True)
class PerCompletionGrader:
    """A grader that is a pure function of one completion."""

    grade_one: Callable[[GradingInput], Grade]

    def check(self, _cases: Sequence[GradingInput], /) -> None:
        """Every row can be graded."""

    def grade(self, cases: Sequence[GradingInput]) -> list[Grade]:
        """One grade for each completion, in order."""
        return [self.grade_one(case) for case in cases]

    def close(self) -> None:
        """There is nothing to close."""


def to_grade(value: object) -> float | None:
    """The grade that a grader's answer means: a finite number; None for anything else, also for an integer beyond the range of a float."""
    if not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def extract_answer(completion: str, tag: str | None) -> str | None:
    """The text to grade: the completion, or the content of its last complete pair of tags; None without such a pair."""
    if tag is None:
        return completion.strip()
    _, opened, rest = completion.rpartition(f"<{tag}>")
    answer, closed, _ = rest.partition(f"</{tag}>")
    if opened and closed:
        return answer.strip()
    contents = re.findall(f"<{tag}>(.*?)</{tag}>", completion, flags=re.DOTALL)  # there may be an opening tag after the last pair
    return contents[-1].strip() if contents else None


def get_reference(case: GradingInput, column: str) -> str | FailedGrade:
    """The row's reference answer as text; booleans as in JSON."""
    value = case.columns.get(column)
    if value is None:
        return FailedGrade(f"the row has no value in column {column!r}")
    if isinstance(value, bool):
        return str(value).lower()
    return str(value).strip()


def make_comparison_grader(tag: str | None, column: str, compare: Callable[[str, str], Grade]) -> PerCompletionGrader:
    """A grader that compares answer and reference. A completion without the answer tag gets 0."""

    def grade_one(case: GradingInput) -> Grade:
        reference = get_reference(case, column)
        if isinstance(reference, FailedGrade):
            return reference
        answer = extract_answer(case.completion, tag)
        return 0.0 if answer is None else compare(answer, reference)

    return PerCompletionGrader(grade_one)

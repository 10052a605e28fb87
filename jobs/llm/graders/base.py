"""What every grader is given, and what it gives."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class GradingInput:
    """A completion to be graded, with its row: the prompt as text, and the other columns."""

    prompt: str
    completion: str
    columns: Mapping[str, Any] = field(default_factory=dict)  # strings, numbers and truth values, or None


@dataclass(frozen=True)
class FailedGrade:
    """The grader could not say what a completion is worth. The reason holds no row and no secret."""

    reason: str


Grade = float | FailedGrade


class Grader(Protocol):
    """Judges completions."""

    def check(self, cases: Sequence[GradingInput], /) -> None:
        """Raises JobFailed when it can be known by now that it could not judge completions of these rows."""
        ...

    def grade(self, cases: Sequence[GradingInput]) -> list[Grade]:
        """One grade for each, in order. What goes wrong with one completion is its grade, and no exception."""
        ...

    def close(self) -> None:
        """End what it started."""
        ...


@dataclass(frozen=True)
class PerCompletionGrader:
    """A grader that is a function of one case, and holds nothing."""

    grade_one: Callable[[GradingInput], Grade]

    def check(self, _cases: Sequence[GradingInput], /) -> None:
        """Whatever it is given, it can grade."""

    def grade(self, cases: Sequence[GradingInput]) -> list[Grade]:
        """Each by itself."""
        return [self.grade_one(case) for case in cases]

    def close(self) -> None:
        """Nothing was started."""


def extract_answer(completion: str, tag: str | None) -> str | None:
    """What is to be graded: the completion, or what its last pair of tags holds; None when it has no such pair."""
    if tag is None:
        return completion.strip()
    _, opened, rest = completion.rpartition(f"<{tag}>")
    answer, closed, _ = rest.partition(f"</{tag}>")
    if opened and closed:
        return answer.strip()
    found = re.findall(f"<{tag}>(.*?)</{tag}>", completion, flags=re.DOTALL)  # an opening tag may stand after the last pair
    return found[-1].strip() if found else None


def get_reference(case: GradingInput, column: str) -> str | FailedGrade:
    """The row's right answer as text; truth values as JSON writes them."""
    value = case.columns.get(column)
    if value is None:
        return FailedGrade(f"the row has nothing in column {column!r}")
    if isinstance(value, bool):
        return str(value).lower()
    return str(value).strip()


def make_comparison_grader(tag: str | None, column: str, compare: Callable[[str, str], Grade]) -> PerCompletionGrader:
    """A grader that compares answer and reference. Without an answer the grade is 0: the completion is not what was asked for."""

    def grade_one(case: GradingInput) -> Grade:
        reference = get_reference(case, column)
        if isinstance(reference, FailedGrade):
            return reference
        answer = extract_answer(case.completion, tag)
        return 0.0 if answer is None else compare(answer, reference)

    return PerCompletionGrader(grade_one)

"""Graders that compare text: its format, the answer as a string, the answer as a number."""

import re
from decimal import Decimal
from typing import TYPE_CHECKING

from jobs.llm.graders.base import FailedGrade, Grade, GradingInput, PerCompletionGrader, make_comparison_grader
from schema.training.llm_graders import FormatGrader, NumericGrader, StringCheckGrader

if TYPE_CHECKING:
    from jobs.runtime.context import JobContext

TAG_GRADE = 0.25  # for each tag that occurs exactly once
MAX_PARTIAL_GRADE = 0.75  # all four tags, but in the wrong order

# A minus after a word, a digit or a bracket is an operator: the last number of "5-3" is 3.
NUMBER_PATTERN = re.compile(r"(?:(?<![\w)])[-+\N{MINUS SIGN}])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,4})?")


def format_grader(config: FormatGrader, _context: "JobContext") -> PerCompletionGrader:
    """Grades whether the completion is a thought and an answer, each in its tags."""
    expected_format = re.compile(
        rf"\s*<{config.think_tag}>(.*)</{config.think_tag}>\s*<{config.answer_tag}>(.*)</{config.answer_tag}>\s*", re.DOTALL
    )
    tags = [f"<{slash}{name}>" for name in (config.think_tag, config.answer_tag) for slash in ("", "/")]

    def grade_one(case: GradingInput) -> Grade:
        tags_found_once = sum(case.completion.count(tag) == 1 for tag in tags)
        if tags_found_once == len(tags) and expected_format.fullmatch(case.completion):
            return 1.0
        return min(MAX_PARTIAL_GRADE, TAG_GRADE * tags_found_once) if config.partial else 0.0

    return PerCompletionGrader(grade_one)


def string_grader(config: StringCheckGrader, _context: "JobContext") -> PerCompletionGrader:
    """Grades whether the answer equals, differs from or contains the reference."""

    def compare(answer: str, reference: str) -> Grade:
        match config.operation:
            case "eq":
                return float(answer == reference)
            case "ne":
                return float(answer != reference)
            case "like":
                return float(reference in answer)
            case "ilike":
                return float(reference.casefold() in answer.casefold())

    return make_comparison_grader(config.answer_tag, config.reference_field, compare)


def numeric_grader(config: NumericGrader, _context: "JobContext") -> PerCompletionGrader:
    """Grades whether the last numbers of answer and reference are equal within the tolerance."""
    tolerance = Decimal(str(config.tolerance))

    def compare(answer: str, reference: str) -> Grade:
        expected = find_last_number(reference)
        if expected is None:
            return FailedGrade(f"column {config.reference_field!r} of the row has no number")
        number = find_last_number(answer)
        if number is None:
            return 0.0
        return float(abs(number - expected) <= tolerance * (abs(expected) or 1))

    return make_comparison_grader(config.answer_tag, config.reference_field, compare)


def find_last_number(text: str) -> Decimal | None:
    """The last number of a text, such as -1,234.5 or 6e23; None without one."""
    numbers = NUMBER_PATTERN.findall(text)
    return Decimal(numbers[-1].replace(",", "").replace("\N{MINUS SIGN}", "-")) if numbers else None

"""A model as judge: what it is asked, and how its points are read."""

import json
import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from jobs.llm.graders.base import FailedGrade, Grade, GradingInput
from jobs.llm.graders.endpoint import Endpoint
from jobs.runtime.errors import JobFailed
from schema.training.graders import ScoreModelGrader

if TYPE_CHECKING:
    from openai import OpenAIError

    from jobs.runtime.context import JobContext

PLACEHOLDER_PATTERN = re.compile(r"\{\{(\w+)\}\}")
NUMBER_PATTERN = re.compile(r"[-+]?\d+(\.\d+)?")
SCORE_SCHEMA = {"type": "object", "properties": {"score": {"type": "number"}}, "required": ["score"], "additionalProperties": False}

# How a judge can be asked, the best first: not every endpoint knows answers with a schema, and some models refuse a temperature.
REQUEST_OPTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    (
        "structured",
        {
            "response_format": {"type": "json_schema", "json_schema": {"name": "score", "strict": True, "schema": SCORE_SCHEMA}},
            "temperature": 0.0,
        },
    ),
    ("plain", {"temperature": 0.0}),
    ("no_temperature", {}),
)
UNSUPPORTED_OPTION_STATUSES = (400, 422)


def score_model_grader(config: ScoreModelGrader, context: "JobContext") -> "Judge":
    """The judge, with a key of its own."""
    return Judge(config, Endpoint(config.base_url, context.secrets.get(config.secret_name), config.timeout_s), context.log_decision)


class Judge:
    """Asks the model for points, several completions at once."""

    def __init__(self, config: ScoreModelGrader, endpoint: Endpoint, log_decision: Callable[[str, str, str], None]) -> None:
        self._config = config
        self._endpoint = endpoint
        self._log_decision = log_decision
        self._request_options: dict[str, Any] = REQUEST_OPTIONS[0][1]

    def check(self, cases: Sequence[GradingInput], /) -> None:
        """Ask once, and find out how the endpoint wants to be asked. Raises JobFailed when it refuses."""
        from openai import APIStatusError

        self._check_placeholders({"prompt", "completion"} | {name for case in cases for name in case.columns})
        for name, manner in REQUEST_OPTIONS:
            self._request_options = manner
            [answer] = self._endpoint.send_all(self._request_score, [cases[0]], max_concurrency=1)
            if isinstance(answer, str):
                self._log_decision(f"grader {self._config.name}", name, "how the judge's endpoint takes questions")
                return
            unknown_manner = isinstance(answer, APIStatusError) and answer.status_code in UNSUPPORTED_OPTION_STATUSES
            if not unknown_manner or name == REQUEST_OPTIONS[-1][0]:
                raise self._endpoint.make_job_failed(self._config.name, answer)

    def grade(self, cases: Sequence[GradingInput]) -> list[Grade]:
        """The points for each, scaled to 0..1; a judge that does not answer, or answers with something else, has failed."""
        answers = self._endpoint.send_all(self._request_score, list(cases), max_concurrency=self._config.concurrency)
        return [self._parse_grade(answer) for answer in answers]

    def close(self) -> None:
        """Close the connections."""
        self._endpoint.close()

    def _check_placeholders(self, known: set[str]) -> None:
        unknown = sorted(set(PLACEHOLDER_PATTERN.findall(self._config.prompt)) - known)
        if unknown:
            message = f"grader {self._config.name!r}: its prompt names {{{{{unknown[0]}}}}}, which no row has"
            raise JobFailed("invalid_config", message, f"the rows have {', '.join(sorted(known))}")

    async def _request_score(self, case: GradingInput) -> str:
        answer = await self._endpoint.client.chat.completions.create(
            model=self._config.model, messages=cast(Any, self._make_messages(case)), **self._request_options
        )
        return (answer.choices[0].message.content or "") if answer.choices else ""

    def _make_messages(self, case: GradingInput) -> list[dict[str, str]]:
        low, high = self._config.min_score, self._config.max_score
        how = f'Answer with JSON alone: {{"score": n}}, where n is a number from {low:g} to {high:g}.'
        return [{"role": "system", "content": how}, {"role": "user", "content": fill_template(self._config.prompt, case)}]

    def _parse_grade(self, answer: "str | OpenAIError") -> Grade:
        if not isinstance(answer, str):
            return self._endpoint.make_failed_grade(answer)
        points = parse_score(answer)
        low, high = self._config.min_score, self._config.max_score
        if points is None:
            return FailedGrade("the judge did not answer with points")
        if not low <= points <= high:
            return FailedGrade(f"the judge gave points outside of {low:g} to {high:g}")
        return (points - low) / (high - low)


def fill_template(template: str, case: GradingInput) -> str:
    """The template with the case's texts in the place of {{names}}, in one pass: what stands in them is no template."""
    texts = {name: "" if value is None else str(value) for name, value in case.columns.items()}
    texts |= {"prompt": case.prompt, "completion": case.completion}
    return PLACEHOLDER_PATTERN.sub(lambda found: texts.get(found[1], found[0]), template)


def parse_score(answer: str) -> float | None:
    """The points of an answer that is {"score": n} or a bare number, and nothing else; None for any other."""
    answer = answer.strip()
    if NUMBER_PATTERN.fullmatch(answer):
        return float(answer)
    try:
        found = json.loads(answer)
    except (ValueError, RecursionError):
        return None
    points = found.get("score") if isinstance(found, dict) else None
    if isinstance(points, bool) or not isinstance(points, int | float) or not math.isfinite(points):
        return None
    return float(points)

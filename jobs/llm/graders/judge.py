"""Grades completions with a language model: the request, and parsing the score."""

import json
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from jobs.llm.graders.base import FailedGrade, Grade, GradingInput, to_grade
from jobs.llm.graders.endpoint import Endpoint, check_base_url
from jobs.runtime.errors import JobFailed
from jobs.runtime.settings import read_egress_policy
from schema.training.llm_graders import ScoreModelGrader

if TYPE_CHECKING:
    from openai import OpenAIError

    from jobs.runtime.context import JobContext

PLACEHOLDER_PATTERN = re.compile(r"\{\{(\w+)\}\}")
NUMBER_PATTERN = re.compile(r"[-+]?\d+(\.\d+)?")
SCORE_SCHEMA = {"type": "object", "properties": {"score": {"type": "number"}}, "required": ["score"], "additionalProperties": False}

# Request options, best first: not every endpoint supports structured output, and some models reject a temperature.
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
    """The judge, with its own API key. Raises JobFailed for an endpoint that the egress policy refuses."""
    policy = read_egress_policy()
    check_base_url(config.name, config.base_url, policy)
    endpoint = Endpoint(config.base_url, context.secrets.get(config.secret_name), config.timeout_s, policy)
    return Judge(config, endpoint, context.log_decision)


class Judge:
    """Asks a model for scores, several completions at a time."""

    def __init__(self, config: ScoreModelGrader, endpoint: Endpoint, log_decision: Callable[[str, str, str], None]) -> None:
        self._config = config
        self._endpoint = endpoint
        self._log_decision = log_decision
        self._request_options: dict[str, Any] = REQUEST_OPTIONS[0][1]

    def check(self, cases: Sequence[GradingInput], /) -> None:
        """Send one request and choose the best options that the endpoint supports. Raises JobFailed when it supports none."""
        from openai import APIStatusError

        self._check_placeholders({"prompt", "completion"} | {name for case in cases for name in case.columns})
        for name, options in REQUEST_OPTIONS:
            self._request_options = options
            [response] = self._endpoint.send_all(self._request_score, [cases[0]], max_concurrency=1)
            if isinstance(response, str):
                self._log_decision(f"grader {self._config.name}", name, "the best request options that the judge's endpoint supports")
                return
            unsupported = isinstance(response, APIStatusError) and response.status_code in UNSUPPORTED_OPTION_STATUSES
            if not unsupported or name == REQUEST_OPTIONS[-1][0]:
                raise self._endpoint.make_job_failed(self._config.name, response)

    def grade(self, cases: Sequence[GradingInput]) -> list[Grade]:
        """The scores, scaled to 0..1; a FailedGrade where the judge does not answer or its answer has no score."""
        responses = self._endpoint.send_all(self._request_score, list(cases), max_concurrency=self._config.concurrency)
        return [self._parse_grade(response) for response in responses]

    def close(self) -> None:
        """Close the connections."""
        self._endpoint.close()

    def _check_placeholders(self, known: set[str]) -> None:
        unknown = sorted(set(PLACEHOLDER_PATTERN.findall(self._config.prompt)) - known)
        if unknown:
            message = f"grader {self._config.name!r}: its prompt uses {{{{{unknown[0]}}}}}, which no row has"
            raise JobFailed("invalid_config", message, f"the rows have {', '.join(sorted(known))}")

    async def _request_score(self, case: GradingInput) -> str:
        response = await self._endpoint.client.chat.completions.create(
            model=self._config.model, messages=cast(Any, self._make_messages(case)), **self._request_options
        )
        return (response.choices[0].message.content or "") if response.choices else ""

    def _make_messages(self, case: GradingInput) -> list[dict[str, str]]:
        low, high = self._config.min_score, self._config.max_score
        instruction = f'Answer with JSON alone: {{"score": n}}, where n is a number from {low:g} to {high:g}.'
        return [{"role": "system", "content": instruction}, {"role": "user", "content": fill_template(self._config.prompt, case)}]

    def _parse_grade(self, response: "str | OpenAIError") -> Grade:
        if not isinstance(response, str):
            return self._endpoint.make_failed_grade(response)
        score = parse_score(response)
        low, high = self._config.min_score, self._config.max_score
        if score is None:
            return FailedGrade("the judge did not answer with a score")
        if not low <= score <= high:
            return FailedGrade(f"the judge's score is outside {low:g} to {high:g}")
        return (score - low) / (high - low)


def fill_template(template: str, case: GradingInput) -> str:
    """The template with the row's texts in place of {{names}}, in one pass: placeholders inside the texts are not replaced."""
    texts = {name: "" if value is None else str(value) for name, value in case.columns.items()}
    texts |= {"prompt": case.prompt, "completion": case.completion}
    return PLACEHOLDER_PATTERN.sub(lambda match: texts.get(match[1], match[0]), template)


def parse_score(answer: str) -> float | None:
    """The score of an answer that is {"score": n} or a bare number; None for any other."""
    answer = answer.strip()
    if NUMBER_PATTERN.fullmatch(answer):
        return float(answer)
    try:
        parsed = json.loads(answer)
    except (ValueError, RecursionError):
        return None
    score = parsed.get("score") if isinstance(parsed, dict) else None
    return None if isinstance(score, bool) else to_grade(score)

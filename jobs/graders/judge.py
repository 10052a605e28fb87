"""A model as judge: what it is asked, and how its points are read."""

import json
import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from jobs.errors import JobFailed
from jobs.graders.endpoint import Endpoint
from jobs.graders.grading import Case, Failed, Grade
from schema.graders import ScoreModelGrader

if TYPE_CHECKING:
    from openai import OpenAIError

    from jobs.context import JobContext

TEMPLATE = re.compile(r"\{\{(\w+)\}\}")
NUMBER = re.compile(r"[-+]?\d+(\.\d+)?")
SCHEMA = {"type": "object", "properties": {"score": {"type": "number"}}, "required": ["score"], "additionalProperties": False}

# How a judge can be asked, the best first: not every endpoint knows answers with a schema, and some models refuse a temperature.
MANNERS: tuple[tuple[str, dict[str, Any]], ...] = (
    (
        "structured",
        {
            "response_format": {"type": "json_schema", "json_schema": {"name": "score", "strict": True, "schema": SCHEMA}},
            "temperature": 0.0,
        },
    ),
    ("plain", {"temperature": 0.0}),
    ("bare", {}),
)
NOT_UNDERSTOOD = (400, 422)


def judge(config: ScoreModelGrader, context: "JobContext") -> "Judge":
    """The judge, with a key of its own."""
    return Judge(config, Endpoint(config.base_url, context.secrets.get(config.secret_name), config.timeout_s), context.decided)


class Judge:
    """Asks the model for points, several completions at once."""

    def __init__(self, config: ScoreModelGrader, endpoint: Endpoint, decided: Callable[[str, str, str], None]) -> None:
        self._config = config
        self._endpoint = endpoint
        self._decided = decided
        self._manner: dict[str, Any] = MANNERS[0][1]

    def check(self, cases: Sequence[Case], /) -> None:
        """Ask once, and find out how the endpoint wants to be asked. Raises JobFailed when it refuses."""
        from openai import APIStatusError

        self._refuse_unknown_names({"prompt", "completion"} | {name for case in cases for name in case.columns})
        for name, manner in MANNERS:
            self._manner = manner
            [answer] = self._endpoint.ask(self._said, [cases[0]], at_once=1)
            if isinstance(answer, str):
                self._decided(f"grader {self._config.name}", name, "how the judge's endpoint takes questions")
                return
            unknown_manner = isinstance(answer, APIStatusError) and answer.status_code in NOT_UNDERSTOOD
            if not unknown_manner or name == MANNERS[-1][0]:
                raise self._endpoint.refusal(self._config.name, answer)

    def grade(self, cases: Sequence[Case]) -> list[Grade]:
        """The points for each, scaled to 0..1; a judge that does not answer, or answers with something else, has failed."""
        answers = self._endpoint.ask(self._said, list(cases), at_once=self._config.concurrency)
        return [self._points(answer) for answer in answers]

    def close(self) -> None:
        """Close the connections."""
        self._endpoint.close()

    def _refuse_unknown_names(self, known: set[str]) -> None:
        unknown = sorted(set(TEMPLATE.findall(self._config.prompt)) - known)
        if unknown:
            message = f"grader {self._config.name!r}: its prompt names {{{{{unknown[0]}}}}}, which no row has"
            raise JobFailed("invalid_config", message, f"the rows have {', '.join(sorted(known))}")

    async def _said(self, case: Case) -> str:
        answer = await self._endpoint.client.chat.completions.create(
            model=self._config.model, messages=cast(Any, self._question(case)), **self._manner
        )
        return (answer.choices[0].message.content or "") if answer.choices else ""

    def _question(self, case: Case) -> list[dict[str, str]]:
        low, high = self._config.min_score, self._config.max_score
        how = f'Answer with JSON alone: {{"score": n}}, where n is a number from {low:g} to {high:g}.'
        return [{"role": "system", "content": how}, {"role": "user", "content": filled(self._config.prompt, case)}]

    def _points(self, answer: "str | OpenAIError") -> Grade:
        if not isinstance(answer, str):
            return self._endpoint.failed(answer)
        points = points_in(answer)
        low, high = self._config.min_score, self._config.max_score
        if points is None:
            return Failed("the judge did not answer with points")
        if not low <= points <= high:
            return Failed(f"the judge gave points outside of {low:g} to {high:g}")
        return (points - low) / (high - low)


def filled(template: str, case: Case) -> str:
    """The template with the case's texts in the place of {{names}}, in one pass: what stands in them is no template."""
    texts = {name: "" if value is None else str(value) for name, value in case.columns.items()}
    texts |= {"prompt": case.prompt, "completion": case.completion}
    return TEMPLATE.sub(lambda found: texts.get(found[1], found[0]), template)


def points_in(answer: str) -> float | None:
    """The points of an answer that is {"score": n} or a bare number, and nothing else; None for any other."""
    answer = answer.strip()
    if NUMBER.fullmatch(answer):
        return float(answer)
    try:
        found = json.loads(answer)
    except (ValueError, RecursionError):
        return None
    points = found.get("score") if isinstance(found, dict) else None
    if isinstance(points, bool) or not isinstance(points, int | float) or not math.isfinite(points):
        return None
    return float(points)

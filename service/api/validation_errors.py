"""What pydantic found wrong with a request, as problems for people: all of them, each with its field and what was probably meant."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from schema.training import TRAINER_TYPES
from schema.training.llm_graders import GRADER_TYPES
from service.core.suggestions import did_you_mean, find_parents, list_fields

MAX_PROBLEMS = 100  # of one answer
UNION_BRANCH = re.compile(r"(?:literal|list|function-[a-z-]+)\[.*\]")  # pydantic's name for one of several forms of a field
QUOTED = re.compile(r"'([^']*)'")  # pydantic lists the values that a field may have as text

PydanticProblem = Mapping[str, Any]  # Any: pydantic describes its errors as loose dicts


@dataclass(frozen=True)
class Problem:
    """One problem of a request."""

    message: str
    hint: str
    param: str | None


class BodyError(RequestValidationError):
    """The validation error of a body that the service assembled, in the form that FastAPI raises for a body that a caller sent."""

    def __init__(self, error: ValidationError, model: type[BaseModel]) -> None:
        super().__init__([{**problem, "loc": ("body", *problem["loc"])} for problem in error.errors()])
        self.model = model


def describe_problems(problems: Sequence[PydanticProblem], model: object) -> list[Problem]:
    """At most MAX_PROBLEMS of pydantic's problems. `model` is the type of the body, for suggesting its fields."""
    return [_describe(problem, model) for problem in _drop_other_forms(problems[: 4 * MAX_PROBLEMS])][:MAX_PROBLEMS]


def is_unknown_trainer_type(problem: PydanticProblem) -> bool:
    """Whether the request asks for a trainer type that no deployment of this version has."""
    return problem["type"] == "union_tag_invalid" and _param(problem) == "training_config"


def _drop_other_forms(problems: Sequence[PydanticProblem]) -> Iterator[PydanticProblem]:
    """Of a field that may have several forms, the problems with the form that fits best: the one whose problem lies deepest."""
    depths: dict[tuple[object, ...], dict[str, int]] = {}
    for problem in problems:
        field, form = _split_at_form(problem["loc"])
        if form is not None:
            forms = depths.setdefault(field, {})
            forms[form] = max(forms.get(form, 0), len(problem["loc"]))
    best = {field: max(forms, key=lambda form: forms[form]) for field, forms in depths.items()}
    for problem in problems:
        field, form = _split_at_form(problem["loc"])
        if form is None or best[field] == form:
            yield problem


def _split_at_form(path: Sequence[str | int]) -> tuple[tuple[object, ...], str | None]:
    """The field with several forms, and the form that a problem is about; without such a field the path and None."""
    for index, step in enumerate(path):
        if isinstance(step, str) and UNION_BRANCH.fullmatch(step):
            return tuple(path[:index]), step
    return tuple(path), None


def _describe(problem: PydanticProblem, model: object) -> Problem:
    param = _param(problem)
    if is_unknown_trainer_type(problem):
        tag = str(problem["ctx"]["tag"])
        message = f"trainer_type {tag!r} is not available in this deployment; it supports: {', '.join(TRAINER_TYPES)}"
        hint = did_you_mean(tag, TRAINER_TYPES, "GET /capabilities lists what this deployment supports")
        return Problem(message, hint, f"{param}.trainer_type")
    message = f"{param}: {_message(problem)}" if param else _message(problem)
    return Problem(message, _hint(problem, model), param)


def _param(problem: PydanticProblem) -> str | None:
    conflicting = problem.get("ctx", {}).get("field") if problem["type"] == "fields_conflict" else None
    location = _strip_union_tags(problem["loc"])
    path = [str(step) for step in location[1:] if not (isinstance(step, int) and problem["type"] == "json_invalid")]
    is_own = path[-1:] == [conflicting]  # an object says of itself that its fields conflict
    return ".".join([*path, conflicting] if conflicting and not is_own else path) or None


def _strip_union_tags(path: Sequence[str | int]) -> list[str | int]:
    """The path as it was sent, without the union member that pydantic adds to it."""
    kept: list[str | int] = []
    for index, step in enumerate(path):
        is_trainer_type = index > 0 and path[index - 1] == "training_config" and step in TRAINER_TYPES
        is_grader_type = index > 1 and path[index - 2] == "reward_config" and isinstance(path[index - 1], int) and step in GRADER_TYPES
        if not (is_trainer_type or is_grader_type or UNION_BRANCH.fullmatch(str(step))):
            kept.append(step)
    return kept


def _message(problem: PydanticProblem) -> str:
    match problem["type"]:
        case "extra_forbidden":
            return "is not a field of this request"
        case "missing" | "too_short" if problem["loc"][-1] == "reward_config":
            return f"trainer_type 'grpo' needs graders; give at least one, of type {', '.join(GRADER_TYPES)}"
        case "missing":
            return "is missing"
        case "union_tag_not_found" if "reward_config" in problem["loc"]:
            return f"a grader needs a type, one of {', '.join(GRADER_TYPES)}"
        case "union_tag_invalid" if "reward_config" in problem["loc"]:
            return f"there is no grader of type {problem['ctx']['tag']!r}; known: {', '.join(GRADER_TYPES)}"
        case "model_attributes_type" | "dict_type" if len(problem["loc"]) == 1:
            return "the body is not a JSON object; send one, with Content-Type: application/json"
        case "json_invalid":
            return f"the body is not JSON: {problem.get('ctx', {}).get('error', '')}".rstrip(": ")
        case _:
            message: str = problem["msg"]
            return message[:1].lower() + message[1:]


def _hint(problem: PydanticProblem, model: object) -> str:
    context = problem.get("ctx", {})
    match problem["type"]:
        case "extra_forbidden":
            *path, name = problem["loc"][1:]
            return _suggest_field(str(name), path, model)
        case "literal_error" | "enum" if isinstance(problem.get("input"), str):
            return did_you_mean(problem["input"], QUOTED.findall(str(context.get("expected", ""))))
        case "union_tag_invalid":
            return did_you_mean(str(context["tag"]), QUOTED.findall(str(context.get("expected_tags", ""))))
        case _:
            return ""


def _suggest_field(name: str, path: Sequence[str | int], model: object) -> str:
    """A field of the same object that is spelled alike, or the one other object that has a field of that very name."""
    parents = find_parents(model, name)
    if len(parents) == 1:
        return f"{name} belongs in {parents[0]}" if parents[0] else f"{name} belongs at the top of the body"
    match = did_you_mean(name, list_fields(model, path))
    return f"{match or 'check the spelling;'} GET /docs lists the fields"

"""The child process of apart.py: `python -m jobs.llm.graders.grader_process KIND` reads questions and writes grades, a line of JSON each.

It has no environment, may write no file, and has its memory limited. Time is limited by whoever asks.
"""

import json
import os
import resource
import sys
from collections.abc import Callable
from typing import Any

MEMORY_BYTES = 4 << 30  # of addresses: sympy and its libraries take a few hundred megabytes
MAX_WRAPPED_CHARACTERS = 200  # characters of a text that may be a formula without dollars around it

GraderResponse = dict[str, float | str]


def main() -> None:
    """Answer until there are no more questions."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    grade = {"expression": make_expression_grader, "json_schema": make_schema_grader}[sys.argv[1]]()
    print("ready", file=answers, flush=True)
    for line in sys.stdin.buffer:
        print(json.dumps(_grade_request(grade, json.loads(line))), file=answers, flush=True)


def _grade_request(grade: Callable[[dict[str, Any]], GraderResponse], request: dict[str, Any]) -> GraderResponse:
    try:
        return grade(request)
    except MemoryError:
        return {"failed": "it took too much memory"}
    except RecursionError:
        return {"failed": "it is nested too deeply"}


def make_expression_grader() -> Callable[[dict[str, Any]], GraderResponse]:
    """Whether the answer's expression is the reference's. What cannot be read in the answer is wrong; in the reference, a failure."""
    import logging

    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)  # it warns that it keeps no time, which is done from outside

    def expressions(text: str) -> list[Any]:
        found = parse(text, parsing_timeout=None)
        if not found and len(text) <= MAX_WRAPPED_CHARACTERS and "$" not in text:
            found = parse(f"${text}$", parsing_timeout=None)  # a bare x^2+1 is known for a formula by its dollars only
        return found

    def grade(question: dict[str, Any]) -> GraderResponse:
        right = expressions(question["reference"])
        if not right:
            return {"failed": "the row's reference is no mathematical expression"}
        return {"grade": float(verify(right, expressions(question["answer"]), timeout_seconds=None))}

    return grade


def make_schema_grader() -> Callable[[dict[str, Any]], GraderResponse]:
    """Whether the answer is JSON that the schema accepts."""
    from jsonschema import Draft202012Validator
    from jsonschema.validators import validator_for
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    nothing_else: Registry[Any] = Registry()  # given, so that a reference to another document is never fetched

    def grade(question: dict[str, Any]) -> GraderResponse:
        try:
            answer = json.loads(question["answer"], parse_constant=_reject_constant)
        except ValueError:
            return {"grade": 0.0}
        validator = validator_for(question["schema"], default=Draft202012Validator)(question["schema"], registry=nothing_else)
        try:
            return {"grade": float(validator.is_valid(answer))}
        except Unresolvable:
            return {"failed": "json_schema refers to something outside of itself"}

    return grade


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


if __name__ == "__main__":
    main()

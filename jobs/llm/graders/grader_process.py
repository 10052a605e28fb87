"""`python -m jobs.llm.graders.grader_process KIND`: the child of subprocess_graders.py; reads requests and writes grades as JSON lines.

It has an empty environment, a memory limit and, where the system permits it, no network, and cannot write files. The parent limits the
time.
"""

import json
import os
import resource
import sys
from collections.abc import Callable
from typing import Any

from jobs.runtime.isolated_process import leave_network

MEMORY_BYTES = 4 << 30  # of address space; sympy and its libraries take a few hundred megabytes
MAX_WRAPPED_CHARACTERS = 200  # longer texts are not parsed as a bare formula

GraderResponse = dict[str, float | str]


def main() -> None:
    """Answer requests until stdin is closed."""
    responses = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not mix with the responses
    leave_network()
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    grade = {"expression": make_expression_grader, "json_schema": make_schema_grader}[sys.argv[1]]()
    print("ready", file=responses, flush=True)
    for line in sys.stdin.buffer:
        print(json.dumps(_grade_request(grade, json.loads(line))), file=responses, flush=True)


def _grade_request(grade: Callable[[dict[str, Any]], GraderResponse], request: dict[str, Any]) -> GraderResponse:
    try:
        return grade(request)
    except MemoryError:
        return {"failed": "it took too much memory"}
    except RecursionError:
        return {"failed": "it is nested too deeply"}


def make_expression_grader() -> Callable[[dict[str, Any]], GraderResponse]:
    """Grades whether two expressions are equal. An unreadable answer gets 0; an unreadable reference is a failure."""
    import logging

    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)  # it warns that it has no timeout; the parent has one

    def parse_expressions(text: str) -> list[Any]:
        expressions = parse(text, parsing_timeout=None)
        if not expressions and len(text) <= MAX_WRAPPED_CHARACTERS and "$" not in text:
            expressions = parse(f"${text}$", parsing_timeout=None)  # it recognizes a bare x^2+1 only between dollar signs
        return expressions

    def grade(request: dict[str, Any]) -> GraderResponse:
        reference = parse_expressions(request["reference"])
        if not reference:
            return {"failed": "the row's reference is not a mathematical expression"}
        return {"grade": float(verify(reference, parse_expressions(request["answer"]), timeout_seconds=None))}

    return grade


def make_schema_grader() -> Callable[[dict[str, Any]], GraderResponse]:
    """Grades whether the answer is JSON that the schema accepts."""
    from jsonschema import Draft202012Validator
    from jsonschema.validators import validator_for
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    empty_registry: Registry[Any] = Registry()  # so that a reference to another document is never fetched

    def grade(request: dict[str, Any]) -> GraderResponse:
        try:
            answer = json.loads(request["answer"], parse_constant=_reject_constant)
        except ValueError:
            return {"grade": 0.0}
        validator = validator_for(request["schema"], default=Draft202012Validator)(request["schema"], registry=empty_registry)
        try:
            return {"grade": float(validator.is_valid(answer))}
        except Unresolvable:
            return {"failed": "json_schema refers to another document"}

    return grade


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


if __name__ == "__main__":
    main()

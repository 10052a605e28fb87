"""Graders whose computation may never end, run in a child process with a timeout: mathematical expressions and JSON schemas.

math-verify's own timeout is an alarm signal: it works only in the main thread, replaces the attempt's signal handlers, and cannot
interrupt a single long multiplication. A regular expression in a schema cannot be interrupted at all.
"""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import IO, TYPE_CHECKING, Any

from jobs.llm.graders.base import FailedGrade, Grade, GradingInput, extract_answer, get_reference
from jobs.runtime.errors import JobFailed
from jobs.runtime.subprocesses import REPOSITORY
from schema.training.llm_graders import ExpressionGrader, JsonSchemaGrader

if TYPE_CHECKING:
    from jobs.runtime.context import JobContext

STARTUP_TIMEOUT_S = 120.0  # importing sympy on a busy machine
EXIT_GRACE_S = 0.2
READ_CHUNK_BYTES = 65_536

Request = dict[str, Any]  # Any: JSON


def expression_grader(config: ExpressionGrader, _context: "JobContext") -> "SubprocessGrader":
    """Grades whether answer and reference are equal expressions, with math-verify."""

    def make_request(case: GradingInput) -> Request | Grade:
        reference = get_reference(case, config.reference_field)
        if isinstance(reference, FailedGrade):
            return reference
        answer = extract_answer(case.completion, config.answer_tag)
        return {"reference": reference, "answer": answer} if answer else 0.0

    return SubprocessGrader("expression", config.timeout_s, make_request)


def schema_grader(config: JsonSchemaGrader, _context: "JobContext") -> "SubprocessGrader":
    """Grades whether the answer is JSON that the schema accepts, with jsonschema."""
    schema = config.json_schema

    def make_request(case: GradingInput) -> Request | Grade:
        answer = extract_answer(case.completion, config.answer_tag)
        return {"schema": schema, "answer": answer} if answer else 0.0

    def check(child: GraderProcess) -> None:
        from jsonschema import Draft202012Validator, SchemaError
        from jsonschema.validators import validator_for

        try:
            validator_for(schema, default=Draft202012Validator).check_schema(schema)
        except SchemaError as error:
            location = "/".join(map(str, error.absolute_path)) or "its top level"
            raise JobFailed("invalid_config", f"grader {config.name!r}: json_schema is not a valid JSON schema: see {location}") from error
        grade = child.send_request({"schema": schema, "answer": "{}"}, config.timeout_s)
        if isinstance(grade, FailedGrade):  # a reference to another document: nothing is fetched
            raise JobFailed("invalid_config", f"grader {config.name!r}: {grade.reason}", "put the referenced schemas under $defs")

    return SubprocessGrader("json_schema", config.timeout_s, make_request, check)


class SubprocessGrader:
    """Grades completions one after the other in a child process.

    `make_request` returns the request for a completion, or its grade where the child is not needed. `check` may raise JobFailed.
    """

    def __init__(
        self,
        kind: str,
        timeout_s: float,
        make_request: Callable[[GradingInput], Request | Grade],
        check: "Callable[[GraderProcess], None]" = lambda _: None,
    ) -> None:
        self._child = GraderProcess(kind)
        self._timeout_s = timeout_s
        self._make_request = make_request
        self._check = check

    def check(self, _cases: Sequence[GradingInput], /) -> None:
        """Raise JobFailed when the configuration is invalid."""
        self._check(self._child)

    def grade(self, cases: Sequence[GradingInput]) -> list[Grade]:
        """One grade for each completion, in order."""
        requests = map(self._make_request, cases)
        return [self._child.send_request(request, self._timeout_s) if isinstance(request, dict) else request for request in requests]

    def close(self) -> None:
        """Kill the child."""
        self._child.kill()


class GraderProcess:
    """A child that answers one request at a time, as JSON lines. It is killed when a response is late, and restarted when needed."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._process: subprocess.Popen[bytes] | None = None

    def send_request(self, request: Request, timeout_s: float) -> Grade:
        """The child's grade, or a FailedGrade. Any interruption kills the child: a late response would answer the next request."""
        answered = False
        try:
            process = self._ensure_running()
            if process is None:
                return FailedGrade("the grader process could not be started")
            stdin, stdout = _require_pipe(process.stdin), _require_pipe(process.stdout)
            stdin.write(json.dumps(request).encode() + b"\n")
            stdin.flush()
            line = _read_line(stdout, timeout_s)
            answered = bool(line)
            if not line:
                return FailedGrade(_describe_exit(process, timeout_s))
            response = json.loads(line)
            return FailedGrade(response["failed"]) if "failed" in response else float(response["grade"])
        except BrokenPipeError:
            return FailedGrade("the grader process has exited")
        finally:
            if not answered:
                self.kill()

    def kill(self) -> None:
        """Kill the child, if it runs."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _ensure_running(self) -> "subprocess.Popen[bytes] | None":
        """The running child, started if necessary; None when it does not start."""
        if self._process is None:
            command = [sys.executable, "-m", "jobs.llm.graders.grader_process", self._kind]
            # An empty environment: the attempt's holds its token.
            self._process = subprocess.Popen(
                command, cwd=REPOSITORY, env={}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            if _read_line(_require_pipe(self._process.stdout), STARTUP_TIMEOUT_S) != b"ready":
                return None
        return self._process


def _describe_exit(process: "subprocess.Popen[bytes]", timeout_s: float) -> str:
    try:
        process.wait(timeout=EXIT_GRACE_S)  # a process that closed its pipe may still be exiting
    except subprocess.TimeoutExpired:
        return f"it took longer than {timeout_s:g} s"
    return "the grader process crashed"


def _read_line(pipe: IO[bytes], timeout_s: float) -> bytes:
    """The next line without its newline; empty when it does not arrive in time or the pipe is closed."""
    line = b""
    deadline = time.monotonic() + timeout_s
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
        chunk = os.read(pipe.fileno(), READ_CHUNK_BYTES) if ready else b""
        if not chunk:
            return b""
        line += chunk
    return line.rstrip(b"\n")


def _require_pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None  # Popen opens both
    return pipe

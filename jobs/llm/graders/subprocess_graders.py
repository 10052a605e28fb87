"""Graders that may compute for ever, in a child process that is killed when it takes too long: expressions, and JSON schemas.

math-verify's own time limit is an alarm signal, which works in a main thread alone, would take the place of our signals there, and
cannot interrupt a single long multiplication. A regular expression in a schema cannot be interrupted at all.
"""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import jobs
from jobs.llm.graders.base import FailedGrade, Grade, GradingInput, extract_answer, get_reference
from jobs.runtime.errors import JobFailed
from schema.training.graders import ExpressionGrader, JsonSchemaGrader

if TYPE_CHECKING:
    from jobs.runtime.context import JobContext

REPOSITORY = Path(jobs.__file__).parent.parent  # where `-m jobs...` is found
STARTUP_TIMEOUT_S = 120.0  # for the child to import sympy, on a machine that is busy
READ_CHUNK_BYTES = 65_536


def expression_grader(config: ExpressionGrader, _context: "JobContext") -> "SubprocessExpressionGrader":
    """Whether two expressions are the same, by math-verify."""
    return SubprocessExpressionGrader(config)


def schema_grader(config: JsonSchemaGrader, _context: "JobContext") -> "SubprocessJsonSchemaGrader":
    """Whether an answer is JSON of the schema, by jsonschema."""
    return SubprocessJsonSchemaGrader(config)


class SubprocessExpressionGrader:
    """Compares the expressions of answer and reference in a child."""

    def __init__(self, config: ExpressionGrader) -> None:
        self._config = config
        self._child = GraderProcess("expression")

    def check(self, _cases: Sequence[GradingInput], /) -> None:
        """Whether a reference can be read is told when it is needed."""

    def grade(self, cases: Sequence[GradingInput]) -> list[Grade]:
        """One after the other."""
        return [self._grade_one(case) for case in cases]

    def close(self) -> None:
        """End the child."""
        self._child.kill()

    def _grade_one(self, case: GradingInput) -> Grade:
        reference = get_reference(case, self._config.reference_field)
        if isinstance(reference, FailedGrade):
            return reference
        answer = extract_answer(case.completion, self._config.answer_tag)
        if not answer:
            return 0.0
        return self._child.send_request({"reference": reference, "answer": answer}, self._config.timeout_s)


class SubprocessJsonSchemaGrader:
    """Validates answers in a child."""

    def __init__(self, config: JsonSchemaGrader) -> None:
        self._config = config
        self._child = GraderProcess("json_schema")

    def check(self, _cases: Sequence[GradingInput], /) -> None:
        """Raises JobFailed when the schema is none, or refers to another document: nothing is fetched."""
        from jsonschema import Draft202012Validator, SchemaError
        from jsonschema.validators import validator_for

        schema = self._config.json_schema
        try:
            validator_for(schema, default=Draft202012Validator).check_schema(schema)
        except SchemaError as error:
            where = "/".join(map(str, error.absolute_path)) or "its top"
            raise JobFailed("invalid_config", f"grader {self._config.name!r}: json_schema is no JSON schema: see {where}") from error
        probed = self._child.send_request({"schema": schema, "answer": "{}"}, self._config.timeout_s)
        if isinstance(probed, FailedGrade):
            raise JobFailed("invalid_config", f"grader {self._config.name!r}: {probed.reason}", "put what it refers to under $defs")

    def grade(self, cases: Sequence[GradingInput]) -> list[Grade]:
        """One after the other."""
        return [self._grade_one(case) for case in cases]

    def close(self) -> None:
        """End the child."""
        self._child.kill()

    def _grade_one(self, case: GradingInput) -> Grade:
        answer = extract_answer(case.completion, self._config.answer_tag)
        if not answer:
            return 0.0
        return self._child.send_request({"schema": self._config.json_schema, "answer": answer}, self._config.timeout_s)


class GraderProcess:
    """A process that answers one question at a time, a line of JSON each way. Killed when it is late, and started when it is needed."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._process: subprocess.Popen[bytes] | None = None

    def send_request(self, request: dict[str, Any], timeout_s: float) -> Grade:
        """Its answer, or why there is none. Whatever interrupts the wait ends the child: its answer would be taken for the next one's."""
        answered = False
        try:
            process = self._ensure_running()
            if process is None:
                return FailedGrade("the process that grades could not be started")
            _require_pipe(process.stdin).write(json.dumps(request).encode() + b"\n")
            _require_pipe(process.stdin).flush()
            line = _read_line(_require_pipe(process.stdout), timeout_s)
            answered = bool(line)
            return _parse_grade(line) if line else FailedGrade(_describe_exit(process, timeout_s))
        except BrokenPipeError:
            return FailedGrade("the process that grades has ended")
        finally:
            if not answered:
                self.kill()

    def kill(self) -> None:
        """End it, if it runs."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _ensure_running(self) -> "subprocess.Popen[bytes] | None":
        if self._process is None:
            command = [sys.executable, "-m", "jobs.llm.graders.grader_process", self._kind]
            # Nothing of our environment, where the attempt's token is, goes with it.
            self._process = subprocess.Popen(
                command, cwd=REPOSITORY, env={}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            if _read_line(_require_pipe(self._process.stdout), STARTUP_TIMEOUT_S) != b"ready":
                return None
        return self._process


def _parse_grade(line: bytes) -> Grade:
    answer = json.loads(line)
    return FailedGrade(answer["failed"]) if "failed" in answer else float(answer["grade"])


def _describe_exit(process: "subprocess.Popen[bytes]", timeout_s: float) -> str:
    try:
        process.wait(timeout=0.2)  # a process that has closed its pipe may still be on its way out
    except subprocess.TimeoutExpired:
        return f"it took longer than {timeout_s:g} s"
    return "the process that grades has crashed"


def _read_line(pipe: IO[bytes], timeout_s: float) -> bytes:
    """The next line, without its end; empty when it did not come in time, or the pipe was closed."""
    read = b""
    ends_at = time.monotonic() + timeout_s
    while not read.endswith(b"\n"):
        ready, _, _ = select.select([pipe], [], [], max(0.0, ends_at - time.monotonic()))
        some = os.read(pipe.fileno(), READ_CHUNK_BYTES) if ready else b""
        if not some:
            return b""
        read += some
    return read.rstrip(b"\n")


def _require_pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None  # both were asked for
    return pipe

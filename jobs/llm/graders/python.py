"""Graders that a user wrote in Python, run in a sandbox.

Monty is an interpreter, written in Rust, of a subset of Python without access to files, the environment, the network, processes or
this interpreter's objects. It runs as a child process, limits each call's time and memory, and is killed and replaced when it
exceeds them. As a second barrier the process itself has no environment, cannot write files, and may open few files and little memory.

Every call starts from an empty state, so one completion cannot affect the next. Random numbers are the same in every call, so that
training is reproducible, and a sleep takes no time.
"""

import shlex
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.llm.graders.base import FailedGrade, Grade, GradingInput, to_grade
from jobs.runtime.errors import JobFailed
from jobs.runtime.settings import cpu_thread_count
from schema.training.llm_graders import PythonGrader

if TYPE_CHECKING:
    from pydantic_monty import MontyError, MontySession

    from jobs.runtime.context import JobContext

FUNCTION_NAME = "grade"
CALL_EXPRESSION = f"{FUNCTION_NAME}(_tunesmith_completion, _tunesmith_row)"
MAX_PRINTED_BYTES = 65_536  # a call that prints more fails
MAX_RECURSION_DEPTH = 500  # of nested calls
KILL_GRACE_S = 2.0  # time for the sandbox to stop a call itself, before its process is killed
INTERPRETER_MEMORY_MB = 256  # the interpreter's own memory, added to the user's limit
MAX_WORKERS = 8


def python_grader(config: PythonGrader, context: "JobContext") -> "SandboxedPythonGrader":
    """The user's function, in a sandbox."""
    return SandboxedPythonGrader(config, context.workdir)


class SandboxedPythonGrader:
    """Calls `grade(completion, row)` in a pool of sandboxes."""

    def __init__(self, config: PythonGrader, workdir: Path) -> None:
        from pydantic_monty import Monty

        self._config = config
        self._workers = min(MAX_WORKERS, cpu_thread_count())
        self._stack = ExitStack()
        self._pool: Any = self._stack.enter_context(
            Monty(
                binary_path=_write_sandbox_launcher(workdir / "graders", config.memory_mb),
                max_processes=self._workers,
                request_timeout=config.timeout_s + KILL_GRACE_S,
            )
        )
        self._threads = ThreadPoolExecutor(self._workers, thread_name_prefix="sandbox")
        self._stack.callback(self._threads.shutdown, wait=False, cancel_futures=True)

    def check(self, _cases: Sequence[GradingInput], /) -> None:
        """Raise JobFailed when the source does not run or does not define grade(completion, row)."""
        from pydantic_monty import MontyError, MontySyntaxError

        try:
            with self._open_session() as session:
                self._run_code(session, self._config.source)
                self._run_code(session, FUNCTION_NAME + "\nNone")  # fails if the name is not defined; a function cannot be returned
        except MontySyntaxError as error:
            raise self._make_job_failed(f"its source is not Python that the sandbox supports: {error.display('traceback')}") from error
        except MontyError as error:
            raise self._make_job_failed(f"its source does not run or does not define {FUNCTION_NAME}(completion, row): {error}") from error

    def grade(self, cases: Sequence[GradingInput]) -> list[Grade]:
        """One grade for each completion, in order; several are computed at a time."""
        return list(self._threads.map(self._grade_one, cases))

    def close(self) -> None:
        """End the sandbox processes and threads."""
        self._stack.close()

    def _grade_one(self, case: GradingInput) -> Grade:
        from pydantic_monty import MontyError

        row = dict(case.columns) | {"prompt": case.prompt}
        try:
            with self._open_session() as session:
                self._run_code(session, self._config.source)
                grade = self._run_code(session, CALL_EXPRESSION, {"_tunesmith_completion": case.completion, "_tunesmith_row": row})
        except MontyError as error:
            return FailedGrade(_describe_error(error))
        except UnicodeError:
            return FailedGrade("the row or the completion is not valid text")
        number = to_grade(grade)
        return FailedGrade(f"{FUNCTION_NAME} did not return a finite number") if number is None else number

    def _open_session(self) -> "MontySession":
        return self._pool.checkout(
            limits={
                "max_feed_duration_secs": self._config.timeout_s,
                "max_memory": self._config.memory_mb << 20,
                "max_recursion_depth": MAX_RECURSION_DEPTH,
            },
            os_policy={"sleep": "zero", "random_start": {"seed": 0}},
        )

    def _run_code(self, session: "MontySession", code: str, inputs: dict[str, Any] | None = None) -> object:
        from pydantic_monty import CollectString

        return session.feed_run(code, inputs=inputs, print_callback=CollectString(MAX_PRINTED_BYTES))

    def _make_job_failed(self, reason: str) -> JobFailed:
        return JobFailed("invalid_config", f"grader {self._config.name!r}: {reason}", "docs/training.md lists what the sandbox supports")


def _describe_error(error: "MontyError") -> str:
    """The error without its message, which may repeat the row."""
    from pydantic_monty import MontyCrashedError, MontyRuntimeError

    if isinstance(error, MontyCrashedError):
        return "the sandbox was killed because it exceeded its limits"
    match error.exception():
        case TimeoutError():
            return "it took longer than its timeout_s"
        case MemoryError():
            return "it used more than its memory_mb, or printed too much"
        case exception:
            frames = error.traceback() if isinstance(error, MontyRuntimeError) else []
            return type(exception).__name__ + (f" in line {frames[-1].line}" if frames else "")


def _write_sandbox_launcher(folder: Path, memory_mb: int) -> Path:
    """Write a script that sets resource limits and executes the sandbox. Limits that a system lacks are left to the sandbox's own."""
    from pydantic_monty._binary import find_monty_binary

    folder.mkdir(parents=True, exist_ok=True)
    program = folder / f"sandbox-{memory_mb}"
    limits = {"c": 0, "f": 0, "n": 16, "v": (memory_mb + INTERPRETER_MEMORY_MB) << 10}
    lines = ["#!/bin/sh", *(f"ulimit -{name} {value} 2>/dev/null" for name, value in limits.items())]
    program.write_text("\n".join([*lines, f'exec /usr/bin/env -i {shlex.quote(find_monty_binary())} "$@"', ""]))
    program.chmod(0o700)
    return program

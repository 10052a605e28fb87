"""Graders in Python, written by a user, in a sandbox.

Monty is an interpreter of a part of Python in Rust that has nothing to escape to: no files, no environment, no network, no
processes, no objects of this interpreter. It runs as a child process, is told how long and how much memory a call may take, and
is killed and replaced when it does not keep to it. The walls around that process are the second ones: no environment, no file to
write, few to open, and an end to its addresses.

Every call begins with nothing: what one completion left behind, the next one does not see. Chance and sleep are not the user's to
have: a random number is the same in every call, so that a training can be repeated, and a sleep takes no time.
"""

import math
import shlex
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.llm.graders.base import FailedGrade, Grade, GradingInput
from jobs.runtime.errors import JobFailed
from jobs.runtime.settings import cpu_thread_count
from schema.training.graders import PythonGrader

if TYPE_CHECKING:
    from pydantic_monty import MontyError, MontySession

    from jobs.runtime.context import JobContext

FUNCTION_NAME = "grade"
CALL_EXPRESSION = f"{FUNCTION_NAME}(_tunesmith_completion, _tunesmith_row)"
MAX_PRINTED_BYTES = 65_536  # then it has failed; nobody reads it
MAX_RECURSION_DEPTH = 500  # of calls within calls
KILL_GRACE_S = 2.0  # for the sandbox to end a call by itself, before its process is killed
INTERPRETER_MEMORY_MB = 256  # what the interpreter's own process takes beside what the user's code may
MAX_WORKERS = 8  # at most


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
        self._stack.callback(_shut_down_threads, threads := ThreadPoolExecutor(self._workers, thread_name_prefix="sandbox"))
        self._threads = threads

    def check(self, _cases: Sequence[GradingInput], /) -> None:
        """Raises JobFailed when the source does not run, or defines no grade(completion, row)."""
        from pydantic_monty import MontyError, MontySyntaxError

        try:
            with self._open_session() as session:
                self._run_code(session, self._config.source)
                self._run_code(session, FUNCTION_NAME + "\nNone")
        except MontySyntaxError as error:
            raise self._make_job_failed(f"its source is not Python that the sandbox knows: {error.display('traceback')}") from error
        except MontyError as error:
            raise self._make_job_failed(f"its source does not run, or defines no {FUNCTION_NAME}(completion, row): {error}") from error

    def grade(self, cases: Sequence[GradingInput]) -> list[Grade]:
        """A few at a time."""
        return list(self._threads.map(self._grade_one, cases))

    def close(self) -> None:
        """End the sandboxes."""
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
            return FailedGrade("the row or the completion is no valid text")
        if not isinstance(grade, int | float) or not math.isfinite(grade):
            return FailedGrade(f"{FUNCTION_NAME} gave no finite number")
        return float(grade)

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
        return JobFailed("invalid_config", f"grader {self._config.name!r}: {reason}", "see docs/training.md for what the sandbox knows")


def _describe_error(error: "MontyError") -> str:
    """What went wrong, without the message: it may repeat the row."""
    from pydantic_monty import MontyCrashedError, MontyRuntimeError

    if isinstance(error, MontyCrashedError):
        return "the sandbox was killed: it did not keep to its limits"
    match error.exception():
        case TimeoutError():
            return "it took longer than its timeout_s"
        case MemoryError():
            return "it took more than its memory_mb, or printed too much"
        case other:
            frames = error.traceback() if isinstance(error, MontyRuntimeError) else []
            return type(other).__name__ + (f" in line {frames[-1].line}" if frames else "")


def _write_sandbox_launcher(folder: Path, memory_mb: int) -> Path:
    """A program that sets limits to itself and becomes the sandbox's. Where a system knows a limit not, the sandbox's own holds."""
    from pydantic_monty._binary import find_monty_binary

    folder.mkdir(parents=True, exist_ok=True)
    program = folder / f"sandbox-{memory_mb}"
    limits = {"c": 0, "f": 0, "n": 16, "v": (memory_mb + INTERPRETER_MEMORY_MB) << 10}
    lines = ["#!/bin/sh", *(f"ulimit -{name} {value} 2>/dev/null" for name, value in limits.items())]
    program.write_text("\n".join([*lines, f'exec /usr/bin/env -i {shlex.quote(find_monty_binary())} "$@"', ""]))
    program.chmod(0o700)
    return program


def _shut_down_threads(threads: ThreadPoolExecutor) -> None:
    threads.shutdown(wait=False, cancel_futures=True)

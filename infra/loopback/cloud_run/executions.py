"""Runs executions: one child process per task attempt, with the time limit, cancels and results of Cloud Run."""

# Wrapped messages accept and return Python's own times, which their declared types do not say.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from google.cloud import run_v2
from google.longrunning import operations_pb2
from google.rpc import code_pb2, status_pb2

State = run_v2.Condition.State
Common = run_v2.Condition.CommonReason
Reason = run_v2.Condition.ExecutionReason

POLL_INTERVAL_S = 0.05
DEFAULT_TIMEOUT_S = 600.0
FOLDER_VARIABLES = ("JOB_WORKDIR",)  # name a folder that a real container has to itself

EXIT_ERROR = "The container exited with an error."
MEMORY_LIMIT = "The configured memory limit was reached."
TIMEOUT = "The configured timeout was reached."
CANCELLED = "Cancelled by user."


@dataclass
class Run:
    """An execution with its operation, its task and its process."""

    execution: run_v2.Execution
    operation: operations_pb2.Operation
    task: run_v2.Task
    thread: threading.Thread | None = None
    child: subprocess.Popen[bytes] | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)


class ExecutionRunner:
    """Runs each execution in a thread. `commands` maps an image to what runs for it; children inherit only `environment`."""

    def __init__(
        self,
        folder: Path,
        commands: Mapping[str, Sequence[str]],
        *,
        environment: Mapping[str, str],
        cwd: Path | None,
        grace_s: float,
        lock: threading.RLock,
    ) -> None:
        self._folder = folder
        self._commands = {image: list(command) for image, command in commands.items()}
        self._environment = dict(environment)
        self._cwd = cwd
        self._grace_s = grace_s
        self._lock = lock  # of the API, which reads the same messages

    def start(self, run: Run) -> None:
        """Begin an execution; returns at once."""
        run.thread = threading.Thread(target=self._run_execution, args=(run,), name=_short_name(run.execution.name), daemon=True)
        run.thread.start()

    def output_path(self, execution: str) -> Path:
        """The file with an execution's output. `execution` is its full name or the last part of it."""
        return self._folder / f"{_short_name(execution)}.log"

    def _run_execution(self, run: Run) -> None:
        execution = run.execution
        image = execution.template.containers[0].image
        if image not in self._commands:
            self._complete(run, f"Image '{image}' not found.", reason=Common.CONTAINER_MISSING)
            return
        attempt, error_message = 0, self._run_attempt(run, 0)
        while error_message and attempt < execution.template.max_retries and not run.cancelled.is_set():
            attempt += 1
            error_message = self._run_attempt(run, attempt)
        self._complete(run, error_message)

    def _run_attempt(self, run: Run, attempt: int) -> str:
        """Run the task's process once; returns the error message, empty after success."""
        child = self._spawn(run, attempt)
        if child is None:
            return CANCELLED
        timed_out = self._wait_for_exit(run, child)
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # its own children end with it, as in a container
        code = child.returncode
        if not code and not timed_out:
            error_message = ""
        elif timed_out:
            error_message = TIMEOUT
        elif run.cancelled.is_set():
            error_message = CANCELLED
        else:
            error_message = MEMORY_LIMIT if code == -signal.SIGKILL else EXIT_ERROR
        with self._lock:
            run.execution.retried_count = attempt
            status = status_pb2.Status(code=code_pb2.UNKNOWN if error_message else code_pb2.OK, message=error_message)
            run.task.last_attempt_result = run_v2.TaskAttemptResult(exit_code=max(code, 0), term_signal=-min(code, 0), status=status)
        return error_message

    def _spawn(self, run: Run, attempt: int) -> subprocess.Popen[bytes] | None:
        """Start the process; None when the execution was cancelled before."""
        container, execution = run.execution.template.containers[0], run.execution
        with self._lock, self.output_path(execution.name).open("ab") as output:
            if run.cancelled.is_set():
                return None
            execution.start_time = datetime.now(UTC)
            execution.running_count = 1
            run.child = subprocess.Popen(
                [*self._commands[container.image], *container.args],
                env=self._child_environment(execution, attempt),
                cwd=self._cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            return run.child

    def _child_environment(self, execution: run_v2.Execution, attempt: int) -> dict[str, str]:
        short_name = _short_name(execution.name)
        variables = {variable.name: variable.value for variable in execution.template.containers[0].env}
        folders = {name: str(self._folder / short_name) for name in FOLDER_VARIABLES if name in variables}
        return {
            **self._environment,
            **variables,
            **folders,
            "CLOUD_RUN_JOB": execution.job,
            "CLOUD_RUN_EXECUTION": short_name,
            "CLOUD_RUN_TASK_INDEX": "0",
            "CLOUD_RUN_TASK_ATTEMPT": str(attempt),
            "CLOUD_RUN_TASK_COUNT": "1",
        }

    def _wait_for_exit(self, run: Run, child: subprocess.Popen[bytes]) -> bool:
        """Wait until the process ends; end it after a cancel or the time limit. Returns whether the limit ended it."""
        template = run.execution.template
        timeout_s = template.timeout.total_seconds() if "timeout" in template else DEFAULT_TIMEOUT_S
        deadline = time.monotonic() + timeout_s
        while not run.cancelled.is_set() and time.monotonic() < deadline:
            if _exits_within(child, POLL_INTERVAL_S):
                return False
        timed_out = not run.cancelled.is_set()
        send_signal(child, signal.SIGTERM)
        if not _exits_within(child, self._grace_s):
            send_signal(child, signal.SIGKILL)
            child.wait()
        return timed_out

    def _complete(self, run: Run, error_message: str, *, reason: int = 0) -> None:
        with self._lock:
            execution, operation = run.execution, run.operation
            execution.running_count = 0
            execution.completion_time = run.task.completion_time = datetime.now(UTC)
            if run.cancelled.is_set() and error_message:
                execution.cancelled_count = 1
                set_condition(execution, State.CONDITION_FAILED, CANCELLED, execution_reason=Reason.CANCELLED)
                operation.error.CopyFrom(status_pb2.Status(code=code_pb2.ABORTED, message=CANCELLED))
            elif error_message:
                execution.failed_count = 1
                message = error_message if reason else f"Task {_short_name(run.task.name)} failed with message: {error_message}"
                set_condition(execution, State.CONDITION_FAILED, message, reason=reason, execution_reason=Reason.NON_ZERO_EXIT_CODE)
                operation.error.CopyFrom(status_pb2.Status(code=code_pb2.FAILED_PRECONDITION, message=message))
            else:
                execution.succeeded_count = 1
                set_condition(execution, State.CONDITION_SUCCEEDED, "Execution completed successfully.")
                operation.response.Pack(run_v2.Execution.pb(execution))
            operation.metadata.Pack(run_v2.Execution.pb(execution))
            operation.done = True


def set_condition(execution: run_v2.Execution, state: int, message: str = "", *, reason: int = 0, execution_reason: int = 0) -> None:
    """Set the execution's only condition, `Completed`."""
    reasons = {"reason": reason} if reason else {"execution_reason": execution_reason} if execution_reason else {}
    now = datetime.now(UTC)
    execution.conditions = [run_v2.Condition(type_="Completed", state=state, message=message, last_transition_time=now, **reasons)]
    execution.update_time = now


def send_signal(child: subprocess.Popen[bytes] | None, signal_number: int) -> None:
    """Signal the whole process group while its leader is there: afterwards its number may belong to another process."""
    if child is not None and child.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal_number)


def _short_name(name: str) -> str:
    return name.rpartition("/")[2]


def _exits_within(child: subprocess.Popen[bytes], timeout_s: float) -> bool:
    try:
        child.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return False
    return True

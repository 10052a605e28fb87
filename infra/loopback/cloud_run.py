"""An emulator of Cloud Run jobs: serves google.cloud.run.v2 over gRPC, and runs every task as a child process.

A client sees what Cloud Run shows: names, the environment and arguments of an execution, newest first, conditions with Cloud
Run's own texts, SIGTERM and then SIGKILL, the time limit, retries. A container is a process group here, isolated only by its
folders: each execution gets its own folder for a variable that names a folder of the container.

    python -m infra.loopback.cloud_run --folder DIR --python PYTHON --job tunesmith-cpu [--port N] [--source .] [--env K=V …]
"""

# Wrapped messages take and give Python's own times, which their declared types do not say.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

import argparse
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Self, TypeAlias
from uuid import uuid4

import grpc
import proto
from google.cloud import run_v2
from google.longrunning import operations_pb2
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, status_pb2
from grpc_status import rpc_status

State = run_v2.Condition.State
Common = run_v2.Condition.CommonReason
Reason = run_v2.Condition.ExecutionReason
# The vendor's two kinds of messages: plain, and wrapped.
Request: TypeAlias = Message | proto.Message
Response: TypeAlias = Message | proto.Message

GRACE_S = 10.0  # between SIGTERM and SIGKILL
POLL_INTERVAL_S = 0.05
DEFAULT_TIMEOUT_S = 600.0
NAME_SUFFIX_CHARACTERS = "bcdfghjklmnpqrstvwxz2456789"  # no vowels: no words
FOLDER_VARIABLES = ("JOB_WORKDIR",)  # each execution gets its own

EXIT_ERROR = "The container exited with an error."
MEMORY_LIMIT = "The configured memory limit was reached."
TIMEOUT = "The configured timeout was reached."
CANCELLED = "Cancelled by user."


@dataclass
class _Run:
    """An execution at work."""

    execution: run_v2.Execution
    operation: operations_pb2.Operation
    task: run_v2.Task
    thread: threading.Thread | None = None
    child: subprocess.Popen[bytes] | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class _InjectedError:
    status: status_pb2.Status
    after_execution: bool


class CloudRun:
    """The emulator. A context manager; `commands` says what runs for an image, `environment` is all that a child inherits."""

    def __init__(
        self,
        folder: Path,
        commands: Mapping[str, Sequence[str]],
        *,
        environment: Mapping[str, str],
        cwd: Path | None = None,
        port: int = 0,
        grace_s: float = GRACE_S,
    ) -> None:
        self._folder = folder
        self._commands = {image: list(command) for image, command in commands.items()}
        self._environment = dict(environment)
        self._cwd = cwd
        self._port = port
        self._grace_s = grace_s
        self._lock = threading.RLock()
        self._jobs: dict[str, run_v2.Job] = {}
        self._runs: dict[str, _Run] = {}  # newest last
        self._operations: dict[str, operations_pb2.Operation] = {}
        self._injected_errors: dict[str, list[_InjectedError]] = {}
        self.calls: list[str] = []

    # --- for people and tests ----------------------------------------------------------------------------------------

    @property
    def host(self) -> str:
        """`address:port`, for CLOUD_RUN_EMULATOR_HOST."""
        return f"127.0.0.1:{self._port}"

    def start(self) -> Self:
        """Listen. A port of 0 becomes a free one."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._pool = ThreadPoolExecutor(8, thread_name_prefix="cloud-run")
        self._server = grpc.server(self._pool, options=[("grpc.so_reuseport", 0)])
        self._server.add_generic_rpc_handlers(tuple(self._handlers()))
        self._port = self._server.add_insecure_port(f"127.0.0.1:{self._port}")
        self._server.start()
        return self

    def stop(self) -> None:
        """Take no more calls, and end every child."""
        self._server.stop(grace=0).wait()
        self._pool.shutdown()
        with self._lock:
            runs = list(self._runs.values())
        for run in runs:
            run.cancelled.set()
            _send_signal(run.child, signal.SIGKILL)
        for run in runs:
            if run.thread is not None:
                run.thread.join()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def create_job(self, name: str, image: str, *, timeout_s: float = DEFAULT_TIMEOUT_S, max_retries: int = 0) -> None:
        """Make a job resource with one container, called `attempt`. `name` is the full one."""
        container = run_v2.Container(name="attempt", image=image)
        task = run_v2.TaskTemplate(containers=[container], max_retries=max_retries, timeout=timedelta(seconds=timeout_s))
        self._store_job(name, run_v2.Job(template=run_v2.ExecutionTemplate(task_count=1, template=task)))

    def delete_jobs(self) -> None:
        """Forget every job resource, as after `make destroy`."""
        with self._lock:
            self._jobs.clear()

    def fail_next(self, method: str, code: grpc.StatusCode, message: str, *details: Message) -> None:
        """The next call of the method is answered with an error, rich details included, and not carried out."""
        self._inject_error(method, code, message, details, after=False)

    def drop_next_response(self, method: str) -> None:
        """The next call of the method is carried out, and its caller hears that the connection was lost."""
        self._inject_error(method, grpc.StatusCode.UNAVAILABLE, "Connection reset by peer", (), after=True)

    def output_path(self, execution: str) -> Path:
        """Where the output of an execution goes, known by its full name or its last part."""
        return self._folder / f"{execution.rpartition('/')[2]}.log"

    def executions(self) -> list[run_v2.Execution]:
        """All of them, newest first."""
        with self._lock:
            return [run_v2.Execution(run.execution) for run in reversed(self._runs.values())]

    def signal_execution(self, execution: str, signal_number: int) -> None:
        """Do to an execution what the platform does unasked: SIGTERM is maintenance, SIGKILL a lack of memory."""
        _send_signal(self._runs[execution].child, signal_number)

    def _inject_error(self, method: str, code: grpc.StatusCode, message: str, details: Sequence[Message], *, after: bool) -> None:
        packed = []
        for detail in details:
            packed.append(any_pb2.Any())
            packed[-1].Pack(detail)
        status = status_pb2.Status(code=code.value[0], message=message, details=packed)
        with self._lock:
            self._injected_errors.setdefault(method, []).append(_InjectedError(status, after))

    # --- Jobs --------------------------------------------------------------------------------------------------------

    def CreateJob(self, request: run_v2.CreateJobRequest) -> operations_pb2.Operation:  # noqa: N802  # methods are called as on the wire
        name = f"{request.parent}/jobs/{request.job_id}"
        if name in self._jobs:
            raise _RpcError(code_pb2.ALREADY_EXISTS, f"Resource '{request.job_id}' already exists.")
        return self._create_finished_operation(self._store_job(name, request.job))

    def GetJob(self, request: run_v2.GetJobRequest) -> run_v2.Job:  # noqa: N802
        return self._find_job(request.name)

    def UpdateJob(self, request: run_v2.UpdateJobRequest) -> operations_pb2.Operation:  # noqa: N802
        self._find_job(request.job.name)
        return self._create_finished_operation(self._store_job(request.job.name, request.job))

    def DeleteJob(self, request: run_v2.DeleteJobRequest) -> operations_pb2.Operation:  # noqa: N802
        job = self._find_job(request.name)
        del self._jobs[request.name]
        return self._create_finished_operation(job)

    def ListJobs(self, request: run_v2.ListJobsRequest) -> run_v2.ListJobsResponse:  # noqa: N802
        return run_v2.ListJobsResponse(jobs=[job for name, job in self._jobs.items() if name.startswith(f"{request.parent}/jobs/")])

    def RunJob(self, request: run_v2.RunJobRequest) -> operations_pb2.Operation:  # noqa: N802
        job = self._find_job(request.name)
        short = f"{request.name.rpartition('/')[2]}-{''.join(random.choices(NAME_SUFFIX_CHARACTERS, k=5))}"
        execution = run_v2.Execution(
            name=f"{request.name}/executions/{short}",
            uid=str(uuid4()),
            job=request.name.rpartition("/")[2],
            create_time=datetime.now(UTC),
            task_count=1,
            parallelism=1,
            template=_apply_overrides(job.template.template, request.overrides),
            log_uri=self.output_path(short).as_uri(),
        )
        task = run_v2.Task(name=f"{execution.name}/tasks/{short}-task0", job=execution.job, execution=short)
        _set_condition(execution, State.CONDITION_RECONCILING)
        run = _Run(execution, self._create_operation(execution), task)
        self._runs[execution.name] = run
        run.thread = threading.Thread(target=self._run_execution, args=(run,), name=short, daemon=True)
        run.thread.start()
        return run.operation

    # --- Executions and Tasks ----------------------------------------------------------------------------------------

    def GetExecution(self, request: run_v2.GetExecutionRequest) -> run_v2.Execution:  # noqa: N802
        return self._find_run(request.name).execution

    def ListExecutions(self, request: run_v2.ListExecutionsRequest) -> run_v2.ListExecutionsResponse:  # noqa: N802
        if not request.parent.endswith("/jobs/-"):
            self._find_job(request.parent)
        parent = request.parent.removesuffix("-") if request.parent.endswith("/jobs/-") else f"{request.parent}/executions/"
        found = [run.execution for name, run in reversed(self._runs.items()) if name.startswith(parent)]
        begin, size = int(request.page_token or 0), request.page_size or 100
        rest = str(begin + size) if begin + size < len(found) else ""
        return run_v2.ListExecutionsResponse(executions=found[begin : begin + size], next_page_token=rest)

    def CancelExecution(self, request: run_v2.CancelExecutionRequest) -> operations_pb2.Operation:  # noqa: N802
        run = self._find_run(request.name)
        if "completion_time" in run.execution:
            raise _RpcError(code_pb2.FAILED_PRECONDITION, "The execution has already completed.")
        if not run.cancelled.is_set():
            run.cancelled.set()
            _set_condition(run.execution, State.CONDITION_RECONCILING, execution_reason=Reason.CANCELLING)
        return run.operation

    def DeleteExecution(self, request: run_v2.DeleteExecutionRequest) -> operations_pb2.Operation:  # noqa: N802
        run = self._find_run(request.name)
        run.cancelled.set()
        _send_signal(run.child, signal.SIGKILL)
        del self._runs[request.name]
        return self._create_finished_operation(run.execution)

    def GetTask(self, request: run_v2.GetTaskRequest) -> run_v2.Task:  # noqa: N802
        return self._find_run(request.name.partition("/tasks/")[0]).task

    def ListTasks(self, request: run_v2.ListTasksRequest) -> run_v2.ListTasksResponse:  # noqa: N802
        return run_v2.ListTasksResponse(tasks=[self._find_run(request.parent).task])

    # --- Operations --------------------------------------------------------------------------------------------------

    def GetOperation(self, request: operations_pb2.GetOperationRequest) -> operations_pb2.Operation:  # noqa: N802
        if request.name not in self._operations:
            raise _RpcError(code_pb2.NOT_FOUND, f"Operation '{request.name}' was not found")
        return self._operations[request.name]

    def WaitOperation(self, request: operations_pb2.WaitOperationRequest) -> operations_pb2.Operation:  # noqa: N802
        """Answers at once: the client asks again."""
        return self.GetOperation(operations_pb2.GetOperationRequest(name=request.name))

    # --- an execution ------------------------------------------------------------------------------------------------

    def _run_execution(self, run: _Run) -> None:
        """From the first process to the last word, in a thread of its own."""
        execution = run.execution
        image = execution.template.containers[0].image
        if image not in self._commands:
            self._complete(run, f"Image '{image}' not found.", reason=Common.CONTAINER_MISSING)
            return
        attempt, error = 0, self._run_attempt(run, 0)
        while error and attempt < execution.template.max_retries and not run.cancelled.is_set():
            attempt += 1
            error = self._run_attempt(run, attempt)
        self._complete(run, error)

    def _run_attempt(self, run: _Run, attempt: int) -> str:
        """What went wrong; empty when nothing did."""
        child = self._spawn(run, attempt)
        if child is None:
            return CANCELLED
        timed_out = self._wait_for_exit(run, child)
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # what it left behind goes with it, as with a container
        code = child.returncode
        ended = TIMEOUT if timed_out else CANCELLED if run.cancelled.is_set() else MEMORY_LIMIT if code == -signal.SIGKILL else EXIT_ERROR
        message = ended if code or timed_out else ""
        with self._lock:
            run.execution.retried_count = attempt
            status = status_pb2.Status(code=code_pb2.UNKNOWN if message else code_pb2.OK, message=message)
            run.task.last_attempt_result = run_v2.TaskAttemptResult(exit_code=max(code, 0), term_signal=-min(code, 0), status=status)
        return message

    def _wait_for_exit(self, run: _Run, child: subprocess.Popen[bytes]) -> bool:
        """Wait for the end, and bring it about after a cancel or the time limit. Whether it was the limit."""
        deadline = time.monotonic() + _timeout_s(run.execution.template)
        while not run.cancelled.is_set() and time.monotonic() < deadline:
            if _exits_within(child, POLL_INTERVAL_S):
                return False
        timed_out = not run.cancelled.is_set()
        _send_signal(child, signal.SIGTERM)
        if not _exits_within(child, self._grace_s):
            _send_signal(child, signal.SIGKILL)
            child.wait()
        return timed_out

    def _spawn(self, run: _Run, attempt: int) -> subprocess.Popen[bytes] | None:
        """The process, unless the execution was cancelled before it began."""
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
        short = execution.name.rpartition("/")[2]
        told = {variable.name: variable.value for variable in execution.template.containers[0].env}
        own = {name: str(self._folder / short) for name in FOLDER_VARIABLES if name in told}
        return {
            **self._environment,
            **told,
            **own,
            "CLOUD_RUN_JOB": execution.job,
            "CLOUD_RUN_EXECUTION": short,
            "CLOUD_RUN_TASK_INDEX": "0",
            "CLOUD_RUN_TASK_ATTEMPT": str(attempt),
            "CLOUD_RUN_TASK_COUNT": "1",
        }

    def _complete(self, run: _Run, error_message: str, *, reason: int = 0) -> None:
        with self._lock:
            execution, operation = run.execution, run.operation
            execution.running_count = 0
            execution.completion_time = run.task.completion_time = datetime.now(UTC)
            if run.cancelled.is_set() and error_message:
                execution.cancelled_count = 1
                _set_condition(execution, State.CONDITION_FAILED, CANCELLED, execution_reason=Reason.CANCELLED)
                operation.error.CopyFrom(status_pb2.Status(code=code_pb2.ABORTED, message=CANCELLED))
            elif error_message:
                execution.failed_count = 1
                message = error_message if reason else f"Task {run.task.name.rpartition('/')[2]} failed with message: {error_message}"
                _set_condition(execution, State.CONDITION_FAILED, message, reason=reason, execution_reason=Reason.NON_ZERO_EXIT_CODE)
                operation.error.CopyFrom(status_pb2.Status(code=code_pb2.FAILED_PRECONDITION, message=message))
            else:
                execution.succeeded_count = 1
                _set_condition(execution, State.CONDITION_SUCCEEDED, "Execution completed successfully.")
                operation.response.Pack(run_v2.Execution.pb(execution))
            operation.metadata.Pack(run_v2.Execution.pb(execution))
            operation.done = True

    # --- the records -------------------------------------------------------------------------------------------------

    def _store_job(self, name: str, job: run_v2.Job) -> run_v2.Job:
        job.name = name
        job.uid = job.uid or str(uuid4())
        job.create_time = datetime.now(UTC)
        with self._lock:
            self._jobs[name] = job
        return job

    def _find_job(self, name: str) -> run_v2.Job:
        if name not in self._jobs:
            raise _RpcError(code_pb2.NOT_FOUND, f"Resource '{name.rpartition('/')[2]}' of kind 'JOB' does not exist.")
        return self._jobs[name]

    def _find_run(self, name: str) -> _Run:
        if name not in self._runs:
            raise _RpcError(code_pb2.NOT_FOUND, f"Resource '{name.rpartition('/')[2]}' of kind 'EXECUTION' does not exist.")
        return self._runs[name]

    def _create_operation(self, resource: run_v2.Job | run_v2.Execution) -> operations_pb2.Operation:
        place = resource.name.partition("/jobs/")[0]
        operation = operations_pb2.Operation(name=f"{place}/operations/{uuid4()}")
        operation.metadata.Pack(type(resource).pb(resource))
        self._operations[operation.name] = operation
        return operation

    def _create_finished_operation(self, resource: run_v2.Job | run_v2.Execution) -> operations_pb2.Operation:
        operation = self._create_operation(resource)
        operation.response.Pack(type(resource).pb(resource))
        operation.done = True
        return operation

    # --- the wire ----------------------------------------------------------------------------------------------------

    def _handlers(self) -> list[grpc.GenericRpcHandler]:
        return [
            grpc.method_handlers_generic_handler(service, {method: self._handler(method, request) for method, request in methods.items()})
            for service, methods in METHODS.items()
        ]

    def _handler(self, method: str, request: type[Request]) -> grpc.RpcMethodHandler:
        """One call: under the lock, with an answer that nothing changes while it is written out."""
        carry_out: Callable[[Request], Response] = getattr(self, method)

        def handle(message: Request, context: grpc.ServicerContext) -> bytes:
            with self._lock:
                self.calls.append(method)
                refusal = self._injected_errors[method].pop(0) if self._injected_errors.get(method) else None
                try:
                    content = b"" if refusal and not refusal.after_execution else _serialize(carry_out(message))
                    status = refusal.status if refusal else None
                except _RpcError as error:
                    content, status = b"", error.status
            if status is not None:
                context.abort_with_status(rpc_status.to_status(status))
            return content

        read = request.deserialize if issubclass(request, proto.Message) else request.FromString
        return grpc.unary_unary_rpc_method_handler(handle, request_deserializer=read, response_serializer=bytes)


def _serialize(response: Response) -> bytes:
    return type(response).serialize(response) if isinstance(response, proto.Message) else response.SerializeToString()


METHODS: dict[str, dict[str, type[Request]]] = {
    "google.cloud.run.v2.Jobs": {
        "CreateJob": run_v2.CreateJobRequest,
        "GetJob": run_v2.GetJobRequest,
        "UpdateJob": run_v2.UpdateJobRequest,
        "DeleteJob": run_v2.DeleteJobRequest,
        "ListJobs": run_v2.ListJobsRequest,
        "RunJob": run_v2.RunJobRequest,
    },
    "google.cloud.run.v2.Executions": {
        "GetExecution": run_v2.GetExecutionRequest,
        "ListExecutions": run_v2.ListExecutionsRequest,
        "CancelExecution": run_v2.CancelExecutionRequest,
        "DeleteExecution": run_v2.DeleteExecutionRequest,
    },
    "google.cloud.run.v2.Tasks": {"GetTask": run_v2.GetTaskRequest, "ListTasks": run_v2.ListTasksRequest},
    "google.longrunning.Operations": {
        "GetOperation": operations_pb2.GetOperationRequest,
        "WaitOperation": operations_pb2.WaitOperationRequest,
    },
}


class _RpcError(Exception):
    """A call is answered with an error."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.status = status_pb2.Status(code=code, message=message)


def _apply_overrides(template: run_v2.TaskTemplate, overrides: run_v2.RunJobRequest.Overrides) -> run_v2.TaskTemplate:
    """What an execution runs: the job's template with the overrides in it."""
    if overrides.task_count > 1:
        raise _RpcError(code_pb2.INVALID_ARGUMENT, "this emulator runs one task per execution")
    template = run_v2.TaskTemplate(template)
    if "timeout" in overrides:
        template.timeout = overrides.timeout
    for override in overrides.container_overrides:
        named = [container for container in template.containers if override.name in ("", container.name)]
        if not named:
            raise _RpcError(code_pb2.INVALID_ARGUMENT, f"overrides.container_overrides: no container is named {override.name!r}")
        if override.args or override.clear_args:
            named[0].args = list(override.args)
        env = {variable.name: variable for variable in (*named[0].env, *override.env)}
        named[0].env = list(env.values())
    return template


def _timeout_s(template: run_v2.TaskTemplate) -> float:
    return template.timeout.total_seconds() if "timeout" in template else DEFAULT_TIMEOUT_S


def _set_condition(execution: run_v2.Execution, state: int, message: str = "", *, reason: int = 0, execution_reason: int = 0) -> None:
    why = {"reason": reason} if reason else {"execution_reason": execution_reason} if execution_reason else {}
    now = datetime.now(UTC)
    execution.conditions = [run_v2.Condition(type_="Completed", state=state, message=message, last_transition_time=now, **why)]
    execution.update_time = now


def _exits_within(child: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        child.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _send_signal(child: subprocess.Popen[bytes] | None, signal_number: int) -> None:
    """To the whole group, while its first process is there: its number may be somebody else's afterwards."""
    if child is not None and child.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal_number)


def main() -> None:
    """Serve until SIGTERM or SIGINT; then end every child."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True, help="for the output and the folders of executions")
    parser.add_argument("--python", type=Path, required=True, help="the Python of the trainer's environment")
    parser.add_argument("--source", type=Path, default=Path(), help="where jobs/ is")
    parser.add_argument("--project", default="demo-tunesmith")
    parser.add_argument("--region", default="local")
    parser.add_argument("--job", action="append", required=True, help="a job resource to make; may be repeated")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="for the children; they inherit nothing else")
    options = parser.parse_args()
    source = options.source.resolve()
    environment = dict(pair.split("=", 1) for pair in options.env) | {"PYTHONPATH": str(source), "PYTHONUNBUFFERED": "1"}
    command = [str(options.python.absolute()), "-m", "jobs.run"]
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    with CloudRun(options.folder.resolve(), {"llm": command}, environment=environment, cwd=source, port=options.port) as cloud_run:
        for name in options.job:
            cloud_run.create_job(f"projects/{options.project}/locations/{options.region}/jobs/{name}", "llm")
        print(f"{time.strftime('%H:%M:%S')} Cloud Run emulator on {cloud_run.host}: {', '.join(options.job)}", flush=True)
        stopped.wait()


if __name__ == "__main__":
    main()

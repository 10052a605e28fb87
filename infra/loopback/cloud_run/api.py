"""The RPC methods of google.cloud.run.v2 and google.longrunning that clients of Cloud Run jobs call, over records in memory."""

# Wrapped messages accept and return Python's own times, which their declared types do not say.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

import random
import signal
import threading
from datetime import UTC, datetime
from typing import TypeAlias
from uuid import uuid4

import proto
from google.cloud import run_v2
from google.longrunning import operations_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, status_pb2

from infra.loopback.cloud_run.executions import ExecutionRunner, Reason, Run, State, send_signal, set_condition

# The vendor's two kinds of messages: plain, and wrapped.
Request: TypeAlias = Message | proto.Message
Response: TypeAlias = Message | proto.Message

NAME_SUFFIX_CHARACTERS = "bcdfghjklmnpqrstvwxz2456789"  # no vowels: no words

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


class RpcError(Exception):
    """The call is answered with this status."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.status = status_pb2.Status(code=code, message=message)


class CloudRunApi:
    """Jobs, executions and operations. Methods are named as in the API; the server calls them under the lock."""

    def __init__(self, runner: ExecutionRunner, lock: threading.RLock) -> None:
        self._runner = runner
        self._lock = lock
        self.jobs: dict[str, run_v2.Job] = {}
        self.runs: dict[str, Run] = {}  # newest last
        self._operations: dict[str, operations_pb2.Operation] = {}

    def store_job(self, name: str, job: run_v2.Job) -> run_v2.Job:
        """Create or replace a job resource. `name` is the full one."""
        job.name = name
        job.uid = job.uid or str(uuid4())
        job.create_time = datetime.now(UTC)
        with self._lock:
            self.jobs[name] = job
        return job

    # --- Jobs --------------------------------------------------------------------------------------------------------

    def CreateJob(self, request: run_v2.CreateJobRequest) -> operations_pb2.Operation:  # noqa: N802  # named as in the API
        name = f"{request.parent}/jobs/{request.job_id}"
        if name in self.jobs:
            raise RpcError(code_pb2.ALREADY_EXISTS, f"Resource '{request.job_id}' already exists.")
        return self._create_finished_operation(self.store_job(name, request.job))

    def GetJob(self, request: run_v2.GetJobRequest) -> run_v2.Job:  # noqa: N802
        return self._get_job(request.name)

    def UpdateJob(self, request: run_v2.UpdateJobRequest) -> operations_pb2.Operation:  # noqa: N802
        self._get_job(request.job.name)
        return self._create_finished_operation(self.store_job(request.job.name, request.job))

    def DeleteJob(self, request: run_v2.DeleteJobRequest) -> operations_pb2.Operation:  # noqa: N802
        job = self._get_job(request.name)
        del self.jobs[request.name]
        return self._create_finished_operation(job)

    def ListJobs(self, request: run_v2.ListJobsRequest) -> run_v2.ListJobsResponse:  # noqa: N802
        return run_v2.ListJobsResponse(jobs=[job for name, job in self.jobs.items() if name.startswith(f"{request.parent}/jobs/")])

    def RunJob(self, request: run_v2.RunJobRequest) -> operations_pb2.Operation:  # noqa: N802
        job = self._get_job(request.name)
        job_id = request.name.rpartition("/")[2]
        short_name = f"{job_id}-{''.join(random.choices(NAME_SUFFIX_CHARACTERS, k=5))}"
        execution = run_v2.Execution(
            name=f"{request.name}/executions/{short_name}",
            uid=str(uuid4()),
            job=job_id,
            create_time=datetime.now(UTC),
            task_count=1,
            parallelism=1,
            template=_apply_overrides(job.template.template, request.overrides),
            log_uri=self._runner.output_path(short_name).as_uri(),
        )
        task = run_v2.Task(name=f"{execution.name}/tasks/{short_name}-task0", job=execution.job, execution=short_name)
        set_condition(execution, State.CONDITION_RECONCILING)
        run = Run(execution, self._create_operation(execution), task)
        self.runs[execution.name] = run
        self._runner.start(run)
        return run.operation

    # --- Executions and Tasks ----------------------------------------------------------------------------------------

    def GetExecution(self, request: run_v2.GetExecutionRequest) -> run_v2.Execution:  # noqa: N802
        return self._get_run(request.name).execution

    def ListExecutions(self, request: run_v2.ListExecutionsRequest) -> run_v2.ListExecutionsResponse:  # noqa: N802
        if not request.parent.endswith("/jobs/-"):
            self._get_job(request.parent)
        prefix = request.parent.removesuffix("-") if request.parent.endswith("/jobs/-") else f"{request.parent}/executions/"
        executions = [run.execution for name, run in reversed(self.runs.items()) if name.startswith(prefix)]
        begin, size = int(request.page_token or 0), request.page_size or 100
        next_page_token = str(begin + size) if begin + size < len(executions) else ""
        return run_v2.ListExecutionsResponse(executions=executions[begin : begin + size], next_page_token=next_page_token)

    def CancelExecution(self, request: run_v2.CancelExecutionRequest) -> operations_pb2.Operation:  # noqa: N802
        run = self._get_run(request.name)
        if "completion_time" in run.execution:
            raise RpcError(code_pb2.FAILED_PRECONDITION, "The execution has already completed.")
        if not run.cancelled.is_set():
            run.cancelled.set()
            set_condition(run.execution, State.CONDITION_RECONCILING, execution_reason=Reason.CANCELLING)
        return run.operation

    def DeleteExecution(self, request: run_v2.DeleteExecutionRequest) -> operations_pb2.Operation:  # noqa: N802
        run = self._get_run(request.name)
        run.cancelled.set()
        send_signal(run.child, signal.SIGKILL)
        del self.runs[request.name]
        return self._create_finished_operation(run.execution)

    def GetTask(self, request: run_v2.GetTaskRequest) -> run_v2.Task:  # noqa: N802
        return self._get_run(request.name.partition("/tasks/")[0]).task

    def ListTasks(self, request: run_v2.ListTasksRequest) -> run_v2.ListTasksResponse:  # noqa: N802
        return run_v2.ListTasksResponse(tasks=[self._get_run(request.parent).task])

    # --- Operations --------------------------------------------------------------------------------------------------

    def GetOperation(self, request: operations_pb2.GetOperationRequest) -> operations_pb2.Operation:  # noqa: N802
        if request.name not in self._operations:
            raise RpcError(code_pb2.NOT_FOUND, f"Operation '{request.name}' was not found")
        return self._operations[request.name]

    def WaitOperation(self, request: operations_pb2.WaitOperationRequest) -> operations_pb2.Operation:  # noqa: N802
        """Answers at once: the client asks again."""
        return self.GetOperation(operations_pb2.GetOperationRequest(name=request.name))

    # --- records -----------------------------------------------------------------------------------------------------

    def _get_job(self, name: str) -> run_v2.Job:
        if name not in self.jobs:
            raise RpcError(code_pb2.NOT_FOUND, f"Resource '{name.rpartition('/')[2]}' of kind 'JOB' does not exist.")
        return self.jobs[name]

    def _get_run(self, name: str) -> Run:
        if name not in self.runs:
            raise RpcError(code_pb2.NOT_FOUND, f"Resource '{name.rpartition('/')[2]}' of kind 'EXECUTION' does not exist.")
        return self.runs[name]

    def _create_operation(self, resource: run_v2.Job | run_v2.Execution) -> operations_pb2.Operation:
        location = resource.name.partition("/jobs/")[0]
        operation = operations_pb2.Operation(name=f"{location}/operations/{uuid4()}")
        operation.metadata.Pack(type(resource).pb(resource))
        self._operations[operation.name] = operation
        return operation

    def _create_finished_operation(self, resource: run_v2.Job | run_v2.Execution) -> operations_pb2.Operation:
        operation = self._create_operation(resource)
        operation.response.Pack(type(resource).pb(resource))
        operation.done = True
        return operation


def _apply_overrides(template: run_v2.TaskTemplate, overrides: run_v2.RunJobRequest.Overrides) -> run_v2.TaskTemplate:
    """The job's template with the overrides of one execution."""
    if overrides.task_count > 1:
        raise RpcError(code_pb2.INVALID_ARGUMENT, "the emulator runs one task to an execution")
    template = run_v2.TaskTemplate(template)
    if "timeout" in overrides:
        template.timeout = overrides.timeout
    for override in overrides.container_overrides:
        containers = [container for container in template.containers if override.name in ("", container.name)]
        if not containers:
            raise RpcError(code_pb2.INVALID_ARGUMENT, f"overrides.container_overrides: no container is named {override.name!r}")
        if override.args or override.clear_args:
            containers[0].args = list(override.args)
        env = {variable.name: variable for variable in (*containers[0].env, *override.env)}
        containers[0].env = list(env.values())
    return template

"""The gRPC server of the emulator, and what tests do with it: create jobs, inject errors, look at executions."""

# Wrapped messages accept and return Python's own times, which their declared types do not say.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc
import proto
from google.cloud import run_v2
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import status_pb2
from grpc_status import rpc_status

from infra.loopback.cloud_run.api import METHODS, CloudRunApi, Request, Response, RpcError
from infra.loopback.cloud_run.executions import DEFAULT_TIMEOUT_S, ExecutionRunner, send_signal

GRACE_S = 10.0  # between SIGTERM and SIGKILL, as in Cloud Run


@dataclass(frozen=True)
class _InjectedError:
    status: status_pb2.Status
    after_execution: bool


class CloudRun:
    """The emulator, a context manager. `commands` maps an image to what runs for it; children inherit only `environment`."""

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
        self._port = port
        self._lock = threading.RLock()
        self._runner = ExecutionRunner(folder, commands, environment=environment, cwd=cwd, grace_s=grace_s, lock=self._lock)
        self._api = CloudRunApi(self._runner, self._lock)
        self._injected_errors: dict[str, list[_InjectedError]] = {}
        self.calls: list[str] = []  # the methods called, oldest first

    # --- the server --------------------------------------------------------------------------------------------------

    @property
    def host(self) -> str:
        """`address:port`, for CLOUD_RUN_EMULATOR_HOST."""
        return f"127.0.0.1:{self._port}"

    def start(self) -> Self:
        """Listen. A port of 0 becomes a free one."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._pool = ThreadPoolExecutor(8, thread_name_prefix="cloud-run")
        self._server = grpc.server(self._pool, options=[("grpc.so_reuseport", 0)])
        for service, methods in METHODS.items():
            handlers = {method: self._create_handler(method, request) for method, request in methods.items()}
            self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
        self._port = self._server.add_insecure_port(f"127.0.0.1:{self._port}")
        self._server.start()
        return self

    def stop(self) -> None:
        """Stop listening and end every child process."""
        self._server.stop(grace=0).wait()
        self._pool.shutdown()
        with self._lock:
            runs = list(self._api.runs.values())
        for run in runs:
            run.cancelled.set()
            send_signal(run.child, signal.SIGKILL)
        for run in runs:
            if run.thread is not None:
                run.thread.join()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def _create_handler(self, method: str, request: type[Request]) -> grpc.RpcMethodHandler:
        """Answers one method: under the lock, so that nothing changes the response while it is serialized."""
        carry_out: Callable[[Request], Response] = getattr(self._api, method)

        def handle(message: Request, context: grpc.ServicerContext) -> bytes:
            with self._lock:
                self.calls.append(method)
                injected = self._injected_errors[method].pop(0) if self._injected_errors.get(method) else None
                try:
                    content = b"" if injected and not injected.after_execution else _serialize(carry_out(message))
                    status = injected.status if injected else None
                except RpcError as error:
                    content, status = b"", error.status
            if status is not None:
                context.abort_with_status(rpc_status.to_status(status))
            return content

        deserialize = request.deserialize if issubclass(request, proto.Message) else request.FromString
        return grpc.unary_unary_rpc_method_handler(handle, request_deserializer=deserialize, response_serializer=bytes)

    # --- job resources -----------------------------------------------------------------------------------------------

    def create_job(self, name: str, image: str, *, timeout_s: float = DEFAULT_TIMEOUT_S, max_retries: int = 0) -> None:
        """Create a job resource with one container, called `attempt`. `name` is the full one."""
        container = run_v2.Container(name="attempt", image=image)
        task = run_v2.TaskTemplate(containers=[container], max_retries=max_retries, timeout=timedelta(seconds=timeout_s))
        self._api.store_job(name, run_v2.Job(template=run_v2.ExecutionTemplate(task_count=1, template=task)))

    def delete_jobs(self) -> None:
        """Delete every job resource, as `make destroy` does."""
        with self._lock:
            self._api.jobs.clear()

    # --- executions --------------------------------------------------------------------------------------------------

    def executions(self) -> list[run_v2.Execution]:
        """Copies of all executions, newest first."""
        with self._lock:
            return [run_v2.Execution(run.execution) for run in reversed(self._api.runs.values())]

    def output_path(self, execution: str) -> Path:
        """The file with an execution's output. `execution` is its full name or the last part of it."""
        return self._runner.output_path(execution)

    def signal_execution(self, execution: str, signal_number: int) -> None:
        """Send the signal that the platform would send by itself: SIGTERM for maintenance, SIGKILL when memory runs out."""
        send_signal(self._api.runs[execution].child, signal_number)

    # --- faults ------------------------------------------------------------------------------------------------------

    def fail_next(self, method: str, code: grpc.StatusCode, message: str, *details: Message) -> None:
        """Answer the next call of the method with an error, including rich details, without carrying it out."""
        self._inject_error(method, code, message, details, after_execution=False)

    def drop_next_response(self, method: str) -> None:
        """Carry out the next call of the method and answer it with a lost connection."""
        self._inject_error(method, grpc.StatusCode.UNAVAILABLE, "Connection reset by peer", (), after_execution=True)

    def _inject_error(self, method: str, code: grpc.StatusCode, message: str, details: Sequence[Message], *, after_execution: bool) -> None:
        packed = []
        for detail in details:
            packed.append(any_pb2.Any())
            packed[-1].Pack(detail)
        status = status_pb2.Status(code=code.value[0], message=message, details=packed)
        with self._lock:
            self._injected_errors.setdefault(method, []).append(_InjectedError(status, after_execution))


def _serialize(response: Response) -> bytes:
    return type(response).serialize(response) if isinstance(response, proto.Message) else response.SerializeToString()

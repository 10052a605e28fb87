"""The connection to the Cloud Run API: one gRPC channel shared by the clients of jobs, executions and tasks."""

# The client library is generated, and loosely typed where it wraps gRPC.
# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import threading
from dataclasses import dataclass

import google.auth
import grpc
from google.cloud import run_v2
from google.cloud.run_v2.services.executions.transports import ExecutionsGrpcTransport
from google.cloud.run_v2.services.jobs.transports import JobsGrpcTransport
from google.cloud.run_v2.services.tasks.transports import TasksGrpcTransport

MAX_RECONNECT_BACKOFF_MS = 2000  # gRPC's default waits up to two minutes before it reconnects


@dataclass(frozen=True)
class Clients:
    """The three clients and the channel they share."""

    channel: grpc.Channel
    jobs: run_v2.JobsClient
    executions: run_v2.ExecutionsClient
    tasks: run_v2.TasksClient


class Connection:
    """Opens the channel at first use. Thread-safe."""

    def __init__(self, emulator_host: str | None) -> None:
        self._emulator_host = emulator_host
        self._lock = threading.Lock()
        self._clients: Clients | None = None

    def open(self) -> Clients:
        """The clients. Raises GoogleAuthError when there are no credentials."""
        with self._lock:
            if self._clients is None:
                channel = _create_channel(self._emulator_host)
                self._clients = Clients(
                    channel=channel,
                    jobs=run_v2.JobsClient(transport=JobsGrpcTransport(channel=channel)),
                    executions=run_v2.ExecutionsClient(transport=ExecutionsGrpcTransport(channel=channel)),
                    tasks=run_v2.TasksClient(transport=TasksGrpcTransport(channel=channel)),
                )
            return self._clients

    def close(self) -> None:
        """Close the channel; the next `open` makes another."""
        with self._lock:
            if self._clients is not None:
                self._clients.channel.close()
            self._clients = None


def _create_channel(emulator_host: str | None) -> grpc.Channel:
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_reconnect_backoff_ms", MAX_RECONNECT_BACKOFF_MS)]
    if emulator_host:
        return grpc.insecure_channel(emulator_host, options=options)
    credentials, _ = google.auth.default(scopes=["https://www.googleapis.com/auth/cloud-platform"])
    return JobsGrpcTransport.create_channel(credentials=credentials, options=options)

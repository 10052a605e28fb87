"""An emulator of Secret Manager: serves google.cloud.secretmanager.v1 over gRPC from memory.

It implements what a client sees: names, version numbers, states, status codes, paging, verification of the payload's checksum (and
required, although Google makes it optional). Nothing expires. Where Google is only eventually consistent, the emulator always returns
stale results: the alias `latest` and the list of versions do not include the newest version.

    python -m infra.loopback.secret_manager [--port N]
"""

import argparse
import re
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Self

import google_crc32c
import grpc
from google.cloud import secretmanager_v1 as sm
from google.protobuf import empty_pb2

SERVICE = "google.cloud.secretmanager.v1.SecretManagerService"
ENABLED, DESTROYED = sm.SecretVersion.State.ENABLED, sm.SecretVersion.State.DESTROYED
MAX_PAYLOAD_BYTES = 64 << 10
PAGE_SIZE = 100


@dataclass
class _StoredSecret:
    """A secret and its versions, numbered from 1. A destroyed version has no payload."""

    secret: sm.Secret
    versions: list[bytes | None] = field(default_factory=list)


@dataclass(frozen=True)
class _Fault:
    """A fault for one call. Without a code the call succeeds."""

    is_executed: bool = True
    is_corrupted: bool = False
    code: grpc.StatusCode | None = None
    message: str = ""


class _RpcError(Exception):
    """The call is answered with this status."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class SecretManager:
    """The emulator; a context manager."""

    def __init__(self, *, port: int = 0) -> None:
        self._secrets: dict[str, _StoredSecret] = {}
        self._lock = threading.Lock()
        self._faults: dict[str, list[_Fault]] = {}
        self._server = grpc.server(ThreadPoolExecutor(8, "secret-manager"), options=[("grpc.so_reuseport", 0)])
        methods = {name: self._handler(name, request) for name, request in METHODS.items()}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
        self._port = self._server.add_insecure_port(f"127.0.0.1:{port}")

    # --- for tests ----------------------------------------------------------------------------------------

    @property
    def host(self) -> str:
        """`address:port`, for SECRET_MANAGER_EMULATOR_HOST."""
        return f"127.0.0.1:{self._port}"

    def secret_names(self) -> list[str]:
        """The names of the existing secrets."""
        with self._lock:
            return sorted(self._secrets)

    def ttl_s(self, name: str) -> float:
        """A secret's time to live, in seconds."""
        ttl: timedelta = self._secrets[name].secret.ttl  # pyright: ignore[reportAssignmentType]  # proto-plus returns Python's own type
        return ttl.total_seconds()

    def fail_next(self, method: str, code: grpc.StatusCode, message: str = "refused") -> None:
        """Answer the next call of a method with an error, without carrying it out."""
        self._inject_fault(method, _Fault(is_executed=False, code=code, message=message))

    def drop_next_response(self, method: str) -> None:
        """Carry out the next call of a method and lose its response."""
        self._inject_fault(method, _Fault(code=grpc.StatusCode.UNAVAILABLE, message="the response was lost"))

    def corrupt_next_response(self, method: str) -> None:
        """Change one byte of the payload in the next response of a method, but not its checksum."""
        self._inject_fault(method, _Fault(is_corrupted=True))

    def _inject_fault(self, method: str, fault: _Fault) -> None:
        with self._lock:
            self._faults.setdefault(method, []).append(fault)

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(grace=0).wait()

    # --- the service -------------------------------------------------------------------------------------------------

    def CreateSecret(self, request: sm.CreateSecretRequest) -> sm.Secret:  # noqa: N802  # named as in the API
        if not re.fullmatch(r"[\w-]{1,255}", request.secret_id):
            raise _RpcError(
                grpc.StatusCode.INVALID_ARGUMENT, f"The provided Secret ID [{request.secret_id}] does not match the expected format"
            )
        name = f"{request.parent}/secrets/{request.secret_id}"
        if name in self._secrets:
            raise _RpcError(grpc.StatusCode.ALREADY_EXISTS, f"Secret [{name}] already exists.")
        secret = sm.Secret(request.secret)
        secret.name = name
        self._secrets[name] = _StoredSecret(secret)
        return secret

    def AddSecretVersion(self, request: sm.AddSecretVersionRequest) -> sm.SecretVersion:  # noqa: N802
        secret, content = self._find_secret(request.parent), bytes(request.payload.data)
        if len(content) > MAX_PAYLOAD_BYTES:
            raise _RpcError(grpc.StatusCode.INVALID_ARGUMENT, "The payload is larger than 65536 bytes.")
        if request.payload.data_crc32c != google_crc32c.value(content):
            raise _RpcError(grpc.StatusCode.INVALID_ARGUMENT, "Data crc32c check failed")
        secret.versions.append(content)
        return self._version(request.parent, len(secret.versions))

    def AccessSecretVersion(self, request: sm.AccessSecretVersionRequest) -> sm.AccessSecretVersionResponse:  # noqa: N802
        number, content = self._find_payload(request.name)
        if content is None:
            raise _RpcError(grpc.StatusCode.FAILED_PRECONDITION, f"Secret Version [{request.name}] is in DESTROYED state.")
        payload = sm.SecretPayload(data=content, data_crc32c=google_crc32c.value(content))
        return sm.AccessSecretVersionResponse(name=self._version(_parent(request.name), number).name, payload=payload)

    def DestroySecretVersion(self, request: sm.DestroySecretVersionRequest) -> sm.SecretVersion:  # noqa: N802
        number, content = self._find_payload(request.name)
        if content is None:
            raise _RpcError(grpc.StatusCode.FAILED_PRECONDITION, f"Secret Version [{request.name}] is in DESTROYED state.")
        self._find_secret(_parent(request.name)).versions[number - 1] = None
        return self._version(_parent(request.name), number)

    def ListSecretVersions(self, request: sm.ListSecretVersionsRequest) -> sm.ListSecretVersionsResponse:  # noqa: N802
        """Newest first, all on one page. Supports only the filter by state."""
        states = {"": (ENABLED, DESTROYED), "state:ENABLED": (ENABLED,)}[request.filter]
        versions = [self._version(request.parent, number) for number in range(len(self._find_secret(request.parent).versions) - 1, 0, -1)]
        return sm.ListSecretVersionsResponse(versions=[version for version in versions if version.state in states])

    def GetSecret(self, request: sm.GetSecretRequest) -> sm.Secret:  # noqa: N802
        return self._find_secret(request.name).secret

    def DeleteSecret(self, request: sm.DeleteSecretRequest) -> empty_pb2.Empty:  # noqa: N802
        self._find_secret(request.name)
        del self._secrets[request.name]
        return empty_pb2.Empty()

    def ListSecrets(self, request: sm.ListSecretsRequest) -> sm.ListSecretsResponse:  # noqa: N802
        """Supports the filters `name:WORD` and `labels.NAME=VALUE`, joined with AND."""
        terms = [term for term in request.filter.split(" AND ") if term]
        names = [
            name
            for name in sorted(self._secrets)
            if name.startswith(request.parent) and all(self._matches_filter(name, term) for term in terms)
        ]
        first, size = int(request.page_token or 0), min(request.page_size or PAGE_SIZE, PAGE_SIZE)
        next_page = str(first + size) if first + size < len(names) else ""
        return sm.ListSecretsResponse(
            secrets=[self._secrets[name].secret for name in names[first : first + size]], next_page_token=next_page
        )

    # --- helpers -----------------------------------------------------------------------------------------------------

    def _matches_filter(self, name: str, term: str) -> bool:
        if term.startswith("name:"):
            return term.removeprefix("name:") in name
        label, _, value = term.removeprefix("labels.").partition("=")
        return self._secrets[name].secret.labels.get(label) == value

    def _find_secret(self, name: str) -> _StoredSecret:
        if name not in self._secrets:
            raise _RpcError(grpc.StatusCode.NOT_FOUND, f"Secret [{name}] not found.")
        return self._secrets[name]

    def _find_payload(self, name: str) -> tuple[int, bytes | None]:
        versions, version = self._find_secret(_parent(name)).versions, name.rpartition("/")[2]
        number = len(versions) - 1 if version == "latest" else int(version)
        if not 1 <= number <= len(versions):
            raise _RpcError(grpc.StatusCode.NOT_FOUND, f"Secret Version [{name}] not found or has no versions.")
        return number, versions[number - 1]

    def _version(self, parent: str, number: int) -> sm.SecretVersion:
        state = DESTROYED if self._find_secret(parent).versions[number - 1] is None else ENABLED
        return sm.SecretVersion(name=f"{parent}/versions/{number}", state=state)

    # Any: each method has its own request and response types.
    def _handler(self, method: str, request: Any) -> grpc.RpcMethodHandler:  # noqa: ANN401
        carry_out: Callable[[Any], Any] = getattr(self, method)

        def handle(message: Any, context: grpc.ServicerContext) -> bytes:  # noqa: ANN401
            content = b""
            try:
                with self._lock:
                    fault = self._faults[method].pop(0) if self._faults.get(method) else _Fault()
                    if fault.is_executed:
                        content = _serialize(_corrupt(carry_out(message)) if fault.is_corrupted else carry_out(message))
            except _RpcError as error:
                context.abort(error.code, str(error))
            if fault.code is not None:
                context.abort(fault.code, fault.message)
            return content

        return grpc.unary_unary_rpc_method_handler(handle, request_deserializer=request.deserialize, response_serializer=bytes)


METHODS = {
    "CreateSecret": sm.CreateSecretRequest,
    "AddSecretVersion": sm.AddSecretVersionRequest,
    "AccessSecretVersion": sm.AccessSecretVersionRequest,
    "DestroySecretVersion": sm.DestroySecretVersionRequest,
    "GetSecret": sm.GetSecretRequest,
    "ListSecretVersions": sm.ListSecretVersionsRequest,
    "DeleteSecret": sm.DeleteSecretRequest,
    "ListSecrets": sm.ListSecretsRequest,
}


def _parent(version: str) -> str:
    return version.rpartition("/versions/")[0]


def _corrupt(response: sm.AccessSecretVersionResponse) -> sm.AccessSecretVersionResponse:
    content = bytearray(response.payload.data)
    content[len(content) // 2] ^= 1
    response.payload.data = bytes(content)
    return response


def _serialize(message: Any) -> bytes:  # noqa: ANN401
    return message.SerializeToString() if isinstance(message, empty_pb2.Empty) else type(message).serialize(message)


def main() -> None:
    """Run until SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(
        prog="python -m infra.loopback.secret_manager", description="An emulator of Secret Manager that keeps its data in memory."
    )
    parser.add_argument("--port", type=int, default=0, help="0 takes a free port")
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    with SecretManager(port=parser.parse_args().port) as emulator:
        print(f"export SECRET_MANAGER_EMULATOR_HOST={emulator.host}", flush=True)
        signal.sigwait({signal.SIGINT, signal.SIGTERM})


if __name__ == "__main__":
    main()

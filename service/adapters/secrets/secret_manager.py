"""Secrets in Google Secret Manager: one secret per job, deleted when the job ends, with an expiry in case it is not.

A secret's payload is the JSON of all the job's secrets; the version with the highest number counts. Versions are read by number, which
is strongly consistent; the alias `latest` and lists may lag by minutes
(https://cloud.google.com/secret-manager/docs/reference/consistency). A job's secrets are written once, so a second version is rare.
"""

# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# The client library is generated, and loosely typed where it wraps protocol buffers.

import itertools
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import TypeVar

import google.auth
import google_crc32c
import grpc
from google.api_core import exceptions as google_errors
from google.api_core.exceptions import GoogleAPICallError
from google.api_core.retry import Retry, if_exception_type
from google.auth.exceptions import GoogleAuthError
from google.cloud import secretmanager_v1
from google.cloud.secretmanager_v1.services.secret_manager_service.transports import SecretManagerServiceGrpcTransport

from service.core.errors import TooLarge, Unavailable
from storage.deadline import deadline, remaining_s

PREFIX = "tunesmith-job-"
SECRET_TTL = timedelta(days=30)  # longer than any job takes
MAX_PAYLOAD_BYTES = 64 << 10  # Secret Manager's limit on a payload
CALL_TIMEOUT_S = 10.0
MAX_RECONNECT_BACKOFF_MS = 2000  # gRPC's default waits up to two minutes before it reconnects
LABELS = {"app": "tunesmith"}
RETRY_PREDICATE = if_exception_type(google_errors.ServiceUnavailable, google_errors.InternalServerError)
CLOUD_PLATFORM_SCOPE = "https://www.googleapis.com/auth/cloud-platform"

ReturnT = TypeVar("ReturnT")


class SecretManagerStore:
    """Secrets `tunesmith-job-<job_id>` of a project. `emulator_host` (host:port) replaces Google's API."""

    def __init__(self, *, project_id: str, emulator_host: str | None = None) -> None:
        self._project_id = project_id
        self._emulator_host = emulator_host
        self._lock = threading.Lock()
        self._cached_client: secretmanager_v1.SecretManagerServiceClient | None = None

    def put(self, job_id: str, secrets: Mapping[str, str]) -> None:
        content = json.dumps(dict(secrets)).encode()
        if len(content) > MAX_PAYLOAD_BYTES:
            raise TooLarge(f"the secrets of a job may take {MAX_PAYLOAD_BYTES} bytes in total; these take {len(content)}")
        self._create_secret(job_id)
        newest = self._add_version(job_id, content)
        for number in range(newest - 1, 0, -1):
            self._destroy_version(job_id, number)

    def read(self, job_id: str) -> dict[str, str]:
        newest: dict[str, str] = {}
        for number in itertools.count(1):
            version = self._access_version(job_id, number)
            if version is None:
                break
            newest = version
        return newest

    def destroy(self, job_id: str) -> bool:
        request = secretmanager_v1.DeleteSecretRequest(name=self._secret_name(job_id))
        try:
            self._call_with_retry(lambda timeout: self._client.delete_secret(request, retry=None, timeout=timeout), google_errors.NotFound)
        except google_errors.NotFound:
            return False
        return True

    def iter_job_ids(self) -> Iterator[str]:
        request = secretmanager_v1.ListSecretsRequest(parent=self._project, filter=f"name:{PREFIX} AND labels.app={LABELS['app']}")
        names = self._call_with_retry(
            lambda timeout: [secret.name for secret in self._client.list_secrets(request, retry=None, timeout=timeout)]
        )
        ids = (name.rpartition("/secrets/")[2] for name in names)
        return iter(sorted(name.removeprefix(PREFIX) for name in ids if name.startswith(PREFIX)))

    def close(self) -> None:
        """Close the connection."""
        with self._lock:
            if self._cached_client is not None:
                self._cached_client.transport.close()
            self._cached_client = None

    # --- calls -------------------------------------------------------------------------------------------------------

    def _create_secret(self, job_id: str) -> None:
        replication = secretmanager_v1.Replication(automatic=secretmanager_v1.Replication.Automatic())
        secret = secretmanager_v1.Secret(replication=replication, labels=LABELS, ttl=SECRET_TTL)
        request = secretmanager_v1.CreateSecretRequest(parent=self._project, secret_id=PREFIX + job_id, secret=secret)
        with suppress(google_errors.AlreadyExists):
            self._call_with_retry(
                lambda timeout: self._client.create_secret(request, retry=None, timeout=timeout), google_errors.AlreadyExists
            )

    def _add_version(self, job_id: str, content: bytes) -> int:
        """Write the next version; returns its number. Not retried: after a lost answer a retry would add a second version."""
        payload = secretmanager_v1.SecretPayload(data=content, data_crc32c=google_crc32c.value(content))
        request = secretmanager_v1.AddSecretVersionRequest(parent=self._secret_name(job_id), payload=payload)
        added = self._call_once(lambda: self._client.add_secret_version(request, retry=None, timeout=remaining_s(CALL_TIMEOUT_S)))
        return int(added.name.rpartition("/")[2])

    def _access_version(self, job_id: str, number: int) -> dict[str, str] | None:
        """The secrets in a version; empty for one that was destroyed or disabled, None when there is no such version."""
        request = secretmanager_v1.AccessSecretVersionRequest(name=self._version_name(job_id, number))
        expected = google_errors.NotFound, google_errors.FailedPrecondition
        try:
            version = self._call_with_retry(
                lambda timeout: self._client.access_secret_version(request, retry=None, timeout=timeout), *expected
            )
        except google_errors.NotFound:
            return None
        except google_errors.FailedPrecondition:
            return {}
        content = bytes(version.payload.data)
        if google_crc32c.value(content) != version.payload.data_crc32c:
            raise Unavailable(f"the secrets of {job_id} arrived damaged; try again")
        return json.loads(content)

    def _destroy_version(self, job_id: str, number: int) -> None:
        """Make a version unreadable. Harmless when it is unreadable already."""
        request = secretmanager_v1.DestroySecretVersionRequest(name=self._version_name(job_id, number))
        expected = google_errors.NotFound, google_errors.FailedPrecondition
        with suppress(*expected):
            self._call_with_retry(lambda timeout: self._client.destroy_secret_version(request, retry=None, timeout=timeout), *expected)

    # --- the client --------------------------------------------------------------------------------------------------

    @property
    def _project(self) -> str:
        return f"projects/{self._project_id}"

    def _secret_name(self, job_id: str) -> str:
        return f"{self._project}/secrets/{PREFIX}{job_id}"

    def _version_name(self, job_id: str, number: int) -> str:
        return f"{self._secret_name(job_id)}/versions/{number}"

    @property
    def _client(self) -> secretmanager_v1.SecretManagerServiceClient:
        with self._lock:
            if self._cached_client is None:
                transport = SecretManagerServiceGrpcTransport(channel=_create_channel(self._emulator_host))
                self._cached_client = secretmanager_v1.SecretManagerServiceClient(transport=transport)
            return self._cached_client

    def _call_with_retry(self, call: Callable[[float], ReturnT], *expected: type[GoogleAPICallError]) -> ReturnT:
        """Make a call that may be repeated. `call` gets its timeout in seconds.

        The deadline covers all tries together. The library's own does not: a try in its last second gets the full timeout again.
        """
        with deadline(CALL_TIMEOUT_S):
            retry = Retry(predicate=RETRY_PREDICATE, initial=0.1, maximum=2.0, timeout=remaining_s(CALL_TIMEOUT_S))
            return self._call_once(retry(lambda: call(remaining_s(CALL_TIMEOUT_S))), *expected)

    def _call_once(self, call: Callable[[], ReturnT], *expected: type[GoogleAPICallError]) -> ReturnT:
        """Make a call; raises Google's errors as Unavailable, except for the expected ones."""
        try:
            return call()
        except expected:
            raise
        except (GoogleAPICallError, google_errors.RetryError) as error:
            raise self._translate_error(error) from error
        except GoogleAuthError as error:
            hint = "on Cloud Run they come from the service account; elsewhere, run: gcloud auth application-default login"
            raise Unavailable("there are no Google credentials for Secret Manager", hint=hint) from error

    def _translate_error(self, error: GoogleAPICallError | google_errors.RetryError) -> Unavailable:
        project = self._project_id
        match error:
            case google_errors.PermissionDenied() if "SERVICE_DISABLED" in str(error) or "has not been used in project" in str(error):
                hint = f"gcloud services enable secretmanager.googleapis.com --project={project}"
                return Unavailable(f"the Secret Manager API is not enabled in project {project}", hint=hint)
            case google_errors.PermissionDenied():
                # Terraform's own roles are narrower than any of Google's: infra/terraform/identities.tf.
                hint = f"make deploy PROJECT_ID={project} grants tunesmith-api its roles tunesmithSecretMaker and tunesmithSecretKeeper"
                return Unavailable(f"the service may not store secrets in project {project}: it lacks its Secret Manager roles", hint=hint)
            case google_errors.TooManyRequests():
                hint = f"https://console.cloud.google.com/iam-admin/quotas?service=secretmanager.googleapis.com&project={project}"
                return Unavailable("a quota of Secret Manager is used up; try again in a minute", hint=hint)
            case google_errors.NotFound():
                message = f"Secret Manager does not find the secret: it was destroyed just now, or there is no project {project}"
                return Unavailable(message, hint=f"gcloud projects describe {project}")
            case google_errors.ClientError() if not isinstance(error, google_errors.Cancelled):
                return Unavailable(f"Secret Manager refused the request: {type(error).__name__}")  # the error's text may quote a secret
            case _:
                return Unavailable(f"Secret Manager did not answer in time ({type(error).__name__})")


def _create_channel(emulator_host: str | None) -> grpc.Channel:
    options = [("grpc.max_reconnect_backoff_ms", MAX_RECONNECT_BACKOFF_MS)]
    if emulator_host:
        return grpc.insecure_channel(emulator_host, options=options)
    credentials, _ = google.auth.default(scopes=[CLOUD_PLATFORM_SCOPE])
    return SecretManagerServiceGrpcTransport.create_channel(credentials=credentials, options=options)

"""Objects in a Google Cloud Storage bucket: `gs://bucket` or `gs://bucket/folder`.

Google's libraries find credentials in the environment: the service account on Google Cloud, `gcloud auth application-default login`
on a laptop, none where STORAGE_EMULATOR_HOST names an emulator. A bucket with versioning or soft delete keeps deleted and replaced
objects until its lifecycle removes them.
"""

# The library has few types; its answers get theirs where they are read. Its private session is the only place to set timeouts.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingTypeStubs=false, reportPrivateUsage=false

import base64
import hashlib
import re
import threading
import uuid
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import requests
from google.api_core import exceptions as google_errors
from google.api_core.retry import Retry
from google.auth.credentials import AnonymousCredentials
from google.auth.exceptions import GoogleAuthError
from google.cloud.storage import Blob, Bucket, Client
from google.cloud.storage.exceptions import DataCorruption
from google.cloud.storage.retry import DEFAULT_RETRY
from google.oauth2.credentials import Credentials
from requests.adapters import HTTPAdapter

from storage import ChecksumMismatch, NoSuchObject, ObjectExists, StorageError, StoredObject, StoreUnavailable, TokenSource
from storage.deadline import remaining_s
from storage.remote import (
    CONNECT_TIMEOUT_S,
    INITIAL_BACKOFF_S,
    MAX_BACKOFF_S,
    MAX_RETRY_S,
    PART_BYTES,
    READ_TIMEOUT_S,
    BucketLocation,
    StoredDigest,
    check_sha256,
    checked_stream,
    retry_on_checksum_mismatch,
    save_to_file,
)

MAX_SINGLE_REQUEST_BYTES = 8 << 20  # the library's limit for an upload in one request
PAGE_SIZE = 1000
MAX_CONNECTIONS = 32  # of one client; further threads wait
WRITE_ID_KEY = "tunesmith-write"  # metadata that identifies the write, to tell a lost answer from another writer
CONTENT_TYPE = "application/octet-stream"


class GcsStore:
    """A bucket, or a folder of it. Every upload declares its CRC32C, so the server rejects damaged bytes."""

    def __init__(self, url: str, *, page_size: int = PAGE_SIZE, get_token: TokenSource | None = None, anonymous: bool = False) -> None:
        """Without `get_token` and not `anonymous`, Google's libraries find the credentials of the machine."""
        self._location = BucketLocation.parse(url, "gs")
        self.url = self._location.url
        self._page_size = page_size
        self._get_token = get_token
        self._anonymous = anonymous
        self._lock = threading.Lock()
        self._client: Client | None = None
        self._bucket_confirmed = False

    def write(self, key: str, content: bytes, *, if_absent: bool = False) -> StoredObject:
        return retry_on_checksum_mismatch(lambda: self._write(key, content, if_absent))

    def read(self, key: str) -> bytes:
        blob = self.blob(key)

        def read_all() -> bytes:
            with self._translate_errors(key):
                return bytes(blob.download_as_bytes(raw_download=True, checksum="crc32c", retry=_retry_policy()))

        return retry_on_checksum_mismatch(read_all)

    def open_read(self, key: str) -> AbstractContextManager[BinaryIO]:
        blob = self._get_blob(key)
        pinned = self._bucket().blob(blob.name, generation=blob.generation)  # all ranges come from one version of the object

        def fetch(start: int, end: int) -> bytes:
            try:
                with self._translate_errors(key):
                    content = pinned.download_as_bytes(
                        start=start,
                        end=end - 1,
                        raw_download=True,
                        checksum=None,  # pyright: ignore[reportArgumentType]  # the server knows only the checksum of the whole, which checked_stream verifies
                        retry=_retry_policy(),
                    )
            except NoSuchObject as error:
                raise ChecksumMismatch(f"{self.url}/{key} was replaced or deleted while it was read") from error
            return bytes(content)

        expected_digest = StoredDigest(google_crc32c.Checksum, base64.b64decode(blob.crc32c)) if blob.crc32c else None
        return checked_stream(int(blob.size or 0), fetch, expected_digest, f"{self.url}/{key}")

    def read_range(self, key: str, start: int, end: int) -> bytes:
        if end <= start:
            return b""
        with self._translate_errors(key):
            try:
                content = self.blob(key).download_as_bytes(
                    start=start,
                    end=end - 1,
                    raw_download=True,
                    checksum=None,  # pyright: ignore[reportArgumentType]  # the server knows only the checksum of the whole
                    retry=_retry_policy(),
                )
            except google_errors.RequestRangeNotSatisfiable:
                return b""
        return bytes(content)

    def upload(self, source: Path, key: str, *, sha256: str | None = None) -> StoredObject:
        if source.stat().st_size <= MAX_SINGLE_REQUEST_BYTES:
            content = source.read_bytes()
            check_sha256(source, sha256, hashlib.sha256(content).hexdigest(), f"{self.url}/{key}")
            return self.write(key, content)
        checksums = _compute_checksums(source)
        check_sha256(source, sha256, checksums.sha256, f"{self.url}/{key}")
        return retry_on_checksum_mismatch(lambda: self._upload(source, key, checksums))

    def download(self, key: str, target: Path) -> Path:
        return save_to_file(lambda: self.open_read(key), target)

    def stat(self, key: str) -> StoredObject | None:
        try:
            return _stored_object(self._get_blob(key), key)
        except NoSuchObject:
            return None

    def iter_objects(self, prefix: str) -> Iterator[StoredObject]:
        with self._translate_errors(prefix):
            listing = self._get_client().list_blobs(
                self._location.bucket,
                prefix=self._location.folder + prefix,
                page_size=self._page_size,
                fields="items(name,size,generation),nextPageToken",
                retry=_retry_policy(),
            )
            for blob in listing:
                key = self._location.key_from_object_name(str(blob.name))
                if key is not None:
                    yield _stored_object(blob, key)

    def delete(self, key: str) -> bool:
        try:
            with self._translate_errors(key):
                self.blob(key).delete(retry=_retry_policy())
        except NoSuchObject:
            return False
        return True

    def blob(self, key: str) -> Blob:
        """The library's object for a key, which the URL signer needs. Only this store has it."""
        return self._bucket().blob(self._location.object_name(key))

    def close(self) -> None:
        """Close the connections."""
        with self._lock:
            if self._client is not None:
                self._client.close()
                self._client = None

    def _get_client(self) -> Client:
        with self._lock:
            if self._client is None:
                self._client = _new_client(self.url, self._get_token, anonymous=self._anonymous)
            return self._client

    def _bucket(self) -> Bucket:
        return self._get_client().bucket(self._location.bucket)

    def _new_blob(self, key: str) -> Blob:
        blob = self.blob(key)
        blob.metadata = {WRITE_ID_KEY: uuid.uuid4().hex}
        return blob

    def _get_blob(self, key: str) -> Blob:
        blob = self.blob(key)
        with self._translate_errors(key):
            blob.reload(retry=_retry_policy())
        return blob

    def _write(self, key: str, content: bytes, if_absent: bool) -> StoredObject:
        blob, crc32c = self._new_blob(key), _crc32c(content)
        blob.crc32c = crc32c
        with self._translate_errors(key):
            try:
                blob.upload_from_string(
                    content, CONTENT_TYPE, if_generation_match=0 if if_absent else None, checksum="crc32c", retry=_retry_policy()
                )
            except google_errors.PreconditionFailed as error:
                if not self._is_own_write(blob):
                    raise ObjectExists(f"{self.url}/{key} already exists") from error
        return self._verify_upload(blob, key, crc32c)

    def _upload(self, source: Path, key: str, checksums: "_Checksums") -> StoredObject:
        """Upload in parts, each repeated until the server accepts it. The server verifies the checksum of the whole, sent first."""
        blob = self._new_blob(key)
        blob.chunk_size = PART_BYTES
        with self._translate_errors(key), source.open("rb") as stream:
            try:
                blob.upload_from_file(
                    stream,
                    size=checksums.size_bytes,
                    content_type=CONTENT_TYPE,
                    checksum="crc32c",
                    crc32c_checksum_value=checksums.crc32c,
                    retry=_retry_policy(),
                )
            except google_errors.ClientError as error:
                if error.code not in (404, 410):
                    raise
                # The upload session is over: its last answer was lost, or the server discarded it.
                self._raise_if_bucket_missing(error)
                if not self._is_own_write(blob):
                    raise StoreUnavailable(f"the upload of {key} to {self.url} was ended by the store; start it again") from error
        return self._verify_upload(blob, key, checksums.crc32c)

    def _is_own_write(self, blob: Blob) -> bool:
        """Whether the stored object comes from this write, whose answer was lost. If so, reloads `blob`."""
        stored = self._bucket().blob(blob.name)
        try:
            stored.reload(retry=_retry_policy())
        except google_errors.NotFound:
            return False
        if _metadata(stored).get(WRITE_ID_KEY) != _metadata(blob).get(WRITE_ID_KEY):
            return False
        blob.reload(retry=_retry_policy())
        return True

    def _verify_upload(self, blob: Blob, key: str, crc32c: str) -> StoredObject:
        """The stored object's metadata. Deletes an object whose checksum is wrong: not every server verifies what was declared."""
        if blob.crc32c != crc32c:
            with self._translate_errors(key):
                blob.delete(if_generation_match=blob.generation, retry=_retry_policy())
            raise ChecksumMismatch(f"{key} arrived damaged at {self.url}: CRC32C {blob.crc32c}, sent {crc32c}")
        self._bucket_confirmed = True
        return _stored_object(blob, key)

    @contextmanager
    def _translate_errors(self, key: str) -> Generator[None]:
        """Raise errors of the library as errors of the store."""
        try:
            yield
        except google_errors.NotFound as error:
            self._raise_if_bucket_missing(error)
            raise NoSuchObject(f"nothing is stored at {self.url}/{key}") from error
        except DataCorruption as error:
            raise ChecksumMismatch(f"{self.url}/{key} and its checksum differ: it was damaged in transit") from error
        except (google_errors.GoogleAPIError, GoogleAuthError, requests.RequestException, OSError) as error:
            if isinstance(error, OSError) and not isinstance(error, (requests.RequestException, ConnectionError)):
                raise  # an error of a local file
            raise _translate_error(error, self._location) from error

    def _raise_if_bucket_missing(self, error: google_errors.ClientError) -> None:
        """Raises StoreUnavailable when the bucket does not exist. Google's message says so; emulators need another request."""
        if "bucket does not exist" not in str(error) and (self._bucket_confirmed or self._bucket_exists()):
            return
        raise StoreUnavailable(
            f"bucket {self._location.bucket} does not exist; create it: gcloud storage buckets create gs://{self._location.bucket}"
            " --location=REGION --uniform-bucket-level-access --public-access-prevention (`make deploy` creates all of them)"
        ) from error

    def _bucket_exists(self) -> bool:
        try:
            list(self._get_client().list_blobs(self._location.bucket, max_results=1, fields="items(name)", retry=_retry_policy()))
        except google_errors.NotFound:
            return False
        except google_errors.Forbidden:
            return True  # narrow credentials may not list all of the bucket
        except (google_errors.GoogleAPIError, GoogleAuthError, requests.RequestException) as error:
            raise _translate_error(error, self._location) from error
        self._bucket_confirmed = True
        return True


@dataclass(frozen=True)
class _Checksums:
    """Size and checksums of a file."""

    size_bytes: int
    sha256: str
    crc32c: str


def create_deadline_session() -> requests.Session:
    """An HTTP session for Google's libraries in which no try outlasts the caller's deadline."""
    return _mount_deadline_adapter(requests.Session())


class _DeadlineAdapter(HTTPAdapter):
    """Bounds every try by the caller's deadline: the library computes one timeout for all tries."""

    def send(self, *args: Any, **kwargs: Any) -> requests.Response:  # noqa: ANN401  # the parent's signature
        response = super().send(*args, **{**kwargs, "timeout": (remaining_s(CONNECT_TIMEOUT_S), remaining_s(READ_TIMEOUT_S))})
        if not response.ok:
            _ = response.content  # the library does not read error responses of downloads, which leaves their connections open
        return response


def _new_client(url: str, get_token: TokenSource | None, *, anonymous: bool) -> Client:
    chosen = AnonymousCredentials() if anonymous else _make_credentials(get_token) if get_token else None
    try:
        client = Client(project=None, credentials=chosen)  # none of the calls here needs a project
    except GoogleAuthError as error:
        raise StoreUnavailable(f"no Google credentials for {url}; run: gcloud auth application-default login") from error
    # The library would fetch the bucket in a thread, for traces, with a permission that nothing else here needs.
    client._bucket_metadata_cache = None  # pyright: ignore[reportAttributeAccessIssue]  # the library checks for None
    for session in (client._http, client._http._auth_request_session):
        assert session is not None  # None only for clients constructed with a session
        _mount_deadline_adapter(session)
    return client


def _make_credentials(get_token: TokenSource) -> Credentials:
    """Credentials whose token is fetched at the first request and again before it expires."""

    def fetch(request: object, scopes: object) -> tuple[str, datetime]:  # noqa: ARG001  # the library's signature
        token, expires_at = get_token()
        return token, expires_at.astimezone(UTC).replace(tzinfo=None)  # the library compares naive times in UTC

    return Credentials(token=None, refresh_handler=fetch)


def _mount_deadline_adapter(session: requests.Session) -> requests.Session:
    for scheme in ("https://", "http://"):
        session.mount(scheme, _DeadlineAdapter(pool_maxsize=MAX_CONNECTIONS))
    return session


def _retry_policy() -> Retry:
    """Retries until the caller's deadline; the library retries for two minutes by default. In an upload in parts, it covers each part."""
    return DEFAULT_RETRY.with_timeout(remaining_s(MAX_RETRY_S)).with_delay(INITIAL_BACKOFF_S, MAX_BACKOFF_S, 2)


def _stored_object(blob: Blob, key: str) -> StoredObject:
    return StoredObject(key=key, size_bytes=int(blob.size or 0), generation=str(blob.generation))


def _metadata(blob: Blob) -> dict[str, str]:
    return dict(blob.metadata or {})


def _crc32c(content: bytes) -> str:
    return base64.b64encode(google_crc32c.Checksum(content).digest()).decode()


def _compute_checksums(source: Path) -> _Checksums:
    size_bytes, sha256, crc32c = 0, hashlib.sha256(), google_crc32c.Checksum()
    with source.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            size_bytes += len(chunk)
            sha256.update(chunk)
            crc32c.update(chunk)
    return _Checksums(size_bytes, sha256.hexdigest(), base64.b64encode(crc32c.digest()).decode())


def _translate_error(error: Exception, location: BucketLocation) -> StorageError:
    """The store's error for one of the library's, with what the operator can do."""
    match error:
        case google_errors.RetryError(cause=Exception() as cause):
            return _translate_error(cause, location)
        case google_errors.Forbidden():
            return StoreUnavailable(_missing_role(str(error), location))
        case google_errors.BadRequest() if "crc32c" in str(error).lower():
            return ChecksumMismatch(f"the store refused an object for {location.url}: it arrived damaged")
        case google_errors.Unauthorized() | GoogleAuthError():
            command = "run: gcloud auth application-default login, or give the process a service account"
            return StoreUnavailable(f"Google refused the credentials for {location.url} ({_first_line(error)}); {command}")
        case google_errors.GoogleAPICallError():
            return StoreUnavailable(f"Cloud Storage answers {error.code} for {location.url}: {_first_line(error)}")
        case _:
            return StoreUnavailable(f"Cloud Storage gave no usable answer in time for {location.url} ({type(error).__name__})")


def _missing_role(message: str, location: BucketLocation) -> str:
    """The message for a refused account, which Google's own message names."""
    match = re.search(r"([\w.+-]+@[\w.-]+\w) does not have (\S+)", message)
    account, permission = match.groups() if match else ("ACCOUNT", "access")
    member = f"serviceAccount:{account}" if account.endswith("gserviceaccount.com") or not match else f"user:{account}"
    return (
        f"{account} does not have {permission} to gs://{location.bucket}; it needs roles/storage.objectUser on the bucket: gcloud storage"
        f" buckets add-iam-policy-binding gs://{location.bucket} --member={member} --role=roles/storage.objectUser"
    )


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:300]

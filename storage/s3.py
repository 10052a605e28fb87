"""Objects in an S3 bucket, of AWS, Cloudflare R2, MinIO or another: `s3://bucket` or `s3://bucket/folder`.

boto3 finds endpoint, region and credentials: AWS_ENDPOINT_URL_S3, AWS_REGION, AWS_ACCESS_KEY_ID, a profile, the machine's role. R2
accepts the region `auto`, or none. A bucket with versioning keeps deleted and replaced objects.
"""

# boto3 creates its clients at run time and has no types; its answers get theirs where they are read.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false, reportMissingTypeStubs=false

import functools
import hashlib
import io
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import boto3
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
    ResponseStreamingError,
)

from storage import ChecksumMismatch, NoSuchObject, ObjectExists, StorageError, StoredObject, StoreUnavailable
from storage.deadline import remaining_s
from storage.remote import (
    CONNECT_TIMEOUT_S,
    MAX_RETRY_S,
    PART_BYTES,
    READ_TIMEOUT_S,
    BucketLocation,
    StoredDigest,
    TransientStoreError,
    check_sha256,
    checked_stream,
    retry_on_checksum_mismatch,
    retry_transient,
    save_to_file,
)

PAGE_SIZE = 1000  # S3's maximum
MAX_PARTS = 10_000  # S3's limit for one upload
MAX_CONNECTIONS = 32
# boto3 fixes a client's timeouts when it creates it, so there is one client for each of these; longest first.
READ_TIMEOUTS_S = (READ_TIMEOUT_S, 10.0, 1.8, 0.9, 0.3)
WRITE_ID_KEY = "tunesmith-write"  # metadata that identifies the write, to tell a lost answer from another writer
SHA256_KEY = "tunesmith-sha256"
CONTENT_TYPE = "application/octet-stream"
NOT_FOUND_CODES = ("404", "NoSuchKey", "NotFound")
BUSY_CODES = ("RequestTimeout", "Throttling", "OperationAborted")
CHECKSUM_ERROR_CODES = ("BadDigest", "XAmzContentSHA256Mismatch", "InvalidDigest")

_CLIENT_LOCK = threading.Lock()  # a session must create one client at a time

ReturnT = TypeVar("ReturnT")


@dataclass(frozen=True)
class S3Login:
    """With whose keys a bucket is used, and where it is, instead of what the environment says. Without keys, requests are not signed."""

    access_key_id: str | None = None
    secret_access_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)
    endpoint_url: str | None = None  # None: Amazon's
    region: str | None = None


class S3Store:
    """A bucket, or a folder of it. Each request's signature covers the SHA-256 of its body, so the server rejects damaged bytes."""

    def __init__(self, url: str, *, page_size: int = PAGE_SIZE, login: S3Login | None = None) -> None:
        """Without `login`, boto3 finds the credentials and the endpoint of the machine."""
        self._login = login
        self._location = BucketLocation.parse(url, "s3")
        self.url = self._location.url
        self._page_size = page_size
        self._lock = threading.Lock()
        self._clients: dict[float, Any] = {}  # by read timeout. Any: boto3's clients have no type
        self._bucket_confirmed = False

    def write(self, key: str, content: bytes, *, if_absent: bool = False) -> StoredObject:
        metadata = _metadata(hashlib.sha256(content).hexdigest())
        condition = {"IfNoneMatch": "*"} if if_absent else {}
        params = {**self._object_params(key), "Body": content, "ContentType": CONTENT_TYPE, "Metadata": metadata, **condition}
        try:
            response = retry_on_checksum_mismatch(lambda: self._call(key, lambda s3: s3.put_object(**params)))
        except ObjectExists:
            head = self._head(key)
            if head is None or head["Metadata"].get(WRITE_ID_KEY) != metadata[WRITE_ID_KEY]:
                raise
            return _stored_object(key, head["ContentLength"], head["ETag"])
        return _stored_object(key, len(content), response["ETag"])

    def read(self, key: str) -> bytes:
        def read_all() -> bytes:
            with self.open_read(key) as stream:
                return stream.read()

        return retry_on_checksum_mismatch(read_all)

    def open_read(self, key: str) -> AbstractContextManager[BinaryIO]:
        head = self._head(key)
        if head is None:
            raise NoSuchObject(f"nothing is stored at {self.url}/{key}")

        def fetch(start: int, end: int) -> bytes:
            params = {**self._object_params(key), "Range": f"bytes={start}-{end - 1}", "IfMatch": head["ETag"]}
            try:
                return self._call(key, lambda s3: s3.get_object(**params)["Body"].read())
            except (ObjectExists, NoSuchObject) as error:  # all ranges must come from one version of the object
                raise ChecksumMismatch(f"{self.url}/{key} was replaced or deleted while it was read") from error

        return checked_stream(int(head["ContentLength"]), fetch, _stored_digest(head), f"{self.url}/{key}")

    def read_range(self, key: str, start: int, end: int) -> bytes:
        if end <= start:
            return b""
        params = {**self._object_params(key), "Range": f"bytes={start}-{end - 1}"}
        try:
            return self._call(key, lambda s3: s3.get_object(**params)["Body"].read())
        except _RangeBeyondEnd:
            return b""

    def upload(self, source: Path, key: str, *, sha256: str | None = None) -> StoredObject:
        if source.stat().st_size <= PART_BYTES:
            content = source.read_bytes()
            check_sha256(source, sha256, hashlib.sha256(content).hexdigest(), f"{self.url}/{key}")
            return self.write(key, content)
        with source.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        check_sha256(source, sha256, digest, f"{self.url}/{key}")
        metadata = _metadata(digest)
        created = self._call(
            key, lambda s3: s3.create_multipart_upload(**self._object_params(key), ContentType=CONTENT_TYPE, Metadata=metadata)
        )
        upload = {**self._object_params(key), "UploadId": created["UploadId"]}
        try:
            return self._send_parts(source, key, upload, metadata)
        except BaseException:
            self._abort(upload)
            raise

    def download(self, key: str, target: Path) -> Path:
        return save_to_file(lambda: self.open_read(key), target)

    def stat(self, key: str) -> StoredObject | None:
        head = self._head(key)
        return None if head is None else _stored_object(key, head["ContentLength"], head["ETag"])

    def iter_objects(self, prefix: str) -> Iterator[StoredObject]:
        continuation: dict[str, str] = {}
        while True:
            page = self._list_page(prefix, self._page_size, continuation)
            for entry in page.get("Contents", ()):
                key = self._location.key_from_object_name(entry["Key"])
                if key is not None:
                    yield _stored_object(key, entry["Size"], entry["ETag"])
            if not page.get("IsTruncated"):
                return
            continuation = {"ContinuationToken": page["NextContinuationToken"]}

    def delete(self, key: str) -> bool:
        existed = self._head(key) is not None  # S3 gives the same answer whether there was an object or not
        if existed:
            self._call(key, lambda s3: s3.delete_object(**self._object_params(key)))
        return existed

    def presign_url(self, key: str, disposition: str, expires_s: int) -> str:
        """A link for reading an object, created without a request. Only this store has it."""
        params = {**self._object_params(key), "ResponseContentDisposition": disposition}
        return self._call(key, lambda s3: s3.generate_presigned_url("get_object", Params=params, ExpiresIn=expires_s))

    def presign_upload(self, key: str, size_bytes: int, expires_s: int) -> str:
        """A link for writing an object of exactly that size, created without a request. Only this store has it."""
        params = {**self._object_params(key), "ContentLength": size_bytes}
        return self._call(key, lambda s3: s3.generate_presigned_url("put_object", Params=params, ExpiresIn=expires_s))

    def close(self) -> None:
        """Close the connections."""
        with self._lock:
            for client in self._clients.values():
                client.close()
            self._clients.clear()

    def _object_params(self, key: str) -> dict[str, str]:
        return {"Bucket": self._location.bucket, "Key": self._location.object_name(key)}

    # Any: boto3 answers with untyped dicts.
    def _head(self, key: str) -> dict[str, Any] | None:
        try:
            return self._call(key, lambda s3: s3.head_object(**self._object_params(key)))
        except NoSuchObject:
            return None

    def _list_page(self, prefix: str, max_keys: int, continuation: dict[str, str]) -> dict[str, Any]:
        params = {"Bucket": self._location.bucket, "Prefix": self._location.folder + prefix, "MaxKeys": max_keys}
        return self._call(prefix, lambda s3: s3.list_objects_v2(**params, **continuation))

    def _send_parts(self, source: Path, key: str, upload: dict[str, str], metadata: dict[str, str]) -> StoredObject:
        """Upload in parts. Raises ChecksumMismatch, before anything is visible, when the file changed since its digest was computed."""
        size_bytes = source.stat().st_size
        part_bytes = max(PART_BYTES, -(-size_bytes // MAX_PARTS))  # all of one size: R2 requires it
        digest, etags = hashlib.sha256(), list[str]()
        with source.open("rb") as stream:
            while part := stream.read(part_bytes):
                digest.update(part)
                etags.append(self._send_part(key, upload, len(etags) + 1, part))
        check_sha256(source, metadata[SHA256_KEY], digest.hexdigest(), f"{self.url}/{key}")
        parts = [{"PartNumber": number, "ETag": etag} for number, etag in enumerate(etags, 1)]
        try:
            completed = self._call(key, lambda s3: s3.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts}))
        except NoSuchObject:  # the upload is over: the answer to its completion was lost, or another process aborted it
            head = self._head(key)
            if head is None or head["Metadata"].get(WRITE_ID_KEY) != metadata[WRITE_ID_KEY]:
                raise StoreUnavailable(f"the upload of {key} to {self.url} was ended by the store; start it again") from None
            return _stored_object(key, head["ContentLength"], head["ETag"])
        return _stored_object(key, size_bytes, completed["ETag"])

    def _send_part(self, key: str, upload: dict[str, str], number: int, part: bytes) -> str:
        # A stream is sent in small blocks, each with its own timeout; a bytes object would have to be sent within one timeout.
        params = {**upload, "PartNumber": number}
        return retry_on_checksum_mismatch(lambda: self._call(key, lambda s3: s3.upload_part(**params, Body=io.BytesIO(part))))["ETag"]

    def _abort(self, upload: dict[str, str]) -> None:
        """Delete the parts of an upload that will not be completed: they would cost money."""
        with suppress(ClientError, BotoCoreError, StorageError):  # the caller raises the error that came first
            self._client().abort_multipart_upload(**upload)

    def _call(self, key: str, function: Callable[[Any], ReturnT]) -> ReturnT:
        """Call boto3, retrying transient errors; raises errors of the store."""

        def call_once() -> ReturnT:
            try:
                response = function(self._client())
            except ClientError as error:
                raise self._translate_error(error, key) from error
            except (BotoCoreError, HTTPClientError, OSError) as error:
                raise _connection_error(error, self._location) from error
            self._bucket_confirmed = True
            return response

        return retry_transient(call_once)

    def _client(self) -> Any:  # noqa: ANN401  # boto3's clients have no type
        read_timeout_s = _choose_read_timeout_s(remaining_s(MAX_RETRY_S))
        with self._lock:
            if read_timeout_s not in self._clients:
                self._clients[read_timeout_s] = _new_client(self.url, read_timeout_s, self._login)
            return self._clients[read_timeout_s]

    def _translate_error(self, error: ClientError, key: str) -> StorageError:
        """The store's error for one of boto3's, with what the operator can do."""
        code, status = str(error.response["Error"].get("Code")), int(error.response["ResponseMetadata"].get("HTTPStatusCode", 0))
        bucket = self._location.bucket
        if code == "NoSuchBucket" or (code in NOT_FOUND_CODES and not self._bucket_confirmed and key and not self._bucket_exists()):
            return StoreUnavailable(
                f"bucket {bucket} does not exist; create it: aws s3 mb s3://{bucket} (or at the provider of the endpoint)"
            )
        if code in NOT_FOUND_CODES or code == "NoSuchUpload":
            return NoSuchObject(f"nothing is stored at {self.url}/{key}")
        if status == 416:
            return _RangeBeyondEnd(f"{self.url}/{key} has no bytes there")
        if status == 412:
            return ObjectExists(f"{self.url}/{key} already exists")
        if status in (401, 403):
            permissions = "s3:GetObject, s3:PutObject, s3:DeleteObject on its objects and s3:ListBucket on the bucket"
            return StoreUnavailable(f"the credentials may not use {self.url} ({code}); they need {permissions}")
        if code in CHECKSUM_ERROR_CODES:
            return ChecksumMismatch(f"the store refused {key} for {self.url}: it arrived damaged ({code})")
        if status >= 500 or status in (408, 409, 429) or code in BUSY_CODES:
            return TransientStoreError(f"the store of {self.url} answers {status} {code}")
        return StoreUnavailable(f"the store of {self.url} answers {status} {code}: {error.response['Error'].get('Message')}")

    def _bucket_exists(self) -> bool:
        """One extra request: the answer to HEAD has no body that tells a missing bucket from a missing object."""
        try:
            self._client().list_objects_v2(Bucket=self._location.bucket, MaxKeys=1)
        except ClientError as error:
            return error.response["Error"].get("Code") != "NoSuchBucket"
        except BotoCoreError as error:
            raise _connection_error(error, self._location) from error
        self._bucket_confirmed = True
        return True


def _new_client(url: str, read_timeout_s: float, login: S3Login | None) -> Any:  # noqa: ANN401
    """A boto3 client. Uses path-style addresses except for AWS: other providers may have no host name for each bucket."""
    with _CLIENT_LOCK:
        try:
            if login is not None:
                return _new_login_client(login, read_timeout_s)
            client = _session().client("s3", config=_config("auto", read_timeout_s))
            if client.meta.endpoint_url.endswith((".amazonaws.com", ".amazonaws.com.cn")):
                return client
            client.close()
            return _session().client("s3", config=_config("path", read_timeout_s))
        except (BotoCoreError, ValueError) as error:
            raise StoreUnavailable(f"the environment has no usable S3 settings for {url}: {error}") from error


def _new_login_client(login: S3Login, read_timeout_s: float) -> Any:  # noqa: ANN401
    """A client that uses nothing of the environment: not its keys, its profile, its endpoint or its region."""
    own = Config(ignore_configured_endpoint_urls=True, **({} if login.access_key_id else {"signature_version": UNSIGNED}))
    return _session().client(
        "s3",
        config=_config("path" if login.endpoint_url else "auto", read_timeout_s).merge(own),
        endpoint_url=login.endpoint_url,
        region_name=login.region or ("auto" if login.endpoint_url else "us-east-1"),
        aws_access_key_id=login.access_key_id,
        aws_secret_access_key=login.secret_access_key,
        aws_session_token=login.session_token,
    )


@functools.cache
def _session() -> boto3.Session:
    """The session, one per process: it reads S3's description from disk and holds the credentials that all stores share."""
    return boto3.Session()


def _choose_read_timeout_s(available_s: float) -> float:
    """The read timeout for the time left; connecting may take half as long again."""
    return next((read_timeout_s for read_timeout_s in READ_TIMEOUTS_S if 1.5 * read_timeout_s <= available_s), READ_TIMEOUTS_S[-1])


def _config(addressing_style: str, read_timeout_s: float) -> Config:
    return Config(
        signature_version="s3v4",
        connect_timeout=min(CONNECT_TIMEOUT_S, read_timeout_s / 2),
        read_timeout=read_timeout_s,
        max_pool_connections=MAX_CONNECTIONS,
        retries={"total_max_attempts": 1, "mode": "standard"},  # retry_transient retries, bounded by time
        # By default boto3 sends a CRC32 trailer, which R2, older MinIO and others refuse. The signature covers the SHA-256.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={"addressing_style": addressing_style, "payload_signing_enabled": True},
    )


class _RangeBeyondEnd(StorageError):
    """A range begins behind the end of its object."""


def _metadata(sha256: str) -> dict[str, str]:
    return {WRITE_ID_KEY: uuid.uuid4().hex, SHA256_KEY: sha256}


def _stored_object(key: str, size_bytes: int, etag: str) -> StoredObject:
    """The generation is the ETag, so writing the same bytes again does not change it."""
    return StoredObject(key=key, size_bytes=int(size_bytes), generation=str(etag).strip('"'))


def _stored_digest(head: dict[str, Any]) -> StoredDigest | None:
    """The SHA-256 from the metadata; else the ETag, which is an MD5 if the object was written in one part without its own key."""
    sha256, etag = head["Metadata"].get(SHA256_KEY), str(head["ETag"]).strip('"')
    if sha256 is not None:
        return StoredDigest(hashlib.sha256, bytes.fromhex(sha256))
    if len(etag) == 32 and head.get("ServerSideEncryption") in (None, "AES256"):
        return StoredDigest(lambda: hashlib.md5(usedforsecurity=False), bytes.fromhex(etag))
    return None


def _connection_error(error: Exception, location: BucketLocation) -> StorageError:
    if isinstance(error, (NoCredentialsError, PartialCredentialsError)):
        return StoreUnavailable(f"no S3 credentials for {location.url}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE")
    if isinstance(error, (ConnectionError, HTTPClientError, ResponseStreamingError, OSError)):
        return TransientStoreError(f"the store of {location.url} did not answer ({type(error).__name__})")
    return StoreUnavailable(f"the store of {location.url} cannot be used: {error}")

"""Objects in an S3 bucket, of AWS, Cloudflare R2, MinIO or another: `s3://bucket` or `s3://bucket/folder`.

Endpoint, region and credentials come from where boto3 looks for them: AWS_ENDPOINT_URL_S3, AWS_REGION, AWS_ACCESS_KEY_ID, a profile, the
role of the machine. R2 takes the region `auto`, or none. In a bucket with versioning, what was deleted or replaced is kept.
"""

# boto3 makes its clients at run time and carries no types; what it answers is given its type where it is taken.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false, reportMissingTypeStubs=false

import functools
import hashlib
import io
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import boto3
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

PAGE_SIZE = 1000  # the most that S3 gives
MAX_PARTS = 10_000  # of one upload, by S3's rule
MAX_CONNECTIONS = 32
READ_TIMEOUTS_S = (
    READ_TIMEOUT_S,
    10.0,
    1.8,
    0.9,
    0.3,
)  # a client keeps its timeouts for life: one for each kind of caller, the patient first
WRITE_ID_KEY = "tunesmith-write"  # metadata: which write an object is of, so that a lost answer can be told from another writer
SHA256_KEY = "tunesmith-sha256"
CONTENT_TYPE = "application/octet-stream"
NOT_FOUND_CODES = ("404", "NoSuchKey", "NotFound")
BUSY_CODES = ("RequestTimeout", "Throttling", "OperationAborted")
CHECKSUM_ERROR_CODES = ("BadDigest", "XAmzContentSHA256Mismatch", "InvalidDigest")

_CLIENT_LOCK = threading.Lock()  # a session makes one client at a time

ReturnT = TypeVar("ReturnT")


class S3Store:
    """A bucket, or a folder of it. Every request is signed over the SHA-256 of its body, so that what arrives damaged is refused."""

    def __init__(self, url: str, *, page_size: int = PAGE_SIZE) -> None:
        self._location = BucketLocation.parse(url, "s3")
        self.url = self._location.url
        self._page_size = page_size
        self._lock = threading.Lock()
        self._clients: dict[float, Any] = {}  # Any: boto3's clients have no type; by how long they wait for an answer
        self._bucket_confirmed = False

    def write(self, key: str, content: bytes, *, if_absent: bool = False) -> StoredObject:
        metadata = _metadata(hashlib.sha256(content).hexdigest())
        condition = {"IfNoneMatch": "*"} if if_absent else {}
        put = {**self._object_params(key), "Body": content, "ContentType": CONTENT_TYPE, "Metadata": metadata, **condition}
        try:
            answer = retry_on_checksum_mismatch(lambda: self._call(key, lambda s3: s3.put_object(**put)))
        except ObjectExists:
            found = self._head(key)
            if found is None or found["Metadata"].get(WRITE_ID_KEY) != metadata[WRITE_ID_KEY]:
                raise
            return _stored_object(key, found["ContentLength"], found["ETag"])
        return _stored_object(key, len(content), answer["ETag"])

    def read(self, key: str) -> bytes:
        def whole() -> bytes:
            with self.open_read(key) as stream:
                return stream.read()

        return retry_on_checksum_mismatch(whole)

    def open_read(self, key: str) -> AbstractContextManager[BinaryIO]:
        found = self._head(key)
        if found is None:
            raise NoSuchObject(f"nothing is stored at {self.url}/{key}")

        def fetch(start: int, end: int) -> bytes:
            place = {**self._object_params(key), "Range": f"bytes={start}-{end - 1}", "IfMatch": found["ETag"]}
            try:
                return self._call(key, lambda s3: s3.get_object(**place)["Body"].read())
            except (ObjectExists, NoSuchObject) as error:  # all ranges are of one and the same writing
                raise ChecksumMismatch(f"{self.url}/{key} was replaced or deleted while it was read") from error

        return checked_stream(int(found["ContentLength"]), fetch, _stored_digest(found), f"{self.url}/{key}")

    def upload(self, source: Path, key: str, *, sha256: str | None = None) -> StoredObject:
        if source.stat().st_size <= PART_BYTES:
            content = source.read_bytes()
            check_sha256(source, sha256, hashlib.sha256(content).hexdigest(), f"{self.url}/{key}")
            return self.write(key, content)
        with source.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        check_sha256(source, sha256, digest, f"{self.url}/{key}")
        metadata = _metadata(digest)
        begun = self._call(
            key, lambda s3: s3.create_multipart_upload(**self._object_params(key), ContentType=CONTENT_TYPE, Metadata=metadata)
        )
        upload = {**self._object_params(key), "UploadId": begun["UploadId"]}
        try:
            return self._send_parts(source, key, upload, metadata)
        except BaseException:
            self._abort(upload)
            raise

    def download(self, key: str, target: Path) -> Path:
        return save_to_file(lambda: self.open_read(key), target)

    def stat(self, key: str) -> StoredObject | None:
        found = self._head(key)
        return None if found is None else _stored_object(key, found["ContentLength"], found["ETag"])

    def iter_objects(self, prefix: str) -> Iterator[StoredObject]:
        more: dict[str, str] = {}
        while True:
            page = self._list_page(prefix, self._page_size, more)
            for entry in page.get("Contents", ()):
                key = self._location.key_from_object_name(entry["Key"])
                if key is not None:
                    yield _stored_object(key, entry["Size"], entry["ETag"])
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def delete(self, key: str) -> bool:
        there = self._head(key) is not None  # S3 answers the same whether there was one or not
        if there:
            self._call(key, lambda s3: s3.delete_object(**self._object_params(key)))
        return there

    def presign_url(self, key: str, disposition: str, expires_s: int) -> str:
        """A link to read an object, made without asking the server: a power only this store has."""
        params = {**self._object_params(key), "ResponseContentDisposition": disposition}
        return self._call(key, lambda s3: s3.generate_presigned_url("get_object", Params=params, ExpiresIn=expires_s))

    def close(self) -> None:
        """Let go of connections."""
        with self._lock:
            for client in self._clients.values():
                client.close()
            self._clients.clear()

    def _object_params(self, key: str) -> dict[str, str]:
        return {"Bucket": self._location.bucket, "Key": self._location.object_name(key)}

    # Any: an answer of boto3 is a loose dict.
    def _head(self, key: str) -> dict[str, Any] | None:
        try:
            return self._call(key, lambda s3: s3.head_object(**self._object_params(key)))
        except NoSuchObject:
            return None

    def _list_page(self, prefix: str, max_keys: int, continuation: dict[str, str]) -> dict[str, Any]:
        place = {"Bucket": self._location.bucket, "Prefix": self._location.folder + prefix, "MaxKeys": max_keys}
        return self._call(prefix, lambda s3: s3.list_objects_v2(**place, **continuation))

    def _send_parts(self, source: Path, key: str, upload: dict[str, str], metadata: dict[str, str]) -> StoredObject:
        """Raises ChecksumMismatch, before anything is visible, when the file is not any more what it was when it was summed."""
        size_bytes = source.stat().st_size
        part_bytes = max(PART_BYTES, -(-size_bytes // MAX_PARTS))  # all of one size: R2 insists
        digest, tags = hashlib.sha256(), list[str]()
        with source.open("rb") as stream:
            while part := stream.read(part_bytes):
                digest.update(part)
                tags.append(self._send_part(key, upload, len(tags) + 1, part))
        check_sha256(source, metadata[SHA256_KEY], digest.hexdigest(), f"{self.url}/{key}")
        parts = [{"PartNumber": number, "ETag": tag} for number, tag in enumerate(tags, 1)]
        try:
            done = self._call(key, lambda s3: s3.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts}))
        except NoSuchObject:  # the upload is over: its completion was carried out and the answer lost, or somebody aborted it
            found = self._head(key)
            if found is None or found["Metadata"].get(WRITE_ID_KEY) != metadata[WRITE_ID_KEY]:
                raise StoreUnavailable(f"the upload of {key} to {self.url} was broken off by the store; start it again") from None
            return _stored_object(key, found["ContentLength"], found["ETag"])
        return _stored_object(key, size_bytes, done["ETag"])

    def _send_part(self, key: str, upload: dict[str, str], number: int, part: bytes) -> str:
        # A stream is sent in small blocks, each with its own timeout; bytes would have to go through within a single one.
        put = {**upload, "PartNumber": number}
        return retry_on_checksum_mismatch(lambda: self._call(key, lambda s3: s3.upload_part(**put, Body=io.BytesIO(part))))["ETag"]

    def _abort(self, upload: dict[str, str]) -> None:
        """Parts of an upload that is never completed cost money until somebody removes them."""
        with suppress(ClientError, BotoCoreError, StorageError):  # the caller hears of what went wrong first
            self._client().abort_multipart_upload(**upload)

    def _call(self, key: str, function: Callable[[Any], ReturnT]) -> ReturnT:
        """Whatever `act` answers, tried again while it is worth while; errors in our words."""

        def once() -> ReturnT:
            try:
                answer = function(self._client())
            except ClientError as error:
                raise self._translate_error(error, key) from error
            except (BotoCoreError, HTTPClientError, OSError) as error:
                raise _connection_error(error, self._location) from error
            self._bucket_confirmed = True
            return answer

        return retry_transient(once)

    def _client(self) -> Any:  # noqa: ANN401  # boto3's clients have no type
        stall_s = _choose_read_timeout_s(remaining_s(MAX_RETRY_S))
        with self._lock:
            if stall_s not in self._clients:
                self._clients[stall_s] = _new_client(self.url, stall_s)
            return self._clients[stall_s]

    def _translate_error(self, error: ClientError, key: str) -> StorageError:
        """boto3's error as one that tells the operator what to do."""
        code, status = str(error.response["Error"].get("Code")), int(error.response["ResponseMetadata"].get("HTTPStatusCode", 0))
        bucket = self._location.bucket
        if code == "NoSuchBucket" or (code in NOT_FOUND_CODES and not self._bucket_confirmed and key and not self._bucket_exists()):
            return StoreUnavailable(
                f"bucket {bucket} does not exist; make it: aws s3 mb s3://{bucket} (or at the provider of the endpoint)"
            )
        if code in NOT_FOUND_CODES or code == "NoSuchUpload":
            return NoSuchObject(f"nothing is stored at {self.url}/{key}")
        if status == 412:
            return ObjectExists(f"{self.url}/{key} is already there")
        if status in (401, 403):
            wants = "s3:GetObject, s3:PutObject, s3:DeleteObject on its objects and s3:ListBucket on the bucket"
            return StoreUnavailable(f"the credentials may not use {self.url} ({code}); they need {wants}")
        if code in CHECKSUM_ERROR_CODES:
            return ChecksumMismatch(f"the store refused {key} for {self.url}: it arrived damaged ({code})")
        if status >= 500 or status in (408, 409, 429) or code in BUSY_CODES:
            return TransientStoreError(f"the store of {self.url} answers {status} {code}")
        return StoreUnavailable(f"the store of {self.url} answers {status} {code}: {error.response['Error'].get('Message')}")

    def _bucket_exists(self) -> bool:
        """Asked once: an answer to HEAD has no body that would tell a missing bucket from a missing object."""
        try:
            self._client().list_objects_v2(Bucket=self._location.bucket, MaxKeys=1)
        except ClientError as error:
            return error.response["Error"].get("Code") != "NoSuchBucket"
        except BotoCoreError as error:
            raise _connection_error(error, self._location) from error
        self._bucket_confirmed = True
        return True


def _new_client(url: str, read_timeout_s: float) -> Any:  # noqa: ANN401
    """Path style for everybody but AWS: others need not have a host name for each bucket."""
    with _CLIENT_LOCK:
        try:
            client = _session().client("s3", config=_config("auto", read_timeout_s))
            if client.meta.endpoint_url.endswith((".amazonaws.com", ".amazonaws.com.cn")):
                return client
            client.close()
            return _session().client("s3", config=_config("path", read_timeout_s))
        except (BotoCoreError, ValueError) as error:
            raise StoreUnavailable(f"the environment has no usable S3 settings for {url}: {error}") from error


@functools.cache
def _session() -> boto3.Session:
    """One for the process: it reads S3's description from disk, and holds credentials that all stores share."""
    return boto3.Session()


def _choose_read_timeout_s(available_s: float) -> float:
    """How long to wait for an answer when so much time is left: connecting may take half as long again."""
    return next((stall_s for stall_s in READ_TIMEOUTS_S if 1.5 * stall_s <= available_s), READ_TIMEOUTS_S[-1])


def _config(addressing_style: str, read_timeout_s: float) -> Config:
    return Config(
        signature_version="s3v4",
        connect_timeout=min(CONNECT_TIMEOUT_S, read_timeout_s / 2),
        read_timeout=read_timeout_s,
        max_pool_connections=MAX_CONNECTIONS,
        retries={"total_max_attempts": 1, "mode": "standard"},  # ours go by the clock, not by number
        # By default boto3 sends CRC32 in trailers, which R2, older MinIO and others refuse. The signature covers SHA-256 anyway.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={"addressing_style": addressing_style, "payload_signing_enabled": True},
    )


def _metadata(sha256: str) -> dict[str, str]:
    return {WRITE_ID_KEY: uuid.uuid4().hex, SHA256_KEY: sha256}


def _stored_object(key: str, size_bytes: int, etag: str) -> StoredObject:
    """S3 numbers no writes: writing the same bytes again leaves the generation as it was."""
    return StoredObject(key=key, size_bytes=int(size_bytes), generation=str(etag).strip('"'))


def _stored_digest(head: dict[str, Any]) -> StoredDigest | None:
    """Ours, or the MD5 that the tag of an object is, if it was written in one piece and not encrypted with a key of its own."""
    sha256, tag = head["Metadata"].get(SHA256_KEY), str(head["ETag"]).strip('"')
    if sha256 is not None:
        return StoredDigest(hashlib.sha256, bytes.fromhex(sha256))
    if len(tag) == 32 and head.get("ServerSideEncryption") in (None, "AES256"):
        return StoredDigest(lambda: hashlib.md5(usedforsecurity=False), bytes.fromhex(tag))
    return None


def _connection_error(error: Exception, location: BucketLocation) -> StorageError:
    if isinstance(error, (NoCredentialsError, PartialCredentialsError)):
        return StoreUnavailable(f"no S3 credentials for {location.url}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE")
    if isinstance(error, (ConnectionError, HTTPClientError, ResponseStreamingError, OSError)):
        return TransientStoreError(f"the store of {location.url} did not answer ({type(error).__name__})")
    return StoreUnavailable(f"the store of {location.url} cannot be asked: {error}")

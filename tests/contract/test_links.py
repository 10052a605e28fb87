"""What every URL signer promises: until it expires, a link downloads one object under its filename, and nothing else."""

import base64
import hashlib
import hmac
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import MappingProxyType
from urllib.parse import parse_qsl, quote, urlsplit

import httpx2
import jwt
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding
from google.auth.compute_engine import Credentials
from google.auth.credentials import AnonymousCredentials
from google.auth.transport.requests import Request

from infra.loopback.google_identity import ACCESS_TOKEN, KEY_ID, GoogleIdentity, InjectedError
from service.adapters.links import MAX_EXPIRES_S, URL_SIGNERS, ServiceUrlSigner, content_disposition, create_url_signer
from service.adapters.links.cloud_storage import CloudStorageUrlSigner
from service.core.errors import InvalidRequest, Unauthorized, Unavailable
from service.core.links import SignedUpload, UrlSigner
from service.core.tokens import TokenSigner
from storage import ObjectStore
from storage.deadline import deadline
from storage.file import LocalStore
from storage.gs import GcsStore
from tests.contract.object_fixtures import StoreFactory

SOURCE = Path(__file__).resolve().parents[2]
KEY = "trained_adapters/job-1/adapter model.safetensors"
TOKENS = TokenSigner(b"k" * 32, lambda: datetime.now(UTC))


class ServiceAccountCredentials(Credentials):
    """Google's credentials of a machine with another source of tokens: the library reads the source at import."""

    def __init__(self, email: str, token_ttl: timedelta = timedelta(hours=1)) -> None:
        super().__init__(service_account_email=email)
        self.token_ttl = token_ttl
        self.refresh_count = 0

    def refresh(self, request: Request) -> None:
        self.refresh_count += 1
        self.token = ACCESS_TOKEN
        self.expiry = datetime.now(UTC).replace(tzinfo=None) + self.token_ttl


@pytest.fixture(scope="module")
def identity() -> Iterator[GoogleIdentity]:
    with GoogleIdentity() as identity:
        yield identity


@pytest.fixture
def links(identity: GoogleIdentity, new_store: StoreFactory) -> Iterator[CloudStorageUrlSigner]:
    store = new_store("gs")
    assert isinstance(store, GcsStore)
    store.write(KEY, b"weights")
    signer = CloudStorageUrlSigner(store, emulator_host=identity.host, credentials=lambda _: ServiceAccountCredentials(identity.email))
    identity.requests.clear()
    yield signer
    signer.close()


def follow_link(link: str, **headers: str) -> httpx2.Response:
    return httpx2.get(link, headers=headers)


@pytest.fixture(params=["file", *sorted(URL_SIGNERS)])
def signer_and_follow(request: pytest.FixtureRequest, new_store: StoreFactory) -> tuple[UrlSigner, Callable[[str], httpx2.Response]]:
    """A signer and a function that opens its links."""
    store = new_store(request.param)
    store.write(KEY, b"weights")
    if request.param == "gs":
        return request.getfixturevalue("links"), follow_link
    signer = create_url_signer(store, TOKENS)
    return signer, follow_link if request.param == "s3" else lambda link: fetch_from_service(store, link)


def fetch_from_service(store: ObjectStore, link: str) -> httpx2.Response:
    """The service's route for files, without the rest of the service."""
    key, _ = TOKENS.read_file_token(link.removeprefix("/files/"))
    return httpx2.Response(200, content=store.read(key))


def test_link_downloads_object(signer_and_follow: tuple[UrlSigner, Callable[[str], httpx2.Response]]) -> None:
    signer, follow = signer_and_follow
    response = follow(signer.sign_url(KEY, "adapter model.safetensors", 60))
    assert (response.status_code, response.content) == (200, b"weights")


def send_to_link(store: ObjectStore, upload: SignedUpload, content: bytes) -> httpx2.Response:
    if not upload.url.startswith("/"):
        return httpx2.put(upload.url, content=content, headers=upload.headers)
    assert isinstance(store, LocalStore)
    key, max_bytes = TOKENS.read_upload_token(upload.url.removeprefix("/datasets/uploads/"))
    assert len(content) <= max_bytes
    with store.open_write(key) as stream:
        stream.write(content)
    return httpx2.Response(200)


@pytest.mark.parametrize("scheme", ["file", *sorted(URL_SIGNERS)])
def test_link_takes_an_object(scheme: str, new_store: StoreFactory, identity: GoogleIdentity) -> None:
    store = new_store(scheme)
    signer = create_url_signer(store, TOKENS)
    if isinstance(store, GcsStore):
        credentials = ServiceAccountCredentials(identity.email)
        signer = CloudStorageUrlSigner(store, emulator_host=identity.host, credentials=lambda _: credentials)
    upload = signer.sign_upload("incoming/uploads/1/rows 1.jsonl", 4, 60)
    assert send_to_link(store, upload, b"rows").status_code == 200
    assert store.read("incoming/uploads/1/rows 1.jsonl") == b"rows"
    if isinstance(signer, CloudStorageUrlSigner):
        signer.close()


def test_object_that_is_not_written_to_its_end_does_not_appear(new_store: StoreFactory) -> None:
    store = new_store("file")
    assert isinstance(store, LocalStore)

    def send_half() -> None:
        with store.open_write("incoming/a") as stream:
            stream.write(b"half")
            raise ConnectionError

    with pytest.raises(ConnectionError):
        send_half()
    assert list(store.iter_objects("")) == []


def test_upload_link_is_not_a_download_link() -> None:
    signer = ServiceUrlSigner(TOKENS)
    with pytest.raises(Unauthorized):
        TOKENS.read_file_token(signer.sign_upload(KEY, 1, 60).url.removeprefix("/datasets/uploads/"))
    with pytest.raises(Unauthorized):
        TOKENS.read_upload_token(signer.sign_url(KEY, "m", 60).removeprefix("/files/"))


def test_bucket_link_has_expiry_and_filename(new_store: StoreFactory, links: CloudStorageUrlSigner) -> None:
    for signer, prefix in ((links, "X-Goog"), (create_url_signer(new_store("s3"), TOKENS), "X-Amz")):
        parameters = dict(parse_qsl(urlsplit(signer.sign_url(KEY, "mein Modell \u00fc.gguf", 900)).query))
        assert parameters[f"{prefix}-Expires"] == "900"
        assert parameters["response-content-disposition"] == content_disposition("mein Modell \u00fc.gguf")


@pytest.mark.parametrize("lifetime_s", [0, -1, MAX_EXPIRES_S + 1])
def test_invalid_link_lifetime_is_rejected(new_store: StoreFactory, links: CloudStorageUrlSigner, lifetime_s: int) -> None:
    for signer in (links, create_url_signer(new_store("s3"), TOKENS)):
        with pytest.raises(InvalidRequest, match="7 days"):
            signer.sign_url(KEY, "m", lifetime_s)


@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("model.gguf", 'attachment; filename="model.gguf"'),
        ('a"b\\c\r\nX: y', "attachment; filename=\"a_b_c__X: y\"; filename*=UTF-8''a%22b%5Cc%0D%0AX%3A%20y"),
        ("\u00fc.gguf", "attachment; filename=\"_.gguf\"; filename*=UTF-8''%C3%BC.gguf"),
    ],
)
def test_filename_is_escaped_in_header(name: str, header: str) -> None:
    assert content_disposition(name) == header


def test_service_links_expire_and_resist_tampering() -> None:
    now = [datetime(2026, 1, 1, tzinfo=UTC)]
    signer = TokenSigner(b"k" * 32, lambda: now[0])
    token = ServiceUrlSigner(signer).sign_url(KEY, "m", 60).removeprefix("/files/")
    assert signer.read_file_token(token) == (KEY, "m")
    head, body, signature = token.split(".")
    claims = json.loads(base64.urlsafe_b64decode(body + "=="))
    other = base64.urlsafe_b64encode(json.dumps(claims | {"sub": "another"}).encode()).decode().rstrip("=")
    with pytest.raises(Unauthorized):
        signer.read_file_token(f"{head}.{other}.{signature}")
    now[0] += timedelta(seconds=60)
    with pytest.raises(Unauthorized, match="expired"):
        signer.read_file_token(token)


# --- Cloud Storage: the emulator does not verify signatures, so these tests do, as Google documents it ---------------


def google_string_to_sign(link: str, method: str, headers: Mapping[str, str]) -> tuple[bytes, bytes]:
    """The bytes that a V4 link signs, derived from the link and the headers of its request, and the signature."""
    parts = urlsplit(link)
    parameters = dict(parse_qsl(parts.query, keep_blank_values=True))
    signature = bytes.fromhex(parameters.pop("X-Goog-Signature"))
    query = "&".join(f"{quote(name, safe='~')}={quote(parameters[name], safe='~')}" for name in sorted(parameters))
    signed = [f"{name.lower()}:{value}" for name, value in sorted({"host": parts.netloc, **headers}.items())]
    request = "\n".join([method, parts.path, query, *signed, "", parameters["X-Goog-SignedHeaders"], "UNSIGNED-PAYLOAD"])
    scope = parameters["X-Goog-Credential"].partition("/")[2]
    digest = hashlib.sha256(request.encode()).hexdigest()
    return "\n".join([parameters["X-Goog-Algorithm"], parameters["X-Goog-Date"], scope, digest]).encode(), signature


def check_google_signature(
    identity: GoogleIdentity, link: str, method: str = "GET", headers: Mapping[str, str] = MappingProxyType({})
) -> None:
    content, signature = google_string_to_sign(link, method, headers)
    identity.key.public_key().verify(signature, content, padding.PKCS1v15(), hashes.SHA256())


def test_link_is_signed_by_google_sign_blob(identity: GoogleIdentity, links: CloudStorageUrlSigner) -> None:
    link = links.sign_url(KEY, "adapter.safetensors", 60)
    check_google_signature(identity, link)
    assert f"X-Goog-Credential={quote(identity.email, safe='')}%2F" in link
    (request,) = identity.requests
    assert request.path == f"/v1/projects/-/serviceAccounts/{identity.email}:signBlob"
    assert request.authorization == f"Bearer {ACCESS_TOKEN}"


def test_upload_link_signs_the_largest_size(identity: GoogleIdentity, links: CloudStorageUrlSigner) -> None:
    upload = links.sign_upload(KEY, 1000, 60)
    assert upload.headers == {"x-goog-content-length-range": "0,1000"}
    check_google_signature(identity, upload.url, "PUT", upload.headers)
    with pytest.raises(InvalidSignature):
        check_google_signature(identity, upload.url, "PUT", {"x-goog-content-length-range": "0,1001"})
    with pytest.raises(InvalidSignature):
        check_google_signature(identity, upload.url, "GET", upload.headers)


@pytest.mark.parametrize(
    ("part", "replacement"),
    [("Expires=60", "Expires=6000"), ("adapter%20model", "other%20model"), ("filename", "filenama"), ("X-Goog-Date=2", "X-Goog-Date=3")],
)
def test_tampered_link_has_invalid_signature(identity: GoogleIdentity, links: CloudStorageUrlSigner, part: str, replacement: str) -> None:
    link = links.sign_url(KEY, "m", 60)
    assert part in link
    with pytest.raises(InvalidSignature):
        check_google_signature(identity, link.replace(part, replacement, 1))


@pytest.mark.parametrize(("token_ttl", "refreshes"), [(timedelta(hours=1), 1), (timedelta(seconds=-1), 4)])
def test_access_token_is_cached_until_expiry(
    identity: GoogleIdentity, new_store: StoreFactory, token_ttl: timedelta, refreshes: int
) -> None:
    store = new_store("gs")
    assert isinstance(store, GcsStore)
    credentials = ServiceAccountCredentials(identity.email, token_ttl)
    links = CloudStorageUrlSigner(store, emulator_host=identity.host, credentials=lambda _: credentials)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: links.sign_url(f"{number}", "m", 60), range(4)))
    assert (credentials.refresh_count == 1) if refreshes == 1 else (credentials.refresh_count >= refreshes)
    links.close()


@pytest.mark.parametrize(
    ("error", "message", "command"),
    [
        (
            InjectedError(403, "IAM_PERMISSION_DENIED"),
            "needs roles/iam.serviceAccountTokenCreator on itself",
            "gcloud iam service-accounts add-iam-policy-binding {email} --member=serviceAccount:{email}"
            " --role=roles/iam.serviceAccountTokenCreator",
        ),
        (InjectedError(403, "SERVICE_DISABLED"), "not enabled", "gcloud services enable iamcredentials.googleapis.com"),
    ],
)
def test_signing_error_names_fix_command(
    identity: GoogleIdentity, links: CloudStorageUrlSigner, error: InjectedError, message: str, command: str
) -> None:
    identity.injected_errors.append(error)
    with pytest.raises(Unavailable, match=message) as excinfo:
        links.sign_url(KEY, "m", 60)
    assert command.format(email=identity.email) in excinfo.value.hint


def test_busy_iam_is_retried(identity: GoogleIdentity, links: CloudStorageUrlSigner) -> None:
    identity.injected_errors += [InjectedError(503, "UNAVAILABLE"), InjectedError(429, "RATE_LIMIT_EXCEEDED")]
    check_google_signature(identity, links.sign_url(KEY, "m", 60))


def test_unreachable_iam_fails_within_deadline(new_store: StoreFactory) -> None:
    store = new_store("gs")
    assert isinstance(store, GcsStore)
    links = CloudStorageUrlSigner(store, emulator_host="127.0.0.1:1", credentials=lambda _: ServiceAccountCredentials("a@b.c"))
    with deadline(0.3), pytest.raises(Unavailable, match="IAM did not answer in time"):
        links.sign_url(KEY, "m", 60)
    links.close()


def test_user_credentials_cannot_sign(new_store: StoreFactory) -> None:
    class UserCredentials(AnonymousCredentials):
        """Credentials with a token and no service account."""

    store = new_store("gs")
    assert isinstance(store, GcsStore)
    links = CloudStorageUrlSigner(store, emulator_host="127.0.0.1:1", credentials=lambda _: UserCredentials())
    with pytest.raises(Unavailable, match="a person's credentials") as excinfo:
        links.sign_url(KEY, "m", 60)
    assert "--impersonate-service-account" in excinfo.value.hint
    links.close()


def test_signing_works_with_only_metadata_server(identity: GoogleIdentity) -> None:
    """End to end with Google's credentials, in another process because the library reads the environment at import."""
    code = """
from service.adapters.links.cloud_storage import CloudStorageUrlSigner
from storage.gs import GcsStore
import sys
links = CloudStorageUrlSigner(GcsStore("gs://bucket"), emulator_host=sys.argv[1])
print(links.sign_url("a/b", "b", 60))
print(links.sign_url("a/c", "c", 60))
"""
    identity.requests.clear()
    isolated = {"HTTPS_PROXY": "http://127.0.0.1:1", "NO_PROXY": "127.0.0.1", "CLOUDSDK_CONFIG": "/nonexistent", "HOME": "/nonexistent"}
    environment = {"PATH": os.environ["PATH"], "STORAGE_EMULATOR_HOST": "http://127.0.0.1:1", **isolated, **identity.environment}
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", code, identity.host]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=SOURCE)
    assert done.returncode == 0, done.stderr
    for link in done.stdout.split():
        check_google_signature(identity, link)
    assert [request.path.partition("?")[0] for request in identity.requests].count(
        "/computeMetadata/v1/instance/service-accounts/default/token"
    ) == 1
    assert not any("allowedLocations" in request.path for request in identity.requests)


# --- S3 --------------------------------------------------------------------------------------------------------------


def test_s3_link_is_signed_with_service_secret(new_store: StoreFactory) -> None:
    link = create_url_signer(new_store("s3"), TOKENS).sign_url(KEY, "m", 60)
    assert is_s3_signature_valid(link, "a-secret")
    assert not is_s3_signature_valid(link.replace("Expires=60", "Expires=6000"), "a-secret")
    assert not is_s3_signature_valid(link, "another secret")


def test_s3_upload_link_signs_the_size(new_store: StoreFactory) -> None:
    upload = create_url_signer(new_store("s3"), TOKENS).sign_upload(KEY, 1000, 60)
    headers = {name.lower(): value for name, value in upload.headers.items()}
    assert headers == {"content-length": "1000"}
    assert is_s3_signature_valid(upload.url, "a-secret", "PUT", headers)
    assert not is_s3_signature_valid(upload.url, "a-secret", "PUT", {"content-length": "1001"})


def is_s3_signature_valid(link: str, secret: str, method: str = "GET", headers: Mapping[str, str] = MappingProxyType({})) -> bool:
    """AWS's signature version 4, derived from the link and the headers of its request."""
    parts = urlsplit(link)
    parameters = dict(parse_qsl(parts.query, keep_blank_values=True))
    signature = parameters.pop("X-Amz-Signature")
    query = "&".join(f"{quote(name, safe='~')}={quote(parameters[name], safe='~')}" for name in sorted(parameters))
    signed = sorted({"host": parts.netloc, **headers}.items())
    lines = [f"{name}:{value}" for name, value in signed]
    request = "\n".join([method, parts.path, query, *lines, "", ";".join(name for name, _ in signed), "UNSIGNED-PAYLOAD"])
    scope = parameters["X-Amz-Credential"].partition("/")[2]
    key = f"AWS4{secret}".encode()
    for word in scope.split("/"):
        key = hmac.digest(key, word.encode(), "sha256")
    content = "\n".join([parameters["X-Amz-Algorithm"], parameters["X-Amz-Date"], scope, hashlib.sha256(request.encode()).hexdigest()])
    return hmac.digest(key, content.encode(), "sha256").hex() == signature


# --- the identity emulator -------------------------------------------------------------------------------------------


def test_identity_token_is_signed_for_one_audience(identity: GoogleIdentity) -> None:
    url = f"http://{identity.host}/computeMetadata/v1/instance/service-accounts/default/identity"
    token = httpx2.get(url, params={"audience": "https://service", "format": "full"}, headers={"Metadata-Flavor": "Google"}).text
    keys = jwt.PyJWKSet.from_dict(httpx2.get(f"http://{identity.host}/oauth2/v3/certs").json())
    claims = jwt.decode(token, keys[KEY_ID], algorithms=["RS256"], audience="https://service", options={"require": ["exp"]})
    assert (claims["email"], claims["email_verified"]) == (identity.email, True)
    with pytest.raises(jwt.InvalidAudienceError):
        jwt.decode(token, keys[KEY_ID], algorithms=["RS256"], audience="https://another")


def test_metadata_server_requires_flavor_header(identity: GoogleIdentity) -> None:
    assert httpx2.get(f"http://{identity.host}/computeMetadata/v1/project/project-id").status_code == 403

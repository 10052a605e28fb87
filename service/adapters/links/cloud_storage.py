"""Links that Cloud Storage serves, signed with the service account's key, which stays in Google Cloud: IAM's signBlob uses it.

The account needs roles/iam.serviceAccountTokenCreator on itself, and roles/storage.objectViewer or more on the bucket: a link has the
permissions of its signer.
"""

# Google's libraries have few types.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false

import base64
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol, runtime_checkable

import google.auth
import requests
from google.auth import crypt
from google.auth.credentials import Credentials, Signing
from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError
from google.auth.transport.requests import Request

from service.adapters.links import check_expiry, content_disposition
from service.core.errors import Unavailable
from service.core.links import SignedUpload
from storage import StorageError
from storage.deadline import deadline
from storage.gs import GcsStore, create_deadline_session
from storage.remote import TransientStoreError, retry_transient

SCOPES = ("https://www.googleapis.com/auth/cloud-platform",)
IAM_ENDPOINT = "https://iamcredentials.googleapis.com"
SIGN_TIMEOUT_S = 10.0  # a signature takes a tenth of a second
TOKEN_CREATOR_ROLE = "roles/iam.serviceAccountTokenCreator"


class CloudStorageUrlSigner:
    """Links to the objects of a Cloud Storage bucket. `emulator_host` (host:port) replaces IAM's API."""

    def __init__(
        self, store: GcsStore, *, emulator_host: str | None = None, credentials: Callable[[Request], Credentials] | None = None
    ) -> None:
        self._store = store
        self._iam_endpoint = f"http://{emulator_host}" if emulator_host else IAM_ENDPOINT
        self._find_credentials = credentials or _default_credentials
        self._session = create_deadline_session()
        self._lock = threading.Lock()
        self._signer: Signing | None = None

    def sign_url(self, key: str, filename: str, expires_s: int) -> str:
        return self._sign(key, expires_s, response_disposition=content_disposition(filename))

    def sign_upload(self, key: str, size_bytes: int, expires_s: int) -> SignedUpload:
        headers = {"x-goog-content-length-range": f"0,{size_bytes}"}
        url = self._sign(key, expires_s, method="PUT", headers=dict(headers))  # a copy: the library adds the header Host
        return SignedUpload(url, headers)

    def close(self) -> None:
        """Close the connections."""
        self._session.close()

    def _sign(
        self,
        key: str,
        expires_s: int,
        *,
        method: str = "GET",
        headers: dict[str, str] | None = None,
        response_disposition: str | None = None,
    ) -> str:
        lifetime = timedelta(seconds=check_expiry(expires_s))
        with deadline(SIGN_TIMEOUT_S):
            try:
                return str(
                    self._store.blob(key).generate_signed_url(
                        version="v4",
                        expiration=lifetime,
                        method=method,
                        headers=headers,
                        response_disposition=response_disposition,
                        credentials=self._get_signer(),
                    )
                )
            except (StorageError, requests.RequestException, GoogleAuthError) as error:
                raise Unavailable(f"links cannot be signed now: {error}") from error

    def _get_signer(self) -> Signing:
        with self._lock:
            if self._signer is None:
                request = Request(self._session)
                credentials = self._find_credentials(request)
                is_signer = isinstance(credentials, Signing)
                self._signer = credentials if is_signer else RemoteSigner(credentials, self._session, self._iam_endpoint)
            return self._signer


class RemoteSigner(Signing, crypt.Signer):
    """Signs through IAM with the key of this process's service account. Keeps its access token until that expires."""

    def __init__(self, credentials: Credentials, session: requests.Session, iam_endpoint: str) -> None:
        self._credentials = credentials
        self._session = session
        self._iam_endpoint = iam_endpoint
        self._lock = threading.Lock()

    @property
    def signer_email(self) -> str:
        """The account's email. It is known only with a token: before, the metadata server calls the account "default"."""
        self._access_token()
        email = self._credentials.service_account_email if isinstance(self._credentials, _ServiceAccountCredentials) else None
        if not email:
            hint = "run the service as a service account, or: gcloud auth application-default login --impersonate-service-account=EMAIL"
            raise Unavailable("links are signed by a service account, and the service runs with a person's credentials", hint=hint)
        return email

    @property
    def signer(self) -> crypt.Signer:
        return self

    @property
    def key_id(self) -> None:
        """None: IAM chooses the key."""

    def sign(self, message: bytes | str) -> bytes:
        return self.sign_bytes(message.encode() if isinstance(message, str) else message)

    def sign_bytes(self, message: bytes) -> bytes:
        """Sign a message. Raises Unavailable with the command that grants the permission when the account may not sign."""
        email, payload = self.signer_email, base64.b64encode(message).decode()
        url = f"{self._iam_endpoint}/v1/projects/-/serviceAccounts/{email}:signBlob"
        response = retry_transient(lambda: self._post_sign_request(url, payload))
        if response.status_code != requests.codes.ok:
            raise _signing_error(response, email)
        return base64.b64decode(response.json()["signedBlob"])

    def _post_sign_request(self, url: str, payload: str) -> requests.Response:
        try:
            response = self._session.post(url, json={"payload": payload}, headers={"Authorization": f"Bearer {self._access_token()}"})
        except requests.RequestException as error:
            raise TransientStoreError(f"IAM did not answer in time ({type(error).__name__})") from error
        if response.status_code >= 500 or response.status_code == requests.codes.too_many_requests:
            raise TransientStoreError(f"IAM answers {response.status_code}")
        return response

    def _access_token(self) -> str:
        with self._lock:
            if not self._credentials.valid:
                self._credentials.refresh(Request(self._session))
            return str(self._credentials.token)


@runtime_checkable
class _ServiceAccountCredentials(Protocol):
    """Credentials that name their account: those of a machine on Google Cloud, or of an impersonated service account."""

    @property
    def service_account_email(self) -> str | None: ...


def _default_credentials(request: Request) -> Credentials:
    try:
        credentials: tuple[Credentials, str | None] = google.auth.default(SCOPES, request)
    except DefaultCredentialsError as error:
        hint = "run: gcloud auth application-default login --impersonate-service-account=EMAIL"
        raise Unavailable("no Google credentials to sign links with", hint=hint) from error
    return credentials[0]


def _signing_error(response: requests.Response, email: str) -> Unavailable:
    """The error for IAM's response, with the command that fixes it."""
    if response.status_code == requests.codes.forbidden and _error_reason(response) == "SERVICE_DISABLED":
        hint = "run: gcloud services enable iamcredentials.googleapis.com"
        return Unavailable("links cannot be signed: the IAM Service Account Credentials API is not enabled", hint=hint)
    if response.status_code in (requests.codes.forbidden, requests.codes.not_found):
        hint = (
            f"run: gcloud iam service-accounts add-iam-policy-binding {email} --member=serviceAccount:{email} --role={TOKEN_CREATOR_ROLE}"
        )
        return Unavailable(f"links cannot be signed: {email} needs {TOKEN_CREATOR_ROLE} on itself", hint=hint)
    return Unavailable(f"links cannot be signed: IAM answers {response.status_code}")


def _error_reason(response: requests.Response) -> str | None:
    """Google's code for the reason, from the error's details."""
    try:
        details: list[dict[str, Any]] = response.json()["error"].get("details", [])  # Any: each kind of detail has other fields
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return next((detail["reason"] for detail in details if "reason" in detail), None)

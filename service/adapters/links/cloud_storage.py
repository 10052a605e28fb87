"""Links that Cloud Storage itself serves, signed by the service account without a key of its own: IAM's signBlob has the key.

The account needs roles/iam.serviceAccountTokenCreator on itself, and roles/storage.objectViewer or more on the bucket: a link can do
what its signer can.
"""

# Google's libraries carry few types.
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
from storage import StorageError
from storage.deadline import deadline
from storage.gs import GcsStore, create_deadline_session
from storage.remote import TransientStoreError, retry_transient

SCOPES = ("https://www.googleapis.com/auth/cloud-platform",)
IAM_ENDPOINT = "https://iamcredentials.googleapis.com"
SIGN_TIMEOUT_S = 10.0  # a signature takes a tenth of a second
TOKEN_CREATOR_ROLE = "roles/iam.serviceAccountTokenCreator"


class CloudStorageUrlSigner:
    """Links to the objects of a Cloud Storage bucket. `emulator_host` (host:port) signs in place of IAM, on a machine without Google."""

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
        life = timedelta(seconds=check_expiry(expires_s))
        with deadline(SIGN_TIMEOUT_S):
            try:
                return str(
                    self._store.blob(key).generate_signed_url(
                        version="v4",
                        expiration=life,
                        method="GET",
                        response_disposition=content_disposition(filename),
                        credentials=self._get_signer(),
                    )
                )
            except (StorageError, requests.RequestException, GoogleAuthError) as error:
                raise Unavailable(f"links cannot be signed now: {error}") from error

    def close(self) -> None:
        """Let go of connections."""
        self._session.close()

    def _get_signer(self) -> Signing:
        with self._lock:
            if self._signer is None:
                request = Request(self._session)
                found = self._find_credentials(request)
                self._signer = found if isinstance(found, Signing) else RemoteSigner(found, self._session, self._iam_endpoint)
            return self._signer


class RemoteSigner(Signing, crypt.Signer):
    """Signs with the key of the service account that this process is, which only Google holds. Its token is kept until it expires."""

    def __init__(self, credentials: Credentials, session: requests.Session, iam_endpoint: str) -> None:
        self._credentials = credentials
        self._session = session
        self._iam_endpoint = iam_endpoint
        self._lock = threading.Lock()

    @property
    def signer_email(self) -> str:
        """The account, which is known once there is a token: before that the metadata server calls it "default"."""
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
        """IAM picks the key."""

    def sign(self, message: bytes | str) -> bytes:
        return self.sign_bytes(message.encode() if isinstance(message, str) else message)

    def sign_bytes(self, message: bytes) -> bytes:
        """Raises Unavailable with the command that mends it, when the account may not sign."""
        email, payload = self.signer_email, base64.b64encode(message).decode()
        url = f"{self._iam_endpoint}/v1/projects/-/serviceAccounts/{email}:signBlob"
        answer = retry_transient(lambda: self._post_sign_request(url, payload))
        if answer.status_code != requests.codes.ok:
            raise _signing_error(answer, email)
        return base64.b64decode(answer.json()["signedBlob"])

    def _post_sign_request(self, url: str, payload: str) -> requests.Response:
        try:
            answer = self._session.post(url, json={"payload": payload}, headers={"Authorization": f"Bearer {self._access_token()}"})
        except requests.RequestException as error:
            raise TransientStoreError(f"IAM did not answer in time ({type(error).__name__})") from error
        if answer.status_code >= 500 or answer.status_code == requests.codes.too_many_requests:
            raise TransientStoreError(f"IAM answers {answer.status_code}")
        return answer

    def _access_token(self) -> str:
        with self._lock:
            if not self._credentials.valid:
                self._credentials.refresh(Request(self._session))
            return str(self._credentials.token)


@runtime_checkable
class _ServiceAccountCredentials(Protocol):
    """Credentials that say whose they are: those of a machine on Google Cloud, or borrowed from a service account."""

    @property
    def service_account_email(self) -> str | None: ...


def _default_credentials(request: Request) -> Credentials:
    try:
        found: tuple[Credentials, str | None] = google.auth.default(SCOPES, request)
    except DefaultCredentialsError as error:
        hint = "run: gcloud auth application-default login --impersonate-service-account=EMAIL"
        raise Unavailable("no Google credentials to sign links with", hint=hint) from error
    return found[0]


def _signing_error(answer: requests.Response, email: str) -> Unavailable:
    """IAM's answer, and the command that mends what it complains of."""
    if answer.status_code == requests.codes.forbidden and _error_reason(answer) == "SERVICE_DISABLED":
        hint = "run: gcloud services enable iamcredentials.googleapis.com"
        return Unavailable("links cannot be signed: the IAM Service Account Credentials API is not enabled", hint=hint)
    if answer.status_code in (requests.codes.forbidden, requests.codes.not_found):
        hint = (
            f"run: gcloud iam service-accounts add-iam-policy-binding {email} --member=serviceAccount:{email} --role={TOKEN_CREATOR_ROLE}"
        )
        return Unavailable(f"links cannot be signed: {email} needs {TOKEN_CREATOR_ROLE} on itself", hint=hint)
    return Unavailable(f"links cannot be signed: IAM answers {answer.status_code}")


def _error_reason(answer: requests.Response) -> str | None:
    """Google's word for it, in the details of its error."""
    try:
        details: list[dict[str, Any]] = answer.json()["error"].get("details", [])  # Any: each kind of detail has fields of its own
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return next((detail["reason"] for detail in details if "reason" in detail), None)

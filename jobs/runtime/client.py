"""The attempt's client of the service: claim the attempt, report events, report the result.

The token that the attempt was launched with only claims it. The claim's answer has a short-lived token for the other calls, which the
answers to reports renew. After a silence longer than its life, a new one is fetched with the secret that the claim was made with.
"""

import secrets
from datetime import datetime
from functools import cached_property
from http import HTTPStatus
from typing import TYPE_CHECKING

from jobs.runtime.errors import AttemptTaken, ClaimRefused
from jobs.runtime.http_retry import is_transient_status
from jobs.runtime.settings import Settings
from schema.base import ForwardCompatible
from schema.events import EventBatch, EventBatchResponse
from schema.result import Result
from schema.spec import CLAIMANT_HEADER, AttemptCredentials, ClaimRequest, ClaimResponse, TokenResponse, claimant_id
from storage import StoreUnavailable

if TYPE_CHECKING:
    import httpx2
    from google.auth.credentials import Credentials

CREDENTIALS_TIMEOUT_S = 60  # the store that asked tries again
CLAIM_TIMEOUT_S = 600  # long enough to replace the service; after that the rented compute is released
RETRY_INITIAL_S = 0.2
RETRY_MAX_S = 15.0


class ServiceUnavailable(Exception):
    """The service did not respond, or cannot handle the request now: retry."""


class Fenced(Exception):
    """The service has replaced this attempt or deleted its job: nothing it does counts anymore."""


class RequestRejected(Exception):
    """The service rejects the request; a retry would not help."""


class IdTokenSource:
    """Google identity tokens, for a service on Cloud Run that requires authentication.

    The token has its own header, because `Authorization` holds the attempt's token.
    See https://cloud.google.com/run/docs/authenticating/service-to-service.
    """

    def __init__(self, audience: str) -> None:
        self._audience = audience

    def headers(self) -> dict[str, str]:
        """The header with a valid token, refreshed before it expires. Raises ServiceUnavailable if no token can be fetched."""
        from google.auth.exceptions import GoogleAuthError
        from google.auth.transport.requests import Request

        try:
            if not self._credentials.valid:
                self._credentials.refresh(Request())
        except GoogleAuthError as error:
            raise ServiceUnavailable(f"no identity token for {self._audience}: {error}") from error
        return {"X-Serverless-Authorization": f"Bearer {self._credentials.token}"}

    @cached_property
    def _credentials(self) -> "Credentials":
        from google.oauth2.id_token import fetch_id_token_credentials

        return fetch_id_token_credentials(self._audience)


def _transport_url(settings: Settings) -> str:
    """The service's URL; behind its Unix socket there is no TLS."""
    scheme, separator, rest = settings.service_url.partition("://")
    return f"http{separator}{rest}" if settings.service_socket else f"{scheme}{separator}{rest}"


class ServiceClient:
    """The client of one attempt. Use it from one thread at a time."""

    def __init__(self, settings: Settings) -> None:
        import httpx2

        self._launch_token = settings.token
        self._token = settings.token
        self._claimant = secrets.token_hex(32)
        self._http = httpx2.Client(
            base_url=f"{_transport_url(settings)}/internal/jobs/{settings.job_id}/attempts/{settings.attempt}",
            transport=httpx2.HTTPTransport(uds=str(settings.service_socket)) if settings.service_socket else None,
            timeout=httpx2.Timeout(10.0, connect=3.0),
            trust_env=False,  # a proxy that is set for other traffic must not intercept this
        )
        self._trace_headers = {"traceparent": settings.traceparent} if settings.traceparent else {}
        self._id_token_source = IdTokenSource(settings.service_audience) if settings.service_audience else None

    @property
    def claimant(self) -> str:
        """The id of this process, as the record and the result name it."""
        return claimant_id(self._claimant)

    def redact(self, text: str) -> str:
        """The text without this client's tokens and secret."""
        for secret in (self._launch_token, self._token, self._claimant):
            text = text.replace(secret, "**********")
        return text

    def claim(self) -> ClaimResponse:
        """Claim the attempt, waiting while the service is unavailable. Raises AttemptTaken, ClaimRefused."""
        import tenacity

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(ServiceUnavailable),
            wait=tenacity.wait_exponential_jitter(multiplier=RETRY_INITIAL_S, max=RETRY_MAX_S, jitter=RETRY_INITIAL_S),
            stop=tenacity.stop_after_delay(CLAIM_TIMEOUT_S),
            reraise=True,
        )
        try:
            response = retrying(self._post, "/claim", ClaimRequest(claimant=self._claimant))
        except ServiceUnavailable as error:
            raise ClaimRefused(f"the service did not respond for {CLAIM_TIMEOUT_S} s") from error
        match response.status_code:
            case HTTPStatus.CONFLICT:
                raise AttemptTaken
            case HTTPStatus.OK:
                claim = ClaimResponse.load(response.content)
                self._token = claim.token
                return claim
            case status:
                raise ClaimRefused(f"the service answered {status} to the claim")

    def report(self, batch: EventBatch) -> EventBatchResponse:
        """Send events. Raises ServiceUnavailable, Fenced, RequestRejected."""
        response = self._post_as_owner("/events", batch)
        match response.status_code:
            case HTTPStatus.OK:
                answer = EventBatchResponse.load(response.content)
                self._token = answer.token or self._token
                return answer
            case HTTPStatus.CONFLICT | HTTPStatus.GONE | HTTPStatus.NOT_FOUND | HTTPStatus.UNAUTHORIZED | HTTPStatus.FORBIDDEN:
                raise Fenced(f"the service answered {response.status_code}")
            case status:
                raise RequestRejected(f"the service answered {status}")

    def issues_store_tokens(self) -> bool:
        """Whether the service issues tokens for gs:// stores; otherwise the machine's own credentials are used."""
        return self._request_credentials().kind == "google"

    def fetch_store_token(self) -> tuple[str, datetime]:
        """A token for the object stores of this job, and when it expires. Raises StoreUnavailable."""
        credentials = self._request_credentials()
        if credentials.token is None or credentials.expires_at is None:
            raise StoreUnavailable("the service issues no tokens for the object store any more")
        return credentials.token, credentials.expires_at

    def _request_credentials(self) -> AttemptCredentials:
        import tenacity

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(ServiceUnavailable),
            wait=tenacity.wait_exponential_jitter(multiplier=RETRY_INITIAL_S, max=RETRY_MAX_S, jitter=RETRY_INITIAL_S),
            stop=tenacity.stop_after_delay(CREDENTIALS_TIMEOUT_S),
            reraise=True,
        )
        try:
            response = retrying(self._post_as_owner, "/credentials", None)
        except ServiceUnavailable as error:
            raise StoreUnavailable(f"no credentials for the object store: {error}") from error
        if response.status_code != HTTPStatus.OK:
            raise StoreUnavailable(f"no credentials for the object store: the service answered {response.status_code}")
        return AttemptCredentials.load(response.content)

    def finish(self, result: Result, timeout_s: float) -> bool:
        """Report the result; False if the service could not be reached, which then finds the result in the object store."""
        import tenacity

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(ServiceUnavailable),
            wait=tenacity.wait_fixed(RETRY_INITIAL_S),
            stop=tenacity.stop_after_delay(timeout_s),
            reraise=True,
        )
        try:
            return retrying(self._post_as_owner, "/result", result, max(1.0, timeout_s)).is_success
        except ServiceUnavailable:
            return False

    def _post_as_owner(self, path: str, body: ForwardCompatible | None, timeout_s: float | None = None) -> "httpx2.Response":
        """Send with the current token, or with a new one if the service does not accept that one any more."""
        response = self._post(path, body, timeout_s)
        if response.status_code != HTTPStatus.UNAUTHORIZED:
            return response
        renewal = self._post("/token", None, timeout_s, token=self._launch_token)
        if renewal.status_code != HTTPStatus.OK:
            return renewal  # the attempt is not this process's any more
        self._token = TokenResponse.load(renewal.content).token
        return self._post(path, body, timeout_s)

    def _post(
        self, path: str, body: ForwardCompatible | None, timeout_s: float | None = None, *, token: str | None = None
    ) -> "httpx2.Response":
        import httpx2

        content = body.model_dump_json() if body else None
        timeout = self._http.timeout if timeout_s is None else timeout_s
        headers = {"Authorization": f"Bearer {token or self._token}", CLAIMANT_HEADER: self._claimant, "Content-Type": "application/json"}
        headers |= self._trace_headers | (self._id_token_source.headers() if self._id_token_source else {})
        try:
            response = self._http.post(path, content=content, headers=headers, timeout=timeout)
        except httpx2.TransportError as error:
            raise ServiceUnavailable(f"{type(error).__name__}: {error}") from error
        if is_transient_status(response.status_code):
            raise ServiceUnavailable(f"the service answered {response.status_code}")
        return response

"""The three things that an attempt says to the service: claim, report, finish."""

from functools import cached_property
from http import HTTPStatus
from typing import TYPE_CHECKING

from jobs.errors import AttemptTaken, ClaimRefused
from jobs.settings import Settings
from schema.base import Lenient
from schema.events import BatchAnswer, EventBatch
from schema.result import Result
from schema.spec import ClaimAnswer, ClaimRequest

if TYPE_CHECKING:
    import httpx
    from google.auth.credentials import Credentials

CLAIM_PATIENCE_S = 600  # a service that is being replaced; after that the compute is better given back
RETRY_FIRST_S = 0.2
RETRY_MOST_S = 15.0


class ServiceAway(Exception):
    """The service did not answer, or not now: try again."""


class Fenced(Exception):
    """The attempt is over for the service: nothing that it does counts any more."""


class Refused(Exception):
    """The service does not accept what was sent, and never will."""


class Identity:
    """Who this machine is, for a service that lets only known identities in: Cloud Run's front door.

    The token goes into a header of its own, because `Authorization` holds the attempt's.
    See https://cloud.google.com/run/docs/authenticating/service-to-service.
    """

    def __init__(self, audience: str) -> None:
        self._audience = audience

    def headers(self) -> dict[str, str]:
        """A valid token, fetched anew before the last one expires. Raises ServiceAway when nobody gives one."""
        from google.auth.exceptions import GoogleAuthError
        from google.auth.transport.requests import Request

        try:
            if not self._credentials.valid:
                self._credentials.refresh(Request())
        except GoogleAuthError as error:
            raise ServiceAway(f"no identity token for {self._audience}: {error}") from error
        return {"X-Serverless-Authorization": f"Bearer {self._credentials.token}"}

    @cached_property
    def _credentials(self) -> "Credentials":
        from google.oauth2.id_token import fetch_id_token_credentials

        return fetch_id_token_credentials(self._audience)


class ServiceClient:
    """Speaks for one attempt. Made for one thread at a time; each method says what it raises."""

    def __init__(self, settings: Settings) -> None:
        import httpx

        self._http = httpx.Client(
            base_url=f"{settings.service_url}/internal/jobs/{settings.job_id}/attempts/{settings.attempt}",
            headers={"Authorization": f"Bearer {settings.token}"},
            timeout=httpx.Timeout(10.0, connect=3.0),
            trust_env=False,  # a proxy for the outside must not stand between an attempt and its service
        )
        self._identity = Identity(settings.service_audience) if settings.service_audience else None

    def claim(self, claimant: str) -> ClaimAnswer:
        """Own the attempt, waiting for the service if it is away. Raises AttemptTaken, ClaimRefused."""
        import tenacity

        patiently = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(ServiceAway),
            wait=tenacity.wait_exponential_jitter(multiplier=RETRY_FIRST_S, max=RETRY_MOST_S, jitter=RETRY_FIRST_S),
            stop=tenacity.stop_after_delay(CLAIM_PATIENCE_S),
            reraise=True,
        )
        try:
            answer = patiently(self._post, "/claim", ClaimRequest(claimant=claimant))
        except ServiceAway as error:
            raise ClaimRefused(f"the service did not answer for {CLAIM_PATIENCE_S} s") from error
        match answer.status_code:
            case HTTPStatus.CONFLICT:
                raise AttemptTaken
            case HTTPStatus.OK:
                return ClaimAnswer.load(answer.content)
            case status:
                raise ClaimRefused(f"the service answered {status} to the claim")

    def report(self, batch: EventBatch) -> BatchAnswer:
        """Send events. Raises ServiceAway, Fenced, Refused."""
        answer = self._post("/events", batch)
        match answer.status_code:
            case HTTPStatus.OK:
                return BatchAnswer.load(answer.content)
            case HTTPStatus.CONFLICT | HTTPStatus.GONE | HTTPStatus.NOT_FOUND | HTTPStatus.UNAUTHORIZED | HTTPStatus.FORBIDDEN:
                raise Fenced(f"the service answered {answer.status_code}")
            case status:
                raise Refused(f"the service answered {status}")

    def finish(self, result: Result, patience_s: float) -> bool:
        """Give the last word; False when the service could not be reached. It is in the object store as well."""
        import tenacity

        briefly = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(ServiceAway),
            wait=tenacity.wait_fixed(RETRY_FIRST_S),
            stop=tenacity.stop_after_delay(patience_s),
            reraise=True,
        )
        try:
            return briefly(self._post, "/result", result, max(1.0, patience_s)).is_success
        except ServiceAway:
            return False

    def _post(self, path: str, body: Lenient, timeout_s: float | None = None) -> "httpx.Response":
        import httpx

        content = body.model_dump_json()
        timeout = self._http.timeout if timeout_s is None else timeout_s
        headers = {"Content-Type": "application/json"} | (self._identity.headers() if self._identity else {})
        try:
            answer = self._http.post(path, content=content, headers=headers, timeout=timeout)
        except httpx.TransportError as error:
            raise ServiceAway(f"{type(error).__name__}: {error}") from error
        if answer.status_code == HTTPStatus.TOO_MANY_REQUESTS or answer.is_server_error:
            raise ServiceAway(f"the service answered {answer.status_code}")
        return answer

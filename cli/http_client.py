"""The HTTP client of the command line: retries, idempotency keys and event streams."""

import json
import time
import uuid
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Any, BinaryIO, Self

import httpx2
from tenacity import RetryCallState, Retrying, retry_if_exception_type, retry_if_result, stop_after_attempt, wait_exponential

from cli.errors import ApiError, Problem
from cli.text import clean_strings, clean_text

TIMEOUT = httpx2.Timeout(30.0, read=300.0)  # the service validates every row of an upload before it responds
MAX_TRIES = 4  # over a few seconds, which covers a restart of the service
MAX_WATCH_TRIES = 20  # about a minute: `watch` runs for hours and should survive an outage
BACKOFF = wait_exponential(0.3, max=3)
MAX_RETRY_AFTER_S = 30  # a longer Retry-After is capped: a person is waiting
RECONNECT_DELAY_S = 0.5
DATASET_POLL_S = 1.0


# Any: responses are JSON; their fields are in service/api/responses.py.
Json = dict[str, Any]


class Client:
    """A client of one service. Every method that sends a request raises ApiError.

    Broken connections, 429 responses and 503 responses with Retry-After are retried. A request that creates a job sends the same
    Idempotency-Key with every try, so a lost response never creates a second job. Uploads have no key and are sent once.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        identity_token: str | None = None,
        timeout: httpx2.Timeout = TIMEOUT,
        max_tries: int = MAX_TRIES,
        transport: httpx2.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`identity_token` is for a service that IAM protects on Cloud Run; with an API key as well, it is for the front end only."""
        self.url = url.rstrip("/")
        headers = {"Authorization": f"Bearer {api_key or identity_token}"} if api_key or identity_token else {}
        if api_key and identity_token:
            headers["X-Serverless-Authorization"] = f"Bearer {identity_token}"
        self._http = httpx2.Client(base_url=self.url, timeout=timeout, headers=headers, transport=transport)
        self._max_tries = max_tries
        self._sleep = sleep

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def get(self, path: str, **params: str | int | list[str] | None) -> Json:
        """GET a resource. Query parameters that are None are left out."""
        query = {name: value for name, value in params.items() if value is not None}
        return self._call_with_retry(lambda: self._http.get(path, params=query))

    def get_health(self) -> Json:
        """What the service says about itself, also when it is not well."""
        try:
            return clean_strings(self._http.get("/health").json())
        except httpx2.TransportError as error:
            raise self._unreachable_error(error) from error
        except ValueError as error:
            raise ApiError(f"{self.url} is not a Tunesmith service", "set --url or TUNESMITH_URL") from error

    def post(self, path: str, body: object | None = None) -> Json:
        """POST a request that is safe to repeat: pause, resume, retry, cancel."""
        return self._call_with_retry(lambda: self._http.post(path, json=body))

    def delete(self, path: str, *, hub_token: str | None = None, **query: str) -> Json:
        """DELETE a resource; with `hub_token` also what the job pushed to the Hub."""
        params = query | ({"delete_hub": "true"} if hub_token else {})
        headers = {"X-HF-Token": hub_token} if hub_token else {}
        return self._call_with_retry(lambda: self._http.delete(path, params=params, headers=headers))

    def train(self, request: Json) -> str:
        """Submit a training job and return its id."""
        return self._post_idempotent("/train", request)["job_id"]

    def export(self, job_id: str, step: int | None, request: Json) -> str:
        """Submit a job that exports the checkpoint of a step, or the published one, and return its id."""
        action = "export" if step is None else f"checkpoints/{step}/export"
        return self._post_idempotent(f"/jobs/{job_id}/{action}", request)["job_id"]

    def clone(self, job_id: str, patch: Json) -> str:
        """Submit the request of a job again with changes and return the new id."""
        return self._post_idempotent(f"/jobs/{job_id}/clone", patch)["job_id"]

    def create_key(self, request: Json) -> Json:
        """Create an API key. Sent once: a second try after a lost answer would leave a key that nobody knows."""
        return self._call_once(lambda: self._http.post("/keys", json=request))

    def plan(self, request: Json) -> Json:
        """What a training job would do, need, take and cost. A service from before dry runs submits it instead: then there is a job_id."""
        return self._post_idempotent("/train?dry_run=true", request)

    def upload(self, file: BinaryIO, filename: str, fields: dict[str, str]) -> Json:
        """Upload a dataset as a stream."""
        return self._call_once(lambda: self._http.post("/datasets", files={"file": (filename, file)}, data=fields))

    def check(self, file: BinaryIO, filename: str, fields: dict[str, str]) -> Json:
        """Let the service check a dataset, which it does not keep."""
        return self._call_once(lambda: self._http.post("/datasets/check", files={"file": (filename, file)}, data=fields))

    def import_dataset(self, fields: dict[str, str]) -> Json:
        """Create a dataset from a file in the dataset store, or from a source elsewhere."""
        return self._call_once(lambda: self._http.post("/datasets", data=fields))

    def send_file(self, link: Json, file: BinaryIO, size_bytes: int) -> None:
        """Send a file to a link that the service returned. Other hosts than the service do not get the credentials."""
        url, headers = link["url"], {**link["headers"], "Content-Length": str(size_bytes)}
        put = self._http.put if url.startswith("/") else httpx2.put
        try:
            response = put(url, content=file, headers=headers, timeout=TIMEOUT)
        except httpx2.TransportError as error:
            raise ApiError(f"the upload broke off: {error}", "repeat the command", "unreachable") from error
        if response.is_error:
            raise _api_error(response)

    def follow_dataset(self, dataset_id: str) -> Iterator[Json]:
        """Yield a dataset again and again until no job makes it any more."""
        while True:
            dataset = self._call_with_retry(lambda: self._http.get(f"/datasets/{dataset_id}"), MAX_WATCH_TRIES)
            yield dataset
            if dataset["status"] != "processing":
                return
            self._sleep(DATASET_POLL_S)

    def stream_events(self, job_id: str, after: int = 0) -> Iterator[Json]:
        """Yield events until the job is final, and reconnect when a connection ends. A paused job is not final.

        Between them come `progress` events, which are of the moment: they have no id, and an earlier service sends none.
        """
        last_id = str(after)
        self.get(f"/jobs/{job_id}")  # a wrong URL or id fails immediately
        while True:
            for event in self._stream_once(f"/jobs/{job_id}/events", {}, last_id):
                if event.event == "done":
                    return
                data: Json = clean_strings(json.loads(event.data))
                if event.event == "progress":
                    yield {"event": {"type": "progress", **data}}
                else:
                    last_id = str(data["id"])
                    yield data
            self._wait_for_job(job_id)

    def follow_log(self, job_id: str, attempt: int | None, tail: int | None = None) -> Iterator[Json]:
        """Yield the output of an attempt in parts until the job ends, from `tail` lines before its end. Reconnects where it left off."""
        params = {"follow": "true"} | ({"attempt": str(attempt)} if attempt else {}) | ({} if tail is None else {"tail": str(tail)})
        last_id = ""
        while True:
            for event in self._stream_once(f"/jobs/{job_id}/logs", params, last_id):
                if event.event == "done":
                    return
                part: Json = clean_strings(json.loads(event.data))
                yield {"attempt": part["attempt"], "text": part["text"], "next_offset": part["offset"]}
                last_id = event.id
            self._wait_for_job(job_id)

    def _stream_once(self, path: str, params: dict[str, str], last_id: str) -> Iterator[httpx2.ServerSentEvent]:
        """Yield the events of one connection; none if the service is busy or unreachable."""
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": last_id} if last_id else {})
        try:
            with self._http.stream("GET", path, params=params, headers=headers) as response:
                if _is_retryable(response):
                    return
                if response.is_error:
                    response.read()
                    raise _api_error(response)
                yield from httpx2.EventSource(response)
        except httpx2.SSEError as error:
            hint = "the service may be of an earlier version: `tunesmith doctor` compares them"
            raise ApiError(f"{self.url}{path} does not stream events: {error}", hint) from error
        except httpx2.TransportError:
            return

    def _wait_for_job(self, job_id: str) -> None:
        """Wait until the service answers again, after a connection ended. Raises ApiError if the job or the service is gone."""
        self._sleep(RECONNECT_DELAY_S)
        self._call_with_retry(lambda: self._http.get(f"/jobs/{job_id}"), MAX_WATCH_TRIES)

    def _post_idempotent(self, path: str, body: Json) -> Json:
        """POST a request that creates a job; every try sends the same key."""
        key = {"Idempotency-Key": uuid.uuid4().hex}
        return self._call_with_retry(lambda: self._http.post(path, json=body, headers=key))

    def _call_with_retry(self, call: Callable[[], httpx2.Response], max_tries: int | None = None) -> Json:
        retrying = Retrying(
            retry=retry_if_exception_type(httpx2.TransportError) | retry_if_result(_is_retryable),
            stop=stop_after_attempt(max_tries or self._max_tries),
            wait=_retry_delay_s,
            sleep=self._sleep,
            retry_error_callback=_last_outcome,
        )
        return self._call_once(lambda: retrying(call))

    def _call_once(self, call: Callable[[], httpx2.Response]) -> Json:
        try:
            response = call()
        except httpx2.TransportError as error:
            raise self._unreachable_error(error) from error
        if response.is_error:
            raise _api_error(response)
        return clean_strings(response.json())

    def _unreachable_error(self, error: httpx2.TransportError) -> ApiError:
        return ApiError(
            f"no service answers at {self.url} ({error})", "start a service with `tunesmith serve`, or set --url", "unreachable"
        )


def _is_retryable(response: httpx2.Response) -> bool:
    """Whether to retry. A 503 without Retry-After is final, such as the response to an incomplete deletion."""
    too_busy = response.status_code == HTTPStatus.SERVICE_UNAVAILABLE and "Retry-After" in response.headers
    return too_busy or response.status_code == HTTPStatus.TOO_MANY_REQUESTS


def _retry_delay_s(state: RetryCallState) -> float:
    """Seconds until the next try: the exponential backoff, or the Retry-After of the response if that is longer."""
    retry_after = "" if state.outcome is None or state.outcome.failed else state.outcome.result().headers.get("Retry-After", "")
    return max(BACKOFF(state), min(int(retry_after), MAX_RETRY_AFTER_S) if retry_after.isdecimal() else 0)


def _last_outcome(state: RetryCallState) -> httpx2.Response:
    """The response of the last try; raises its exception."""
    assert state.outcome is not None
    return state.outcome.result()


def _api_error(response: httpx2.Response) -> ApiError:
    try:
        body: Json = clean_strings(response.json())
        error: Json = body.get("error", body)  # an incomplete deletion has no `error` object
        more = [Problem(each["message"], each.get("hint", ""), each.get("param")) for each in error.get("errors", [])[1:]]
        return ApiError(error["message"], error.get("hint", ""), error.get("code", ""), response.status_code, error.get("param"), more)
    except (ValueError, KeyError, TypeError, AttributeError):
        needs_identity = response.status_code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
        hint = (
            "Cloud Run requires an identity token: TUNESMITH_IDENTITY_TOKEN=$(gcloud auth print-identity-token)" if needs_identity else ""
        )
        return ApiError(
            f"the service answered {response.status_code}: {clean_text(response.text[:200])}", hint, status=response.status_code
        )

"""The HTTP API, as the command line uses it."""

import hashlib
import json
import time
import uuid
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any, BinaryIO, Self

import httpx2
from tenacity import RetryCallState, Retrying, retry_if_exception_type, retry_if_result, stop_after_attempt, wait_exponential

from cli.errors import ApiError

CHUNK_BYTES = 1 << 20
TIMEOUT = httpx2.Timeout(30.0, read=300.0)  # a large upload is checked row by row before it is answered
MAX_TRIES = 4  # over some seconds: a service that restarts is back by then
MAX_WATCH_TRIES = 20  # who follows a job for hours waits a minute for a service that is away
BACKOFF = wait_exponential(0.3, max=3)
MAX_RETRY_AFTER_S = 30  # whatever a service asks for: somebody sits in front of this
RECONNECT_DELAY_S = 0.5


# Any: answers are JSON; their shapes are in service/api/responses.py.
Json = dict[str, Any]


class Client:
    """A service at a url. Every method raises ApiError with what to do about it.

    A connection that breaks, and a service that says "come again", are tried again a few times. What makes something carries one
    Idempotency-Key over all its tries, so that a lost answer never makes a second job. Uploads cannot, and are tried once.
    """

    def __init__(
        self,
        url: str,
        identity_token: str | None = None,
        *,
        transport: httpx2.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.url = url.rstrip("/")
        headers = {"Authorization": f"Bearer {identity_token}"} if identity_token else {}
        self._http = httpx2.Client(base_url=self.url, timeout=TIMEOUT, headers=headers, transport=transport)
        self._sleep = sleep

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def get(self, path: str, **params: str | int | None) -> Json:
        """GET something."""
        wanted = {name: value for name, value in params.items() if value is not None}
        return self._call_with_retry(lambda: self._http.get(path, params=wanted))

    def post(self, path: str, body: object | None = None) -> Json:
        """POST of something that is harmless to repeat: pause, resume, retry, cancel."""
        return self._call_with_retry(lambda: self._http.post(path, json=body))

    def delete(self, path: str, *, hub_token: str | None = None) -> Json:
        """DELETE something; with a token, what it pushed to the Hub as well."""
        params = {"delete_hub": "true"} if hub_token else {}
        headers = {"X-HF-Token": hub_token} if hub_token else {}
        return self._call_with_retry(lambda: self._http.delete(path, params=params, headers=headers))

    def train(self, request: Json) -> str:
        """Submit a job."""
        return self._post_idempotent("/train", request)["job_id"]

    def export(self, job_id: str, step: int | None, request: Json) -> str:
        """Submit a job that exports a checkpoint: that of a step, or what was published."""
        below = "export" if step is None else f"checkpoints/{step}/export"
        return self._post_idempotent(f"/jobs/{job_id}/{below}", request)["job_id"]

    def clone(self, job_id: str, patch: Json) -> str:
        """Submit a job again, with changes."""
        return self._post_idempotent(f"/jobs/{job_id}/clone", patch)["job_id"]

    def upload(self, file: BinaryIO, filename: str, fields: dict[str, str]) -> Json:
        """Upload a dataset, streaming."""
        return self._call_once(lambda: self._http.post("/datasets", files={"file": (filename, file)}, data=fields))

    def import_dataset(self, fields: dict[str, str]) -> Json:
        """Make a dataset of a file that lies in the store."""
        return self._call_once(lambda: self._http.post("/datasets", data=fields))

    def stream_events(self, job_id: str, after: int = 0) -> Iterator[Json]:
        """Events as they happen, over as many connections as it takes, until the job is final; a paused job is waited for."""
        place = after
        self.get(f"/jobs/{job_id}")  # a wrong url is told at once
        while True:
            for event in self._stream_once(job_id, place):
                if event is None:
                    return
                place = event["id"]
                yield event
            self._sleep(RECONNECT_DELAY_S)
            self._call_with_retry(lambda: self._http.get(f"/jobs/{job_id}"), MAX_WATCH_TRIES)  # is it still there?

    def follow_log(self, job_id: str, attempt: int | None, offset: int = 0) -> Iterator[str]:
        """An attempt's output until the job ends."""
        params = {"follow": "true", "offset": str(offset)} | ({"attempt": str(attempt)} if attempt else {})
        try:
            with self._http.stream("GET", f"/jobs/{job_id}/logs", params=params, timeout=httpx2.Timeout(30.0, read=None)) as answer:
                if answer.is_error:
                    answer.read()
                    raise _api_error(answer)
                yield from answer.iter_text()
        except httpx2.TransportError as error:
            raise self._unreachable_error(error) from error

    def download_file(self, file: Json, target: Path, progress: Callable[[int], None]) -> None:
        """Download a file behind a link and check its digest; it gets its name when it is whole."""
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(target.name + ".part")
        digest = hashlib.sha256()
        try:
            with httpx2.stream("GET", file["url"], timeout=TIMEOUT) as answer, part.open("wb") as out:
                if answer.is_error:
                    answer.read()
                    raise _api_error(answer)
                for chunk in answer.iter_bytes(CHUNK_BYTES):
                    digest.update(chunk)
                    out.write(chunk)
                    progress(len(chunk))
        except httpx2.TransportError as error:
            raise self._unreachable_error(error) from error
        if digest.hexdigest() != file["sha256"]:
            part.unlink()
            raise ApiError(f"{target.name} arrived damaged", "try again")
        part.replace(target)

    def _stream_once(self, job_id: str, after: int) -> Iterator[Json | None]:
        """One connection's events, perhaps none; None when the service said that there are no more."""
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
        try:
            with self._http.stream("GET", f"/jobs/{job_id}/events", headers=headers) as answer:
                if _is_retryable(answer):
                    return
                if answer.is_error:
                    answer.read()
                    raise _api_error(answer)
                for event in httpx2.EventSource(answer):
                    if event.event == "done":
                        yield None
                        return
                    yield json.loads(event.data)
        except httpx2.TransportError:
            return

    def _post_idempotent(self, path: str, body: Json) -> Json:
        """POST of something that makes a job: every try carries the same key."""
        key = {"Idempotency-Key": uuid.uuid4().hex}
        return self._call_with_retry(lambda: self._http.post(path, json=body, headers=key))

    def _call_with_retry(self, call: Callable[[], httpx2.Response], max_tries: int = MAX_TRIES) -> Json:
        again = Retrying(
            retry=retry_if_exception_type(httpx2.TransportError) | retry_if_result(_is_retryable),
            stop=stop_after_attempt(max_tries),
            wait=_retry_delay_s,
            sleep=self._sleep,
            retry_error_callback=_last_outcome,
        )
        return self._call_once(lambda: again(call))

    def _call_once(self, call: Callable[[], httpx2.Response]) -> Json:
        try:
            answer = call()
        except httpx2.TransportError as error:
            raise self._unreachable_error(error) from error
        if answer.is_error:
            raise _api_error(answer)
        return answer.json()

    def _unreachable_error(self, error: httpx2.TransportError) -> ApiError:
        return ApiError(
            f"no service answers at {self.url} ({error})", "start one with `tunesmith serve`, or name it with --url", "unreachable"
        )


def _is_retryable(answer: httpx2.Response) -> bool:
    """Whether the same request may do better in a moment. A 503 without a time, as of a deletion that is not complete, would not."""
    too_busy = answer.status_code == HTTPStatus.SERVICE_UNAVAILABLE and "Retry-After" in answer.headers
    return too_busy or answer.status_code == HTTPStatus.TOO_MANY_REQUESTS


def _retry_delay_s(state: RetryCallState) -> float:
    """How long to wait before the next try: at least as long as the service asked for, within reason."""
    asked = "" if state.outcome is None or state.outcome.failed else state.outcome.result().headers.get("Retry-After", "")
    return max(BACKOFF(state), min(int(asked), MAX_RETRY_AFTER_S) if asked.isdecimal() else 0)


def _last_outcome(state: RetryCallState) -> httpx2.Response:
    """The last try's answer, or its exception."""
    assert state.outcome is not None
    return state.outcome.result()


def _api_error(answer: httpx2.Response) -> ApiError:
    try:
        body = answer.json()
        error: Json = body.get("error", body)  # a deletion that is not complete tells in its own words
        return ApiError(error["message"], error.get("hint", ""), error.get("code", ""), answer.status_code, error.get("param"))
    except (ValueError, KeyError, TypeError, AttributeError):
        known = answer.status_code not in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
        hint = "" if known else "on Cloud Run the front door asks who you are: TUNESMITH_IDENTITY_TOKEN=$(gcloud auth print-identity-token)"
        return ApiError(f"the service answered {answer.status_code}: {answer.text[:200]}", hint, status=answer.status_code)

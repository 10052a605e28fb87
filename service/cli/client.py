"""The HTTP API, as the command line uses it."""

import hashlib
import json
import uuid
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any, BinaryIO, Self

import httpx2
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

CHUNK_BYTES = 1 << 20
TIMEOUT = httpx2.Timeout(30.0, read=300.0)  # a large upload is checked row by row before it is answered
RETRIES = 4  # over some seconds: a service that restarts is back by then


class ApiError(Exception):
    """The service refused, or could not be reached."""

    def __init__(self, message: str, hint: str = "", code: str = "", status: int = 0) -> None:
        self.message = message
        self.hint = hint
        self.code = code
        self.status = status
        super().__init__(message)


# Any: answers are JSON; their shapes are in service/api/views.py.
Json = dict[str, Any]


class Client:
    """A service at a url. Every method raises ApiError with what to do about it."""

    def __init__(self, url: str, identity_token: str | None = None) -> None:
        self.url = url.rstrip("/")
        headers = {"Authorization": f"Bearer {identity_token}"} if identity_token else {}
        self._http = httpx2.Client(base_url=self.url, timeout=TIMEOUT, headers=headers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def get(self, path: str, **params: str | int | None) -> Json:
        """GET, again when the connection breaks."""
        wanted = {name: value for name, value in params.items() if value is not None}
        return self._again(lambda: self._http.get(path, params=wanted))

    def post(self, path: str, body: object | None = None) -> Json:
        """POST of something that is harmless to repeat."""
        return self._again(lambda: self._http.post(path, json=body))

    def delete(self, path: str) -> Json:
        """DELETE, again when the connection breaks."""
        return self._again(lambda: self._http.delete(path))

    def train(self, request: Json) -> str:
        """Submit a job; a lost answer never makes a second one."""
        key = {"Idempotency-Key": uuid.uuid4().hex}
        return self._again(lambda: self._http.post("/train", json=request, headers=key))["job_id"]

    def upload(self, file: BinaryIO, filename: str, fields: dict[str, str]) -> Json:
        """Upload a dataset, streaming."""
        return self._once(lambda: self._http.post("/datasets", files={"file": (filename, file)}, data=fields))

    def take_in(self, fields: dict[str, str]) -> Json:
        """Make a dataset of a file that lies in the store."""
        return self._once(lambda: self._http.post("/datasets", data=fields))

    def events(self, job_id: str, after: int = 0) -> Iterator[Json]:
        """Events as they happen, over as many connections as it takes, until the job is final."""
        place = after
        while True:
            for event in self._stream(job_id, place):
                if event is None:
                    return
                place = event["id"]
                yield event
            self.get(f"/jobs/{job_id}")  # is it still there? waits for a service that restarts

    def follow_log(self, job_id: str, attempt: int | None, offset: int = 0) -> Iterator[str]:
        """An attempt's output until the job ends."""
        params = {"follow": "true", "offset": str(offset)} | ({"attempt": str(attempt)} if attempt else {})
        try:
            with self._http.stream("GET", f"/jobs/{job_id}/logs", params=params, timeout=httpx2.Timeout(30.0, read=None)) as answer:
                if answer.is_error:
                    answer.read()
                    raise _refused(answer)
                yield from answer.iter_text()
        except httpx2.TransportError as error:
            raise self._unreachable(error) from error

    def fetch(self, file: Json, target: Path, progress: Callable[[int], None]) -> None:
        """Download a file behind a link and check its digest; it gets its name when it is whole."""
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(target.name + ".part")
        digest = hashlib.sha256()
        try:
            with httpx2.stream("GET", file["url"], timeout=TIMEOUT) as answer, part.open("wb") as out:
                if answer.is_error:
                    answer.read()
                    raise _refused(answer)
                for chunk in answer.iter_bytes(CHUNK_BYTES):
                    digest.update(chunk)
                    out.write(chunk)
                    progress(len(chunk))
        except httpx2.TransportError as error:
            raise self._unreachable(error) from error
        if digest.hexdigest() != file["sha256"]:
            part.unlink()
            raise ApiError(f"{target.name} arrived damaged", "try again")
        part.replace(target)

    def _stream(self, job_id: str, after: int) -> Iterator[Json | None]:
        """One connection's events; None when the service said that there are no more."""
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
        try:
            with self._http.stream("GET", f"/jobs/{job_id}/events", headers=headers) as answer:
                if answer.is_error:
                    answer.read()
                    raise _refused(answer)
                for event in httpx2.EventSource(answer):
                    if event.event == "done":
                        yield None
                        return
                    yield json.loads(event.data)
        except httpx2.TransportError:
            return

    def _again(self, call: Callable[[], httpx2.Response]) -> Json:
        again = Retrying(
            retry=retry_if_exception_type(httpx2.TransportError),
            stop=stop_after_attempt(RETRIES),
            wait=wait_exponential(0.3, max=3),
            reraise=True,
        )
        return self._once(lambda: again(call))

    def _once(self, call: Callable[[], httpx2.Response]) -> Json:
        try:
            answer = call()
        except httpx2.TransportError as error:
            raise self._unreachable(error) from error
        if answer.is_error:
            raise _refused(answer)
        return answer.json()

    def _unreachable(self, error: httpx2.TransportError) -> ApiError:
        return ApiError(
            f"no service answers at {self.url} ({error})", "start one with `tunesmith serve`, or name it with --url", "unreachable"
        )


def _refused(answer: httpx2.Response) -> ApiError:
    try:
        error = answer.json()["error"]
        return ApiError(error["message"], error["hint"], error["code"], answer.status_code)
    except (ValueError, KeyError, TypeError):
        known = answer.status_code not in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
        hint = "" if known else "on Cloud Run the front door asks who you are: TUNESMITH_IDENTITY_TOKEN=$(gcloud auth print-identity-token)"
        return ApiError(f"the service answered {answer.status_code}: {answer.text[:200]}", hint, status=answer.status_code)

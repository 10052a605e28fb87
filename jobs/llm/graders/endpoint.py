"""A client for an OpenAI-compatible endpoint: concurrent requests, and messages for its errors."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from jobs.llm.graders.base import FailedGrade
from jobs.runtime.egress import check_url
from jobs.runtime.errors import JobFailed, exception_chain
from schema.egress import EgressPolicy, EgressRefused

if TYPE_CHECKING:
    from openai import OpenAIError

MAX_RETRIES = 4  # the client waits 0.5 s before the first and doubles it each time, or obeys Retry-After

STATUS_EXPLANATIONS = {
    301: " (a redirect, which is not followed)",
    302: " (a redirect, which is not followed)",
    303: " (a redirect, which is not followed)",
    307: " (a redirect, which is not followed)",
    308: " (a redirect, which is not followed)",
    401: " (the API key is wrong)",
    403: " (the API key lacks permission)",
    404: " (no such URL or model)",
    429: " (too many requests)",
}

Item = TypeVar("Item")
Response = TypeVar("Response")


def check_base_url(grader_name: str, base_url: str, policy: EgressPolicy) -> None:
    """Raise JobFailed when the deployment does not connect to that endpoint."""
    try:
        check_url(base_url, policy)
    except EgressRefused as error:
        raise JobFailed("invalid_config", f"grader {grader_name!r}: base_url is refused: {error}", error.hint) from error


class Endpoint:
    """A client with its own API key. Requests run in a daemon thread, so that canceling a job does not wait for the endpoint.

    It connects only to addresses that the egress policy allows, and follows no redirect, which would take the key elsewhere.
    """

    def __init__(
        self, base_url: str, api_key: str | None, timeout_s: float, policy: EgressPolicy, *, max_retries: int = MAX_RETRIES
    ) -> None:
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        from jobs.llm.graders.checked_transport import CheckedTransport

        self.base_url = base_url
        self.timeout_s = timeout_s
        # Always pass a key: without one the client reads OPENAI_API_KEY from the environment.
        self.client = AsyncOpenAI(
            base_url=base_url,
            api_key=api_key or "none",
            timeout=timeout_s,
            max_retries=max_retries,
            http_client=DefaultAsyncHttpxClient(transport=CheckedTransport(base_url, policy), follow_redirects=False),
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="grader-endpoint", daemon=True)
        self._thread.start()

    def send_all(
        self, send_one: Callable[[Item], Awaitable[Response]], items: Sequence[Item], *, max_concurrency: int
    ) -> "list[Response | OpenAIError]":
        """The response or the error of each item, in order, with at most `max_concurrency` requests at a time."""
        from openai import OpenAIError

        async def map_all() -> "list[Response | OpenAIError]":
            semaphore = asyncio.Semaphore(max_concurrency)

            async def with_concurrency_limit(item: Item) -> "Response | OpenAIError":
                async with semaphore:
                    try:
                        return await send_one(item)
                    except OpenAIError as error:
                        return error

            return await asyncio.gather(*map(with_concurrency_limit, items))

        future = asyncio.run_coroutine_threadsafe(map_all(), self._loop)
        try:
            return future.result()
        finally:
            future.cancel()

    def close(self) -> None:
        """Close the connections and end the thread."""
        asyncio.run_coroutine_threadsafe(self.client.close(), self._loop).result(timeout=5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5)
        self._loop.close()

    def describe_error(self, error: "OpenAIError") -> str:
        """The error without the response body, which may repeat the row or the key."""
        from openai import APIConnectionError, APIStatusError, APITimeoutError

        refusal = next((cause for cause in exception_chain(error) if isinstance(cause, EgressRefused)), None)
        if refusal is not None:
            return f"{self.base_url} was not called: {refusal}"
        match error:
            case APIStatusError():
                return f"{self.base_url} answered {error.status_code}{STATUS_EXPLANATIONS.get(error.status_code, '')}"
            case APITimeoutError():
                return f"{self.base_url} did not answer within {self.timeout_s:g} s"
            case APIConnectionError():
                return f"{self.base_url} cannot be reached"
            case _:
                return f"{self.base_url}: {type(error).__name__}"

    def make_failed_grade(self, error: "OpenAIError") -> FailedGrade:
        """The error as a grade."""
        return FailedGrade(self.describe_error(error))

    def make_job_failed(self, grader_name: str, error: "OpenAIError") -> JobFailed:
        """The error as the job's failure, for checks before training."""
        from openai import AuthenticationError, PermissionDeniedError

        if isinstance(error, AuthenticationError | PermissionDeniedError):
            return JobFailed("auth", f"grader {grader_name!r}: {self.describe_error(error)}", "check the grader's api_key")
        return JobFailed(
            "invalid_config",
            f"grader {grader_name!r}: {self.describe_error(error)}",
            "check the grader's base_url and model, or try again later",
        )

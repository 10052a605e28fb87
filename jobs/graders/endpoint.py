"""An endpoint that speaks OpenAI's API, asked many things at once, and what its errors mean."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from jobs.errors import JobFailed
from jobs.graders.grading import Failed

if TYPE_CHECKING:
    from openai import OpenAIError

TRIES_MORE = 4  # the client waits 0.5 s before the first and twice as long before each next one, or as long as it is told to

Asked = TypeVar("Asked")
Got = TypeVar("Got")


class Endpoint:
    """A client with a key of its own. Its calls run in a thread that dies with the process: a cancel does not wait for a judge."""

    def __init__(self, base_url: str, key: str | None, timeout_s: float, *, tries_more: int = TRIES_MORE) -> None:
        from openai import AsyncOpenAI

        self.base_url = base_url
        self.timeout_s = timeout_s
        # A key is passed always, or the client would take another one from the environment.
        self.client = AsyncOpenAI(base_url=base_url, api_key=key or "none", timeout=timeout_s, max_retries=tries_more)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="grader-endpoint", daemon=True)
        self._thread.start()

    def ask(self, one: Callable[[Asked], Awaitable[Got]], items: Sequence[Asked], *, at_once: int) -> "list[Got | OpenAIError]":
        """What the endpoint answers to each, or how it failed to, in order."""
        from openai import OpenAIError

        async def all_of_them() -> "list[Got | OpenAIError]":
            room = asyncio.Semaphore(at_once)

            async def when_there_is_room(item: Asked) -> "Got | OpenAIError":
                async with room:
                    try:
                        return await one(item)
                    except OpenAIError as error:
                        return error

            return await asyncio.gather(*map(when_there_is_room, items))

        future = asyncio.run_coroutine_threadsafe(all_of_them(), self._loop)
        try:
            return future.result()
        finally:
            future.cancel()

    def close(self) -> None:
        """Close the connections, and end the thread."""
        asyncio.run_coroutine_threadsafe(self.client.close(), self._loop).result(timeout=5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5)
        self._loop.close()

    def why(self, error: "OpenAIError") -> str:
        """What went wrong, without the answer's body: it may repeat the row, or the key."""
        from openai import APIConnectionError, APIStatusError, APITimeoutError

        match error:
            case APIStatusError():
                return f"{self.base_url} answered {error.status_code}{MEANING.get(error.status_code, '')}"
            case APITimeoutError():
                return f"{self.base_url} did not answer within {self.timeout_s:g} s"
            case APIConnectionError():
                return f"{self.base_url} cannot be reached"
            case _:
                return f"{self.base_url}: {type(error).__name__}"

    def failed(self, error: "OpenAIError") -> Failed:
        """The error as a grade."""
        return Failed(self.why(error))

    def refusal(self, name: str, error: "OpenAIError") -> JobFailed:
        """The error as the end of the job, before it has begun."""
        from openai import AuthenticationError, PermissionDeniedError

        if isinstance(error, AuthenticationError | PermissionDeniedError):
            return JobFailed("auth", f"grader {name!r}: {self.why(error)}", "check the grader's api_key")
        return JobFailed(
            "invalid_config", f"grader {name!r}: {self.why(error)}", "check the grader's base_url and model, or try again later"
        )


MEANING = {401: " (the key is wrong)", 403: " (the key may not do this)", 404: " (no such address or model)", 429: " (too many requests)"}

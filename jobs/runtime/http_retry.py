"""Which HTTP errors are transient, and retries of requests to the Hugging Face Hub."""

import time
from collections.abc import Callable
from json import JSONDecodeError
from typing import TypeVar

from jobs.runtime.errors import exception_chain
from jobs.runtime.retry import RETRY_INITIAL_S, RETRY_MAX_S, TRIES

ReturnT = TypeVar("ReturnT")


def is_transient_status(status: int) -> bool:
    """Whether the same request may succeed later: a timeout, too many requests, or a server error."""
    return status in (408, 429) or status >= 500


def retry_hub(operation: Callable[[], ReturnT], *, tries: int = TRIES, sleep: Callable[[float], None] = time.sleep) -> ReturnT:
    """Run a request to the Hub and retry it while its error is transient. Raises the last error."""
    import tenacity

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(is_transient_hub_error),
        wait=tenacity.wait_exponential(RETRY_INITIAL_S, RETRY_MAX_S),
        stop=tenacity.stop_after_attempt(tries),
        sleep=sleep,
        reraise=True,
    )
    return retrying(operation)


def is_transient_hub_error(error: BaseException) -> bool:
    """Whether a request to the Hub may succeed later."""
    from httpx2 import TransportError
    from huggingface_hub.errors import OfflineModeIsEnabled

    status = http_status(error)
    if status is not None:
        return is_transient_status(status) or status in (409, 412)  # two commits at once; another commit came first
    causes = list(exception_chain(error))
    if any(isinstance(cause, JSONDecodeError) for cause in causes):  # a gateway's error page instead of the Hub's response
        return True
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in causes):
        return False
    # The Xet client, which is not part of the HTTP client, raises RuntimeError for every network error.
    return any(isinstance(cause, TransportError | ConnectionError | TimeoutError | RuntimeError) for cause in causes)


def http_status(error: BaseException) -> int | None:
    """The status of the response that caused an error, which a client may have wrapped in others; None without a response."""
    responses = (getattr(cause, "response", None) for cause in exception_chain(error))
    return next((int(response.status_code) for response in responses if response is not None), None)

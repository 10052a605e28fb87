"""Which HTTP errors are retried."""

import pytest

from jobs.runtime.http_retry import is_transient_hub_error, is_transient_status, retry_hub


class ResponseError(Exception):
    """A client's error with the response that caused it."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.response = type("Response", (), {"status_code": status})()


@pytest.mark.parametrize(
    ("status", "transient"), [(400, False), (401, False), (404, False), (408, True), (409, False), (429, True), (503, True)]
)
def test_timeouts_and_server_errors_are_transient(status: int, transient: bool) -> None:
    assert is_transient_status(status) is transient


@pytest.mark.parametrize(("status", "transient"), [(403, False), (404, False), (408, True), (409, True), (412, True), (500, True)])
def test_hub_errors_also_include_commit_conflicts(status: int, transient: bool) -> None:
    assert is_transient_hub_error(ResponseError(status)) is transient


def test_wrapped_xet_error_is_transient_and_wrapped_rejection_is_not() -> None:
    wrapped = ValueError("download failed")
    wrapped.__cause__ = RuntimeError("network error")
    assert is_transient_hub_error(wrapped)
    wrapped.__cause__ = ResponseError(404)
    assert not is_transient_hub_error(wrapped)


def test_transient_error_is_retried_and_permanent_error_is_raised_at_once() -> None:
    errors: list[Exception] = [ResponseError(503), ResponseError(404)]
    waits: list[float] = []

    def fail() -> None:
        raise errors.pop(0)

    with pytest.raises(ResponseError, match="404"):
        retry_hub(fail, sleep=waits.append)
    assert (errors, len(waits)) == ([], 1)

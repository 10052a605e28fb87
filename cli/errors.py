"""Errors that the command line shows in one line, with a hint below."""

from typing import Self


class CliError(Exception):
    """A command cannot do what was asked."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ApiError(CliError):
    """The service refused a request, or could not be reached."""

    def __init__(self, message: str, hint: str = "", code: str = "", status: int = 0, param: str | None = None) -> None:
        super().__init__(message, hint)
        self.code = code
        self.status = status
        self.param = param  # the field of the request that is to blame

    def with_hint(self, hint: str) -> Self:
        """The same error with another hint."""
        return type(self)(self.message, hint, self.code, self.status, self.param)

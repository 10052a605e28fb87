"""Errors that the command line prints as one line and a hint.

CliError
└── ApiError
"""

from typing import Self


class CliError(Exception):
    """The command cannot run with these arguments or files."""

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
        self.param = param  # the request field that caused the error

    def with_hint(self, hint: str) -> Self:
        """The same error with another hint."""
        return type(self)(self.message, hint, self.code, self.status, self.param)

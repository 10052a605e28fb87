"""Errors that the command line prints as a line per problem, each with a hint, or with --json as one document.

CliError
└── ApiError
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a command: what, with which field of the request or option, and what would work."""

    message: str
    hint: str = ""
    param: str | None = None


class CliError(Exception):
    """The command cannot run with these arguments or files."""

    code = "invalid_command"

    def __init__(self, message: str, hint: str = "", *, exit_code: int = 1, param: str | None = None, more: Sequence[Problem] = ()) -> None:
        """`more` has the problems after the first."""
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = exit_code
        self.param = param
        self.problems = (Problem(message, hint, param), *more)
        self.options: frozenset[str] = frozenset()  # of the command that raised it

    @classmethod
    def of(cls, problems: Sequence[Problem]) -> Self:
        """An error with all of these problems; there must be one."""
        first, *more = problems
        return cls(first.message, first.hint, param=first.param, more=more)


class ApiError(CliError):
    """The service refused a request, or could not be reached."""

    def __init__(
        self, message: str, hint: str = "", code: str = "", status: int = 0, param: str | None = None, more: Sequence[Problem] = ()
    ) -> None:
        super().__init__(message, hint, param=param, more=more)
        self.code = code
        self.status = status

    def with_hint(self, hint: str) -> Self:
        """The same error with another hint."""
        return type(self)(self.message, hint, self.code, self.status, self.param, self.problems[1:])

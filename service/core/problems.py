"""Collects the problems of one request, so that its caller learns of all of them at once."""

from collections.abc import Generator
from contextlib import contextmanager

from service.core.errors import InvalidRequest, NotFound, TunesmithError


class Problems:
    """The problems that independent checks found. Only what the caller can mend is collected; every other error passes at once."""

    def __init__(self) -> None:
        self._found: list[TunesmithError] = []

    def __bool__(self) -> bool:
        return bool(self._found)

    @contextmanager
    def collect(self) -> Generator[None]:
        """Run one check, and keep what it raises."""
        try:
            yield
        except (InvalidRequest, NotFound) as error:
            self.add(error)

    def add(self, error: TunesmithError) -> None:
        """Keep a problem, and those that were raised with it. The same problem of the same field is kept once."""
        for problem in error.problems:
            if (problem.message, problem.param) not in {(each.message, each.param) for each in self._found}:
                self._found.append(problem)

    def raise_found(self) -> None:
        """Raise the first problem with the others beside it, if there is any."""
        if self._found:
            first, *others = self._found
            first.others = tuple(others)
            raise first

"""Checks of the URLs that a caller names, such as a judge's `base_url`, against the deployment's egress policy.

A host that is not found, or not found in time, passes: it may resolve where the attempt runs, which checks again and connects only to
addresses that it checked.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

from pydantic import BaseModel

from schema.egress import EgressPolicy, EgressRefused, parse_url
from schema.training import TrainingConfig
from service.core.errors import InvalidRequest
from service.core.ports import HostResolver
from service.core.problems import Problems
from storage.deadline import deadline

URL_FIELDS = ("base_url", "tracking_uri")  # a test finds every other field of a training config whose pattern is that of a URL
RESOLVE_TIMEOUT_S = 1.0  # for all hosts of one request, which takes at most four seconds as a whole


class NoResolver:
    """Finds no host: only what shows in the URL itself is checked."""

    def resolve(self, host: str, port: int) -> tuple[str, ...]:  # noqa: ARG002
        return ()


@dataclass(frozen=True)
class EgressCheck:
    """The deployment's policy, and what resolves host names."""

    policy: EgressPolicy = field(default_factory=EgressPolicy)
    resolver: HostResolver = field(default_factory=NoResolver)

    def check(self, config: TrainingConfig) -> None:
        """Raise InvalidRequest when a URL of the configuration may not be connected to. Takes RESOLVE_TIMEOUT_S at most."""
        problems = Problems()
        with deadline(RESOLVE_TIMEOUT_S):
            for path, url in _iter_urls(config):
                with problems.collect():
                    self._check_url(path, url)
        problems.raise_found()

    def check_url(self, path: str, url: str) -> None:
        """Raise InvalidRequest when a URL of that field of a request may not be connected to. Takes RESOLVE_TIMEOUT_S at most."""
        with deadline(RESOLVE_TIMEOUT_S):
            self._check_url(path, url)

    def _check_url(self, path: str, url: str) -> None:
        try:
            target = parse_url(url)
            self.policy.check_target(target)
            if target.address is None:
                self.policy.check_addresses(target, self.resolver.resolve(target.host, target.port))
        except EgressRefused as error:
            raise InvalidRequest(f"{path} is refused: {error}", hint=error.hint, param=path) from error


def _iter_urls(model: BaseModel, path: str = "training_config") -> Iterator[tuple[str, str]]:
    """Every URL that a caller names in a configuration, with the path of its field."""
    for name, value in model:
        if isinstance(value, BaseModel):
            yield from _iter_urls(value, f"{path}.{name}")
        elif isinstance(value, list | tuple):
            for index, item in enumerate(cast(Sequence[object], value)):
                if isinstance(item, BaseModel):
                    yield from _iter_urls(item, f"{path}.{name}.{index}")
        elif name in URL_FIELDS and isinstance(value, str):
            yield f"{path}.{name}", value

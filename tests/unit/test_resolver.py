"""The resolver of the service: no lookup outlasts the caller's deadline, and slow ones do not use up threads."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from service.adapters.resolver import MAX_LOOKUPS, SystemResolver
from storage.deadline import deadline


@pytest.fixture
def release(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Makes every lookup wait until it is set."""
    released = threading.Event()

    def wait(*_: object, **__: object) -> list[object]:
        released.wait(20)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("8.8.8.8", 443))]

    monkeypatch.setattr(socket, "getaddrinfo", wait)
    yield released
    released.set()


def test_host_has_addresses_and_unknown_host_has_none() -> None:
    resolver = SystemResolver()
    assert set(resolver.resolve("localhost", 443)) & {"127.0.0.1", "::1"}
    assert resolver.resolve("a..b", 443) == ()


def test_slow_lookup_ends_with_the_deadline(release: threading.Event) -> None:
    started = time.monotonic()
    with deadline(0.05):
        assert SystemResolver().resolve("judge.example", 443) == ()
    assert time.monotonic() - started < 1


def test_slow_lookups_are_limited_and_recover(release: threading.Event) -> None:
    resolver, threads_before = SystemResolver(), threading.active_count()
    with deadline(0.01):
        for _ in range(2 * MAX_LOOKUPS):
            assert resolver.resolve("judge.example", 443) == ()
    assert threading.active_count() - threads_before <= MAX_LOOKUPS
    release.set()
    while threading.active_count() > threads_before:
        time.sleep(0.01)
    assert resolver.resolve("judge.example", 443) == ("8.8.8.8",)

"""Connections to servers that the caller named: every address is checked against the deployment's egress policy.

`checked_addresses` is for a client of our own, which then connects to an address that was checked. `guard_connections` and `guard_process`
are for libraries that open their own sockets: they check each connection when it is made.
"""

import contextlib
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from urllib.request import getproxies, proxy_bypass

from schema.egress import EgressPolicy, EgressRefused, Target, parse_url

Resolve = Callable[[str, int], tuple[str, ...]]


def resolve(host: str, port: int) -> tuple[str, ...]:
    """All addresses of a host. Raises OSError when it has none."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return tuple(dict.fromkeys(str(entry[4][0]) for entry in found))


def checked_addresses(target: Target, policy: EgressPolicy, resolve: Resolve = resolve) -> tuple[str, ...]:
    """The addresses of the target, all allowed. Raises EgressRefused, and OSError when its host is not found."""
    policy.check_target(target)
    addresses = (str(target.address),) if target.address is not None else resolve(target.host, target.port)
    policy.check_addresses(target, addresses)
    return addresses


def check_url(url: str, policy: EgressPolicy, resolve: Resolve = resolve) -> Target:
    """The target of a URL that may be connected to. Raises EgressRefused. A host that is not found passes: it has no address."""
    target = parse_url(url)
    with contextlib.suppress(OSError):
        checked_addresses(target, policy, resolve)
    return target


def operator_proxy(target: Target) -> str | None:
    """The proxy that the operator's environment sets for the target. It resolves the host's name, and applies rules of its own."""
    proxies = getproxies()
    proxy = proxies.get(target.scheme) or proxies.get("all")
    return proxy if proxy and not proxy_bypass(target.host) else None


@contextlib.contextmanager
def guard_connections(target: Target, policy: EgressPolicy) -> Iterator[None]:
    """Raise EgressRefused from each connection of this thread that the policy does not allow, as seen by the socket: after the name is
    resolved, and also after a redirect. Behind a proxy of the operator only the target itself is checked.
    """
    if operator_proxy(target) is not None:
        yield
        return
    _install_guard()
    _guards.thread.check = lambda address, port: _check_connection(address, port, target, policy)
    try:
        yield
    finally:
        _guards.thread.check = None


def guard_process(policy: EgressPolicy) -> None:
    """Raise EgressRefused from each connection of this process that the policy does not allow, for good."""
    _install_guard()
    _guards.process_check = lambda address, port: _check_connection(address, port, None, policy)


Check = Callable[[str, int], None]


class _ThreadGuard(threading.local):
    check: Check | None = None


@dataclass
class _Guards:
    """What the audit hook applies: the check of the current thread, or else that of the process."""

    thread: _ThreadGuard = field(default_factory=_ThreadGuard)
    process_check: Check | None = None


_guards = _Guards()


@cache
def _install_guard() -> None:
    """Once per process: an audit hook cannot be removed."""
    sys.addaudithook(_check_audit_event)


def _check_audit_event(event: str, arguments: tuple[object, ...]) -> None:
    check = (_guards.thread.check or _guards.process_check) if event == "socket.connect" else None
    if check is None:
        return
    connection, address = arguments
    if isinstance(connection, socket.socket) and isinstance(address, tuple):  # the address of a Unix socket is a path
        try:
            check(str(address[0]), int(address[1]))
        except EgressRefused:
            connection.close()  # libraries close a socket only after an OSError
            raise


def _check_connection(address: str, port: int, target: Target | None, policy: EgressPolicy) -> None:
    if target is None or port != target.port:  # not where the URL leads
        target = Target("https", address, port, None)
    policy.check_address(target, address)

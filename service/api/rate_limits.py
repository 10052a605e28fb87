"""Rate limits of callers, enforced after authentication and before the body is read, and of failed authentications by address.

Counted in the memory of the process: with several instances a caller has the limit at each of them.
"""

import json
import math
import time
from collections.abc import Mapping
from ipaddress import IPv6Address, ip_address

from limits import RateLimitItem
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from service.core.errors import TooManyRequests
from service.core.principals import LOCAL_PRINCIPAL, Principal, Scope
from service.core.rate_limits import RateKind

IPV6_NETWORK_BITS = 64  # what one customer of a network gets at least: single addresses of it cost nothing


class RateLimiter:
    """Counts requests of principals and failed authentications of addresses, each in a moving window."""

    def __init__(self, rates: Mapping[RateKind, RateLimitItem]) -> None:
        self._rates = rates
        self._limiter = MovingWindowRateLimiter(MemoryStorage())

    def check(self, principal: Principal, kind: RateKind) -> dict[str, str]:
        """Count a request; returns the headers that describe the limit. Raises TooManyRequests.

        Attempts, which the service itself has started, and callers with the token of the home folder have no limits.
        """
        is_local = (principal.tenant_id, principal.subject) == (LOCAL_PRINCIPAL.tenant_id, LOCAL_PRINCIPAL.subject)
        if is_local or Scope.ATTEMPT in principal.scopes:
            return {}
        rate = self._rates.get(kind)
        if rate is None:
            return {}
        key = json.dumps([kind, principal.tenant_id, principal.subject])  # quoted: two pairs of names never read alike
        if not self._limiter.hit(rate, key):
            raise self._exceeded(rate, key, f"{kind} requests of {principal.subject}")
        return self._headers(rate, key)

    def count_failed_authentication(self, address: str) -> None:
        """Count a request that names no caller. Raises TooManyRequests for an address with too many of them.

        Valid callers of the same address are not affected: there may be many behind one. Processes of this machine have no limit.
        """
        rate, network = self._rates.get("failed_auth"), _network_of(address)
        if rate is not None and network is not None and not self._limiter.hit(rate, network):
            raise self._exceeded(rate, network, "failed authentications from this address")

    def _exceeded(self, rate: RateLimitItem, key: str, what: str) -> TooManyRequests:
        headers = self._headers(rate, key)
        headers["Retry-After"] = headers["RateLimit-Reset"]
        message = f"too many {what}: at most {rate.amount} in {rate.get_expiry()} seconds"
        return TooManyRequests(message, hint=f"try again in {headers['Retry-After']} seconds", headers=headers)

    def _headers(self, rate: RateLimitItem, key: str) -> dict[str, str]:
        """The state of a limit. `RateLimit-Reset`: seconds until the oldest counted request no longer counts."""
        stats = self._limiter.get_window_stats(rate, key)
        return {
            "RateLimit-Limit": str(rate.amount),
            "RateLimit-Remaining": str(max(0, stats.remaining)),
            "RateLimit-Reset": str(max(1, math.ceil(stats.reset_time - time.time()))),
        }


def kind_of(method: str, *, is_upload: bool) -> RateKind:
    """The limit that a request counts toward. `is_upload`: its route takes a file."""
    if method in ("GET", "HEAD", "OPTIONS"):
        return "read"
    return "upload" if is_upload else "write"


def _network_of(address: str) -> str | None:
    """The address, or its network where an address alone says little; None for this machine and for what is no address."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return None
    if isinstance(parsed, IPv6Address):
        parsed = parsed.ipv4_mapped or parsed
    if parsed.is_loopback:
        return None
    return str(int(parsed) >> (128 - IPV6_NETWORK_BITS)) if isinstance(parsed, IPv6Address) else str(parsed)

"""The egress policy: which addresses a deployment connects to when a caller names them, such as a judge's `base_url`.

Pure: the caller resolves host names and passes the addresses. The service checks at submit what it can see; an attempt checks again and
connects to the address that it checked, because a name may resolve to another address later.

The public internet over https is open. Everything else needs a rule of the operator (TUNESMITH_EGRESS_ALLOW), except that the local
profile allows loopback. Link-local and metadata addresses, and the service itself, are never allowed.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Annotated

from pydantic import AfterValidator

from schema.base import ForwardCompatible

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

EGRESS_VARIABLE = "JOB_EGRESS"  # the policy as JSON, in the environment of every attempt
ALLOW_VARIABLE = "TUNESMITH_EGRESS_ALLOW"

DEFAULT_PORTS = {"http": 80, "https": 443}
# Ports of services that are not HTTP, from the list that browsers refuse (https://fetch.spec.whatwg.org/#port-blocking), and of databases.
NON_HTTP_PORTS = frozenset(
    (
        *range(1, 80),
        *(110, 111, 113, 119, 123, 135, 137, 139, 143, 161, 179, 389, 427, 465, 512, 513, 514, 515, 526, 530, 531, 532, 540, 548, 554, 556),
        *(563, 587, 601, 636, 989, 990, 993, 995, 1719, 1720, 1723, 2049, 3306, 3659, 4045, 5060, 5061, 5432, 6000, 6379, 6566),
        *(6665, 6666, 6667, 6668, 6669, 6697, 10080, 11211, 27017),
    )
)

METADATA_HOSTS = frozenset(
    (
        *("metadata", "metadata.google.internal", "metadata.goog", "instance-data", "instance-data.ec2.internal"),
        *("metadata.azure.internal", "metadata.tencentyun.com", "metadata.platformequinix.com"),
    )
)


def _networks(*names: str) -> tuple[Network, ...]:
    return tuple(ip_network(name) for name in names)


# Addresses by which a machine learns its credentials: link-local, and those that clouds put elsewhere.
METADATA_NETWORKS = _networks(
    *("169.254.0.0/16", "fe80::/10", "fd00:ec2::/32", "fd20:ce::254/128", "fd00:42::42/128"),  # the last: Scaleway
    *("100.100.100.200/32", "168.63.129.16/32", "192.0.0.192/32"),  # Alibaba, Azure, Oracle
)
LOOPBACK_NETWORKS = _networks("127.0.0.0/8", "::1/128")
UNSPECIFIED_NETWORKS = _networks("0.0.0.0/8", "::/128")
# What is not the public internet, by https://www.iana.org/assignments/iana-ipv4-special-registry and its sibling for IPv6.
SPECIAL_NETWORKS: tuple[tuple[str, tuple[Network, ...]], ...] = (
    ("an unspecified address", UNSPECIFIED_NETWORKS),
    ("a loopback address", LOOPBACK_NETWORKS),
    ("a private address", _networks("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7", "fec0::/10")),
    ("a shared address of a carrier", _networks("100.64.0.0/10")),
    ("an address for documentation", _networks("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24", "2001:db8::/32", "3fff::/20")),
    ("an address for benchmarks", _networks("198.18.0.0/15", "2001:2::/48")),
    ("a multicast address", _networks("224.0.0.0/4", "ff00::/8")),
    ("an address that embeds another", _networks("::ffff:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32", "::/96")),
    ("a reserved address", _networks("192.0.0.0/24", "192.88.99.0/24", "240.0.0.0/4", "2001::/23", "100::/64", "5f00::/16")),
)
PUBLIC_IPV6 = IPv6Network("2000::/3")

ALLOWED_URL_CHARACTERS = re.compile(r"[A-Za-z0-9\-._~:/?\[\]@!$&'()*+,;=%]+")
LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
NUMBER = re.compile(r"0x[0-9a-f]*|[0-9]+")
LOCALHOST = "localhost"


class EgressRefused(ValueError):
    """A URL or an address that the policy does not allow. The message says what is wrong, the hint what would work."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True)
class Target:
    """Where a URL leads: its normalized host, which is an address if `address` is set, and its port."""

    scheme: str
    host: str
    port: int
    address: Address | None


@dataclass(frozen=True)
class AllowRule:
    """One rule of the operator: a network, or a host name, or with `suffix` all names below it; on one port or all."""

    network: Network | None
    host: str = ""
    suffix: bool = False
    port: int | None = None

    def matches(self, target: Target, address: Address) -> bool:
        """Whether the rule allows that address of the target."""
        if self.network is not None:
            return self._matches_port(target) and _is_in(address, (self.network,))
        # Whoever controls the name must not thereby reach this machine, unless the rule says localhost.
        is_this_machine = _is_in(address, LOOPBACK_NETWORKS + UNSPECIFIED_NETWORKS)
        return self.matches_host(target) and (not is_this_machine or _is_localhost(self.host))

    def matches_host(self, target: Target) -> bool:
        """Whether the rule names the target's host."""
        is_named = bool(self.host) and (target.host.endswith(f".{self.host}") if self.suffix else target.host == self.host)
        return is_named and self._matches_port(target)

    def _matches_port(self, target: Target) -> bool:
        return self.port in (None, target.port)


@lru_cache(maxsize=1024)
def parse_allow_rule(text: str) -> AllowRule:
    """The rule of `10.0.0.0/8`, `10.1.2.3:8000`, `[fd00::/8]:443`, `judge.corp.example:8000` or `*.corp.example`. Raises ValueError."""
    host, port = _split_port(text.strip().lower())
    if "/" in host or ":" in host or NUMBER.fullmatch(host.rpartition(".")[2]):
        return AllowRule(ip_network(host), port=port)
    suffix = host.startswith("*.")
    name = host.removeprefix("*.").removesuffix(".")
    if not all(LABEL.fullmatch(label) for label in name.split(".")):
        raise ValueError(f"{text!r} is neither a network such as 10.0.0.0/8 nor a host such as judge.example.com:8000 or *.example.com")
    return AllowRule(None, name, suffix, port)


def _check_rule(text: str) -> str:
    parse_allow_rule(text)
    return text


def allow_rule_of(target: Target) -> str:
    """The rule that allows exactly this target."""
    return f"[{target.host}]:{target.port}" if ":" in target.host else f"{target.host}:{target.port}"


class EgressPolicy(ForwardCompatible):
    """What a deployment may connect to. The default is the strictest: the public internet over https."""

    allow: tuple[Annotated[str, AfterValidator(_check_rule)], ...] = ()
    allow_loopback: bool = False
    own_ports: tuple[int, ...] = ()  # of the service, on loopback and on `own_addresses`
    own_addresses: tuple[str, ...] = ()  # of the service's machine
    own_hosts: tuple[str, ...] = ()  # host:port, names by which the service is reached from outside

    def check_target(self, target: Target) -> None:
        """Raise EgressRefused for what shows without resolving the host name."""
        if target.address is not None:
            return self.check_address(target, target.address)
        named = any(rule.matches_host(target) for rule in self._rules)
        if target.host in METADATA_HOSTS:
            raise EgressRefused(f"{target.host} is a metadata service, which is never allowed", "name the server itself")
        if f"{target.host}:{target.port}" in self.own_hosts or (_is_localhost(target.host) and target.port in self.own_ports):
            raise _is_service(target)
        self._check_port(target)
        if _is_localhost(target.host) and not (named or self.allow_loopback):
            raise _not_allowed(target, "this machine")
        may_allow_http = named or self.allow_loopback or any(rule.network is not None for rule in self._rules)
        if target.scheme == "http" and not may_allow_http:
            raise _needs_https(target)
        return None

    def check_address(self, target: Target, address: Address | str) -> None:
        """Raise EgressRefused unless this address of the target may be connected to."""
        address = _parse_address(address)
        reachable = (address, *_embedded_addresses(address))
        if any(_is_in(each, METADATA_NETWORKS) for each in reachable):
            raise EgressRefused(f"{target.host} is a link-local or metadata address, which is never allowed", "name the server itself")
        if target.port in self.own_ports and any(self._is_this_machine(each) for each in reachable):
            raise _is_service(target)
        self._check_port(target)
        # A rule for the wrapping address, such as 64:ff9b::/96 of a translator, does not open what it wraps.
        if self._has_rule(target, address) and all(self._has_rule(target, each) or not describe_special(each) for each in reachable[1:]):
            return
        if self.allow_loopback and _is_in(address, LOOPBACK_NETWORKS):
            return
        special = describe_special(address)
        if special:
            raise _not_allowed(target, special)
        if target.scheme == "http":
            raise _needs_https(target)

    def check_addresses(self, target: Target, addresses: Iterable[Address | str]) -> None:
        """Raise EgressRefused unless every address of the target may be connected to."""
        for address in addresses:
            self.check_address(target, address)

    @property
    def _rules(self) -> tuple[AllowRule, ...]:
        return tuple(parse_allow_rule(text) for text in self.allow)

    def _has_rule(self, target: Target, address: Address) -> bool:
        return any(rule.matches(target, address) for rule in self._rules)

    def _is_this_machine(self, address: Address) -> bool:
        return _is_in(address, LOOPBACK_NETWORKS + UNSPECIFIED_NETWORKS) or str(address) in self.own_addresses

    def _check_port(self, target: Target) -> None:
        """A rule that names the port allows it."""
        if target.port in NON_HTTP_PORTS and not any(rule.port == target.port for rule in self._rules):
            raise EgressRefused(f"port {target.port} is not a port of HTTP servers", f"use another port, {_allow_hint(target)}")


def parse_url(url: str) -> Target:
    """Where an http or https URL leads. Raises EgressRefused for a URL that two parsers might read differently."""
    scheme, separator, rest = url.partition("://")
    scheme = scheme.lower()
    if scheme not in DEFAULT_PORTS or not separator:
        raise EgressRefused("the URL does not begin with https://", "only https, and where the operator allows it http, is supported")
    authority = re.split(r"[/?#\\]", rest, maxsplit=1)[0]
    if not url.isascii():
        raise EgressRefused("the URL has characters that are not ASCII", _ascii_hint(authority))
    if not ALLOWED_URL_CHARACTERS.fullmatch(rest):
        raise EgressRefused("the URL has a space, a control character or another character that is not allowed", "percent-encode it")
    if "@" in authority:
        raise EgressRefused("the URL has a user name or a password", "send credentials in their own field")
    try:
        host, port = _split_port(authority.lower())
    except ValueError as error:
        raise EgressRefused(str(error), "use a port from 1 to 65535") from error
    address = _parse_host_address(host, bracketed=authority.startswith("["))
    host = str(address) if address is not None else _normalize_name(host)
    return Target(scheme, host, DEFAULT_PORTS[scheme] if port is None else port, address)


def describe_special(address: Address) -> str:
    """What kind of address it is, if it is not one of the public internet; else empty."""
    found = next((name for name, networks in SPECIAL_NETWORKS if _is_in(address, networks)), "")
    is_other = isinstance(address, IPv6Address) and address not in PUBLIC_IPV6
    return found or ("a reserved address" if is_other or not address.is_global else "")


def _split_port(authority: str) -> tuple[str, int | None]:
    """Host and port of `host`, `host:port`, `[v6]` and `[v6]:port`. Raises ValueError."""
    if authority.startswith("["):
        host, closed, rest = authority[1:].partition("]")
        if not closed or (rest and not rest.startswith(":")):
            raise ValueError("an IPv6 address is written as [address] or [address]:port")
        port = rest[1:]
    elif authority.count(":") == 1:
        host, _, port = authority.partition(":")
        rest = ":"
    else:
        return authority, None
    if not rest:
        return host, None
    if not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise ValueError(f"{port!r} is not a port")
    return host, int(port)


def _parse_host_address(host: str, *, bracketed: bool) -> Address | None:
    """The address that a host is, in any spelling that a resolver accepts: 127.1, 0x7f000001, 0177.0.0.1, 2130706433."""
    if bracketed or ":" in host:
        try:
            address = IPv6Address(host) if bracketed and "%" not in host else None
        except ValueError:
            address = None
        if address is None:
            raise EgressRefused("the URL's host is not an IPv6 address", "write it as [address], without a zone")
        return address
    labels = host.removesuffix(".").split(".")
    if not NUMBER.fullmatch(labels[-1]):
        return None
    numbers = [_parse_number(label) for label in labels]
    # As inet_aton: the last number fills the bytes that the others leave.
    last_limit = 256 ** (5 - len(labels)) if len(labels) <= 4 else 0
    if any(number is None for number in numbers) or not last_limit:
        raise EgressRefused("the URL's host is neither a name nor an IPv4 address", "write an address as four decimal numbers")
    *leading, last = [number or 0 for number in numbers]
    if any(number > 255 for number in leading) or last >= last_limit:
        raise EgressRefused("the URL's host is not an IPv4 address", "write an address as four decimal numbers")
    return IPv4Address(sum(number << (24 - 8 * index) for index, number in enumerate(leading)) + last)


def _parse_number(label: str) -> int | None:
    if not NUMBER.fullmatch(label):
        return None
    digits, base = (label[2:] or "0", 16) if label.startswith("0x") else (label, 8 if label.startswith("0") else 10)
    try:
        return int(digits, base)
    except ValueError:
        return None


def _normalize_name(host: str) -> str:
    name = host.removesuffix(".")
    if len(name) > 253 or not all(LABEL.fullmatch(label) for label in name.split(".")):
        raise EgressRefused("the URL's host is not a valid host name", "such as judge.example.com")
    return name


def _embedded_addresses(address: Address) -> tuple[Address, ...]:
    """IPv4 addresses that a tunnel or a translator behind an IPv6 address would connect to."""
    if isinstance(address, IPv4Address):
        return ()
    low = IPv4Address(int(address) & 0xFFFFFFFF)
    embedded: list[Address] = [each for each in (address.ipv4_mapped, address.sixtofour, *(address.teredo or ())) if each is not None]
    if _is_in(address, _networks("64:ff9b::/96", "64:ff9b:1::/48", "::/96")) and int(address) > 1:
        embedded.append(low)
    return tuple(embedded)


def _parse_address(address: Address | str) -> Address:
    """The address; text may have a zone, as `getaddrinfo` returns link-local ones."""
    return ip_address(address.partition("%")[0]) if isinstance(address, str) else address


def _is_in(address: Address, networks: Iterable[Network]) -> bool:
    return any(address.version == network.version and address in network for network in networks)


def _is_localhost(host: str) -> bool:
    return host == LOCALHOST or host.endswith(f".{LOCALHOST}")


def _is_service(target: Target) -> EgressRefused:
    return EgressRefused(f"{target.host}:{target.port} is this service itself", "name another server")


def _not_allowed(target: Target, kind: str) -> EgressRefused:
    return EgressRefused(
        f"{target.host} is {kind}, which this deployment does not connect to", f"use a public https URL, {_allow_hint(target)}"
    )


def _needs_https(target: Target) -> EgressRefused:
    return EgressRefused("http is only for servers that the operator allows", f"use https, {_allow_hint(target)}")


def _allow_hint(target: Target) -> str:
    return f"or ask the operator to add {allow_rule_of(target)} to {ALLOW_VARIABLE}"


def _ascii_hint(authority: str) -> str:
    try:
        return f"write the host in its ASCII form, {authority.encode('idna').decode()}; percent-encode the rest"
    except UnicodeError:
        return "write the host in its ASCII form and percent-encode the rest"

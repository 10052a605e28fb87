"""The setting of rate limits: how many requests of each kind one caller may send in a window of time."""

from collections.abc import Mapping
from typing import Annotated, Literal, get_args

from limits import RateLimitItem, parse
from pydantic import AfterValidator

RateKind = Literal["read", "write", "upload", "failed_auth"]

NO_RATE_LIMITS = "none"
DEFAULT_RATE_LIMITS = "read=600/minute,write=120/minute,upload=20/minute,failed_auth=30/minute"


def parse_rate_limits(text: str) -> Mapping[RateKind, RateLimitItem]:
    """The limits of a text such as `read=600/minute,write=120/minute`; a kind that it leaves out has none. Raises ValueError."""
    if text.strip() == NO_RATE_LIMITS:
        return {}
    found: dict[RateKind, RateLimitItem] = {}
    for part in text.split(","):
        name, _, rate = part.strip().partition("=")
        kind = next((kind for kind in get_args(RateKind) if kind == name), None)
        if kind is None or kind in found:
            known = ", ".join(get_args(RateKind))
            raise ValueError(
                f"{part.strip()!r} is no rate limit; each of {known} can be written once, as read=600/minute, or {NO_RATE_LIMITS}"
            )
        try:
            found[kind] = parse(rate)
        except ValueError as error:
            raise ValueError(f"{rate!r} is no rate; write it as 600/minute or 10 per 5 seconds") from error
    return found


def _check(text: str) -> str:
    parse_rate_limits(text)
    return text


RateLimits = Annotated[str, AfterValidator(_check)]

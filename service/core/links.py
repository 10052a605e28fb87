"""The port of signed links to single objects of a store."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class SignedUpload:
    """Where one object is sent with PUT, and the headers that the request must have."""

    url: str
    headers: Mapping[str, str]


class UrlSigner(Protocol):
    """Makes links to objects of one bucket that need no other credential and expire."""

    def sign_url(self, key: str, filename: str, expires_s: int) -> str:
        """An absolute URL, or a path that starts with `/` when this service itself serves it. Raises InvalidRequest, Unavailable."""
        ...

    def sign_upload(self, key: str, size_bytes: int, expires_s: int) -> SignedUpload:
        """A link that takes an object of at most that size, and no other. Its URL is as that of `sign_url`, which says what is raised."""
        ...

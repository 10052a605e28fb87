"""The port for the credentials with which attempts reach the object stores."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from schema.spec import AttemptCredentials


@dataclass(frozen=True)
class StoreAccess:
    """What an attempt may reach in one store: keys, and prefixes that end in "/"."""

    url: str
    readable: tuple[str, ...]
    writable: tuple[str, ...]  # and readable


class CredentialIssuer(Protocol):
    """Issues the credentials with which attempts reach the object stores."""

    def issue(self, accesses: Sequence[StoreAccess]) -> AttemptCredentials:
        """Credentials for exactly that, which expire within hours. Raises Unavailable."""
        ...

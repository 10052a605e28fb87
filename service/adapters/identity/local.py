"""The token of a home folder: who can read the file is who runs the service."""

import hashlib
import hmac
from pathlib import Path

from service.adapters.secrets.local import load_or_create_key
from service.core.access.keys import make_key

TOKEN_FILE = "token"  # cli/settings.py reads it


class LocalToken:
    """The token, created at first use in a file that only its owner can read."""

    def __init__(self, home: Path) -> None:
        self._token = load_or_create_key(home / TOKEN_FILE, lambda: make_key().encode()).strip()

    @property
    def fingerprint(self) -> str:
        """Changes with the token, and does not reveal it."""
        return hashlib.sha256(b"tunesmith home token " + self._token).hexdigest()[:16]

    def matches(self, text: str) -> bool:
        """Whether a caller's token is this one; takes the same time for each wrong token."""
        return hmac.compare_digest(text.encode(errors="replace"), self._token)

"""Logging a browser in: a caller who is known gets a code for a link, and the browser that opens the link gets a session.

A browser cannot send a token with a link or an event stream by itself; a session is a signed cookie. Neither code nor session is stored.
A session ends when what it was made with does: an API key that is revoked, or a token of the home folder that is replaced.
"""

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

from service.core.access.keys import KEY_SUBJECT_PREFIX, Keys
from service.core.access.ports import LocalCredential
from service.core.errors import Unauthorized
from service.core.principals import LOCAL_PRINCIPAL, Principal, Scope
from service.core.tokens import TokenSigner

CODE_AUDIENCE, SESSION_AUDIENCE = "tunesmith-login", "tunesmith-session"
CODE_TTL = timedelta(seconds=60)
SESSION_TTL = timedelta(hours=8)
MAX_USED_CODES = 10_000


@dataclass(frozen=True)
class Session:
    """A session for a browser: the text of its cookie."""

    token: str
    expires_in_s: int


class Logins:
    """Makes codes and sessions, and recognizes sessions. A code works once in a process, and for a minute anywhere."""

    def __init__(self, tokens: TokenSigner, keys: Keys, local_token: LocalCredential, clock: Callable[[], datetime]) -> None:
        self._tokens = tokens
        self._keys = keys
        self._local_token = local_token
        self._clock = clock
        self._used_codes: dict[str, datetime] = {}  # when each expires

    def create_code(self, principal: Principal) -> str:
        """A code with which a browser becomes the principal."""
        # The random part keeps apart the codes that one caller gets within a second.
        return self._tokens.sign(self._describe(principal) | {"jti": secrets.token_hex(8)}, CODE_AUDIENCE, CODE_TTL)

    def redeem_code(self, code: str) -> Session:
        """The session for a code. Raises Unauthorized for one that is used, expired or not ours."""
        claims, now = self._tokens.read(code, CODE_AUDIENCE), self._clock()
        self._used_codes = {used: expires_at for used, expires_at in self._used_codes.items() if expires_at > now}
        if code in self._used_codes or len(self._used_codes) >= MAX_USED_CODES:
            raise Unauthorized("the login link was used", hint="run `tunesmith open` again")
        self._used_codes[code] = now + CODE_TTL + timedelta(minutes=1)
        principal = self._read(claims)
        return Session(self._tokens.sign(self._describe(principal), SESSION_AUDIENCE, SESSION_TTL), int(SESSION_TTL.total_seconds()))

    def recognize(self, session: str) -> Principal:
        """The principal of a session. May ask the access store. Raises Unauthorized, Unavailable."""
        return self._read(self._tokens.read(session, SESSION_AUDIENCE))

    def _describe(self, principal: Principal) -> dict[str, object]:
        claims: dict[str, object] = {"sub": principal.subject, "tenant": principal.tenant_id, "scopes": sorted(principal.scopes)}
        return claims | ({"credential": self._local_token.fingerprint} if principal == LOCAL_PRINCIPAL else {})

    def _read(self, claims: dict[str, object]) -> Principal:
        subject, scopes = str(claims["sub"]), claims.get("scopes")
        if subject.startswith(KEY_SUBJECT_PREFIX):
            return self._keys.get_principal(subject)
        if not isinstance(scopes, list):
            raise Unauthorized("the session is not valid")
        principal = Principal(str(claims.get("tenant")), subject, frozenset(Scope(str(scope)) for scope in scopes))  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]  # signed by this service
        if principal == LOCAL_PRINCIPAL and claims.get("credential") != self._local_token.fingerprint:
            raise Unauthorized("the session has ended", hint="run `tunesmith open` again")
        return principal

"""Tokens that the service signs for their bearers: each is for one attempt, or for one object.

A launch token is what an attempt starts with: it can claim the attempt, and be exchanged for an attempt token by the process that did.
An attempt token reports; it is short-lived, and answers to reports renew it. Every token names the key that signed it, so that keys can
be replaced while attempts run and links are in use.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta

import jwt

from service.core.errors import Unauthorized

LAUNCH_AUDIENCE = "tunesmith-launch"
ATTEMPT_AUDIENCE = "tunesmith-attempt"
FILE_AUDIENCE = "tunesmith-file"
UPLOAD_AUDIENCE = "tunesmith-upload"
# No attempt waits or runs longer. A token is useless earlier: every call checks in the record that its attempt has not ended.
LAUNCH_TOKEN_TTL = timedelta(days=14)
ATTEMPT_TOKEN_TTL = timedelta(hours=1)
LEEWAY = timedelta(seconds=60)  # clocks differ
ALGORITHM = "HS256"


class TokenSigner:
    """Signs and reads tokens with one secret key, so no token is stored. Tokens signed with a previous key are still accepted."""

    def __init__(self, key: bytes, clock: Callable[[], datetime], previous_keys: Sequence[bytes] = ()) -> None:
        self._key_id = key_id(key)
        self._keys = {key_id(known): known for known in (*previous_keys, key)}
        self._clock = clock

    def sign_launch_token(self, job_id: str, attempt: int) -> str:
        """A token that lets its bearer claim one attempt."""
        return self._sign({"sub": job_id, "attempt": attempt, "aud": LAUNCH_AUDIENCE}, LAUNCH_TOKEN_TTL)

    def sign_attempt_token(self, job_id: str, attempt: int) -> str:
        """A token that lets the process that claimed an attempt report for it."""
        return self._sign({"sub": job_id, "attempt": attempt, "aud": ATTEMPT_AUDIENCE}, ATTEMPT_TOKEN_TTL)

    def verify_launch_token(self, token: str, job_id: str, attempt: int) -> None:
        """Raise Unauthorized unless the token may claim exactly this attempt."""
        self._verify(token, LAUNCH_AUDIENCE, job_id, attempt)

    def verify_attempt_token(self, token: str, job_id: str, attempt: int) -> timedelta:
        """How long the token, which may report for exactly this attempt, is still valid. Raises Unauthorized for any other token."""
        claims = self._verify(token, ATTEMPT_AUDIENCE, job_id, attempt)
        return timedelta(seconds=float(str(claims["exp"])) - self._clock().timestamp())

    def renew_attempt_token(self, job_id: str, attempt: int, remaining: timedelta) -> str | None:
        """A new attempt token for one that is valid for `remaining` more time; None while that is at least half of its life."""
        return self.sign_attempt_token(job_id, attempt) if remaining < ATTEMPT_TOKEN_TTL / 2 else None

    def sign_file_token(self, key: str, filename: str, expires_s: int) -> str:
        """A token that lets its bearer read one object."""
        return self._sign({"sub": key, "filename": filename, "aud": FILE_AUDIENCE}, timedelta(seconds=expires_s))

    def read_file_token(self, token: str) -> tuple[str, str]:
        """The object's key and the name to save it under. Raises Unauthorized."""
        claims = self._read(token, FILE_AUDIENCE, leeway=timedelta())
        return str(claims["sub"]), str(claims["filename"])

    def sign_upload_token(self, key: str, size_bytes: int, expires_s: int) -> str:
        """A token that lets its bearer write one object of at most that size."""
        return self._sign({"sub": key, "size_bytes": size_bytes, "aud": UPLOAD_AUDIENCE}, timedelta(seconds=expires_s))

    def read_upload_token(self, token: str) -> tuple[str, int]:
        """The object's key and its largest size. Raises Unauthorized."""
        claims = self._read(token, UPLOAD_AUDIENCE, leeway=timedelta())
        return str(claims["sub"]), int(str(claims["size_bytes"]))

    def sign(self, claims: Mapping[str, object], audience: str, lifetime: timedelta) -> str:
        """A token with these claims, `sub` among them, for one purpose."""
        return self._sign({**claims, "aud": audience}, lifetime)

    def read(self, token: str, audience: str) -> dict[str, object]:
        """The claims of a token for that purpose. Raises Unauthorized."""
        return self._read(token, audience, leeway=timedelta())

    def _sign(self, claims: dict[str, object], lifetime: timedelta) -> str:
        claims = claims | {"exp": self._clock() + lifetime}
        return jwt.encode(claims, self._keys[self._key_id], algorithm=ALGORITHM, headers={"kid": self._key_id})

    def _verify(self, token: str, audience: str, job_id: str, attempt: int) -> dict[str, object]:
        claims = self._read(token, audience)
        if claims.get("sub") != job_id or claims.get("attempt") != attempt:
            raise Unauthorized("the token is for another attempt")
        return claims

    def _read(self, token: str, audience: str, leeway: timedelta = LEEWAY) -> dict[str, object]:
        try:
            claims = jwt.decode(
                token,
                self._keys[str(jwt.get_unverified_header(token).get("kid"))],
                algorithms=[ALGORITHM],
                audience=audience,
                options={"require": ["exp", "sub", "aud"], "verify_exp": False},  # checked below against the service's clock
            )
        except (jwt.InvalidTokenError, KeyError) as error:  # KeyError: a key that this service does not know
            raise Unauthorized("the link or token is not valid") from error
        if claims["exp"] <= (self._clock() - leeway).timestamp():
            raise Unauthorized("the link or token has expired", hint="ask for a new one")
        return claims


def key_id(key: bytes) -> str:
    """The name of a signing key in tokens: a digest, which does not reveal the key."""
    return hashlib.sha256(b"tunesmith key id " + key).hexdigest()[:16]

"""Tokens that the service signs for their bearers: each is for one attempt, or for one object."""

from collections.abc import Callable, Mapping
from datetime import datetime, timedelta

import jwt

from service.core.errors import Unauthorized

ATTEMPT_AUDIENCE = "tunesmith-attempt"
FILE_AUDIENCE = "tunesmith-file"
# No attempt runs longer. A token is useless earlier: every call checks in the record that its attempt has not ended.
ATTEMPT_TOKEN_TTL = timedelta(days=14)
LEEWAY = timedelta(seconds=60)  # clocks differ


class TokenSigner:
    """Signs and reads tokens with one secret key, so no token is stored."""

    def __init__(self, key: bytes, clock: Callable[[], datetime]) -> None:
        self._key = key
        self._clock = clock

    def sign_attempt_token(self, job_id: str, attempt: int) -> str:
        """A token that lets its bearer report for one attempt."""
        return self._sign({"sub": job_id, "attempt": attempt, "aud": ATTEMPT_AUDIENCE, "exp": self._clock() + ATTEMPT_TOKEN_TTL})

    def verify_attempt_token(self, token: str, job_id: str, attempt: int) -> None:
        """Raise Unauthorized unless the token is for exactly this attempt."""
        claims = self._read(token, ATTEMPT_AUDIENCE)
        if claims.get("sub") != job_id or claims.get("attempt") != attempt:
            raise Unauthorized("the token is for another attempt")

    def sign_file_token(self, key: str, filename: str, expires_s: int) -> str:
        """A token that lets its bearer read one object."""
        return self._sign({"sub": key, "filename": filename, "aud": FILE_AUDIENCE, "exp": self._clock() + timedelta(seconds=expires_s)})

    def read_file_token(self, token: str) -> tuple[str, str]:
        """The object's key and the name to save it under. Raises Unauthorized."""
        claims = self._read(token, FILE_AUDIENCE, leeway=timedelta())
        return str(claims["sub"]), str(claims["filename"])

    def sign(self, claims: Mapping[str, object], audience: str, lifetime: timedelta) -> str:
        """A token with these claims, `sub` among them, for one purpose."""
        return self._sign({**claims, "aud": audience, "exp": self._clock() + lifetime})

    def read(self, token: str, audience: str) -> dict[str, object]:
        """The claims of a token for that purpose. Raises Unauthorized."""
        return self._read(token, audience, leeway=timedelta())

    def _sign(self, claims: dict[str, object]) -> str:
        return jwt.encode(claims, self._key, algorithm="HS256")

    def _read(self, token: str, audience: str, leeway: timedelta = LEEWAY) -> dict[str, object]:
        try:
            claims = jwt.decode(
                token,
                self._key,
                algorithms=["HS256"],
                audience=audience,
                options={"require": ["exp", "sub", "aud"], "verify_exp": False},  # checked below against the service's clock
            )
        except jwt.InvalidTokenError as error:
            raise Unauthorized("the link or token is not valid") from error
        if claims["exp"] <= (self._clock() - leeway).timestamp():
            raise Unauthorized("the link or token has expired", hint="ask for a new one")
        return claims

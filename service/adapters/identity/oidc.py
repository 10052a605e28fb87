"""Verifies identity tokens of OpenID Connect issuers: signature, issuer, audience, expiry.

Keys are fetched from the issuer and kept. A token with an unknown key id causes one fetch a minute at most, so that forged tokens cannot
make the service call the issuer again and again.
"""

import logging
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any, cast

import httpx2
import jwt

from service.core.access.rules import Identity, TrustedIssuer
from service.core.errors import Unauthorized, Unavailable
from storage.deadline import remaining_s

log = logging.getLogger(__name__)

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "ES256", "ES384", "EdDSA")  # signatures with a public key only
FETCH_TIMEOUT_S = 3.0
MIN_FETCH_INTERVAL_S = 60.0
KEYS_TTL_S = 3600.0
MAX_DOCUMENT_BYTES = 1 << 20
LEEWAY = timedelta(seconds=60)  # clocks differ
# Google's identity tokens name their issuer with or without the scheme.
ISSUER_SPELLINGS = {"https://accounts.google.com": ("https://accounts.google.com", "accounts.google.com")}


class OidcVerifier:
    """The trusted issuers of a deployment."""

    def __init__(self, issuers: tuple[TrustedIssuer, ...], clock: Callable[[], datetime]) -> None:
        self._issuers = {
            spelling: _Issuer(issuer, clock)
            for issuer in issuers
            for spelling in ISSUER_SPELLINGS.get(issuer.issuer.rstrip("/"), (issuer.issuer,))
        }

    def verify(self, token: str) -> Identity:
        """The identity that a token proves. Blocks while keys are fetched. Raises Unauthorized, Unavailable."""
        try:
            claimed = jwt.decode(token, options={"verify_signature": False}).get("iss")
        except (jwt.InvalidTokenError, ValueError, RecursionError) as error:
            raise Unauthorized("the token is neither an API key of this deployment nor an identity token") from error
        issuer = self._issuers.get(claimed) if isinstance(claimed, str) else None
        if issuer is None:
            raise Unauthorized("this deployment does not trust the issuer of the token")
        return issuer.verify(token)

    def close(self) -> None:
        """Close the connections."""
        for issuer in set(self._issuers.values()):
            issuer.close()


class _Issuer:
    def __init__(self, issuer: TrustedIssuer, clock: Callable[[], datetime]) -> None:
        self._issuer = issuer
        self._clock = clock
        self._keys: dict[str, jwt.PyJWK] = {}
        self._fetched_at: float | None = None
        self._tried_at: float | None = None
        self._lock = threading.Lock()
        # A redirect could lead anywhere, and the answer decides who callers are.
        self._http = httpx2.Client(timeout=FETCH_TIMEOUT_S, follow_redirects=False)

    def verify(self, token: str) -> Identity:
        try:
            key = self._find_key(str(jwt.get_unverified_header(token).get("kid", "")))
            claims = jwt.decode(
                token,
                key.key,
                algorithms=[name for name in ALGORITHMS if name == key.algorithm_name],
                audience=list(self._issuer.audience),
                options={"require": ["exp", "iat", "sub", "iss", "aud"], "verify_exp": False, "verify_iat": False, "verify_nbf": False},
            )
        except (jwt.InvalidTokenError, ValueError) as error:
            raise Unauthorized(f"the identity token is not valid: {error}") from error
        self._check_times(claims)
        email = claims.get("email")
        verified = isinstance(email, str) and (claims.get("email_verified") is True or claims.get("email_verified") == "true")
        return Identity(self._issuer.issuer, str(claims["sub"]), email if verified else None, claims)

    def close(self) -> None:
        self._http.close()

    # Any: a token's claims are loose JSON.
    def _check_times(self, claims: dict[str, Any]) -> None:
        now, leeway_s = self._clock().timestamp(), LEEWAY.total_seconds()
        times = {name: claims.get(name) for name in ("exp", "nbf", "iat")}
        if any(value is not None and not isinstance(value, int | float) for value in times.values()):
            raise Unauthorized("the identity token is not valid: a time is not a number")
        if cast(float, times["exp"]) <= now - leeway_s:
            raise Unauthorized("the identity token has expired", hint="ask the issuer for a new one")
        if any(value is not None and value > now + leeway_s for value in (times["nbf"], times["iat"])):
            raise Unauthorized("the identity token is not valid yet")

    def _find_key(self, key_id: str) -> jwt.PyJWK:
        with self._lock:
            now = time.monotonic()
            expired = self._fetched_at is None or now - self._fetched_at > KEYS_TTL_S
            may_fetch = self._tried_at is None or now - self._tried_at > MIN_FETCH_INTERVAL_S
            if (expired or key_id not in self._keys) and may_fetch:
                self._tried_at = now
                self._fetch_keys()
                self._fetched_at = now
            if self._fetched_at is None:
                raise Unavailable(f"the keys of {self._issuer.issuer} could not be read; try again")
            key = self._keys.get(key_id)
        if key is None:
            raise Unauthorized(f"{self._issuer.issuer} has no key of that id")
        return key

    def _fetch_keys(self) -> None:
        """Raises Unavailable while there are no keys at all; keys that were read before stay in use."""
        try:
            url = self._issuer.jwks_url or self._discover()
            documents = self._fetch(url).get("keys", [])
            keys = jwt.PyJWKSet(documents).keys
        except (httpx2.HTTPError, jwt.PyJWTError, ValueError, TypeError, AttributeError) as error:
            log.warning("the keys of an issuer cannot be read", extra={"issuer": self._issuer.issuer, "error": str(error)})
            if not self._keys:
                raise Unavailable(f"the keys of {self._issuer.issuer} cannot be read now; try again") from error
            return
        self._keys = {str(key.key_id): key for key in keys if key.key_id and key.algorithm_name in ALGORITHMS}

    def _discover(self) -> str:
        document = self._fetch(self._issuer.issuer.rstrip("/") + "/.well-known/openid-configuration")
        url = document["jwks_uri"]
        if not isinstance(url, str) or (self._issuer.issuer.startswith("https:") and not url.startswith("https:")):
            raise ValueError("jwks_uri is not an https URL")
        return url

    def _fetch(self, url: str) -> dict[str, Any]:
        response = self._http.get(url, timeout=remaining_s(FETCH_TIMEOUT_S))
        response.raise_for_status()
        if len(response.content) > MAX_DOCUMENT_BYTES:
            raise ValueError(f"{url} is larger than {MAX_DOCUMENT_BYTES} bytes")
        document = response.json()
        if not isinstance(document, dict):
            raise TypeError(f"{url} is not a JSON object")
        return cast(dict[str, Any], document)

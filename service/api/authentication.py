"""Decides which principal a request belongs to, from its headers alone: nothing of the body has been read by then.

In this order:

1. `Authorization: Bearer tsk_…`: an API key, or the token of the home folder.
2. The caller that Cloud Run has verified, where the rule file says that IAM protects the service.
3. `Authorization: Bearer <identity token>` of an issuer that the rule file trusts.
4. The cookie of a browser that has logged in, on a request without any of these.

No other header says who a caller is.
"""

from dataclasses import dataclass, field

import anyio
import anyio.to_thread
import jwt
from starlette.datastructures import Headers
from starlette.requests import Request

from service.core.access.keys import KEY_PREFIX, Keys
from service.core.access.logins import Logins
from service.core.access.ports import IdentityVerifier, LocalCredential
from service.core.access.rules import CLOUD_RUN_ISSUER, Identity, IdentityRules, admit
from service.core.errors import Forbidden, Unauthorized
from service.core.principals import LOCAL_PRINCIPAL, Principal, attempt_principal
from service.core.tokens import TokenSigner

SESSION_COOKIE = "tunesmith_session"
MAX_CREDENTIAL_CHARS = 16_384
CONCURRENT_LOOKUPS = 8  # of keys in the database and of issuers' keys; they must not use up the threads that requests share
HINT = (
    "send `Authorization: Bearer` with an API key (`tunesmith keys create`); on the service's own machine, the text of TUNESMITH_HOME/token"
)


@dataclass(frozen=True)
class Authenticator:
    """The ways in which this deployment recognizes callers."""

    keys: Keys
    logins: Logins
    local_token: LocalCredential
    rules: IdentityRules
    verifier: IdentityVerifier
    tokens: TokenSigner
    attempt_identity: str | None  # the service account of attempts, which may only report
    _lookups: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(CONCURRENT_LOOKUPS))

    async def authenticate_caller(self, request: Request) -> Principal:
        """The caller. Raises Unauthorized, Forbidden, Unavailable."""
        credential = _read_bearer(request.headers, "authorization")
        front_end_token = self._read_front_end_token(request.headers)
        caller = _read_unsigned_claims(front_end_token) if front_end_token else {}
        if self.attempt_identity and caller.get("email") == self.attempt_identity:
            raise Forbidden(f"{self.attempt_identity} is the service account of attempts; it may only report")
        if credential.startswith(KEY_PREFIX):
            return await self._recognize_key(credential)
        if self.rules.cloud_run and credential == front_end_token and front_end_token:
            return admit(self.rules, _cloud_run_identity(caller))
        if credential and self.rules.issuers:
            identity = await anyio.to_thread.run_sync(self.verifier.verify, credential, limiter=self._lookups)
            return admit(self.rules, identity)
        if self.rules.cloud_run and front_end_token:
            return admit(self.rules, _cloud_run_identity(caller))
        if not credential and (session := request.cookies.get(SESSION_COOKIE, "")):
            return await anyio.to_thread.run_sync(self.logins.recognize, session, limiter=self._lookups)
        raise Unauthorized(
            "the request names no caller that this deployment knows" if credential else "the request has no token", hint=HINT
        )

    def authenticate_attempt(self, request: Request) -> Principal:
        """The attempt of the URL, whose token the request has. Raises Unauthorized."""
        token = _read_bearer(request.headers, "authorization")
        if not token:
            raise Unauthorized("an attempt must send its token: Authorization: Bearer …")
        job_id, number = str(request.path_params["job_id"]), str(request.path_params["attempt"])
        if not (number.isascii() and number.isdecimal() and len(number) < 10):
            raise Unauthorized("the token is for another attempt")
        self.tokens.verify_attempt_token(token, job_id, int(number))
        return attempt_principal(job_id, int(number))

    async def _recognize_key(self, credential: str) -> Principal:
        if self.local_token.matches(credential):
            return LOCAL_PRINCIPAL
        if self.keys.is_remembered(credential):
            principal = self.keys.recognize(credential)
        else:
            principal = await anyio.to_thread.run_sync(self.keys.recognize, credential, limiter=self._lookups)
        if principal is None:
            raise Unauthorized("the API key is unknown, expired or revoked", hint=HINT)
        return principal

    def _read_front_end_token(self, headers: Headers) -> str:
        """The token that Cloud Run checks; it reads X-Serverless-Authorization first.

        See https://cloud.google.com/run/docs/authenticating/service-to-service.
        """
        if not (self.rules.cloud_run or self.attempt_identity):
            return ""
        return _read_bearer(headers, "x-serverless-authorization") or _read_bearer(headers, "authorization")


def _read_bearer(headers: Headers, name: str) -> str:
    """The bearer token in a header; empty without one. Raises Unauthorized for a header that appears twice or is too long."""
    values = headers.getlist(name)
    if len(values) > 1:
        raise Unauthorized(f"the header {name} appears {len(values)} times")
    scheme, _, token = (values[0] if values else "").partition(" ")
    if len(token) > MAX_CREDENTIAL_CHARS:
        raise Unauthorized(f"the header {name} is longer than any token")
    return token.strip() if scheme.lower() == "bearer" else ""


def _read_unsigned_claims(token: str) -> dict[str, object]:
    """The claims of a token that Cloud Run has verified; empty for one that has none."""
    try:
        return jwt.decode(token, options={"verify_signature": False})
    except (jwt.InvalidTokenError, ValueError, RecursionError):
        return {}


def _cloud_run_identity(claims: dict[str, object]) -> Identity:
    email, subject = claims.get("email"), claims.get("sub")
    if not isinstance(subject, str):
        raise Unauthorized("Cloud Run passed on no identity token", hint="let IAM protect the service, or take cloud_run out of its rules")
    return Identity(CLOUD_RUN_ISSUER, subject, email if isinstance(email, str) else None, claims)

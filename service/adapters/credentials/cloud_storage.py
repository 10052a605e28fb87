"""Google access tokens for attempts, which reach only what one job needs: Credential Access Boundaries.

The service exchanges a token of its own account at Google's Security Token Service for one with a boundary.
See https://cloud.google.com/iam/docs/downscoping-short-lived-credentials.
"""

# The library has few types; its answers get theirs where they are read.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingTypeStubs=false, reportMissingTypeArgument=false

import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import google.auth
from google.auth.credentials import Credentials
from google.auth.downscoped import AccessBoundaryRule, AvailabilityCondition, CredentialAccessBoundary
from google.auth.exceptions import GoogleAuthError
from google.auth.transport.requests import Request
from google.oauth2 import sts

from schema.spec import AttemptCredentials
from service.core.errors import Unavailable
from service.core.store_credentials import StoreAccess
from storage.gs import create_deadline_session
from storage.remote import BucketLocation

STS_URL = "https://sts.googleapis.com/v1/token"
SCOPE = "https://www.googleapis.com/auth/cloud-platform"
GRANT_TYPE = "urn:ietf:params:oauth:grant-type:token-exchange"
ACCESS_TOKEN_TYPE = "urn:ietf:params:oauth:token-type:access_token"  # a name of a type
OR = " || "
MAX_EXPRESSION_CHARACTERS = 2048  # of one condition; a job that mixes many datasets needs more than one
LIST_PREFIX = "api.getAttribute('storage.googleapis.com/objectListPrefix', '')"


class GoogleCredentialIssuer:
    """The CredentialIssuer for gs:// stores. `find_credentials` finds those of the service."""

    def __init__(
        self,
        clock: Callable[[], datetime],
        *,
        sts_url: str = STS_URL,
        find_credentials: Callable[[], Credentials] | None = None,
    ) -> None:
        self._clock = clock
        self._sts = sts.Client(sts_url)
        self._find_credentials = find_credentials or _find_own_credentials
        self._source: Credentials | None = None

    def issue(self, accesses: Sequence[StoreAccess]) -> AttemptCredentials:
        request = Request(create_deadline_session())
        try:
            source = self._source = self._source or self._find_credentials()
            if not source.valid:
                source.refresh(request)
            answer: dict[str, Any] = self._sts.exchange_token(
                request,
                grant_type=GRANT_TYPE,
                subject_token=source.token,
                subject_token_type=ACCESS_TOKEN_TYPE,
                requested_token_type=ACCESS_TOKEN_TYPE,
                additional_options=render_boundary(accesses),
            )
        except GoogleAuthError as error:
            raise Unavailable(f"no credentials for the attempt: {str(error).partition(chr(10))[0][:200]}") from error
        return AttemptCredentials(kind="google", token=str(answer["access_token"]), expires_at=self._find_expiry(answer, source))

    def _find_expiry(self, answer: dict[str, Any], source: Credentials) -> datetime:
        """A token with a boundary expires with the token that it was exchanged for, unless the answer says otherwise."""
        if "expires_in" in answer:
            return self._clock() + timedelta(seconds=int(answer["expires_in"]))
        return source.expiry.replace(tzinfo=UTC) if source.expiry else self._clock() + timedelta(minutes=10)


def _find_own_credentials() -> Credentials:
    credentials, _ = google.auth.default(scopes=[SCOPE])
    return credentials


def render_boundary(accesses: Sequence[StoreAccess]) -> dict[str, Any]:
    """The Credential Access Boundary: for each bucket rules for what may be read and for what may be written."""
    rules: list[AccessBoundaryRule] = []
    for access in accesses:
        location = BucketLocation.parse(access.url, "gs")
        for role, prefixes in (("objectViewer", access.readable), ("objectUser", access.writable)):
            bucket = f"//storage.googleapis.com/projects/_/buckets/{location.bucket}"
            for expression in _join_conditions([_render_condition(location, prefix) for prefix in prefixes]):
                rules.append(AccessBoundaryRule(bucket, [f"inRole:roles/storage.{role}"], AvailabilityCondition(expression)))
    return CredentialAccessBoundary(rules).to_json()


def _join_conditions(conditions: Sequence[str]) -> list[str]:
    """Expressions that together hold for any of the conditions, each within the limit of its length."""
    expressions: list[str] = []
    for condition in conditions:
        if expressions and len(expressions[-1]) + len(OR) + len(condition) <= MAX_EXPRESSION_CHARACTERS:
            expressions[-1] += OR + condition
        else:
            expressions.append(condition)
    return expressions


def _render_condition(location: BucketLocation, prefix: str) -> str:
    """The condition for a prefix, as the expression language quotes strings: a folder's objects and their listing, or one object."""
    name = location.folder + prefix
    resource = _quote(f"projects/_/buckets/{location.bucket}/objects/{name}")
    if not prefix.endswith("/"):
        return f"resource.name == {resource}"
    return f"resource.name.startsWith({resource}) || {LIST_PREFIX}.startsWith({_quote(name)})"


def _quote(text: str) -> str:
    return "'" + json.dumps(text)[1:-1].replace("'", "\\'").replace('\\"', '"') + "'"

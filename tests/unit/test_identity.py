"""Identity tokens and the rule file: which tokens prove who somebody is, and what that gives them."""

import base64
import hashlib
import hmac
import json
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import jwt
import pytest
from pydantic import ValidationError

from service.adapters.identity.oidc import OidcVerifier
from service.core.access.rules import Identity, IdentityRules, TrustedIssuer, admit
from service.core.errors import Forbidden, Unauthorized, Unavailable
from service.core.principals import Role, role_principal
from tests.factories import START
from tests.unit.oidc_issuer import AUDIENCE, OidcIssuer, serve_issuer

HOUR = timedelta(hours=1)


@pytest.fixture(scope="module")
def issuer() -> Iterator[OidcIssuer]:
    with serve_issuer() as issuer:
        yield issuer


@pytest.fixture
def verifier(issuer: OidcIssuer) -> Iterator[OidcVerifier]:
    verifier = OidcVerifier((TrustedIssuer(issuer=issuer.url, audience=(AUDIENCE, "other-audience-of-ours")),), lambda: START)
    yield verifier
    verifier.close()


# --- tokens ----------------------------------------------------------------------------------------------------------


def test_token_proves_an_identity(issuer: OidcIssuer, verifier: OidcVerifier) -> None:
    identity = verifier.verify(issuer.sign(START, repository="example/models"))
    assert (identity.issuer, identity.subject, identity.email) == (issuer.url, "1234", "ada@example.com")
    assert identity.claims["repository"] == "example/models"


def test_audience_may_be_a_list(issuer: OidcIssuer, verifier: OidcVerifier) -> None:
    assert verifier.verify(issuer.sign(START, aud=["x", AUDIENCE])).subject == "1234"


@pytest.mark.parametrize("verified", [False, None, "yes", 1])
def test_unverified_address_is_no_address(issuer: OidcIssuer, verifier: OidcVerifier, verified: object) -> None:
    assert verifier.verify(issuer.sign(START, email_verified=verified)).email is None


@pytest.mark.parametrize(
    "claims",
    [
        {"aud": "https://elsewhere.example.com"},
        {"aud": None},
        {"iss": "https://evil.example.com"},
        {"iss": None},
        {"sub": None},
        {"exp": START - HOUR},
        {"exp": None},
        {"exp": "tomorrow"},
        {"nbf": START + HOUR},
        {"iat": START + HOUR},
    ],
    ids=str,
)
def test_token_is_refused(issuer: OidcIssuer, verifier: OidcVerifier, claims: dict[str, Any]) -> None:
    with pytest.raises(Unauthorized):
        verifier.verify(issuer.sign(START, **claims))


def test_forged_tokens_are_refused(issuer: OidcIssuer, verifier: OidcVerifier) -> None:
    good = issuer.sign(START)
    header, payload, signature = good.split(".")
    claims = jwt.decode(good, options={"verify_signature": False})
    with serve_issuer() as other:  # another key of the same id
        foreign = other.sign(START, iss=issuer.url)
    forgeries = {
        "no signature": f"{header}.{payload}.",
        "removed signature": f"{header}.{payload}.SIGNATURE_REMOVED_BY_GOOGLE",
        "another payload": f"{header}.{jwt.encode(claims | {'sub': '1'}, 'k' * 32).split('.')[1]}.{signature}",
        "alg none": jwt.encode(claims, None, algorithm="none", headers={"kid": issuer.current}),
        "the public key as a shared secret": _sign_with_public_key(claims, issuer),
        "another issuer's key": foreign,
        "not a token": "a.b.c",
        "empty": "",
        "nested": "{" * 5000,
    }
    for name, token in forgeries.items():
        with pytest.raises(Unauthorized):
            pytest.fail(f"{name}: {verifier.verify(token)}")


def _sign_with_public_key(claims: dict[str, Any], issuer: OidcIssuer) -> str:
    """PyJWT refuses to make this token, so it is assembled by hand."""

    def encode(part: bytes) -> bytes:
        return base64.urlsafe_b64encode(part).rstrip(b"=")

    head = encode(json.dumps({"alg": "HS256", "typ": "JWT", "kid": issuer.current}).encode()) + b"." + encode(json.dumps(claims).encode())
    return (head + b"." + encode(hmac.digest(issuer.public_pem(), head, hashlib.sha256))).decode()


def test_new_key_is_fetched_once_a_minute_at_most(issuer: OidcIssuer, verifier: OidcVerifier, monkeypatch: pytest.MonkeyPatch) -> None:
    verifier.verify(issuer.sign(START))
    issuer.rotate(elliptic=True)
    fetches = issuer.fetches
    for _ in range(20):
        with pytest.raises(Unauthorized, match="no key"):
            verifier.verify(issuer.sign(START))
    assert issuer.fetches == fetches
    monkeypatch.setattr("service.adapters.identity.oidc.MIN_FETCH_INTERVAL_S", 0)
    assert verifier.verify(issuer.sign(START)).subject == "1234"


def test_issuer_that_is_away(issuer: OidcIssuer, verifier: OidcVerifier, monkeypatch: pytest.MonkeyPatch) -> None:
    issuer.is_down = True
    try:
        with pytest.raises(Unavailable):
            verifier.verify(issuer.sign(START))
        with pytest.raises(Unavailable):  # and is not asked again at once
            verifier.verify(issuer.sign(START))
    finally:
        issuer.is_down = False
    monkeypatch.setattr("service.adapters.identity.oidc.MIN_FETCH_INTERVAL_S", 0)
    verifier.verify(issuer.sign(START))
    monkeypatch.setattr("service.adapters.identity.oidc.KEYS_TTL_S", 0)
    issuer.is_down = True
    try:
        assert verifier.verify(issuer.sign(START)).subject == "1234"  # with the keys that were read before
    finally:
        issuer.is_down = False


# --- rules -----------------------------------------------------------------------------------------------------------


def make_identity(**changes: Any) -> Identity:
    return Identity(**{"issuer": "https://i", "subject": "1", "email": "ada@example.com", "claims": {}} | changes)


def make_rules(*rules: dict[str, Any]) -> IdentityRules:
    return IdentityRules.model_validate_json(json.dumps({"rules": rules}))


def test_first_matching_rule_decides() -> None:
    rules = make_rules(
        {"email": "eve@example.com", "role": None},
        {"email": "ada@*", "tenant": "a", "role": "admin"},
        {"email": "*@example.com", "tenant": "b", "role": "read"},
    )
    assert admit(rules, make_identity()) == role_principal("a", "ada@example.com", Role.ADMIN)
    assert admit(rules, make_identity(email="bob@example.com")) == role_principal("b", "bob@example.com", Role.READ)
    for email in ("eve@example.com", "bob@example.com.evil.org", None):
        with pytest.raises(Forbidden):
            admit(rules, make_identity(email=email))


def test_every_condition_must_hold() -> None:
    rules = make_rules({"issuer": "https://i", "subject": "repo:example/*", "claims": {"ref": "refs/heads/main"}, "role": "submit"})
    admitted = make_identity(subject="repo:example/models", claims={"ref": "refs/heads/main"})
    assert admit(rules, admitted).tenant_id == "local"
    for changes in ({"issuer": "https://j"}, {"subject": "repo:other/models"}, {"claims": {}}, {"claims": {"ref": ["refs/heads/main"]}}):
        with pytest.raises(Forbidden):
            admit(rules, make_identity(**{"subject": "repo:example/models", "claims": {"ref": "refs/heads/main"}} | changes))


def test_without_rules_nobody_is_admitted() -> None:
    with pytest.raises(Forbidden, match="no rule"):
        admit(IdentityRules(), make_identity())


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        ({"rules": [{"role": "read"}]}, "admit everybody"),
        ({"rules": [{"email": "*"}]}, "role"),
        ({"rules": [{"email": "*", "role": "root"}]}, "role"),
        ({"issuers": [{"issuer": "http://issuer.example.com", "audience": ["a"]}]}, "https"),
        ({"issuers": [{"issuer": "https://issuer.example.com", "audience": []}]}, "audience"),
        ({"issuers": [{"issuer": "https://issuer.example.com"}]}, "audience"),
        (
            {
                "issuers": [{"issuer": "https://i.example.com", "audience": ["a"]}],
                "cloud_run": True,
                "rules": [{"email": "*", "role": "read"}],
            },
            "several",
        ),
        ({"people": []}, "people"),
    ],
    ids=str,
)
def test_unsafe_rule_file_is_refused(rules: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        IdentityRules.model_validate_json(json.dumps(rules))

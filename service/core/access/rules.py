"""The rule file of a deployment: which issuers vouch for callers, and which tenant and role each caller has.

    {"issuers": [{"issuer": "https://accounts.google.com", "audience": ["https://tunesmith.example.com"]}],
     "rules": [{"email": "*@example.com", "tenant": "research", "role": "submit"},
               {"issuer": "https://token.actions.githubusercontent.com", "claims": {"repository": "example/models"},
                "tenant": "ci", "role": "submit"}]}

The first rule whose every condition holds decides. Without one, the caller is refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Self
from urllib.parse import urlsplit

from pydantic import Field, StringConstraints, model_validator

from schema.base import Id, Strict, field_error
from service.core.errors import Forbidden
from service.core.principals import LOCAL_TENANT, Principal, Role, role_principal

LOOPBACK_HOSTS = ("127.0.0.1", "::1", "localhost")

Pattern = Annotated[str, StringConstraints(min_length=1, max_length=500)]


class TrustedIssuer(Strict):
    """An OIDC issuer whose identity tokens are accepted. Its keys are read from its discovery document unless `jwks_url` names them."""

    issuer: Annotated[str, StringConstraints(max_length=500, pattern=r"^https?://[^\s@?#]+$")]
    audience: Annotated[tuple[str, ...], Field(min_length=1, max_length=20)]
    jwks_url: Annotated[str, StringConstraints(max_length=500, pattern=r"^https?://[^\s@]+$")] | None = None

    @model_validator(mode="after")
    def _require_https(self) -> Self:
        for field in ("issuer", "jwks_url"):
            parts = urlsplit(getattr(self, field) or "")
            if parts.scheme == "http" and parts.hostname not in LOOPBACK_HOSTS:
                raise field_error(field, f"{field} must be an https URL: its answers decide who callers are")
        return self


class Rule(Strict):
    """Gives the callers that meet every condition a tenant and a role. Patterns are matched as file names are: `*@example.com`."""

    issuer: Pattern | None = Field(None, description="The issuer; `cloud-run` is the front end of Cloud Run.")
    email: Pattern | None = Field(None, description="The verified email address.")
    subject: Pattern | None = Field(None, description="The claim `sub`.")
    claims: dict[str, Pattern] = Field({}, description="Other claims, each a string.")
    tenant: Id = LOCAL_TENANT
    role: Role | None = Field(description="What they may do; null refuses them.", strict=False)

    @model_validator(mode="after")
    def _require_condition(self) -> Self:
        if not (self.issuer or self.email or self.subject or self.claims):
            raise field_error("email", "a rule without a condition would admit everybody; give issuer, email, subject or claims")
        return self


class IdentityRules(Strict):
    """The rule file."""

    issuers: tuple[TrustedIssuer, ...] = Field(default=(), max_length=50)
    cloud_run: bool = Field(
        default=False,
        description="Accept the caller that Cloud Run has verified. Only where IAM protects the service: Cloud Run removes the signature "
        "of such a token, so nothing else protects it.",
    )
    rules: tuple[Rule, ...] = Field(default=(), max_length=1000)

    @model_validator(mode="after")
    def _require_issuer_where_there_are_several(self) -> Self:
        if len(self.issuers) + self.cloud_run > 1 and any(rule.issuer is None for rule in self.rules):
            raise field_error("rules", "with several issuers, each rule must name its issuer: any of them could vouch for the same address")
        return self


@dataclass(frozen=True)
class Identity:
    """Who a verified token is for."""

    issuer: str
    subject: str
    email: str | None  # None: the issuer has not verified it
    claims: Mapping[str, object]

    @property
    def name(self) -> str:
        """Who it is, for people."""
        return self.email or f"{self.subject} of {self.issuer}"


CLOUD_RUN_ISSUER = "cloud-run"


def admit(rules: IdentityRules, identity: Identity) -> Principal:
    """The principal of an identity. Raises Forbidden when no rule admits it."""
    for rule in rules.rules:
        if _matches(rule, identity):
            if rule.role is None:
                break
            return role_principal(rule.tenant, identity.name, rule.role)
    raise Forbidden(f"no rule of this deployment admits {identity.name}", hint="ask who runs it for a rule or an API key")


def _matches(rule: Rule, identity: Identity) -> bool:
    conditions = (
        (rule.issuer, identity.issuer),
        (rule.email, identity.email),
        (rule.subject, identity.subject),
        *((pattern, identity.claims.get(name)) for name, pattern in rule.claims.items()),
    )
    return all(pattern is None or (isinstance(value, str) and fnmatchcase(value, pattern)) for pattern, value in conditions)

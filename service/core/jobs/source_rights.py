"""With whose rights a source is read: the caller's own, nobody's, or the deployment's.

The deployment's credentials reach every tenant's files and whatever else its account may read. So a source is read with them only
for the owner of a service without identity rules, and for the prefixes that the operator lists for a tenant.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from schema.sources import BucketSource, HubSource, Source
from service.core.errors import InvalidRequest
from service.core.principals import LOCAL_TENANT

Rights = Literal["caller", "anonymous", "deployment"]

GOOGLE_TOKEN, HF_TOKEN = "google_access_token", "hf_token"
S3_KEYS = ("access_key_id", "secret_access_key")
# What a caller may send with a source of each kind; the options are no secrets.
SECRETS: Mapping[str, tuple[str, ...]] = {"gs": (GOOGLE_TOKEN,), "s3": (*S3_KEYS, "session_token"), "hf": (HF_TOKEN,)}
OPTIONS: Mapping[str, tuple[str, ...]] = {"s3": ("endpoint_url", "region")}


@dataclass(frozen=True)
class SourceRules:
    """Which sources this deployment reads with its own credentials."""

    owner_is_local: bool = False  # there are no identity rules: whoever calls is the owner of this machine
    prefixes: Mapping[str, Sequence[str]] = field(default_factory=dict[str, Sequence[str]])  # by tenant, such as gs://bucket/folder

    def allow(self, tenant_id: str, source: Source) -> bool:
        """Whether the deployment's credentials may be used."""
        if self.owner_is_local and tenant_id == LOCAL_TENANT:
            return True
        return any(_is_below(source, prefix) for prefix in self.prefixes.get(tenant_id, ()))


def choose_rights(source: Source, sent: Mapping[str, str], tenant_id: str, rules: SourceRules) -> Rights:
    """Whose rights to use. Raises InvalidRequest for credentials that the source does not use, or that are incomplete."""
    kind = source.kind
    known = (*SECRETS.get(kind, ()), *OPTIONS.get(kind, ()))
    for name in sent:
        if name not in known:
            hint = f"send {', '.join(known)}, or nothing" if known else "leave it out"
            raise InvalidRequest(f"a source of the kind {kind} does not use {name}", hint=hint, param=_param(name))
    if kind == "s3" and (missing := [name for name in S3_KEYS if name not in sent]) and any(name in sent for name in SECRETS["s3"]):
        raise InvalidRequest(f"source_credentials needs {missing[0]} too", param="source_credentials")
    if any(name in sent for name in SECRETS.get(kind, ())):
        return "caller"
    # Another endpoint is the caller's choice; the deployment's keys are for its own.
    is_own = isinstance(source, BucketSource | HubSource) and "endpoint_url" not in sent
    return "deployment" if is_own and rules.allow(tenant_id, source) else "anonymous"


def _is_below(source: Source, prefix: str) -> bool:
    """Whether everything that a source names lies below a prefix of the operator's."""
    match source:
        case BucketSource(scheme=scheme, bucket=bucket):
            whole = f"{scheme}://{bucket}/{source.prefix}"
            return whole.startswith(f"{prefix.rstrip('/')}/") or (source.is_single and whole == prefix)
        case HubSource(repo_id=repo_id):
            return f"hf://{repo_id}" == prefix or f"hf://{repo_id}".startswith(f"{prefix.rstrip('/')}/")
        case _:
            return False


def _param(name: str) -> str:
    return name if name == HF_TOKEN else f"source_credentials.{name}"

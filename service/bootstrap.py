"""Puts the adapters named in the settings behind the ports of the core. The only module that imports both."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from pkgutil import resolve_name
from secrets import token_hex
from typing import Any

from pydantic import ValidationError

from schema.ingestion import IngestLimits
from service.adapters.access import ACCESS_STORES
from service.adapters.hub import HubCache, HuggingFaceHub
from service.adapters.identity.local import LocalToken
from service.adapters.identity.oidc import OidcVerifier
from service.adapters.ingester import ProcessIngester
from service.adapters.jobstores import JOB_STORES
from service.adapters.launchers import LauncherDeployment, create_launchers
from service.adapters.links import create_url_signer
from service.adapters.resolver import SystemResolver
from service.adapters.secrets import SECRET_STORES
from service.adapters.secrets.local import load_or_create_key
from service.adapters.secrets.signing_keys import load_signing_keys
from service.core.access.audit import AuditLog
from service.core.access.keys import Keys
from service.core.access.logins import Logins
from service.core.access.ports import AccessStore, IdentityVerifier
from service.core.access.rules import IdentityRules
from service.core.datasets.assembly import DatasetServices, build_dataset_services
from service.core.jobs.assembly import JobServices, build_job_services
from service.core.jobs.credentials import DeploymentCredentials
from service.core.jobs.reconciler import Reconciler
from service.core.jobs.source_rights import SourceRules
from service.core.jobs.upkeep import Upkeep
from service.core.launchers import LauncherPool
from service.core.models.registry import ModelRegistry
from service.core.ports import Buckets, Hub, JobStore, SecretStore
from service.core.principals import UPKEEP_PRINCIPAL
from service.core.quotas import QuotaChecks
from service.core.store_credentials import CredentialIssuer
from service.core.tokens import TokenSigner
from service.core.validation.egress import EgressCheck
from service.core.validation.hub import NoHub
from service.settings import (
    Settings,
    attempt_variables,
    check_renamed_variables,
    egress_policy,
    hub_cache_folder,
    inherited_variables,
)
from service.tracing import current_traceparent
from storage.registry import STORES, open_store

UPKEEP_INTERVAL_S, PROMPT_UPKEEP_INTERVAL_S = 3600.0, 60.0


@dataclass(frozen=True)
class Services:
    """The parts of a running service."""

    settings: Settings
    store: JobStore
    access_store: AccessStore
    buckets: Buckets
    launchers: LauncherPool
    secrets: SecretStore
    hub: Hub
    tokens: TokenSigner
    jobs: JobServices
    datasets: DatasetServices
    models: ModelRegistry
    keys: Keys
    logins: Logins
    audit_log: AuditLog
    identity_rules: IdentityRules
    identity_verifier: IdentityVerifier
    local_token: LocalToken
    reconciler: Reconciler | None  # None: a scheduler calls POST /internal/reconcile instead
    upkeep: Upkeep | None  # None: a scheduler calls POST /internal/cleanup instead


def build_services(settings: Settings, clock: Callable[[], datetime] | None = None) -> Services:
    """Build every part. `clock` replaces the machine's clock.

    Raises ValueError for a name that no registry has, Unavailable when a part does not work.
    """
    home = settings.home_folder
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    clock = clock or utc_now
    rules = load_identity_rules(settings)
    store, access_store = _open_job_store(settings), _open_access_store(settings)
    buckets = Buckets(**{name: open_store(url) for name, url in settings.object_urls.items()})
    launchers = LauncherPool(create_launchers(settings.launchers, _describe_deployment(settings)))
    secrets = _open_secret_store(settings)
    hub = _create_hub(settings)
    tokens = _create_token_signer(settings, clock)
    quotas = QuotaChecks(store, settings.quotas, clock)
    interval_s, names = settings.reconcile_interval_s, [launcher.name for launcher in launchers]

    def reconcile_launcher(name: str) -> int:
        # `jobs` is built below, because it needs the reconciler's `wake`.
        return jobs.reconciliation.reconcile_launcher(UPKEEP_PRINCIPAL, name)

    reconciler = Reconciler(reconcile_launcher, names, interval_s) if interval_s else None

    def reconcile_inside_request(job_id: str) -> None:
        jobs.reconciliation.reconcile_job(job_id)

    jobs = build_job_services(
        store=store,
        secrets=secrets,
        buckets=buckets,
        launchers=launchers,
        url_signer=create_url_signer(buckets.models, tokens, iam_emulator_host=settings.iam_credentials_emulator_host),
        tokens=tokens,
        deployment_id=_find_deployment_id(settings),
        clock=clock,
        traceparent=current_traceparent,
        random_suffix=lambda: token_hex(6),
        wake=reconciler.wake if reconciler else reconcile_inside_request,
        hub=hub,
        trackers=settings.trackers,
        attempt_variables=attempt_variables(settings),
        credentials=_create_credential_issuer(settings, clock),
        preparation_limit=timedelta(seconds=settings.preparation_limit_s),
        checkpoint_retention=_find_checkpoint_retention(settings),
        quotas=quotas,
        egress=EgressCheck(egress_policy(settings), SystemResolver()),
        source_rules=SourceRules(owner_is_local=settings.identity is None, prefixes=settings.dataset_sources),
    )
    datasets = build_dataset_services(
        store=store,
        buckets=buckets,
        limits=IngestLimits(
            max_row_bytes=settings.max_row_bytes,
            max_image_row_bytes=settings.max_image_row_bytes,
            max_rows=settings.max_dataset_rows,
            max_pixels=settings.max_dataset_pixels,
            max_source_bytes=settings.max_source_bytes,
            max_memory_bytes=settings.ingest_memory_bytes,
        ),
        ingester=ProcessIngester(python=settings.ingest_python, variables=inherited_variables(settings)),
        jobs=jobs.ingestions,
        upload_signer=create_url_signer(buckets.datasets, tokens, iam_emulator_host=settings.iam_credentials_emulator_host),
        clock=clock,
        random_suffix=token_hex,
        scratch=home / "uploads",
        tokenizer_cache=home / "tokenizers",
        quotas=quotas,
        max_incoming_bytes=settings.max_incoming_bytes,
        max_upload_bytes=_find_max_link_bytes(settings),
        incoming_by_tenant=settings.identity is not None,
        wait_s=settings.ingest_wait_s,
        max_request_bytes=settings.ingest_request_bytes,
    )
    keys, local_token = Keys(access_store, clock), LocalToken(home)
    return Services(
        settings=settings,
        store=store,
        access_store=access_store,
        buckets=buckets,
        launchers=launchers,
        secrets=secrets,
        hub=hub,
        tokens=tokens,
        jobs=jobs,
        datasets=datasets,
        models=ModelRegistry(buckets.models, hub),
        keys=keys,
        logins=Logins(tokens, keys, local_token, clock),
        audit_log=AuditLog(access_store, clock, random_suffix=lambda: token_hex(6)),
        identity_rules=rules,
        identity_verifier=OidcVerifier(rules.issuers, clock),
        local_token=local_token,
        reconciler=reconciler,
        upkeep=_create_upkeep(settings, jobs) if interval_s else None,
    )


def _find_max_link_bytes(settings: Settings) -> int:
    """The largest file that can be sent to a link: where this service takes it, the limit of its uploads applies."""
    is_own = settings.object_urls["datasets"].startswith("file://")
    return min(settings.max_upload_bytes, settings.max_incoming_bytes) if is_own else settings.max_incoming_bytes


def _find_checkpoint_retention(settings: Settings) -> timedelta | None:
    days = settings.checkpoint_retention_days
    return None if days is None else timedelta(days=days)


def _create_upkeep(settings: Settings, jobs: JobServices) -> Upkeep:
    """The pass over completed jobs: every hour, or every minute where their checkpoints are to go at once."""
    interval_s = UPKEEP_INTERVAL_S if settings.checkpoint_retention_days else PROMPT_UPKEEP_INTERVAL_S
    return Upkeep(lambda: jobs.retention.prune_expired(UPKEEP_PRINCIPAL), interval_s)


def utc_now() -> datetime:
    """The machine's clock."""
    return datetime.now(UTC)


def load_identity_rules(settings: Settings) -> IdentityRules:
    """The rule file of the deployment; without one, nobody is admitted by an identity token. Raises ValueError."""
    text = settings.identity
    if text is None:
        return IdentityRules()
    try:
        if not text.lstrip().startswith("{"):
            text = Path(text).expanduser().read_text()
        rules = IdentityRules.model_validate_json(text)
    except OSError as error:
        raise ValueError(f"identity: the rule file cannot be read: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(["identity", *(str(step) for step in first["loc"])])
        raise ValueError(f"{path}: {first['msg']}") from error
    if rules.cloud_run and settings.cloud_run_service is None:
        raise ValueError("identity.cloud_run: this is not Cloud Run, whose front end verifies callers; anybody could pose as anybody")
    return rules


def check_adapters(settings: Settings) -> None:
    """Raise ValueError for a name that no registry has, and for a launcher's invalid settings, before anything is started."""
    check_renamed_variables()
    load_identity_rules(settings)
    for registry, kind, name in (
        (JOB_STORES, "job store", settings.job_store),
        (SECRET_STORES, "secret store", settings.secret_store),
        *((STORES, "object store", url.partition(":")[0]) for url in settings.object_urls.values()),
    ):
        _check_known(registry, kind, name)
    LauncherPool(create_launchers(settings.launchers, _describe_deployment(settings)))


def _describe_deployment(settings: Settings) -> LauncherDeployment:
    """What launchers learn of the deployment."""
    return LauncherDeployment(
        home=settings.home_folder,
        service_url=settings.url,
        public_url=settings.public_url,
        service_audience=settings.identity_audience,
        variables=inherited_variables(settings),
    )


# Any: a registry line is text; the contract suites hold the class behind it to its port.
def load_adapter(registry: dict[str, str], kind: str, name: str) -> Any:  # noqa: ANN401
    """The class behind a registry line. Raises ValueError that lists the known names."""
    _check_known(registry, kind, name)
    return resolve_name(registry[name])


def _check_known(registry: dict[str, str], kind: str, name: str) -> None:
    if name not in registry:
        raise ValueError(f"no {kind} {name!r}; known: {', '.join(sorted(registry))}")


def _open_job_store(settings: Settings) -> JobStore:
    create = load_adapter(JOB_STORES, "job store", settings.job_store)
    match settings.job_store:
        case "sqlite":
            return create(settings.home_folder / "tunesmith.db")
        case "firestore":
            return create(project_id=settings.project_id, database=settings.firestore_database)
        case _:
            return create()


def _open_access_store(settings: Settings) -> AccessStore:
    create = load_adapter(ACCESS_STORES, "access store", settings.job_store)
    match settings.job_store:
        case "sqlite":
            return create(settings.home_folder / "access.db")
        case "firestore":
            return create(project_id=settings.project_id, database=settings.firestore_database)
        case _:
            return create()


def _open_secret_store(settings: Settings) -> SecretStore:
    create = load_adapter(SECRET_STORES, "secret store", settings.secret_store)
    if settings.secret_store == "secret-manager":
        return create(project_id=settings.project_id, emulator_host=settings.secret_manager_emulator_host)
    return create(settings.home_folder / "secrets")


def _create_hub(settings: Settings) -> Hub:
    if not settings.hf_hub_offline:
        return HuggingFaceHub(settings.hf_endpoint)
    attempts_are_offline = settings.launchers == ("local",) and "HF_HUB_OFFLINE" in inherited_variables(settings)
    return NoHub(HubCache(hub_cache_folder()).has_model if attempts_are_offline else None)


def _create_token_signer(settings: Settings, clock: Callable[[], datetime]) -> TokenSigner:
    if settings.signing_key is not None:
        return TokenSigner(settings.signing_key.get_secret_value().encode(), clock, settings.previous_signing_keys)
    current, previous = load_signing_keys(settings.home_folder, clock())
    return TokenSigner(current, clock, previous)


def _find_deployment_id(settings: Settings) -> str:
    """The name of the deployment in the object stores: one for each store of records."""
    if settings.deployment_id is not None:
        return settings.deployment_id
    if settings.job_store == "firestore":
        return hashlib.sha256(f"{settings.project_id}/{settings.firestore_database}".encode()).hexdigest()[:16]
    return load_or_create_key(settings.home_folder / "deployment-id", lambda: token_hex(8).encode()).decode()


def _create_credential_issuer(settings: Settings, clock: Callable[[], datetime]) -> CredentialIssuer:
    if not settings.narrow_attempt_credentials:
        return DeploymentCredentials()
    from service.adapters.credentials.cloud_storage import GoogleCredentialIssuer  # a heavy import, for deployments on Google Cloud only

    return GoogleCredentialIssuer(clock)

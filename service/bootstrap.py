"""Puts the adapters named in the settings behind the ports of the core. The only module that imports both."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pkgutil import resolve_name
from secrets import token_bytes, token_hex
from typing import Any

from service.adapters.hub import HuggingFaceHub
from service.adapters.jobstores import JOB_STORES
from service.adapters.launchers import LAUNCHERS
from service.adapters.links import create_url_signer
from service.adapters.secrets import SECRET_STORES
from service.adapters.secrets.local import load_or_create_key
from service.core.datasets.records import Datasets
from service.core.datasets.rows import RowLimits
from service.core.jobs.assembly import JobServices, build_job_services
from service.core.jobs.limits import Limits
from service.core.jobs.reconciler import Reconciler
from service.core.ports import Buckets, Hub, JobStore, Launcher, SecretStore
from service.core.tokens import TokenSigner
from service.core.validation.hub import NoHub
from service.settings import SOURCE_ROOT, Settings, attempt_environment, inherited_environment
from storage.registry import STORES, open_store

# In the cloud every call crosses a network, an execution is listed seconds after it was started, and each check is billed.
CLOUD_LIMITS = Limits(
    heartbeat_timeout=timedelta(seconds=120),
    cancel_grace=timedelta(seconds=20),
    kill_grace=timedelta(seconds=40),
    launch_lookup_delay=timedelta(seconds=60),
    start_timeout=timedelta(minutes=60),  # an execution may wait for a GPU
    lease=timedelta(minutes=10),
    lease_grace=timedelta(minutes=5),
)
CLOUD_RUN_TIME_LIMIT_S = 3600  # Cloud Run's limit for a task with a GPU


@dataclass(frozen=True)
class Services:
    """The parts of a running service."""

    settings: Settings
    store: JobStore
    buckets: Buckets
    launcher: Launcher
    secrets: SecretStore
    hub: Hub
    tokens: TokenSigner
    jobs: JobServices
    datasets: Datasets
    reconciler: Reconciler | None  # None: a scheduler calls POST /internal/reconcile instead


def build_services(settings: Settings, clock: Callable[[], datetime] | None = None) -> Services:
    """Build every part. `clock` replaces the machine's clock.

    Raises ValueError for a name that no registry has, Unavailable when a part does not work.
    """
    home = settings.home_folder
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    clock = clock or utc_now
    store = _open_job_store(settings)
    buckets = Buckets(**{name: open_store(url) for name, url in settings.object_urls.items()})
    launcher = _create_launcher(settings)
    secrets = _open_secret_store(settings)
    hub = NoHub() if settings.hf_hub_offline else HuggingFaceHub(settings.hf_endpoint)
    tokens = TokenSigner(_signing_key(settings), clock)
    interval_s = settings.reconcile_interval_s
    # `jobs` is built below, because it needs the reconciler's `wake`.
    reconciler = Reconciler(lambda: jobs.reconciliation.reconcile(), interval_s) if interval_s else None

    def reconcile_inside_request(job_id: str) -> None:
        jobs.reconciliation.reconcile_job(job_id)

    jobs = build_job_services(
        store=store,
        secrets=secrets,
        buckets=buckets,
        launcher=launcher,
        url_signer=create_url_signer(buckets.models, tokens, iam_emulator_host=settings.iam_credentials_emulator_host),
        tokens=tokens,
        clock=clock,
        random_suffix=lambda: token_hex(6),
        wake=reconciler.wake if reconciler else reconcile_inside_request,
        limits=Limits() if settings.launcher == "local" else CLOUD_LIMITS,
        hub=hub,
        trackers=settings.trackers,
        attempt_environment=attempt_environment(settings),
    )
    datasets = Datasets(
        store=store,
        objects=buckets.datasets,
        limits=RowLimits(
            max_row_bytes=settings.max_row_bytes,
            max_image_row_bytes=settings.max_image_row_bytes,
            max_rows=settings.max_dataset_rows,
        ),
        clock=clock,
        random_suffix=lambda: token_hex(6),
        scratch=home / "uploads",
        max_incoming_bytes=settings.max_incoming_bytes,
    )
    return Services(settings, store, buckets, launcher, secrets, hub, tokens, jobs, datasets, reconciler)


def utc_now() -> datetime:
    """The machine's clock."""
    return datetime.now(UTC)


def check_adapters(settings: Settings) -> None:
    """Raise ValueError for a name that no registry has, before anything is started."""
    for registry, kind, name in (
        (JOB_STORES, "job store", settings.job_store),
        (LAUNCHERS, "launcher", settings.launcher),
        (SECRET_STORES, "secret store", settings.secret_store),
        *((STORES, "object store", url.partition(":")[0]) for url in settings.object_urls.values()),
    ):
        _check_known(registry, kind, name)


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


def _open_secret_store(settings: Settings) -> SecretStore:
    create = load_adapter(SECRET_STORES, "secret store", settings.secret_store)
    if settings.secret_store == "secret-manager":
        return create(project_id=settings.project_id, emulator_host=settings.secret_manager_emulator_host)
    return create(settings.home_folder / "secrets")


def _signing_key(settings: Settings) -> bytes:
    if settings.signing_key is not None:
        return settings.signing_key.get_secret_value().encode()
    return load_or_create_key(settings.home_folder / "signing-key", lambda: token_bytes(32))


def _create_launcher(settings: Settings) -> Launcher:
    create = load_adapter(LAUNCHERS, "launcher", settings.launcher)
    if settings.launcher == "cloud-run":
        return create(
            project_id=settings.project_id,
            region=settings.region,
            profiles=settings.hardware_profiles,
            service_url=settings.url,
            service_audience=settings.identity_audience,
            max_concurrent_jobs=settings.max_concurrent_jobs,
            time_limit_s=settings.attempt_time_limit_s or CLOUD_RUN_TIME_LIMIT_S,
            emulator_host=settings.cloud_run_emulator_host,
        )
    return create(
        home=settings.home_folder,
        python=settings.trainer_python,
        source=SOURCE_ROOT,
        service_url=settings.url,
        max_concurrent_jobs=settings.max_concurrent_jobs,
        environment=inherited_environment(settings),
        time_limit_s=settings.attempt_time_limit_s,
    )

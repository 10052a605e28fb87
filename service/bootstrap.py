"""Puts the adapters named in the settings behind the ports of the core. The only place that knows both."""

import secrets as random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib import import_module
from typing import Any

from service.adapters.hub import HuggingFaceHub
from service.adapters.jobstores import JOB_STORES
from service.adapters.launchers import LAUNCHERS
from service.adapters.links import create_url_signer
from service.adapters.secrets import SECRET_STORES
from service.adapters.secrets.local import load_or_create_key
from service.core.datasets.records import Datasets
from service.core.datasets.rows import RowLimits
from service.core.hub import NoHub
from service.core.jobs.reconciler import Reconciler
from service.core.jobs.service import Jobs, Limits
from service.core.ports import Hub, JobStore, Launcher, SecretStore
from service.core.tokens import TokenSigner
from service.settings import SOURCE_ROOT, Settings, attempt_environment, inherited_environment
from storage import ObjectStore
from storage.registry import STORES, open_store

# In the cloud every answer crosses a network, an execution takes seconds to be seen, and a signal is a call that costs.
CLOUD_LIMITS = Limits(
    heartbeat_timeout=timedelta(seconds=120),
    cancel_grace=timedelta(seconds=20),
    kill_grace=timedelta(seconds=40),
    launch_lookup_delay=timedelta(seconds=60),
    start_timeout=timedelta(minutes=60),  # an execution may wait for a GPU
    lease=timedelta(minutes=10),
    lease_grace=timedelta(minutes=5),
)
CLOUD_RUN_TIME_LIMIT_S = 3600  # what a task with a GPU may take there


@dataclass(frozen=True)
class Buckets:
    """The object stores, by what lies there. On a laptop all three are one folder."""

    configs: ObjectStore
    datasets: ObjectStore
    models: ObjectStore


@dataclass(frozen=True)
class Services:
    """The service, put together."""

    settings: Settings
    store: JobStore
    objects: Buckets
    launcher: Launcher
    secrets: SecretStore
    hub: Hub
    tokens: TokenSigner
    jobs: Jobs
    datasets: Datasets
    reconciler: Reconciler | None  # None: a scheduler calls the service instead


def build_services(settings: Settings, clock: Callable[[], datetime] | None = None) -> Services:
    """Build every part; `clock` is the service's, left out the machine's.

    Raises ValueError for a name that no registry knows, Unavailable when a part does not work.
    """
    home = settings.home_folder
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    store = _job_store(settings)
    objects = Buckets(**{name: open_store(url) for name, url in settings.object_urls.items()})
    launcher = _launcher(settings)
    clock = clock or utc_now
    secrets = _secret_store(settings)
    hub = NoHub() if settings.hf_hub_offline else HuggingFaceHub(settings.hf_endpoint)
    tokens = TokenSigner(_signing_key(settings), clock)
    reconciler = Reconciler(lambda: jobs.reconcile(), settings.reconcile_interval_s) if settings.reconcile_interval_s else None

    def step(job_id: str) -> None:
        jobs.reconcile_job(job_id)

    jobs = Jobs(
        store=store,
        secrets=secrets,
        configs=objects.configs,
        models=objects.models,
        datasets=objects.datasets,
        launcher=launcher,
        url_signer=create_url_signer(objects.models, tokens, iam_emulator_host=settings.iam_credentials_emulator_host),
        tokens=tokens,
        clock=clock,
        random_suffix=lambda: random.token_hex(6),
        wake=reconciler.wake if reconciler else step,
        limits=Limits() if settings.launcher == "local" else CLOUD_LIMITS,
        hub=hub,
        trackers=settings.trackers,
        attempt_environment=attempt_environment(settings),
    )
    datasets = Datasets(
        store=store,
        objects=objects.datasets,
        limits=RowLimits(
            max_row_bytes=settings.max_row_bytes,
            max_image_row_bytes=settings.max_image_row_bytes,
            max_rows=settings.max_dataset_rows,
        ),
        clock=clock,
        random_suffix=lambda: random.token_hex(6),
        scratch=home / "uploads",
        max_incoming_bytes=settings.max_incoming_bytes,
    )
    return Services(settings, store, objects, launcher, secrets, hub, tokens, jobs, datasets, reconciler)


def utc_now() -> datetime:
    """The service's clock."""
    return datetime.now(UTC)


def check_adapters(settings: Settings) -> None:
    """Raises ValueError for a name that no registry knows, before anything is begun."""
    for registry, kind, name in (
        (JOB_STORES, "job store", settings.job_store),
        (LAUNCHERS, "launcher", settings.launcher),
        (SECRET_STORES, "secret store", settings.secret_store),
        *((STORES, "object store", url.partition(":")[0]) for url in settings.object_urls.values()),
    ):
        if name not in registry:
            raise ValueError(f"no {kind} {name!r}; known: {', '.join(sorted(registry))}")


# Any: the class behind a registry line is known when it is loaded; the contract suites hold it to its port.
def load_adapter(registry: dict[str, str], kind: str, name: str) -> Any:  # noqa: ANN401
    """The class behind a registry line. Raises ValueError naming the lines there are."""
    if name not in registry:
        raise ValueError(f"no {kind} {name!r}; known: {', '.join(sorted(registry))}")
    module, _, class_name = registry[name].partition(":")
    return getattr(import_module(module), class_name)


def _job_store(settings: Settings) -> JobStore:
    build = load_adapter(JOB_STORES, "job store", settings.job_store)
    match settings.job_store:
        case "sqlite":
            return build(settings.home_folder / "tunesmith.db")
        case "firestore":
            return build(project_id=settings.project_id, database=settings.firestore_database)
        case _:
            return build()


def _secret_store(settings: Settings) -> SecretStore:
    build = load_adapter(SECRET_STORES, "secret store", settings.secret_store)
    if settings.secret_store == "secret-manager":
        return build(project_id=settings.project_id, emulator_host=settings.secret_manager_emulator_host)
    return build(settings.home_folder / "secrets")


def _signing_key(settings: Settings) -> bytes:
    if settings.signing_key is not None:
        return settings.signing_key.get_secret_value().encode()
    return load_or_create_key(settings.home_folder / "signing-key", lambda: random.token_bytes(32))


def _launcher(settings: Settings) -> Launcher:
    build = load_adapter(LAUNCHERS, "launcher", settings.launcher)
    if settings.launcher == "cloud-run":
        return build(
            project_id=settings.project_id,
            region=settings.region,
            profiles=settings.hardware_profiles,
            service_url=settings.url,
            service_audience=settings.identity_audience,
            max_concurrent_jobs=settings.max_concurrent_jobs,
            time_limit_s=settings.attempt_time_limit_s or CLOUD_RUN_TIME_LIMIT_S,
            emulator_host=settings.cloud_run_emulator_host,
        )
    return build(
        home=settings.home_folder,
        python=settings.trainer_python,
        source=SOURCE_ROOT,
        service_url=settings.url,
        max_concurrent_jobs=settings.max_concurrent_jobs,
        environment=inherited_environment(settings),
        time_limit_s=settings.attempt_time_limit_s,
    )

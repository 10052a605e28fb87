"""Puts the adapters named in the settings behind the ports of the core. The only place that knows both."""

import secrets as random
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import import_module
from typing import Any

from service.adapters.jobstores import JOB_STORES
from service.adapters.launchers import LAUNCHERS
from service.adapters.links import ServiceLinks
from service.adapters.secrets import SECRET_STORES
from service.adapters.secrets.local import owner_only_key
from service.core.dataset_rows import RowLimits
from service.core.datasets import Datasets
from service.core.jobs import Jobs
from service.core.ports import JobStore, Launcher, SecretStore
from service.core.reconciler import Reconciler
from service.core.tokens import TokenSigner
from service.settings import SOURCE, Settings, inherited_environment
from storage import ObjectStore, open_store


@dataclass(frozen=True)
class Parts:
    """The service, put together."""

    settings: Settings
    store: JobStore
    objects: ObjectStore
    launcher: Launcher
    tokens: TokenSigner
    jobs: Jobs
    datasets: Datasets
    reconciler: Reconciler


def assemble(settings: Settings) -> Parts:
    """Build every part. Raises ValueError for a name that no registry knows, Unavailable when a part does not work."""
    home = settings.home_folder
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    store = _job_store(settings)
    objects = open_store(settings.store_url)
    launcher = _launcher(settings)
    secrets: SecretStore = adapter(SECRET_STORES, "secret store", settings.secret_store)(home / "secrets")
    tokens = TokenSigner(owner_only_key(home / "signing-key", lambda: random.token_bytes(32)), now)
    reconciler = Reconciler(lambda: jobs.reconcile(), settings.reconcile_interval_s)
    jobs = Jobs(
        store=store,
        secrets=secrets,
        configs=objects,
        models=objects,
        datasets=objects,
        launcher=launcher,
        links=ServiceLinks(tokens),
        tokens=tokens,
        clock=now,
        random_tail=lambda: random.token_hex(6),
        wake=reconciler.wake,
    )
    datasets = Datasets(
        store=store,
        objects=objects,
        limits=RowLimits(max_row_bytes=settings.max_row_bytes, max_rows=settings.max_dataset_rows),
        clock=now,
        random_tail=lambda: random.token_hex(6),
        scratch=home / "uploads",
    )
    return Parts(settings, store, objects, launcher, tokens, jobs, datasets, reconciler)


def now() -> datetime:
    """The service's clock."""
    return datetime.now(UTC)


# Any: the class behind a registry line is known when it is loaded; the contract suites hold it to its port.
def adapter(registry: dict[str, str], kind: str, name: str) -> Any:  # noqa: ANN401
    """The class behind a registry line. Raises ValueError naming the lines there are."""
    if name not in registry:
        raise ValueError(f"no {kind} {name!r}; known: {', '.join(sorted(registry))}")
    module, _, class_name = registry[name].partition(":")
    return getattr(import_module(module), class_name)


def _job_store(settings: Settings) -> JobStore:
    build = adapter(JOB_STORES, "job store", settings.job_store)
    return build(settings.home_folder / "tunesmith.db") if settings.job_store == "sqlite" else build()


def _launcher(settings: Settings) -> Launcher:
    return adapter(LAUNCHERS, "launcher", settings.launcher)(
        home=settings.home_folder,
        python=settings.trainer_python,
        source=SOURCE,
        service_url=settings.url,
        max_concurrent_jobs=settings.max_concurrent_jobs,
        environment=inherited_environment(),
    )

"""Checks the hardware that a request asks for: whether this deployment has it, and whether the job can run there."""

from collections.abc import Callable, Iterable
from pkgutil import resolve_name

from schema.capabilities import EnvironmentManifest, FamilyCapabilities
from schema.placement import Placement
from schema.training import JobConfig
from schema.training.trackers import TRACKERS
from service.core.errors import Unsupported
from service.core.launchers import LauncherPool
from service.core.ports import Profile
from service.core.problems import Problems

# One line for each family: "module:function", called with the config, the family's capabilities and the profile. It raises Unsupported.
SUPPORT_CHECKS = {"llm": "service.core.validation.llm_support:check_support"}


def place(config: JobConfig, hardware: str | list[str] | None, launchers: LauncherPool, *, is_new: bool = False) -> tuple[Placement, ...]:
    """The placements that a job may use, in the order of the request. Every one of them must be able to run it.

    Of a new job, some of them must have its trackers; a job that exists goes on without a tracker that is missing.
    Raises Unsupported, InvalidRequest, and Unavailable when a launcher cannot tell now what it offers.
    """
    offers = launchers.resolve(hardware, config.environment)
    problems = Problems()
    for offer in offers:
        with problems.collect():
            check_environment(config, offer.manifest, offer.profile)
    if is_new:
        with problems.collect():
            check_trackers(config, [offer.manifest for offer in offers])
    problems.raise_found()
    return tuple(offer.placement for offer in offers)


def list_trackers(manifests: Iterable[EnvironmentManifest]) -> list[str]:
    """The trackers that some of the environments have. An environment that does not tell may have any."""
    installed = [TRACKERS if manifest.trackers is None else manifest.trackers for manifest in manifests]
    return [name for name in TRACKERS if any(name in names for names in installed)]


def check_trackers(config: JobConfig, manifests: Iterable[EnvironmentManifest]) -> None:
    """Raise Unsupported for a tracker that no environment has in which the job may run."""
    known, problems = list_trackers(manifests), Problems()
    for name in TRACKERS:
        if name not in known and dict(config).get(f"{name}_config") is not None:
            message = f"tracker {name!r} is not installed in the environment of this job; it has: {', '.join(known) or 'none'}"
            problems.add(Unsupported(message, hint=f"leave {name}_config out, or use one of those", param=f"training_config.{name}_config"))
    problems.raise_found()


def check_environment(config: JobConfig, manifest: EnvironmentManifest, profile: Profile) -> None:
    """Raise Unsupported when the job needs something that the environment or the hardware does not have."""
    capabilities = manifest.families.get(config.family)
    known = capabilities.trainer_types if capabilities else ()
    if capabilities is None or config.trainer_type not in known:
        message = (
            f"trainer_type {config.trainer_type!r} is not available in this deployment; its environment {manifest.environment!r} has: "
        )
        hint = "GET /capabilities lists what this deployment can do"
        raise Unsupported(message + (", ".join(known) or "none"), hint=hint, param="training_config.trainer_type")
    if config.family in SUPPORT_CHECKS:
        check: Callable[[JobConfig, FamilyCapabilities, Profile], None] = resolve_name(SUPPORT_CHECKS[config.family])
        check(config, capabilities, profile)

"""Checks the hardware that a request asks for: whether this deployment has it, and whether the job can run there."""

from collections.abc import Callable, Iterable
from pkgutil import resolve_name

from schema.capabilities import EnvironmentManifest, FamilyCapabilities
from schema.placement import Placement
from schema.training import JobConfig
from schema.training.trackers import TRACKERS
from service.core.errors import DoesNotFit, InvalidRequest, Unsupported
from service.core.launchers import LauncherPool, Offer
from service.core.models.sizes import StoredBase
from service.core.ports import Profile
from service.core.problems import Problems

# One line for each family: "module:function", called with the config, the family's capabilities and the profile. It raises Unsupported.
SUPPORT_CHECKS = {"llm": "service.core.validation.llm_support:check_support"}

# Likewise, called with the base as well, None where the model store does not have it. It raises DoesNotFit.
MEMORY_CHECKS = {"llm": "service.core.validation.llm_support:check_memory"}


def place(
    config: JobConfig,
    hardware: str | list[str] | None,
    launchers: LauncherPool,
    *,
    is_new: bool = False,
    base: StoredBase | None = None,
) -> tuple[Placement, ...]:
    """The placements that a job may use, in the order of the request. Every one of them must be able to run it.

    Of a new job, some of them must have its trackers; a job that exists goes on without a tracker that is missing. `base` is the base
    model, if the model store has it. Raises Unsupported, InvalidRequest, and Unavailable when a launcher cannot tell now what it offers.
    """
    offers = launchers.resolve(hardware, config.environment)
    problems = Problems()
    for offer in offers:
        with problems.collect():
            try:
                check_environment(config, offer.manifest, offer.profile, base)
            except Unsupported as error:
                _name_fitting(error, config, launchers, base)
                raise
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


def list_supporting(config: JobConfig, launchers: LauncherPool) -> list[Offer]:
    """Every profile of this deployment that has what the job needs, memory aside."""
    return [offer for offer in launchers.list_offers(config.environment) if _supports(offer, config)]


def check_environment(config: JobConfig, manifest: EnvironmentManifest, profile: Profile, base: StoredBase | None = None) -> None:
    """Raise Unsupported when the job needs something that the environment or the hardware does not have, and DoesNotFit for memory."""
    problems = Problems()
    with problems.collect():
        check_capabilities(config, manifest, profile)
    capabilities = manifest.families.get(config.family)
    if capabilities is not None and config.family in MEMORY_CHECKS:
        with problems.collect():
            resolve_name(MEMORY_CHECKS[config.family])(config, capabilities, profile, base)
    problems.raise_found()


def check_capabilities(config: JobConfig, manifest: EnvironmentManifest, profile: Profile) -> None:
    """Raise Unsupported when the job needs something that the environment or the hardware does not have, memory aside."""
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


def _name_fitting(error: Unsupported, config: JobConfig, launchers: LauncherPool, base: StoredBase | None) -> None:
    """Name the hardware of this deployment that has the memory, in the hint of a problem with memory."""
    misfits = [problem for problem in error.problems if isinstance(problem, DoesNotFit)]
    if not misfits:
        return
    offers = launchers.list_offers(config.environment)
    fitting = [offer.placement.hardware for offer in offers if _accepts(offer, config, base)]
    for problem in misfits:
        problem.hint = f"it fits on hardware {' or '.join(fitting)}" if fitting else "no hardware of this deployment has the memory"


def _supports(offer: Offer, config: JobConfig) -> bool:
    try:
        check_capabilities(config, offer.manifest, offer.profile)
    except InvalidRequest:
        return False
    return True


def _accepts(offer: Offer, config: JobConfig, base: StoredBase | None) -> bool:
    try:
        check_environment(config, offer.manifest, offer.profile, base)
    except InvalidRequest:
        return False
    return True

"""`GET /capabilities`: what this deployment can train, where, at what price, and what it can export."""

from dataclasses import asdict
from typing import Any, get_args

from fastapi import APIRouter

from schema.capabilities import EnvironmentManifest, FamilyCapabilities
from schema.estimate.prices import find_price
from schema.training import TRAINER_TYPES
from schema.training.llm_export import ExportFormat, GgufQuantization
from schema.training.llm_graders import GRADER_TYPES
from service.api.dependencies import PrincipalDep, ServicesDep
from service.api.route import LimitedRoute
from service.core.errors import Unavailable
from service.core.launchers import LauncherPool
from service.core.ports import Launcher, Profile
from service.core.principals import Scope
from service.core.validation.llm_support import has_flash_attention, list_notes, list_options
from service.core.validation.placement import list_trackers

DESTINATIONS = ("gcs", "hfhub")

router = APIRouter(route_class=LimitedRoute, tags=["training"])


# Any: the fields depend on the deployment; docs/api.md documents them.
@router.get("/capabilities")
def get_capabilities(services: ServicesDep, principal: PrincipalDep) -> dict[str, Any]:
    """The launchers with their hardware and environments, the trainer types, and what the default hardware can do."""
    principal.require(Scope.JOBS_READ)
    return capabilities_response(services.launchers)


def capabilities_response(launchers: LauncherPool) -> dict[str, object]:
    """The body of `GET /capabilities`. Raises Unavailable when no launcher can tell what it offers."""
    environments: dict[str, dict[str, EnvironmentManifest]] = {}
    problems: dict[str, Unavailable] = {}
    for launcher in launchers:
        try:
            environments[launcher.name] = dict(launcher.list_environments())
        except Unavailable as error:
            environments[launcher.name], problems[launcher.name] = {}, error
    if len(problems) == len(environments):
        raise next(iter(problems.values()))
    return {
        "launchers": {
            launcher.name: {
                "profiles": {name: _describe_profile(launcher, profile) for name, profile in launcher.profiles.items()},
                "environments": {name: manifest.model_dump(mode="json") for name, manifest in environments[launcher.name].items()},
                "problem": _describe_problem(problems.get(launcher.name)),
            }
            for launcher in launchers
        },
        "trainer_types": _describe_trainer_types(launchers, environments),
        "graders": list(GRADER_TYPES),
        "trackers": list_trackers(manifest for manifests in environments.values() for manifest in manifests.values()),
    } | _describe_default(launchers, environments)


def _describe_profile(launcher: Launcher, profile: Profile) -> dict[str, object]:
    price = find_price(launcher.name, profile.name)
    return {**asdict(profile), "price": asdict(price) if price else None}


def _describe_problem(error: Unavailable | None) -> str | None:
    return f"{error.message} {error.hint}".strip() if error else None


def _describe_trainer_types(launchers: LauncherPool, environments: dict[str, dict[str, EnvironmentManifest]]) -> dict[str, object]:
    """The trainer types that some launcher can run, each with the hardware that it can use."""
    described: dict[str, object] = {}
    for name, config in TRAINER_TYPES.items():
        hardware = [
            f"{launcher.name}/{profile}"
            for launcher in launchers
            if name in _trainer_types_of(environments[launcher.name].get(config.environment), config.family)
            for profile in launcher.profiles
        ]
        if hardware:
            described[name] = {
                "family": config.family,
                "environment": config.environment,
                "dataset_types": list(config.dataset_types),
                "modalities": list(config.modalities),
                "hardware": hardware,
            }
    return described


def _trainer_types_of(manifest: EnvironmentManifest | None, family: str) -> tuple[str, ...]:
    capabilities = manifest.families.get(family) if manifest else None
    return capabilities.trainer_types if capabilities else ()


def _describe_default(launchers: LauncherPool, environments: dict[str, dict[str, EnvironmentManifest]]) -> dict[str, object]:
    """What language models can use on the hardware of a job that asks for none."""
    launcher = next(launcher for launcher in launchers if environments[launcher.name])
    profile = next(iter(launcher.profiles.values()))
    manifest = environments[launcher.name].get("llm")
    capabilities = (manifest.families.get("llm") if manifest else None) or FamilyCapabilities(trainer_types=())
    return {
        "default_hardware": f"{launcher.name}/{profile.name}",
        "methods": list(list_options("method", capabilities, profile)),
        "providers": list(list_options("provider", capabilities, profile)),
        "modalities": list(list_options("modality", capabilities, profile)),
        "export": {
            "formats": [name for name in get_args(ExportFormat) if name != "onnx" or capabilities.features.get("onnx")],
            "destinations": list(DESTINATIONS),
            "gguf_quantizations": list(get_args(GgufQuantization)) if capabilities.features.get("gguf") else [],
            "artifacts": sorted({info.name for config in TRAINER_TYPES.values() for info in config.artifact_kinds}),
        },
        "lm_eval": capabilities.features.get("lm_eval", False),
        "use_fa2": has_flash_attention(capabilities, profile),
        "notes": list_notes(capabilities, profile),
    }

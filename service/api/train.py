"""`POST /train` and `GET /capabilities`."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, get_args

from fastapi import APIRouter

from schema.job import ArtifactKind
from schema.requests import TrainRequest
from schema.training import TRAINER_TYPES
from schema.training.export import ExportFormat, GgufQuantization
from schema.training.graders import GRADER_TYPES
from service.api.dependencies import IdempotencyHeader, ServicesDep, TenantDep
from service.api.responses import TrainResponse
from service.core.ports import RuntimeCapabilities

TRACKERS = ("wandb", "mlflow", "tensorboard", "trackio")
DESTINATIONS = ("gcs", "hfhub")

router = APIRouter(tags=["training"])


@router.post("/train", status_code=201)
def train(body: TrainRequest, services: ServicesDep, tenant_id: TenantDep, idempotency_key: IdempotencyHeader = None) -> TrainResponse:
    """Start a training job. It is durable when this answers."""
    return TrainResponse(job_id=services.jobs.submission.submit(body, tenant_id, idempotency_key).job_id)


# Any: the answer grows with the deployment; its shape is documented in docs/api.md.
@router.get("/capabilities")
def get_capabilities(services: ServicesDep) -> dict[str, Any]:
    """What this deployment can train, on what, and into what."""
    profiles = {name: services.launcher.get_capabilities(name) for name in services.launcher.profiles}
    return capabilities_response(profiles, services.launcher.name)


def capabilities_response(profiles: Mapping[str, RuntimeCapabilities], launcher_name: str) -> dict[str, object]:
    """The whole answer of `GET /capabilities`. What is said outside `profiles` is said of the first, which is the default."""
    hardware = next(iter(profiles.values()))
    return {
        "launcher": launcher_name,
        "profiles": {name: asdict(facts) for name, facts in profiles.items()},
        "trainer_types": {
            name: {"dataset_types": list(config.dataset_types), "modalities": list(config.modalities)}
            for name, config in TRAINER_TYPES.items()
            if name in hardware.trainer_types
        },
        "providers": list(hardware.providers),
        "methods": list(hardware.methods),
        "modalities": list(hardware.modalities),
        "graders": list(GRADER_TYPES),
        "export": {
            "formats": [name for name in get_args(ExportFormat) if name != "onnx" or hardware.onnx],
            "destinations": list(DESTINATIONS),
            "gguf_quantizations": list(get_args(GgufQuantization)) if hardware.gguf else [],
            "artifacts": list(get_args(ArtifactKind)),
        },
        "trackers": list(TRACKERS),
        "lm_eval": hardware.lm_eval,
        "use_fa2": hardware.flash_attention_2,
        "hardware": asdict(hardware),
    }

"""`POST /train` and `GET /capabilities`."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, get_args

from fastapi import APIRouter

from schema.requests import TrainRequest
from schema.training import TRAINER_TYPES
from schema.training.llm_export import ExportFormat, GgufQuantization
from schema.training.llm_graders import GRADER_TYPES
from service.api.dependencies import IdempotencyHeader, ServicesDep, TenantDep
from service.api.responses import TrainResponse
from service.core.ports import RuntimeCapabilities

TRACKERS = ("wandb", "mlflow", "tensorboard", "trackio")
DESTINATIONS = ("gcs", "hfhub")

router = APIRouter(tags=["training"])


@router.post("/train", status_code=201)
def create_training_job(
    body: TrainRequest, services: ServicesDep, tenant_id: TenantDep, idempotency_key: IdempotencyHeader = None
) -> TrainResponse:
    """Create a training job. Its record is durable when this responds."""
    return TrainResponse(job_id=services.jobs.submission.submit(body, tenant_id, idempotency_key).job_id)


# Any: the fields depend on the deployment; docs/api.md documents them.
@router.get("/capabilities")
def get_capabilities(services: ServicesDep) -> dict[str, Any]:
    """What this deployment can train, on which hardware, and what it can export."""
    profiles = {name: services.launcher.get_capabilities(name) for name in services.launcher.profiles}
    return capabilities_response(profiles, services.launcher.name)


def capabilities_response(profiles: Mapping[str, RuntimeCapabilities], launcher_name: str) -> dict[str, object]:
    """The body of `GET /capabilities`. Everything outside `profiles` describes the first profile, which is the default."""
    default = next(iter(profiles.values()))
    return {
        "launcher": launcher_name,
        "profiles": {name: asdict(capabilities) for name, capabilities in profiles.items()},
        "trainer_types": {
            name: {"dataset_types": list(config.dataset_types), "modalities": list(config.modalities)}
            for name, config in TRAINER_TYPES.items()
            if name in default.trainer_types
        },
        "providers": list(default.providers),
        "methods": list(default.methods),
        "modalities": list(default.modalities),
        "graders": list(GRADER_TYPES),
        "export": {
            "formats": [name for name in get_args(ExportFormat) if name != "onnx" or default.onnx],
            "destinations": list(DESTINATIONS),
            "gguf_quantizations": list(get_args(GgufQuantization)) if default.gguf else [],
            "artifacts": sorted({info.name for config in TRAINER_TYPES.values() for info in config.artifact_kinds}),
        },
        "trackers": list(TRACKERS),
        "lm_eval": default.lm_eval,
        "use_fa2": default.flash_attention_2,
        "hardware": asdict(default),
    }

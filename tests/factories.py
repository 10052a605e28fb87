"""Values with every field set, so that a test names only the fields that matter to it."""

from datetime import UTC, datetime
from typing import Any

from schema.capabilities import EnvironmentManifest, FamilyCapabilities
from schema.dataset import Dataset, Split
from schema.job import Attempt, Job, Status
from schema.placement import Placement
from schema.requests import TRAIN_REQUEST_EXAMPLE, TrainRequest
from schema.training import TRAINER_TYPES, TRAINING_CONFIG, SftConfig, TrainingConfig
from service.core.ports import Profile

START = datetime(2026, 1, 1, tzinfo=UTC)
FAKE_PLACEMENT = Placement(launcher="fake", profile="fake", environment="llm")


def make_config(**changes: Any) -> SftConfig:
    return SftConfig.model_validate({"base_model_id": "google/gemma-3-270m"} | changes)


def make_grpo_config(*graders: dict[str, Any], **changes: Any) -> TrainingConfig:
    reward_config = list(graders) or [{"type": "numeric_accuracy", "name": "right"}]
    config = {"base_model_id": "google/gemma-3-270m", "trainer_type": "grpo", "reward_config": reward_config}
    return TRAINING_CONFIG.validate_python(config | changes)


def make_job(job_id: str = "job-1", **changes: Any) -> Job:
    job = Job(
        job_id=job_id,
        tenant_id="local",
        job_name="a job",
        processed_dataset_id="dataset_1",
        training_config=make_config(),
        placements=(FAKE_PLACEMENT,),
        status=Status.QUEUED,
        created_at=START,
        updated_at=START,
        status_changed_at=START,
    )
    return job.model_copy(update=changes)


def make_attempt(number: int = 1, **changes: Any) -> Attempt:
    return Attempt(number=number, placement=FAKE_PLACEMENT, created_at=START).model_copy(update=changes)


def make_dataset(dataset_id: str = "dataset_1", **changes: Any) -> Dataset:
    splits = {
        name: Split(rows=rows, size_bytes=100, sha256="0" * 64, key=f"datasets/{dataset_id}/{name}.jsonl")
        for name, rows in (("train", 9), ("eval", 1))
    }
    dataset = Dataset(
        processed_dataset_id=dataset_id,
        tenant_id="local",
        name="rows",
        dataset_type="messages",
        splits=splits,
        digest="sha256:0",
        rows_uploaded=10,
        created_at=START,
    )
    return dataset.model_copy(update=changes)


def make_train_request(**changes: Any) -> TrainRequest:
    body = {"processed_dataset_id": "dataset_1", "training_config": TRAIN_REQUEST_EXAMPLE["training_config"]}
    return TrainRequest.model_validate(body | changes)


def make_capabilities(**changes: Any) -> FamilyCapabilities:
    """Language models with llama.cpp, and nothing else that is optional."""
    options = {"provider": ("huggingface",), "method": ("LoRA", "Full"), "modality": ("text", "vision")}
    capabilities: dict[str, Any] = {"trainer_types": tuple(TRAINER_TYPES), "options": options, "features": {"gguf": True}}
    return FamilyCapabilities(**capabilities | changes)


def make_manifest(capabilities: FamilyCapabilities | None = None, environment: str = "llm") -> EnvironmentManifest:
    return EnvironmentManifest(environment=environment, python="3.11.0", families={"llm": capabilities or make_capabilities()})


def make_profile(name: str = "fake", **changes: Any) -> Profile:
    return Profile(**{"name": name, "device": "cpu", "device_name": "a processor"} | changes)

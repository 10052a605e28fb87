"""The settings of the Cloud Run launcher."""

from pathlib import Path
from typing import Self

from pydantic import AliasChoices, Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.setting_types import SOURCE_ROOT, CommaList

GPU_TASK_LIMIT_S = 3600  # Cloud Run's limit for a task with a GPU


class CloudRunSettings(BaseSettings):
    """Settings of the Cloud Run launcher, each an environment variable `TUNESMITH_CLOUD_RUN_<NAME>`."""

    model_config = SettingsConfigDict(env_prefix="TUNESMITH_CLOUD_RUN_", extra="ignore", frozen=True)

    project_id: str | None = Field(
        None,
        validation_alias=AliasChoices("TUNESMITH_PROJECT_ID", "PROJECT_ID", "GOOGLE_CLOUD_PROJECT"),
        description="The Google Cloud project of the Cloud Run jobs, the same as of Firestore and Secret Manager.",
    )
    region: str | None = Field(
        None,
        validation_alias=AliasChoices("TUNESMITH_REGION", "REGION"),
        description="The region of the Cloud Run jobs, such as `europe-west4`.",
    )
    profiles: CommaList = Field(
        ("l4",),
        min_length=1,
        description="Hardware profiles that jobs may request, by comma; the first is the default. Each has its own Cloud Run job.",
    )
    max_concurrent_jobs: int = Field(
        1, ge=1, le=1000, description="Maximum number of attempts that run at the same time; other jobs wait in the queue."
    )
    time_limit_s: int = Field(
        GPU_TASK_LIMIT_S,
        ge=10,
        le=604_800,
        description="Time limit of an attempt in seconds. An attempt saves a checkpoint before it, and the next attempt continues. "
        "Default: an hour, the longest that a GPU task may take.",
    )
    environments: Path = Field(
        SOURCE_ROOT / "jobs/environments", description="Folder of the manifests of the images, which their build writes."
    )
    emulator_host: str | None = Field(
        None, validation_alias="CLOUD_RUN_EMULATOR_HOST", description="host:port of a Cloud Run emulator, for `make cloud-local`."
    )

    @model_validator(mode="after")
    def _check_project(self) -> Self:
        for name, variable in (("project_id", "PROJECT_ID"), ("region", "REGION")):
            if not getattr(self, name):
                raise ValueError(f"cloud-run needs {variable}")
        return self

"""The settings of the local launcher."""

from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.setting_types import SOURCE_ROOT


class LocalSettings(BaseSettings):
    """Settings of the local launcher, each an environment variable `TUNESMITH_LOCAL_<NAME>`."""

    model_config = SettingsConfigDict(env_prefix="TUNESMITH_LOCAL_", extra="ignore", frozen=True)

    max_concurrent_jobs: int = Field(
        1, ge=1, le=1000, description="Maximum number of attempts that run at the same time; other jobs wait in the queue."
    )
    max_concurrent_ingestions: int = Field(
        1, ge=1, le=100, description="Maximum number of attempts besides these that make datasets: they do not wait behind a training."
    )
    time_limit_s: int | None = Field(
        None,
        ge=10,
        le=604_800,
        description="Time limit of an attempt in seconds. An attempt saves a checkpoint before it, and the next attempt continues. "
        "Default: no limit.",
    )
    memory_limit_bytes: int | None = Field(
        None,
        ge=64 << 20,
        description="Memory that an attempt may hold with all its processes, in bytes; one that holds more is ended and fails with "
        "`out_of_memory`. Default: 90 % of the machine's memory.",
    )
    max_processes: int = Field(
        1024, ge=1, description="Maximum number of processes of an attempt, including itself; an attempt with more is ended and fails."
    )
    venvs: Path = Field(
        SOURCE_ROOT / ".venvs", description="Folder of the virtual environments of attempts, each named as its environment."
    )
    environments: Path = Field(
        SOURCE_ROOT / "jobs/environments", description="Folder of the environments, each with the manifest of what it can run."
    )

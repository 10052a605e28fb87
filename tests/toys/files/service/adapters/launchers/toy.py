"""A second launcher of child processes, whose attempts see only the runtime and one family."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Self

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.adapters.launchers import LauncherDeployment
from service.adapters.launchers.local.device import detect_profile
from service.adapters.launchers.local.environments import LocalEnvironments
from service.adapters.launchers.local.launcher import LocalLauncher
from service.adapters.launchers.local.settings import LocalSettings
from service.core.ports import Profile
from service.setting_types import SOURCE_ROOT


class ToySettings(BaseSettings):
    """Settings of the toy launcher."""

    model_config = SettingsConfigDict(env_prefix="TUNESMITH_TOY_", extra="ignore", frozen=True)

    source: str = Field(description="Folder of the code of attempts.")


class ToyLauncher(LocalLauncher):
    name = "toy"

    @classmethod
    def from_environment(cls, deployment: LauncherDeployment) -> Self:
        settings, local = ToySettings(), LocalSettings()  # type: ignore[call-arg]
        environments = LocalEnvironments(
            environments=local.environments, venvs=local.venvs, source=SOURCE_ROOT, variables=deployment.variables
        )
        return cls(
            home=deployment.home / "toy",
            environments=environments,
            source=Path(settings.source),
            service_url=deployment.service_url,
            max_concurrent_jobs=2,
            variables=deployment.variables,
        )

    @cached_property
    def profiles(self) -> Mapping[str, Profile]:
        return {"toy": detect_profile("toy", None)}

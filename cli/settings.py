"""Settings of the command line, with the same environment variables and defaults as the service."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

SOURCE_ROOT = Path(__file__).resolve().parent.parent
HUB_URL = "https://huggingface.co"
TRUE_WORDS = ("1", "on", "yes", "true")  # as huggingface_hub reads them
DEFAULT_URL = "http://127.0.0.1:8080"


@dataclass(frozen=True)
class Settings:
    """Settings of the command line: environment variables `TUNESMITH_<NAME>`, and those of huggingface_hub."""

    home: Path = Path("~/.tunesmith")
    venvs: Path = SOURCE_ROOT / ".venvs"
    hub_url: str = HUB_URL
    is_hub_offline: bool = False
    cache: Path = Path("~/.cache")  # of the account: XDG_CACHE_HOME

    @classmethod
    def from_environment(cls, variables: Mapping[str, str] = os.environ) -> Self:
        """Read the settings from environment variables; a missing variable means the default."""
        return cls(
            home=Path(variables.get("TUNESMITH_HOME", cls.home)),
            venvs=Path(variables.get("TUNESMITH_LOCAL_VENVS", cls.venvs)),
            hub_url=variables.get("HF_ENDPOINT", cls.hub_url).rstrip("/"),
            is_hub_offline=variables.get("HF_HUB_OFFLINE", "").lower() in TRUE_WORDS,
            cache=Path(variables.get("XDG_CACHE_HOME") or cls.cache),
        )

    @property
    def trainer_python(self) -> Path:
        """The Python of the environment that `chat` uses."""
        return self.venvs / "llm/bin/python"

    @property
    def home_folder(self) -> Path:
        """`home` as an absolute path."""
        return self.home.expanduser().absolute()

    @property
    def service_pid(self) -> int | None:
        """The process of the service that runs in the home folder; None if none does."""
        try:
            pid = int(str(self._read_service_file()["pid"]))
            os.kill(pid, 0)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return pid

    @property
    def local_token(self) -> str | None:
        """The token of the home folder, if its service runs: once that was killed, anybody could listen on its port."""
        if self.service_pid is None:
            return None
        try:
            return (self.home_folder / "token").read_text().strip()
        except OSError:
            return None

    @property
    def service_url(self) -> str:
        """The URL that a running service wrote to `home`/service.json, else the default URL."""
        try:
            return str(self._read_service_file()["url"])
        except (FileNotFoundError, ValueError, KeyError):
            return DEFAULT_URL

    def _read_service_file(self) -> dict[str, object]:
        return json.loads((self.home_folder / "service.json").read_text())

"""Settings of the command line, with the same environment variables and defaults as the service."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

SOURCE_ROOT = Path(__file__).resolve().parent.parent
DEFAULT_URL = "http://127.0.0.1:8080"


@dataclass(frozen=True)
class Settings:
    """Settings of the command line, each an environment variable `TUNESMITH_<NAME>`."""

    home: Path = Path("~/.tunesmith")
    venvs: Path = SOURCE_ROOT / ".venvs"
    cache: Path = Path("~/.cache")  # of the account: XDG_CACHE_HOME

    @classmethod
    def from_environment(cls, variables: Mapping[str, str] = os.environ) -> Self:
        """Read the settings from environment variables; a missing variable means the default."""
        return cls(
            home=Path(variables.get("TUNESMITH_HOME", cls.home)),
            venvs=Path(variables.get("TUNESMITH_LOCAL_VENVS", cls.venvs)),
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
    def local_token(self) -> str | None:
        """The token of the home folder, if its service runs: once that was killed, anybody could listen on its port."""
        try:
            os.kill(int(str(self._read_service_file()["pid"])), 0)
            return (self.home_folder / "token").read_text().strip()
        except (OSError, ValueError, KeyError, TypeError):
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

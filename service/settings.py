"""Every setting of the service, read from the environment here and nowhere else."""

import os
from pathlib import Path
from typing import Literal

from pydantic import AliasChoices, Field
from pydantic_settings import BaseSettings, SettingsConfigDict

SOURCE = Path(__file__).resolve().parent.parent


class Settings(BaseSettings):
    """Settings of the service, each an environment variable `TUNESMITH_<NAME>`."""

    model_config = SettingsConfigDict(env_prefix="TUNESMITH_", extra="ignore", frozen=True)

    home: Path = Field(Path("~/.tunesmith"), description="Where the local profile keeps records, objects, secrets and logs.")
    host: str = Field("127.0.0.1", description="Address to listen on. The local profile asks nobody who they are: keep it on loopback.")
    port: int = Field(8080, ge=0, le=65535, validation_alias=AliasChoices("TUNESMITH_PORT", "PORT"), description="0 takes a free one.")
    public_url: str | None = Field(None, description="How callers and attempts reach the service, if not at host and port.")
    job_store: str = Field("sqlite", description="Where records are kept: `sqlite`, or `memory` (gone when the service stops).")
    launcher: str = Field("local", description="Where attempts run.")
    secret_store: str = Field("local", description="Where secrets are kept.")
    objects_url: str | None = Field(None, description="The object store, as a url; left out it is a folder in home.")
    max_concurrent_jobs: int = Field(1, ge=1, le=64, description="Attempts at a time on this machine; others wait in the queue.")
    trainer_python: Path = Field(SOURCE / ".venvs/llm/bin/python", description="The Python of the trainer's environment.")
    max_upload_bytes: int = Field(2 << 30, ge=1, description="Largest dataset file, in bytes.")
    max_row_bytes: int = Field(1 << 20, ge=100, description="Longest row of a dataset, in bytes.")
    max_dataset_rows: int = Field(1_000_000, ge=1, description="Most rows of a dataset.")
    reconcile_interval_s: float = Field(1.0, gt=0, description="Seconds between two looks at the open jobs.")
    log_format: Literal["text", "json"] = Field("text", description="`json` for a log collector.")

    @property
    def home_folder(self) -> Path:
        """`home` as an absolute path."""
        return self.home.expanduser().absolute()

    @property
    def store_url(self) -> str:
        """The object store's url."""
        return self.objects_url or (self.home_folder / "objects").as_uri()

    @property
    def url(self) -> str:
        """How attempts on this machine reach the service."""
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host  # noqa: S104  # compared, not bound
        return self.public_url or f"http://{host}:{self.port}"


# What an attempt on this machine inherits; everything else, credentials above all, stays with the service.
INHERITED = (
    *("PATH", "HOME", "USER", "LANG", "LC_ALL", "TZ", "TMPDIR", "XDG_CACHE_HOME", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
    *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"),
    *("HF_HOME", "HF_ENDPOINT", "HF_HUB_OFFLINE", "WANDB_BASE_URL"),
    *("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"),
)


def inherited_environment() -> dict[str, str]:
    """The service's variables that an attempt may see."""
    return {name: os.environ[name] for name in INHERITED if name in os.environ}

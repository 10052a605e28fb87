"""Every setting of the service, read from the environment here and nowhere else."""

import os
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AliasChoices, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from service.core.jobs.trackers import DeploymentTrackers

DEFAULT_HF_ENDPOINT = "https://huggingface.co"
SOURCE_ROOT = Path(__file__).resolve().parent.parent


class Settings(BaseSettings):
    """Settings of the service, each an environment variable `TUNESMITH_<NAME>`."""

    model_config = SettingsConfigDict(env_prefix="TUNESMITH_", extra="ignore", frozen=True)

    home: Path = Field(Path("~/.tunesmith"), description="Where the local profile keeps records, objects, secrets and logs.")
    host: str = Field("127.0.0.1", description="Address to listen on. The local profile asks nobody who they are: keep it on loopback.")
    port: int = Field(8080, ge=0, le=65535, validation_alias=AliasChoices("TUNESMITH_PORT", "PORT"), description="0 takes a free one.")
    public_url: str | None = Field(None, description="How callers and attempts reach the service, if not at host and port.")
    job_store: str = Field(
        "sqlite", description="Where records are kept: `sqlite`, `firestore`, or `memory` (gone when the service stops)."
    )
    launcher: str = Field("local", description="Where attempts run: `local` or `cloud-run`.")
    secret_store: str = Field("local", description="Where secrets are kept: `local` or `secret-manager`.")
    objects_url: str | None = Field(
        None, description="The object store, as a url: `file:///…`, `gs://bucket`, `s3://bucket`. Left out, a folder in home."
    )
    configs_url: str | None = Field(None, description="Where specs and results lie, if not in the object store above.")
    datasets_url: str | None = Field(None, description="Where datasets lie, if not in the object store above.")
    models_url: str | None = Field(None, description="Where base models and artifacts lie, if not in the object store above.")
    gcs_config_bucket_name: str | None = Field(
        None, validation_alias="GCS_CONFIG_BUCKET_NAME", description="The bucket of specs and results: another way to say `configs_url`."
    )
    project_id: str | None = Field(
        None,
        validation_alias=AliasChoices("TUNESMITH_PROJECT_ID", "PROJECT_ID", "GOOGLE_CLOUD_PROJECT"),
        description="The Google Cloud project of Firestore, Cloud Run and Secret Manager.",
    )
    region: str | None = Field(
        None,
        validation_alias=AliasChoices("TUNESMITH_REGION", "REGION"),
        description="The region of the Cloud Run jobs, such as `europe-west4`.",
    )
    firestore_database: str = Field("(default)", description="The Firestore database.")
    hardware_profiles: Annotated[tuple[str, ...], NoDecode] = Field(
        ("l4",),
        description="Kinds of hardware that jobs may ask for, by comma; the first is the default. Each has a Cloud Run job of its own.",
    )
    attempt_time_limit_s: int | None = Field(
        None,
        ge=10,
        le=604_800,
        description="Seconds that an attempt may take; it saves a checkpoint in time, and the next attempt follows. "
        "Left out: an hour on Cloud Run, which is what a GPU task there may take, and no limit elsewhere.",
    )
    identity_audience: str | None = Field(
        None, description="What an attempt's identity token is for, where only known identities may call the service: its https url."
    )
    attempt_identity: str | None = Field(
        None, description="The service account of attempts, where there is a front door: it may report for attempts, and call nothing else."
    )
    signing_key: SecretStr | None = Field(
        None, min_length=32, description="Signs attempt tokens and links, the same in every instance. Left out, a key file in home."
    )
    max_concurrent_jobs: int = Field(1, ge=1, le=1000, description="Attempts at a time; others wait in the queue.")
    trainer_python: Path = Field(SOURCE_ROOT / ".venvs/llm/bin/python", description="The Python of the trainer's environment.")
    max_upload_bytes: int = Field(2 << 30, ge=1, description="Largest dataset file, in bytes.")
    max_incoming_bytes: int = Field(
        2 << 30, ge=1, description="Largest dataset file that is read from `incoming/` of the dataset store, in bytes."
    )
    max_row_bytes: int = Field(1 << 20, ge=100, description="Longest row of a dataset, in bytes.")
    max_image_row_bytes: int = Field(
        16 << 20, ge=100, description="Longest row of a dataset with its images, in bytes; without them it is max_row_bytes."
    )
    max_dataset_rows: int = Field(1_000_000, ge=1, description="Most rows of a dataset.")
    hf_endpoint: str = Field(
        DEFAULT_HF_ENDPOINT,
        pattern=r"^https?://[^\s@]+$",
        validation_alias=AliasChoices("TUNESMITH_HF_ENDPOINT", "HF_ENDPOINT"),
        description="The Hugging Face Hub, which is asked before a job is taken whether its token may read the base, and push. "
        "Attempts use it, too.",
    )
    hf_hub_offline: bool = Field(False, validation_alias="HF_HUB_OFFLINE", description="`1`: the Hub is not asked.")
    trackers: DeploymentTrackers | None = Field(
        None,
        description="Where jobs that name no tracker of that kind mirror their curves, as JSON in the words of a request: "
        '`{"mlflow_config": {"tracking_uri": "https://mlflow.example.com"}, "tensorboard_config": {}}`. W&B with `"mode": "offline"` only.',
    )
    reconcile_interval_s: float = Field(
        1.0,
        ge=0,
        description="Seconds between two looks at the open jobs. 0: no background task, a scheduler calls `POST /internal/reconcile`.",
    )
    event_poll_s: float = Field(
        0.1, gt=0, le=60, description="Seconds between two looks for a followed job's events; each is a read of the store."
    )
    log_format: Literal["text", "json"] = Field("text", description="`json` for a log collector.")

    cloud_run_emulator_host: str | None = Field(
        None, validation_alias="CLOUD_RUN_EMULATOR_HOST", description="host:port of a stand-in for Cloud Run, for `make cloud-local`."
    )
    secret_manager_emulator_host: str | None = Field(
        None, validation_alias="SECRET_MANAGER_EMULATOR_HOST", description="host:port of a stand-in for Secret Manager."
    )
    iam_credentials_emulator_host: str | None = Field(
        None, validation_alias="IAM_CREDENTIALS_EMULATOR_HOST", description="host:port of a stand-in for IAM credentials, which sign links."
    )

    @field_validator("hardware_profiles", mode="before")
    @classmethod
    def _split_commas(cls, value: object) -> object:
        return tuple(name.strip() for name in value.split(",") if name.strip()) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_cloud_settings(self) -> Self:
        needs = {"firestore": ("project_id",), "secret-manager": ("project_id",), "cloud-run": ("project_id", "region", "public_url")}
        for adapter in (self.job_store, self.secret_store, self.launcher):
            for name in needs.get(adapter, ()):
                if not getattr(self, name):
                    raise ValueError(f"{adapter} needs {_variable_name(name)}")
        if self.launcher == "cloud-run" and not self.hardware_profiles:
            raise ValueError("cloud-run needs TUNESMITH_HARDWARE_PROFILES, such as l4,cpu")
        return self

    @property
    def home_folder(self) -> Path:
        """`home` as an absolute path."""
        return self.home.expanduser().absolute()

    @property
    def object_urls(self) -> dict[Literal["configs", "datasets", "models"], str]:
        """The object store's url, by what lies there."""
        shared = self.objects_url or (self.home_folder / "objects").as_uri()
        configs = self.configs_url or (f"gs://{self.gcs_config_bucket_name}" if self.gcs_config_bucket_name else None)
        return {"configs": configs or shared, "datasets": self.datasets_url or shared, "models": self.models_url or shared}

    @property
    def url(self) -> str:
        """How attempts on this machine reach the service."""
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host  # noqa: S104  # compared, not bound
        return self.public_url or f"http://{host}:{self.port}"


def _variable_name(name: str) -> str:
    """How a person sets it."""
    return {"project_id": "PROJECT_ID", "region": "REGION"}.get(name, f"TUNESMITH_{name.upper()}")


# What an attempt on this machine inherits; everything else, credentials above all, stays with the service.
INHERITED_VARIABLES = (
    *("PATH", "HOME", "USER", "LANG", "LC_ALL", "TZ", "TMPDIR", "XDG_CACHE_HOME", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
    *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"),
    *("HF_HOME", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET", "WANDB_BASE_URL"),
    # How the attempt reaches the object store: gs:// and s3:// read their credentials from where their own tools do.
    *("GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_CLOUD_PROJECT", "STORAGE_EMULATOR_HOST", "GCE_METADATA_HOST"),
    *("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"),
    *("JOB_PROCESSES", "JOB_PARALLELISM"),  # how many GPUs a training uses at most, and how it shares them
)
# And where there is an s3:// store: it knows no other credentials than these.
INHERITED_S3_VARIABLES = (
    *("AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"),
    *("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"),
)


def inherited_environment(settings: Settings) -> dict[str, str]:
    """The service's variables that an attempt may see."""
    uses_s3 = any(url.startswith("s3://") for url in settings.object_urls.values())
    names = (*INHERITED_VARIABLES, *INHERITED_S3_VARIABLES) if uses_s3 else INHERITED_VARIABLES
    return {name: os.environ[name] for name in names if name in os.environ}


def attempt_environment(settings: Settings) -> dict[str, str]:
    """What every attempt is told, wherever it runs: the Hub that the service asks, where it is another than the usual one."""
    return {} if settings.hf_endpoint == DEFAULT_HF_ENDPOINT else {"HF_ENDPOINT": settings.hf_endpoint}

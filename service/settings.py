"""The settings of the service. Each launcher has settings of its own, beside its adapter; no other code reads the environment."""

import os
import socket
from ipaddress import ip_address
from pathlib import Path
from typing import Literal, Self
from urllib.parse import urlsplit

import psutil
from pydantic import AliasChoices, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from schema.egress import EGRESS_VARIABLE, EgressPolicy, allow_rule_of, parse_allow_rule, parse_url
from service.core.jobs.trackers import DeploymentTrackers
from service.core.quotas import Quotas
from service.core.rate_limits import DEFAULT_RATE_LIMITS, RateLimits
from service.setting_types import SOURCE_ROOT, CommaList, RetentionDays

DEFAULT_HF_ENDPOINT = "https://huggingface.co"
IP_FAMILIES = (socket.AF_INET, socket.AF_INET6)


class Settings(BaseSettings):
    """Settings of the service, each an environment variable `TUNESMITH_<NAME>`."""

    model_config = SettingsConfigDict(env_prefix="TUNESMITH_", extra="ignore", frozen=True)

    home: Path = Field(Path("~/.tunesmith"), description="Folder of the records, objects, secrets and logs that are not stored in a cloud.")
    host: str = Field("127.0.0.1", description="Address to listen on. Other than loopback, it needs `identity`.")
    port: int = Field(
        8080, ge=0, le=65535, validation_alias=AliasChoices("TUNESMITH_PORT", "PORT"), description="Port to listen on; 0 picks a free one."
    )
    public_url: str | None = Field(None, description="URL at which callers and attempts reach the service, if not host and port.")
    job_store: str = Field(
        "sqlite", description="Where job records are stored: `sqlite`, `firestore`, or `memory` (lost when the service stops)."
    )
    launchers: CommaList = Field(
        ("local",),
        min_length=1,
        description="Launchers that run attempts, by comma: `local`, `cloud-run`. Jobs that ask for no hardware use the first one's first "
        "profile. Each launcher has settings of its own, below.",
    )
    secret_store: str = Field("local", description="Where secrets are stored: `local` or `secret-manager`.")
    objects_url: str | None = Field(
        None, description="URL of the object store: `file:///…`, `gs://bucket`, `s3://bucket`. Default: a folder in home."
    )
    configs_url: str | None = Field(None, description="URL of the store of specs and results, if not the object store above.")
    datasets_url: str | None = Field(None, description="URL of the store of datasets, if not the object store above.")
    models_url: str | None = Field(None, description="URL of the store of base models and artifacts, if not the object store above.")
    deployment_id: str | None = Field(
        None,
        pattern=r"^[a-z0-9][a-z0-9-]{0,62}$",
        description="Name of this deployment in the object stores, which several deployments can share. Default: one for each store of "
        "records.",
    )
    gcs_config_bucket_name: str | None = Field(
        None,
        validation_alias="GCS_CONFIG_BUCKET_NAME",
        description="Bucket of specs and results; the same as `configs_url` with `gs://` and the name.",
    )
    project_id: str | None = Field(
        None,
        validation_alias=AliasChoices("TUNESMITH_PROJECT_ID", "PROJECT_ID", "GOOGLE_CLOUD_PROJECT"),
        description="The Google Cloud project of Firestore and Secret Manager, and of Cloud Run.",
    )
    firestore_database: str = Field("(default)", description="The Firestore database.")
    identity: str | None = Field(
        None,
        description="The rule file that says which identities may call and what they may do (docs/identity.md), or its content as JSON. "
        "Needed to listen elsewhere than on loopback. Without it, a caller has an API key or the token file in home.",
    )
    cloud_run_service: str | None = Field(
        None, validation_alias="K_SERVICE", description="Set by Cloud Run. `identity` may trust its front end only there."
    )
    identity_audience: str | None = Field(
        None, description="Audience of an attempt's identity token, where IAM protects the service: the service's https URL."
    )
    attempt_identity: str | None = Field(
        None, description="Service account of attempts, where IAM protects the service. It may only report."
    )
    narrow_attempt_credentials: bool = Field(
        False,
        description="`true`: attempts get Google access tokens that reach only their own job's objects; all object stores are `gs://`.",
    )
    signing_key: SecretStr | None = Field(
        None, min_length=32, description="Key that signs attempt tokens and links; the same in every instance. Default: a key file in home."
    )
    signing_key_previous: SecretStr | None = Field(
        None,
        min_length=32,
        description="Earlier signing keys, by comma: their tokens and links stay valid after the key was replaced, and they sign nothing.",
    )
    allowed_hosts: CommaList = Field(
        (),
        description="Host names at which the service answers besides loopback, its address, `host` and the one in `public_url`, by comma; "
        "`*.example.com` for all names below one. Requests for other hosts are refused: a web page could send them (DNS rebinding).",
    )
    allowed_origins: CommaList = Field(
        (),
        description="Origins whose web pages may call the API from a browser, by comma: `https://dashboard.example.com`. "
        "Default: only pages of this service.",
    )
    trusted_proxies: CommaList = Field(
        (),
        description="Addresses or networks of reverse proxies, by comma, whose X-Forwarded-For and X-Forwarded-Proto are believed; `*`: "
        "every address, where only the proxy can connect. Default: none.",
    )
    max_header_bytes: int = Field(
        32 << 10, ge=1 << 10, description="Largest header of a request, in bytes; longer ones are answered with 431."
    )
    header_timeout_s: float = Field(10.0, gt=0, description="Seconds in which the header of a request must arrive.")
    keep_alive_s: float = Field(5.0, gt=0, description="Seconds that a connection stays open between two requests.")
    body_timeout_s: float = Field(
        10.0, gt=0, description="Seconds in which a body must grow by 1 KiB for each of them; a slower connection is closed."
    )
    max_connections: int | None = Field(
        None,
        ge=8,
        description="Maximum number of open connections. At the limit, the connection that has waited longest for a request is closed. "
        "Default: as many as the process may have files, less 256, at most 16384.",
    )
    max_concurrent_uploads: int = Field(
        2,
        ge=1,
        description="Datasets that are checked at the same time. Four times as many wait; more are answered with 503 and Retry-After.",
    )
    ingest_wait_s: float = Field(
        60.0, gt=0, le=3600, description="Seconds that an upload waits for its dataset; what takes longer is left to a job."
    )
    ingest_request_bytes: int = Field(
        64 << 20, ge=0, description="Largest file below `incoming/` that is read inside a request, in bytes; a job reads larger ones."
    )
    otlp_endpoint: str | None = Field(
        None,
        pattern=r"^https?://[^\s@]+$",
        validation_alias="OTEL_EXPORTER_OTLP_ENDPOINT",
        description="URL of an OpenTelemetry collector (OTLP over HTTP), to which traces and metrics are sent. Default: none are recorded.",
    )
    max_upload_bytes: int = Field(2 << 30, ge=1, description="Largest dataset file in an upload, in bytes.")
    max_incoming_bytes: int = Field(
        2 << 30, ge=1, description="Largest dataset file that is read from `incoming/` of the dataset store, in bytes."
    )
    max_row_bytes: int = Field(1 << 20, ge=100, description="Longest row of a dataset, in bytes.")
    max_image_row_bytes: int = Field(
        16 << 20, ge=100, description="Longest row of a dataset including its images, in bytes; max_row_bytes applies without them."
    )
    ingest_python: Path = Field(
        SOURCE_ROOT / ".venvs/data/bin/python", description="Python of the environment `data`, in which uploaded files are read."
    )
    ingest_memory_bytes: int = Field(
        4 << 30, ge=256 << 20, description="Memory that the process that reads one uploaded file may address, in bytes."
    )
    max_dataset_rows: int = Field(1_000_000, ge=1, description="Maximum number of rows of a dataset.")
    max_source_bytes: int = Field(
        16 << 30, ge=1, description="Largest source of a dataset that a job downloads, all its files together, in bytes."
    )
    dataset_sources: dict[str, tuple[str, ...]] = Field(
        {},
        description="Which sources are read with the deployment's own credentials, as JSON: prefixes such as `gs://bucket/folder` or "
        '`hf://owner` by tenant: `{"acme": ["gs://acme-data/chats"]}`. Default: every source for the owner of a service without '
        "`identity`, none for anybody else; callers send credentials of their own.",
    )
    quotas: Quotas = Field(
        default_factory=lambda: Quotas.model_validate({}),
        description="Quotas of tenants, as JSON: `default`, and `tenants` by id with what differs for one. Of each: `max_queued_jobs`, "
        "`max_running_jobs`, `max_stored_bytes` (datasets and artifacts), `max_gpu_hours_per_month`, `max_cost_usd_per_month`. "
        "Default: none.",
    )
    rate_limits: RateLimits = Field(
        DEFAULT_RATE_LIMITS,
        description="Requests of one caller at one instance of the service, by kind; failed authentications are counted by address. A kind "
        "that is left out has no limit; `none`: no limits. The account that runs the service has none, as on a laptop.",
    )
    max_dataset_pixels: int = Field(
        20_000_000_000, ge=1, description="Maximum number of pixels of all images of a dataset: checking them takes about 10 s per 10⁹."
    )
    hf_endpoint: str = Field(
        DEFAULT_HF_ENDPOINT,
        pattern=r"^https?://[^\s@]+$",
        validation_alias=AliasChoices("TUNESMITH_HF_ENDPOINT", "HF_ENDPOINT"),
        description="URL of the Hugging Face Hub. Before accepting a job, the service asks whether the token may read the base and push. "
        "Attempts use it too.",
    )
    hf_hub_offline: bool = Field(False, validation_alias="HF_HUB_OFFLINE", description="`1`: the service does not call the Hub.")
    trackers: DeploymentTrackers | None = Field(
        None,
        description="Trackers of jobs that name no tracker of that kind, as JSON with the fields of a request: "
        '`{"mlflow_config": {"tracking_uri": "https://mlflow.example.com"}, "tensorboard_config": {}}`. W&B only with `"mode": "offline"`.',
    )
    egress_allow: CommaList = Field(
        (),
        description="Where callers' URLs (judges, MLflow servers) may lead besides the public internet over https, by comma: networks and "
        "hosts, with or without a port, such as `10.2.0.0/16`, `judge.corp.example:8000`, `*.corp.example`. http is allowed there too. "
        "Loopback is allowed where callers and attempts are all on this machine. Link-local and metadata addresses and the service itself "
        "are never allowed.",
    )
    preparation_limit_s: int = Field(
        7200,
        ge=60,
        description="Seconds that an attempt may take to download its base model and prepare its dataset; after that its job fails.",
    )
    checkpoint_retention_days: RetentionDays = Field(
        7.0,
        description="Days for which a completed job keeps its checkpoints; then all but the published one are deleted, and that one is "
        "reduced to what an export reads. `0`: soon after it is completed; `none`: forever. Failed and cancelled jobs keep theirs.",
    )
    reconcile_interval_s: float = Field(
        1.0,
        ge=0,
        description="Seconds between two reconciliations. 0: no background task; a scheduler calls `POST /internal/reconcile`.",
    )
    event_poll_s: float = Field(
        0.1, gt=0, le=60, description="Seconds between two polls for the events of a followed job; each reads the job store."
    )
    max_followers: int = Field(1000, ge=1, description="How many clients may follow events or logs at the same time.")
    max_followers_per_job: int = Field(500, ge=1, description="How many clients may follow the events or logs of one job at the same time.")
    log_format: Literal["text", "json"] = Field("text", description="`json` for a log collector.")

    secret_manager_emulator_host: str | None = Field(
        None, validation_alias="SECRET_MANAGER_EMULATOR_HOST", description="host:port of a Secret Manager emulator."
    )
    iam_credentials_emulator_host: str | None = Field(
        None,
        validation_alias="IAM_CREDENTIALS_EMULATOR_HOST",
        description="host:port of an emulator of IAM Credentials, which signs links.",
    )

    @model_validator(mode="after")
    def _check_signing_keys(self) -> Self:
        if self.signing_key_previous is None:
            return self
        if self.signing_key is None:
            raise ValueError("TUNESMITH_SIGNING_KEY_PREVIOUS needs TUNESMITH_SIGNING_KEY, the key that signs now")
        if any(len(key) < 32 for key in self.previous_signing_keys):
            raise ValueError("each key in TUNESMITH_SIGNING_KEY_PREVIOUS has at least 32 characters")
        return self

    @model_validator(mode="after")
    def _check_cloud_settings(self) -> Self:
        for adapter in (self.job_store, self.secret_store):
            if adapter in ("firestore", "secret-manager") and not self.project_id:
                raise ValueError(f"{adapter} needs PROJECT_ID")
        return self

    @field_validator("egress_allow")
    @classmethod
    def _check_egress_rules(cls, rules: tuple[str, ...]) -> tuple[str, ...]:
        for rule in rules:
            parse_allow_rule(rule)
        return rules

    @field_validator("dataset_sources")
    @classmethod
    def _check_dataset_sources(cls, sources: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        for prefix in (prefix for prefixes in sources.values() for prefix in prefixes):
            scheme, _, rest = prefix.partition("://")
            if scheme not in ("gs", "s3", "hf") or not rest or any(character in rest for character in "*?"):
                raise ValueError(f"{prefix!r} is no prefix of sources such as gs://bucket/folder, s3://bucket or hf://owner")
        return sources

    @property
    def home_folder(self) -> Path:
        """`home` as an absolute path."""
        return self.home.expanduser().absolute()

    @property
    def previous_signing_keys(self) -> tuple[bytes, ...]:
        """The earlier signing keys in the settings."""
        text = self.signing_key_previous.get_secret_value() if self.signing_key_previous else ""
        return tuple(key.strip().encode() for key in text.split(",") if key.strip())

    @model_validator(mode="after")
    def _check_narrow_credentials(self) -> Self:
        if self.narrow_attempt_credentials and not all(url.startswith("gs://") for url in self.object_urls.values()):
            raise ValueError("TUNESMITH_NARROW_ATTEMPT_CREDENTIALS needs object stores on Google Cloud: gs://bucket")
        return self

    @property
    def object_urls(self) -> dict[Literal["configs", "datasets", "models"], str]:
        """The URL of the object store of each kind of object."""
        shared = self.objects_url or (self.home_folder / "objects").as_uri()
        configs = self.configs_url or (f"gs://{self.gcs_config_bucket_name}" if self.gcs_config_bucket_name else None)
        return {"configs": configs or shared, "datasets": self.datasets_url or shared, "models": self.models_url or shared}

    @property
    def url(self) -> str:
        """The URL at which attempts on this machine reach the service."""
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host  # noqa: S104  # compared, not bound
        return self.public_url or f"http://{host}:{self.port}"


# Settings that an earlier version had, with their names since. Ignored without a word, they would change what a deployment does.
RENAMED_VARIABLES = {
    "TUNESMITH_LAUNCHER": "TUNESMITH_LAUNCHERS",
    "TUNESMITH_TRAINER_PYTHON": "TUNESMITH_LOCAL_VENVS",
    "TUNESMITH_HARDWARE_PROFILES": "TUNESMITH_CLOUD_RUN_PROFILES",
    "TUNESMITH_MAX_CONCURRENT_JOBS": "TUNESMITH_LOCAL_MAX_CONCURRENT_JOBS or TUNESMITH_CLOUD_RUN_MAX_CONCURRENT_JOBS",
    "TUNESMITH_ATTEMPT_TIME_LIMIT_S": "TUNESMITH_LOCAL_TIME_LIMIT_S or TUNESMITH_CLOUD_RUN_TIME_LIMIT_S",
}


def check_renamed_variables() -> None:
    """Raise ValueError for a setting of an earlier version in the environment."""
    for old, new in RENAMED_VARIABLES.items():
        if old in os.environ:
            raise ValueError(f"{old} is now called {new}")


# Variables that an attempt on this machine inherits. It gets no others, and above all no credentials of the service.
INHERITED_VARIABLES = (
    *("PATH", "HOME", "USER", "LANG", "LC_ALL", "TZ", "TMPDIR", "XDG_CACHE_HOME", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
    *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"),
    *("HF_HOME", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET", "WANDB_BASE_URL"),
    # How the attempt reaches the object store: gs:// and s3:// read credentials where Google's and Amazon's own tools do.
    *("GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_CLOUD_PROJECT", "STORAGE_EMULATOR_HOST", "GCE_METADATA_HOST"),
    *("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"),
    *("JOB_PROCESSES", "JOB_PARALLELISM"),  # how many GPUs a training uses at most, and how it splits the work
)
# Inherited as well if there is an s3:// store.
INHERITED_S3_VARIABLES = (
    *("AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"),
    *("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"),
)


def inherited_variables(settings: Settings) -> dict[str, str]:
    """The service's variables that an attempt may see."""
    own_sources = (prefix for prefixes in settings.dataset_sources.values() for prefix in prefixes)
    uses_s3 = any(url.startswith("s3://") for url in (*settings.object_urls.values(), *own_sources))
    names = (*INHERITED_VARIABLES, *INHERITED_S3_VARIABLES) if uses_s3 else INHERITED_VARIABLES
    return {name: os.environ[name] for name in names if name in os.environ}


def hub_cache_folder() -> Path:
    """Where the Hub's client keeps what attempts on this machine have downloaded: they inherit the variables that say so."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("HF_HOME") or cache / "huggingface").expanduser() / "hub"


def attempt_variables(settings: Settings) -> dict[str, str]:
    """Variables of every attempt, on any launcher: the egress policy, and the URL of the Hub if it is not the public one."""
    egress = {EGRESS_VARIABLE: egress_policy(settings).model_dump_json()}
    return egress if settings.hf_endpoint == DEFAULT_HF_ENDPOINT else egress | {"HF_ENDPOINT": settings.hf_endpoint}


def egress_policy(settings: Settings) -> EgressPolicy:
    """What this deployment connects to when a caller names it. The operator's own MLflow server is allowed as it is."""
    mlflow = settings.trackers.mlflow_config if settings.trackers else None
    own = [parse_url(url) for url in (settings.public_url,) if url]
    return EgressPolicy(
        allow=(*settings.egress_allow, *([allow_rule_of(parse_url(mlflow.tracking_uri))] if mlflow else [])),
        allow_loopback=_is_on_one_machine(settings),
        own_ports=tuple(sorted({settings.port, *(target.port for target in own if target.address)})),
        own_addresses=tuple(sorted({*_interface_addresses(), *(target.host for target in own if target.address)})),
        own_hosts=tuple(f"{target.host}:{target.port}" for target in own if not target.address),
    )


def _is_on_one_machine(settings: Settings) -> bool:
    """Whether callers and attempts are all on this machine: then its loopback is theirs."""
    hosts = {settings.host, *([urlsplit(settings.public_url).hostname] if settings.public_url else [])}
    return set(settings.launchers) == {"local"} and hosts <= {"127.0.0.1", "::1", "localhost"}


def _interface_addresses() -> set[str]:
    """The addresses of this machine."""
    addresses = {
        entry.address.partition("%")[0] for entries in psutil.net_if_addrs().values() for entry in entries if entry.family in IP_FAMILIES
    }
    return {str(ip_address(address)) for address in addresses}

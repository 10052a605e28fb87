"""The environment variables of an attempt. The only module of `jobs/` that reads or sets them."""

import os
import sys
import tempfile
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jobs.runtime.errors import JobFailed
from schema.egress import EGRESS_VARIABLE, EgressPolicy


@dataclass(frozen=True)
class Settings:
    """How an attempt was launched.

    JOB_ID                 the job; its spec is at configs/{JOB_ID}.json
    JOB_SPEC_STORE_URL     the object store of spec and result, such as file:///home/me/objects
    JOB_ATTEMPT            the number of the attempt, from 1
    JOB_TOKEN              the bearer token of this attempt; never logged
    SERVICE_URL            where to claim and report
    JOB_SERVICE_SOCKET     the service's Unix socket, used instead of the address in SERVICE_URL; missing: the service is elsewhere
    SERVICE_AUDIENCE       audience of the Google identity token that the service requires; missing: it requires none
    JOB_WORKDIR            a folder for everything that the attempt writes
    JOB_REPORT_INTERVAL_S  seconds between reports (15); their responses carry directives such as `cancel`
    JOB_IMAGE              the container image, for run.json; missing: none
    JOB_PROCESSES          maximum number of training processes (`read_max_processes`); missing: one per GPU
    JOB_PARALLELISM        ddp or fsdp (`read_parallelism`); missing: chosen by whether the model fits
    JOB_EGRESS             what callers' URLs may lead to (`read_egress_policy`); missing: the public internet over https
    TRACEPARENT            the W3C trace context that the attempt continues; missing: none
    JOB_TIME_LIMIT_S       seconds within which the attempt must save and yield to the next one; missing: no limit
    """

    job_id: str
    spec_store_url: str
    attempt: int
    token: str = field(repr=False)
    service_url: str
    workdir: Path
    service_socket: Path | None = None
    service_audience: str | None = None
    report_interval_s: float = 15.0
    time_limit_s: float | None = None
    image: str | None = None
    traceparent: str | None = None


def read_settings(environment: Mapping[str, str] = os.environ) -> Settings:
    """Read the settings from the environment. Raises JobFailed for a variable that is missing or not a number."""
    limit = environment.get("JOB_TIME_LIMIT_S")
    return Settings(
        job_id=_read_required(environment, "JOB_ID"),
        spec_store_url=_read_required(environment, "JOB_SPEC_STORE_URL"),
        attempt=int(_parse_number("JOB_ATTEMPT", _read_required(environment, "JOB_ATTEMPT"))),
        token=_read_required(environment, "JOB_TOKEN"),
        service_url=_read_required(environment, "SERVICE_URL").rstrip("/"),
        service_socket=Path(socket) if (socket := environment.get("JOB_SERVICE_SOCKET")) else None,
        service_audience=environment.get("SERVICE_AUDIENCE") or None,
        workdir=Path(_read_required(environment, "JOB_WORKDIR")).resolve(),
        report_interval_s=_parse_number("JOB_REPORT_INTERVAL_S", environment.get("JOB_REPORT_INTERVAL_S") or "15"),
        time_limit_s=_parse_number("JOB_TIME_LIMIT_S", limit) if limit else None,
        image=environment.get("JOB_IMAGE") or None,
        traceparent=environment.get("TRACEPARENT") or None,
    )


def _read_required(environment: Mapping[str, str], name: str) -> str:
    if not environment.get(name):
        raise JobFailed("internal", f"the attempt was launched without {name}", "the launcher must set it; see jobs/runtime/settings.py")
    return environment[name]


def _parse_number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        message = f"{name} is not a number: {text!r}"
        raise JobFailed("internal", message, "the launcher must set it; see jobs/runtime/settings.py") from error


def cpu_thread_count(environment: Mapping[str, str] = os.environ) -> int:
    """How many threads to compute with: OMP_NUM_THREADS, which a launcher sets to share a machine, or else all cores."""
    threads = environment.get("OMP_NUM_THREADS", "")
    return int(threads) if threads.isdecimal() and int(threads) > 0 else os.cpu_count() or 1


def use_one_gpu(environment: MutableMapping[str, str] = os.environ) -> None:
    """Limit CUDA to the first visible GPU. Call it before any library initializes CUDA: one process trains on one GPU.

    Otherwise the trainer of transformers would use DataParallel over all GPUs, which TRL rejects. JOB_VISIBLE_GPUS keeps the original
    list for worker processes.
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        environment["JOB_VISIBLE_GPUS"] = visible
    environment["CUDA_VISIBLE_DEVICES"] = (visible if visible is not None else "0").partition(",")[0]


def visible_gpus(gpu_count: int, environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The GPUs that the attempt may use, as CUDA_VISIBLE_DEVICES names them; the machine has `gpu_count`.

    MIG partitions cannot communicate with each other, so only the first one is used.
    """
    visible = environment.get("JOB_VISIBLE_GPUS")
    names = tuple(str(number) for number in range(gpu_count)) if visible is None else tuple(name.strip() for name in visible.split(","))
    return names[:1] if any(name.startswith("MIG-") for name in names) else names


def read_max_processes(environment: Mapping[str, str] = os.environ) -> int | None:
    """JOB_PROCESSES: the maximum number of training processes; None: one per GPU. Raises JobFailed unless it is 1 or more."""
    value = environment.get("JOB_PROCESSES")
    if not value:
        return None
    count = int(_parse_number("JOB_PROCESSES", value))
    if count < 1:
        raise JobFailed("internal", f"JOB_PROCESSES is {value}", "the launcher must set it to 1 or more, or not at all")
    return count


def read_parallelism(environment: Mapping[str, str] = os.environ) -> Literal["ddp", "fsdp"] | None:
    """JOB_PARALLELISM: ddp (each process has the whole model) or fsdp (each has a shard); None: by what fits. Raises JobFailed."""
    value = environment.get("JOB_PARALLELISM") or None
    if value not in ("ddp", "fsdp", None):
        raise JobFailed("internal", f"JOB_PARALLELISM is {value!r}", "the launcher must set it to ddp or fsdp, or not at all")
    return value


# What a child process may inherit: how to find programs and libraries, how to compute, where temporary files go. Everything else stays
# here, because an environment holds tokens, keys and cloud credentials under names that nobody can list.
INHERITED_VARIABLES = frozenset({"PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "LANGUAGE", "TZ", "TMPDIR"})
INHERITED_PREFIXES = ("LC_", "OMP_", "MKL_", "OPENBLAS_", "CUDA_", "NVIDIA_", "NCCL_", "PYTORCH_", "TORCHINDUCTOR_", "TRITON_", "UNSLOTH_")
OFFLINE_VARIABLES = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def child_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of every child process of an attempt: no token, no key, no Hub. Its home is the attempt's own folder."""
    kept = {name: value for name, value in environment.items() if name in INHERITED_VARIABLES or name.startswith(INHERITED_PREFIXES)}
    return kept | OFFLINE_VARIABLES | {"HOME": environment.get("JOB_WORKDIR") or tempfile.gettempdir()}


def worker_environment(rank: int, world_size: int, gpu: str | None, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of a worker process: that of a child, the rank, and one GPU."""
    return child_environment(environment) | _rank_environment(rank, world_size) | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})


def set_rank_environment(rank: int, world_size: int, environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the variables by which libraries recognize this rank; `clear_rank_environment` undoes it."""
    environment.update(_rank_environment(rank, world_size))


def clear_rank_environment(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let libraries see a single process again."""
    for name in (*_rank_environment(0, 1), "LOCAL_WORLD_SIZE", "MASTER_PORT"):  # the last two are accelerate's own
        environment.pop(name, None)


def _rank_environment(rank: int, world_size: int) -> dict[str, str]:
    """The variables by which libraries recognize a rank. Each process sees one device, so its local rank is 0.

    There is no MASTER_PORT: the processes meet in a file, where torchrun's would meet at a port that every interface offers. What
    connects them afterwards listens on loopback only. accelerate asks for MASTER_ADDR, and does not use it.
    """
    loopback = "lo" if sys.platform == "linux" else "lo0"
    interfaces = {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": f"={loopback}"}
    return {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"} | interfaces


def enable_unsloth_logits(environment: MutableMapping[str, str] = os.environ) -> None:
    """Make unsloth return logits, which our loss is computed from."""
    environment["UNSLOTH_RETURN_LOGITS"] = "1"


def read_egress_policy(environment: Mapping[str, str] = os.environ) -> EgressPolicy:
    """JOB_EGRESS: what the attempt may connect to when a caller names it. Missing: the strictest policy. Raises JobFailed."""
    value = environment.get(EGRESS_VARIABLE)
    try:
        return EgressPolicy.load(value) if value else EgressPolicy()
    except ValueError as error:
        raise JobFailed("internal", f"{EGRESS_VARIABLE} is not an egress policy", "the service must set it") from error


def refuse_mlflow_redirects(environment: MutableMapping[str, str] = os.environ) -> None:
    """Make MLflow's client treat a redirect as an error, which would send metrics where no caller or operator said."""
    environment["MLFLOW_ALLOW_HTTP_REDIRECTS"] = "false"

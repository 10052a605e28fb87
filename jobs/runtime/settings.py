"""The environment of an attempt: the only place in `jobs/` that reads it."""

import os
import sys
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jobs.runtime.errors import JobFailed


@dataclass(frozen=True)
class Settings:
    """How an attempt was launched.

    JOB_ID                 the job; its spec is at configs/{JOB_ID}.json
    JOB_SPEC_STORE_URL     the object store of spec and result, such as file:///home/me/objects
    JOB_ATTEMPT            the number of the attempt, from 1
    JOB_TOKEN              the bearer token of this attempt; never logged
    SERVICE_URL            where to claim and report
    SERVICE_AUDIENCE       what the identity token is for that the service's front door asks for; missing: it asks for none
    JOB_WORKDIR            a folder of the attempt's own, for everything it writes
    JOB_REPORT_INTERVAL_S  seconds between reports (15); a directive such as `cancel` comes with their answers
    JOB_IMAGE              the container's image, for run.json; missing: none
    JOB_PROCESSES          processes that train at most (`most_processes`); missing: one for each GPU
    JOB_PARALLELISM        how they share the training (`parallelism`): ddp or fsdp; missing: as the model fits
    JOB_TIME_LIMIT_S       seconds within which the attempt saves what it has and yields to the next one; missing: no limit
    """

    job_id: str
    spec_store_url: str
    attempt: int
    token: str = field(repr=False)
    service_url: str
    workdir: Path
    service_audience: str | None = None
    report_interval_s: float = 15.0
    time_limit_s: float | None = None
    image: str | None = None


def read_settings(environment: Mapping[str, str] = os.environ) -> Settings:
    """Raises JobFailed that names the variable which is missing or not a number."""
    limit = environment.get("JOB_TIME_LIMIT_S")
    return Settings(
        job_id=_read_required(environment, "JOB_ID"),
        spec_store_url=_read_required(environment, "JOB_SPEC_STORE_URL"),
        attempt=int(_parse_number("JOB_ATTEMPT", _read_required(environment, "JOB_ATTEMPT"))),
        token=_read_required(environment, "JOB_TOKEN"),
        service_url=_read_required(environment, "SERVICE_URL").rstrip("/"),
        service_audience=environment.get("SERVICE_AUDIENCE") or None,
        workdir=Path(_read_required(environment, "JOB_WORKDIR")).resolve(),
        report_interval_s=_parse_number("JOB_REPORT_INTERVAL_S", environment.get("JOB_REPORT_INTERVAL_S") or "15"),
        time_limit_s=_parse_number("JOB_TIME_LIMIT_S", limit) if limit else None,
        image=environment.get("JOB_IMAGE") or None,
    )


def _read_required(environment: Mapping[str, str], name: str) -> str:
    if not environment.get(name):
        raise JobFailed("internal", f"the attempt was launched without {name}", "the launcher must set it; see jobs/runtime/settings.py")
    return environment[name]


def _parse_number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise JobFailed(
            "internal", f"{name} is not a number: {text!r}", "the launcher must set it; see jobs/runtime/settings.py"
        ) from error


def cpu_thread_count(environment: Mapping[str, str] = os.environ) -> int:
    """How many threads to compute with: OMP_NUM_THREADS, with which a launcher shares a machine, else every core."""
    told = environment.get("OMP_NUM_THREADS", "")
    return int(told) if told.isdecimal() and int(told) > 0 else os.cpu_count() or 1


def use_one_gpu(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let CUDA show this process the first of its GPUs alone, before anything asks: one process trains on one GPU.

    Transformers' trainer would otherwise spread a batch over all of them by threads, which TRL refuses. What the process was shown is
    kept for those that train beside it.
    """
    shown = environment.get("CUDA_VISIBLE_DEVICES")
    if shown is not None:
        environment["JOB_VISIBLE_GPUS"] = shown
    environment["CUDA_VISIBLE_DEVICES"] = (shown if shown is not None else "0").partition(",")[0]


def visible_gpus(gpu_count: int, environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The GPUs that the attempt may use, as CUDA_VISIBLE_DEVICES names them; `found` is how many the machine has.

    Parts of a divided GPU cannot speak to each other: of these it is one.
    """
    told = environment.get("JOB_VISIBLE_GPUS")
    names = tuple(str(number) for number in range(gpu_count)) if told is None else tuple(name.strip() for name in told.split(","))
    return names[:1] if any(name.startswith("MIG-") for name in names) else names


def read_max_processes(environment: Mapping[str, str] = os.environ) -> int | None:
    """JOB_PROCESSES: how many processes train at most; missing: one for each GPU. Raises JobFailed when it is no number from 1."""
    told = environment.get("JOB_PROCESSES")
    if not told:
        return None
    count = int(_parse_number("JOB_PROCESSES", told))
    if count < 1:
        raise JobFailed("internal", f"JOB_PROCESSES is {told}", "the launcher must set it to 1 or more, or not at all")
    return count


def read_parallelism(environment: Mapping[str, str] = os.environ) -> Literal["ddp", "fsdp"] | None:
    """JOB_PARALLELISM: ddp, every process with the whole model, or fsdp, each with a part; missing: as it fits. Raises JobFailed."""
    told = environment.get("JOB_PARALLELISM") or None
    if told not in ("ddp", "fsdp", None):
        raise JobFailed("internal", f"JOB_PARALLELISM is {told!r}", "the launcher must set it to ddp or fsdp, or not at all")
    return told


def worker_environment(
    rank: int, world_size: int, port: int, gpu: str | None, environment: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """What another process of a training is started with: no token, and one GPU of its own."""
    kept = {name: value for name, value in environment.items() if not name.startswith("JOB_")}
    return kept | _rank_environment(rank, world_size, port) | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})


def set_rank_environment(rank: int, world_size: int, port: int, environment: MutableMapping[str, str] = os.environ) -> None:
    """Let the libraries find this to be that process of a training; until `be_alone`."""
    environment.update(_rank_environment(rank, world_size, port))


def clear_rank_environment(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let the libraries find a single process again."""
    for name in (*_rank_environment(0, 1, 0), "LOCAL_WORLD_SIZE"):  # the last is accelerate's own
        environment.pop(name, None)


def _rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """As torchrun says it. Each sees one device alone, which is its first."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": "0"}
    sockets = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}  # else it looks up the machine's name, which may have none
    return {"RANK": str(rank), "WORLD_SIZE": str(world_size)} | place | sockets


def enable_unsloth_logits(environment: MutableMapping[str, str] = os.environ) -> None:
    """Our loss is computed from logits, which unsloth otherwise keeps to itself."""
    environment["UNSLOTH_RETURN_LOGITS"] = "1"

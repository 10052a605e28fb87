"""What this machine computes with, found without an ML library."""

import subprocess
from dataclasses import replace
from pathlib import Path

import psutil

from service.core.ports import Profile

NVIDIA_SMI = ("nvidia-smi", "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits")
NVIDIA_SMI_TIMEOUT_S = 10.0


def detect_profile(name: str, time_limit_s: int | None) -> Profile:
    """This machine as a profile: its NVIDIA GPUs, or its processor. The first GPU describes all of them."""
    machine = Profile(
        name=name,
        device="cpu",
        device_name=_cpu_name(),
        cpus=psutil.cpu_count(),
        memory_bytes=psutil.virtual_memory().total,
        has_bf16=bool(_cpu_flags() & {"avx512_bf16", "amx_bf16"}),
        time_limit_s=time_limit_s,
    )
    gpus = _query_gpus()
    if not gpus:
        return machine
    gpu_name, memory_mib, capability = gpus[0]
    return replace(
        machine,
        device="cuda",
        device_name=gpu_name,
        gpus=len(gpus),
        gpu_memory_bytes=int(memory_mib) << 20 if memory_mib.isdecimal() else None,
        compute_capability=_parse_float(capability),
    )


def _query_gpus() -> list[tuple[str, str, str]]:
    """Name, memory in MiB and compute capability of each GPU; none without NVIDIA's driver. A value may be "[N/A]"."""
    try:
        answer = subprocess.run(NVIDIA_SMI, capture_output=True, timeout=NVIDIA_SMI_TIMEOUT_S, check=True, text=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[value.strip() for value in line.rsplit(",", 2)] for line in answer.stdout.splitlines() if line.strip()]
    return [(row[0], row[1], row[2]) for row in rows if len(row) == 3]


def _parse_float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")


def _cpu_flags() -> set[str]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set[str]())

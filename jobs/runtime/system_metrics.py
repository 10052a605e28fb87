"""How busy the machine is, and what its GPUs draw: for the curves, and for the lineage of what was trained.

A machine without a GPU, or without its driver, simply has no such numbers; that is found out once, and said once.
"""

import functools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Protocol

log = logging.getLogger(__name__)

JOULES_PER_WH = 3600.0
SAMPLE_INTERVAL_S = 5.0
CPU_INTERVAL_S = 0.1  # psutil's own advice: over less the share is noise


@dataclass(frozen=True)
class GpuReading:
    """One GPU at one moment. None is what its driver does not tell, such as the load of a part of a divided GPU."""

    utilization: float | None = None  # percent of the last interval in which something ran
    memory_used_bytes: float | None = None
    power_w: float | None = None
    temperature_c: float | None = None
    energy_j: float | None = None  # since the driver was loaded


class Gpus(Protocol):
    """The GPUs that this process can see."""

    def read(self) -> Sequence[GpuReading]:
        """All of them now, in the driver's order."""
        ...


@dataclass(frozen=True)
class Energy:
    """What the GPUs took, or why nobody knows."""

    joules: float | None
    missing_reason: str = ""

    @property
    def watt_hours(self) -> float | None:
        return None if self.joules is None else self.joules / JOULES_PER_WH


class NvidiaGpus:
    """The GPUs of NVIDIA's driver; `nvml` is the module pynvml, initialised."""

    def __init__(self, nvml: ModuleType) -> None:
        self._nvml = nvml
        self._handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]

    @property
    def names(self) -> list[str]:
        """What the GPUs are called."""
        return [str(self._nvml.nvmlDeviceGetName(handle)) for handle in self._handles]

    @property
    def driver(self) -> str:
        """The driver's version."""
        return str(self._nvml.nvmlSystemGetDriverVersion())

    def read(self) -> list[GpuReading]:
        return [self._reading(handle) for handle in self._handles]

    def _reading(self, handle: object) -> GpuReading:
        nvml = self._nvml
        return GpuReading(
            utilization=self._query(lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu),
            memory_used_bytes=self._query(lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used),
            power_w=self._query(lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000),  # milliwatts
            temperature_c=self._query(lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
            energy_j=self._query(lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000),  # millijoules
        )

    def _query(self, query: Callable[[], float]) -> float | None:
        try:
            return float(query())
        except self._nvml.NVMLError:
            return None


class EnergyMeter:
    """What the GPUs take from now on: by their own counters, or by their power, summed up between two looks."""

    def __init__(self, gpus: Gpus | None = None, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._gpus = gpus if gpus is not None else nvidia_gpus()
        self._monotonic = monotonic
        self._first = self._last = self._read()
        self._last_s = monotonic()
        self._integrated_j = [0.0] * len(self._first)
        self._lock = threading.Lock()

    def start_sampling(self, interval_s: float = SAMPLE_INTERVAL_S) -> None:
        """Look at the power now and then, in a thread, from here to the end of the process: where a GPU does not count for itself."""
        if any(reading.energy_j is None and reading.power_w is not None for reading in self._first):
            threading.Thread(target=self._sample_periodically, args=(interval_s,), name="energy", daemon=True).start()

    def sample(self) -> None:
        """A look at the power: the sum takes it to have changed evenly since the last one."""
        with self._lock:
            self._integrate_power()

    def _sample_periodically(self, interval_s: float) -> None:
        while True:
            time.sleep(interval_s)
            self.sample()

    def _integrate_power(self) -> None:
        now_s, readings = self._monotonic(), self._read()
        for index, (before, after) in enumerate(zip(self._last, readings, strict=False)):
            if before.power_w is not None and after.power_w is not None:
                self._integrated_j[index] += (before.power_w + after.power_w) / 2 * (now_s - self._last_s)
        self._last, self._last_s = readings, now_s

    def read(self) -> Energy:
        """What was taken so far, all GPUs together."""
        if not self._first:
            return Energy(None, "no GPU whose driver tells what it draws; the energy of a CPU is not measured")
        self.sample()
        taken = [self._gpu_energy_j(index) for index in range(len(self._first))]
        known = [joules for joules in taken if joules is not None]
        if len(known) < len(taken):
            return Energy(None, f"{len(taken) - len(known)} of {len(taken)} GPUs do not tell what they draw")
        return Energy(sum(known))

    def _gpu_energy_j(self, index: int) -> float | None:
        first, last = self._first[index], self._last[index]
        if first.energy_j is not None and last.energy_j is not None:
            return last.energy_j - first.energy_j
        return None if last.power_w is None else self._integrated_j[index]

    def _read(self) -> Sequence[GpuReading]:
        return self._gpus.read() if self._gpus is not None else ()


def system_metrics(folder: Path | None = None, gpus: Gpus | None = None) -> dict[str, float]:
    """How busy the machine is, as numbers of a curve; `folder` is where the disk's free room is looked up. Takes a millisecond or two."""
    import psutil

    found = {
        "rss_bytes": float(psutil.Process().memory_info().rss),
        "memory_available_bytes": float(psutil.virtual_memory().available),
        "disk_free_bytes": float(psutil.disk_usage(str(folder or Path.cwd())).free),
    }
    if time.monotonic() - _cpu_sampling_started_s() > CPU_INTERVAL_S:
        found["cpu_percent"] = psutil.cpu_percent()  # of all cores, since the last call
    gpus = gpus if gpus is not None else nvidia_gpus()
    return found | (gpu_metrics(gpus.read()) if gpus is not None else {})


def gpu_metrics(readings: Sequence[GpuReading]) -> dict[str, float]:
    """The numbers of one GPU as gpu_…, of several as gpu0_…, gpu1_…."""
    found: dict[str, float] = {}
    for index, reading in enumerate(readings):
        prefix = "gpu" if len(readings) == 1 else f"gpu{index}"
        for name in ("utilization", "memory_used_bytes", "power_w", "temperature_c"):
            value = getattr(reading, name)
            if value is not None:
                found[f"{prefix}_{name}"] = value
    return found


@functools.cache
def nvidia_gpus() -> NvidiaGpus | None:
    """The GPUs of NVIDIA's driver; None without any, or in an environment without pynvml. Determined once."""
    if find_spec("pynvml") is None:
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
        found = NvidiaGpus(pynvml)
    except pynvml.NVMLError as error:
        log.info("no GPU to watch", extra={"reason": str(error)})
        return None
    return found if found.names else None


@functools.cache
def _cpu_sampling_started_s() -> float:
    """When the CPU was first looked at. What that look says is about nothing."""
    import psutil

    psutil.cpu_percent()
    return time.monotonic()

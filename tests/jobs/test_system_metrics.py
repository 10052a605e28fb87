# ruff: noqa: N802  # the names of the driver's library
"""Metrics of the machine and its GPUs; a machine without a GPU reports none."""

import itertools
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from jobs.runtime.system_metrics import EnergyMeter, GpuReading, NvidiaGpus, gpu_metrics, nvidia_gpus, system_metrics


@dataclass
class FakeGpuReader:
    """Returns one of `readings` per call; the last one repeats."""

    readings: list[list[GpuReading]]
    returned: list[list[GpuReading]] = field(default_factory=list)

    def read(self) -> list[GpuReading]:
        self.returned.append(self.readings.pop(0) if len(self.readings) > 1 else self.readings[0])
        return self.returned[-1]


class FakeNvml:
    """The driver's library for a machine with two GPUs. The second is partitioned and does not report its utilization."""

    NVML_TEMPERATURE_GPU = 0

    class NVMLError(Exception):
        pass

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, handle: int) -> str:
        return f"GPU {handle}"

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.1"

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:
        if handle == 1:
            raise self.NVMLError("Not Supported")
        return SimpleNamespace(gpu=87)

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return SimpleNamespace(used=1 << 30)

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        return 71_500

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:
        return 55

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        return 9_000


def test_machine_metrics_are_reported(tmp_path: Path) -> None:
    metrics = system_metrics(tmp_path, FakeGpuReader([[]]))  # also the first CPU reading
    assert {"rss_bytes", "memory_available_bytes", "disk_free_bytes"} <= set(metrics)
    time.sleep(0.11)
    assert 0 <= system_metrics(tmp_path)["cpu_percent"] <= 100
    assert all(value >= 0 for value in metrics.values())


def test_driver_is_probed_only_once() -> None:
    assert nvidia_gpus() is nvidia_gpus()
    assert nvidia_gpus.cache_info().misses == 1


def test_multiple_gpus_are_reported_and_missing_values_left_out() -> None:
    gpus = NvidiaGpus(FakeNvml())
    assert (gpus.names, gpus.driver) == (["GPU 0", "GPU 1"], "580.1")
    metrics = gpu_metrics(gpus.read())
    assert metrics["gpu0_utilization"] == 87
    assert metrics["gpu1_power_w"] == 71.5
    assert "gpu1_utilization" not in metrics
    assert "gpu_temperature_c" in gpu_metrics(gpus.read()[:1])  # a single GPU has no number


def test_energy_uses_hardware_counters() -> None:
    meter = EnergyMeter(FakeGpuReader([[GpuReading(power_w=9e9, energy_j=100.0)], [GpuReading(power_w=9e9, energy_j=3700.0)]]))
    energy = meter.read()
    assert (energy.joules, energy.watt_hours) == (3600.0, 1.0)


def test_energy_without_counter_integrates_power() -> None:
    clock = iter([0.0, 10.0, 30.0])
    readings = [[GpuReading(power_w=100.0)], [GpuReading(power_w=200.0)], [GpuReading(power_w=0.0)]]
    meter = EnergyMeter(FakeGpuReader(readings), monotonic=lambda: next(clock))
    meter.sample()
    assert meter.read().joules == 150 * 10 + 100 * 20


def test_power_is_sampled_when_no_counter_exists() -> None:
    sampled = threading.Event()

    class SignalingReader(FakeGpuReader):
        def read(self) -> list[GpuReading]:
            reading = super().read()
            if len(self.returned) == 4:  # the first reading and three of the sampling thread
                sampled.set()
            return reading

    ticks = itertools.count(step=10.0)
    meter = EnergyMeter(SignalingReader([[GpuReading(power_w=100.0)]]), monotonic=lambda: next(ticks))
    meter.start_sampling(interval_s=0.001)
    assert sampled.wait(10)
    assert (meter.read().joules or 0) >= 100 * 30


def test_gpu_with_counter_is_not_sampled() -> None:
    reader = FakeGpuReader([[GpuReading(power_w=100.0, energy_j=1.0)]])
    before = threading.active_count()
    EnergyMeter(reader).start_sampling(interval_s=0.001)
    assert threading.active_count() == before


def test_unmeasured_energy_is_null_with_reason() -> None:
    unmetered = EnergyMeter(FakeGpuReader([[GpuReading(energy_j=1.0), GpuReading()]])).read()
    no_gpu = EnergyMeter(FakeGpuReader([[]])).read()
    assert unmetered.joules is no_gpu.joules is no_gpu.watt_hours is None
    assert "1 of 2 GPUs" in unmetered.missing_reason
    assert "no GPU" in no_gpu.missing_reason

"""The hardware profiles that this launcher knows. The Cloud Run job of each is sized in infra/terraform; a test compares the two."""

from dataclasses import dataclass, replace

from service.core.ports import Profile

GIB = 1 << 30


@dataclass(frozen=True)
class CloudRunProfile:
    """A profile, and the quota that usually runs out first."""

    profile: Profile
    quota: str

    def with_time_limit(self, time_limit_s: int) -> Profile:
        """The profile as a deployment with that time limit offers it."""
        return replace(self.profile, time_limit_s=time_limit_s)


PROFILES = {
    each.profile.name: each
    for each in (
        CloudRunProfile(
            Profile(
                name="l4",
                device="cuda",
                device_name="NVIDIA L4, 24 GB",
                gpus=1,
                gpu_memory_bytes=24 * GIB,
                compute_capability=8.9,
                cpus=8,
                memory_bytes=32 * GIB,
            ),
            quota="NvidiaL4GpuAllocNoZonalRedundancyPerProjectRegion",
        ),
        CloudRunProfile(
            Profile(
                name="rtx-pro-6000",
                device="cuda",
                device_name="NVIDIA RTX PRO 6000 Blackwell, 96 GB",
                gpus=1,
                gpu_memory_bytes=96 * GIB,
                compute_capability=12.0,
                cpus=20,
                memory_bytes=80 * GIB,
            ),
            quota="NvidiaRtxPro6000GpuAllocNoZonalRedundancyPerProjectRegion",
        ),
        CloudRunProfile(
            Profile(name="cpu", device="cpu", device_name="Cloud Run CPU", cpus=8, memory_bytes=32 * GIB),
            quota="CpuAllocPerProjectRegion",
        ),
    )
}

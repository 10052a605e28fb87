"""The hardware that estimates know: memory, and how fast it computes. Numbers, each with its origin.

A training reaches a share of a GPU's peak. The shares are from published trainings of other projects, of 30 to 43 % on an H100 and 32 % on
an RTX PRO 6000, lowered because ours were not measured on a GPU; the processor's figure was measured by `bench/estimates.py`.
"""

from dataclasses import dataclass

from schema.estimate.ranges import Range

GIB = 1 << 30

# Of the peak. Wide on purpose: short rows, small models and slow kernels reach a fraction of what long packed rows do.
GPU_SHARE = Range(0.10, 0.42)
# T4: no bf16 in hardware, which the driver then emulates.
EMULATED_SHARE = Range(0.02, 0.12)

# A core of a server processor, in floating point operations a second; measured with Gemma 3 270M on two cores of an AMD EPYC with
# AVX512-BF16: 35e9 to 60e9 while nothing else ran, 12e9 to 35e9 beside other work. Newer processors are faster, older ones slower.
CPU_CORE_FLOP_PER_S = Range(9e9, 90e9)
CPU_MEMORY_BYTES_PER_S = Range(5e9, 40e9)  # a laptop beside other work, and a server
DEFAULT_CORES = 2

# What Python, torch, transformers and TRL hold in memory before any weight is loaded; measured by `bench/estimates.py`.
PROCESS_BYTES = 900 << 20


@dataclass(frozen=True)
class Device:
    """One kind of hardware to train on; with several GPUs, one of them."""

    name: str
    on_gpu: bool
    memory_bytes: int | None  # None: not known
    flop_per_s: Range  # that a training reaches
    memory_bytes_per_s: Range
    has_bf16: bool  # computes it in hardware
    process_bytes: int = 0  # of its memory that the process takes beside the training


def _gpu(name: str, gib: int, peak_tflop_per_s: float, gb_per_s: float, share: Range = GPU_SHARE) -> Device:
    """A GPU by its data sheet: memory, dense bf16 peak (fp16 of a T4) and memory bandwidth, of which generation reaches a third to 0.8."""
    return Device(
        name=name,
        on_gpu=True,
        memory_bytes=gib * GIB,
        flop_per_s=share.scale(peak_tflop_per_s * 1e12),
        memory_bytes_per_s=Range(gb_per_s * 0.3e9, gb_per_s * 0.8e9),
        has_bf16=True,
    )


# By how a GPU's name contains it; the first match counts. RTX PRO 6000: dense bf16 derived from its fp4 figure.
GPUS: tuple[tuple[str, Device], ...] = (
    ("RTX PRO 6000", _gpu("NVIDIA RTX PRO 6000, 96 GB", 96, 500, 1597)),
    ("H200", _gpu("NVIDIA H200, 141 GB", 131, 989, 4800)),  # 141 GB are 131 GiB
    ("H100", _gpu("NVIDIA H100, 80 GB", 80, 989, 3350)),
    ("L40S", _gpu("NVIDIA L40S, 48 GB", 48, 362, 864)),
    ("A100-SXM4-40GB", _gpu("NVIDIA A100, 40 GB", 40, 312, 1555)),
    ("A100-PCIE-40GB", _gpu("NVIDIA A100, 40 GB", 40, 312, 1555)),
    ("A100", _gpu("NVIDIA A100, 80 GB", 80, 312, 1935)),
    ("A10G", _gpu("NVIDIA A10G, 24 GB", 24, 70, 600)),
    ("L4", _gpu("NVIDIA L4, 24 GB", 24, 121, 300)),
    ("T4", _gpu("NVIDIA T4, 16 GB", 16, 65, 320, EMULATED_SHARE)),
)
# From the smallest to the largest.
KNOWN_GPUS: tuple[Device, ...] = tuple(
    sorted({device.name: device for _, device in GPUS}.values(), key=lambda device: (device.memory_bytes or 0, device.flop_per_s.high))
)
# A GPU of another name: from a T4 to an H200.
UNKNOWN_GPU = Device(
    name="NVIDIA GPU",
    on_gpu=True,
    memory_bytes=None,
    flop_per_s=Range(EMULATED_SHARE.low * 65e12, GPU_SHARE.high * 989e12),
    memory_bytes_per_s=Range(90e9, 3800e9),
    has_bf16=True,
)


def find_gpu(name: str, memory_bytes: int | None) -> Device:
    """The GPU of that name with the memory that it has here, or one of which only the memory is known."""
    found = next((device for part, device in GPUS if part.lower() in name.lower()), UNKNOWN_GPU)
    known = memory_bytes if memory_bytes is not None else found.memory_bytes
    return Device(name, True, known, found.flop_per_s, found.memory_bytes_per_s, found.has_bf16)


def make_cpu(name: str, cores: int | None, memory_bytes: int | None, *, has_bf16: bool) -> Device:
    """A processor. Without bf16 in hardware it computes in fp32, which takes twice the memory and, where cores have it, half the speed."""
    flop_per_s = CPU_CORE_FLOP_PER_S.scale(max(1, cores or DEFAULT_CORES))
    return Device(name, False, memory_bytes, flop_per_s, CPU_MEMORY_BYTES_PER_S, has_bf16, PROCESS_BYTES)

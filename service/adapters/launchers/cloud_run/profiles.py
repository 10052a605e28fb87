"""The hardware profiles that this launcher offers, and what an attempt can do on each."""

from dataclasses import dataclass, field
from typing import get_args

from schema.training import TRAINER_TYPES
from schema.training.llm import Modality
from service.core.ports import RuntimeCapabilities

# What jobs/environments/llm/requirements.txt installs in the image; a test compares the two.
IMAGE_PACKAGES = {"bitsandbytes": True, "onnx": True, "lm_eval": False, "unsloth": False}
NOTES = {
    "provider": "unsloth is not in the image: it pins its own versions of what the image holds",
    "use_fa2": "flash-attn is not in the image; the GPU could run it",
    "lm_eval_tasks": "lm_eval is not in the image",
}


@dataclass(frozen=True)
class HardwareProfile:
    """One kind of hardware. Its Cloud Run job is `tunesmith-<name>`, sized in infra/terraform."""

    name: str
    device: str
    device_name: str
    quota: str  # the Cloud Run quota that usually runs out first
    notes: dict[str, str] = field(default_factory=lambda: dict(NOTES))

    @property
    def capabilities(self) -> RuntimeCapabilities:
        """What an attempt can do on this hardware. Every profile runs the same image."""
        return RuntimeCapabilities(
            device=self.device,
            device_name=self.device_name,
            methods=("LoRA", "QLoRA", "Full"),
            providers=("huggingface",),
            modalities=get_args(Modality),
            trainer_types=tuple(TRAINER_TYPES),
            flash_attention_2=False,
            gguf=True,
            onnx=IMAGE_PACKAGES["onnx"],
            lm_eval=IMAGE_PACKAGES["lm_eval"],
            notes=self.notes,
        )


PROFILES = {
    profile.name: profile
    for profile in (
        HardwareProfile("l4", "cuda", "NVIDIA L4, 24 GB", "NvidiaL4GpuAllocNoZonalRedundancyPerProjectRegion"),
        HardwareProfile(
            "rtx-pro-6000", "cuda", "NVIDIA RTX PRO 6000 Blackwell, 96 GB", "NvidiaRtxPro6000GpuAllocNoZonalRedundancyPerProjectRegion"
        ),
        HardwareProfile(
            "cpu", "cpu", "Cloud Run CPU", "CpuAllocPerProjectRegion", {**NOTES, "use_fa2": "FlashAttention 2 needs an Ampere or newer GPU"}
        ),
    )
}

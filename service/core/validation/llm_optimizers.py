"""Whether a hardware profile can run the optimizer of a language model job."""

from schema.training import LlmTrainingConfig
from schema.training.llm_optimization import CPU_OPTIMIZERS, GPU_OPTIMIZERS
from service.core.errors import Unsupported
from service.core.ports import Profile


def check_optimizer(config: LlmTrainingConfig, profile: Profile) -> None:
    """Raise Unsupported for an optimizer that needs a GPU, on a profile without one."""
    optim = config.hyperparameters.optim
    if optim in GPU_OPTIMIZERS and profile.device != "cuda":
        message = f"optim {optim!r} needs an NVIDIA GPU; {profile.name} is {profile.device_name}"
        hint = f"request hardware with a GPU, or use one of {', '.join(CPU_OPTIMIZERS)}"
        raise Unsupported(message, hint=hint, param="training_config.hyperparameters.optim")

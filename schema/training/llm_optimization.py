"""The optimizers and learning rate schedules of the LLM family, and the LoRA initializations, with the rules of their own settings.

The names are those of transformers' TrainingArguments and of peft's `init_lora_weights`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from pydantic import StringConstraints

from schema.base import field_error

Optimizer = Literal[
    "adamw_torch",
    "adamw_torch_fused",
    "adafactor",
    "sgd",
    "adamw_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "lion_8bit",
    "paged_lion_8bit",
]
# These come from bitsandbytes, whose kernels for them need an NVIDIA GPU.
GPU_OPTIMIZERS: frozenset[Optimizer] = frozenset(("adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit", "paged_lion_8bit"))
CPU_OPTIMIZERS = tuple(name for name in get_args(Optimizer) if name not in GPU_OPTIMIZERS)
# Their state has the shape of the weights, so that it can be sharded with them and gathered for a checkpoint.
SHARDABLE_OPTIMIZERS: tuple[Optimizer, ...] = ("adamw_torch", "adamw_torch_fused", "sgd")

# Which of the Adam settings an optimizer uses.
_ADAM_FIELDS = ("adam_beta1", "adam_beta2", "adam_epsilon")
_LION_FIELDS = ("adam_beta1", "adam_beta2")

Schedule = Literal[
    "linear",
    "cosine",
    "cosine_with_min_lr",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "warmup_stable_decay",
]


@dataclass(frozen=True)
class ScheduleParameter:
    """A number that shapes a schedule, with its bounds."""

    minimum: float
    maximum: float
    is_whole: bool = False
    excludes_minimum: bool = False

    def find_mistake(self, value: float) -> str | None:
        """What is wrong with a value, in words; None if it is right."""
        if self.is_whole and value != int(value):
            return f"must be a whole number, not {value:g}"
        if not self.minimum <= value <= self.maximum or (self.excludes_minimum and value == self.minimum):
            above = "above" if self.excludes_minimum else "at least"
            return f"must be {above} {self.minimum:g} and at most {self.maximum:g}, not {value:g}"
        return None


_CYCLES = ScheduleParameter(0, 1000, excludes_minimum=True)
_RATE = ScheduleParameter(0, 1)
_STEPS = ScheduleParameter(1, 10_000_000, is_whole=True)
# The numeric parameters of transformers' schedules, except those that follow from the length of the training.
SCHEDULE_PARAMETERS: Mapping[Schedule, Mapping[str, ScheduleParameter]] = {
    "linear": {},
    "cosine": {"num_cycles": _CYCLES},
    "cosine_with_min_lr": {"min_lr": _RATE, "min_lr_rate": _RATE, "num_cycles": _CYCLES},
    "cosine_with_restarts": {"num_cycles": ScheduleParameter(1, 1000, is_whole=True)},
    "polynomial": {"lr_end": _RATE, "power": ScheduleParameter(0, 100, excludes_minimum=True)},
    "constant": {},
    "constant_with_warmup": {},
    "inverse_sqrt": {"timescale": _STEPS},
    "warmup_stable_decay": {"num_decay_steps": _STEPS, "min_lr_ratio": _RATE, "num_cycles": _CYCLES},
}

POLYNOMIAL_LR_END = 1e-7  # transformers' default of lr_end

# Like peft's names, except that `default` is peft's True. Others of peft are left out: `corda` and `lora_ga` need gradients or covariances
# of the data before the training, and `loftq` quantizes the base itself.
LoraInit = Annotated[str, StringConstraints(pattern=r"^(default|gaussian|orthogonal|eva|pissa|pissa_niter_[1-9][0-9]?|olora)$")]


def is_base_factor_init(lora_init: str) -> bool:
    """Whether the adapter starts as a part of the base's weights (PiSSA, OLoRA), and not at zero."""
    return re.match("pissa|olora", lora_init) is not None


def used_adam_fields(optim: Optimizer) -> tuple[str, ...]:
    """The Adam settings that an optimizer uses."""
    if "lion" in optim:
        return _LION_FIELDS
    return _ADAM_FIELDS if "adam" in optim else ()


def reject_unused_adam_fields(optim: Optimizer, sent: set[str]) -> None:
    """Raise a PydanticCustomError for an Adam setting that was sent and that the optimizer does not use."""
    used = used_adam_fields(optim)
    for name in _ADAM_FIELDS:
        if name in sent and name not in used:
            raise field_error(f"training_config.hyperparameters.{name}", f"{name} is not used by optim {optim!r}; leave it out")


def check_schedule(schedule: Schedule, parameters: Mapping[str, float]) -> None:
    """Raise a PydanticCustomError, for `lr_scheduler_kwargs`, unless the parameters are right for the schedule."""
    known = SCHEDULE_PARAMETERS[schedule]
    for name, value in parameters.items():
        if name not in known:
            accepted = f"it accepts {', '.join(known)}" if known else "it accepts none"
            raise field_error("lr_scheduler_kwargs", f"lr_scheduler_type {schedule!r} has no parameter {name!r}; {accepted}")
        if mistake := known[name].find_mistake(value):
            raise field_error("lr_scheduler_kwargs", f"{name} {mistake}")
    if schedule == "cosine_with_min_lr" and len({"min_lr", "min_lr_rate"} & parameters.keys()) != 1:
        reason = "lr_scheduler_type 'cosine_with_min_lr' needs either min_lr, a learning rate, or min_lr_rate, a share of the peak"
        raise field_error("lr_scheduler_kwargs", reason)
    if schedule == "warmup_stable_decay" and "num_decay_steps" not in parameters:
        reason = "lr_scheduler_type 'warmup_stable_decay' needs num_decay_steps, the optimizer steps of the decay at the end"
        raise field_error("lr_scheduler_kwargs", reason)


def check_final_rate(schedule: Schedule, parameters: Mapping[str, float], learning_rate: float) -> None:
    """Raise a PydanticCustomError unless the schedule ends below its peak."""
    name = {"cosine_with_min_lr": "min_lr", "polynomial": "lr_end"}.get(schedule, "")
    final_rate = parameters.get(name, POLYNOMIAL_LR_END if schedule == "polynomial" else 0.0)
    if final_rate >= learning_rate:
        reason = f"{name} {final_rate:g} is not below learning_rate {learning_rate:g}"
        raise field_error("hyperparameters.lr_scheduler_kwargs", reason)

"""How a training uses the memory of its device: what `memory_planner.py` chose, or `oom.py` after memory ran out.

A checkpoint keeps it, so that the next attempt does not run out of memory again.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import JsonValue

from jobs.runtime.batch_config import BatchConfig


@dataclass(frozen=True)
class MemoryPlan:
    """The rows of a forward pass, and whether activations are recomputed in the backward pass."""

    batch_config: BatchConfig
    gradient_checkpointing: bool

    @classmethod
    def from_details(cls, details: Mapping[str, JsonValue]) -> "MemoryPlan":
        """The plan that `details` of a training's state gives. Raises ValidationError if it gives no batch."""
        return cls(BatchConfig.from_details(details), details.get("gradient_checkpointing") is True)

    @property
    def details(self) -> dict[str, JsonValue]:
        """The form in which a training's state and its checkpoints keep it."""
        return self.batch_config.details | {"gradient_checkpointing": self.gradient_checkpointing}

    def adopt_if_compatible(self, saved: "MemoryPlan") -> "MemoryPlan":
        """`saved`, with which an earlier attempt fitted into memory, unless the request has changed the effective batch size since."""
        batch_config = self.batch_config.adopt_if_compatible(saved.batch_config)
        return MemoryPlan(batch_config, self.gradient_checkpointing or saved.gradient_checkpointing)

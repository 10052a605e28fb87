"""How the rows of one optimizer step pass through the model: batch size times gradient accumulation steps.

For families that train in batches; the rest of the runtime does not know about them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from pydantic import JsonValue, TypeAdapter

from schema.checkpoint import BATCH_FIELDS


@dataclass(frozen=True)
class BatchConfig:
    """Rows per forward pass, and forward passes per optimizer step."""

    batch_size: int
    gradient_accumulation_steps: int

    @classmethod
    def from_details(cls, details: Mapping[str, JsonValue]) -> Self:
        """The batch that `details` of a training's state gives. Raises ValidationError if it gives none."""
        return TypeAdapter(cls).validate_python({name: details.get(name) for name in BATCH_FIELDS})

    @property
    def details(self) -> dict[str, JsonValue]:
        """The form in which a training's state and its checkpoints keep it."""
        return {"batch_size": self.batch_size, "gradient_accumulation_steps": self.gradient_accumulation_steps}

    def __str__(self) -> str:
        return f"batch_size {self.batch_size}"

    @property
    def effective_batch_size(self) -> int:
        """Rows per optimizer step."""
        return self.batch_size * self.gradient_accumulation_steps

    def reduce(self) -> "BatchConfig | None":
        """The largest divisor of the effective batch that is at most half the batch size; None if the batch size is 1."""
        size = max((size for size in range(1, self.batch_size // 2 + 1) if self.effective_batch_size % size == 0), default=None)
        return None if size is None else BatchConfig(size, self.effective_batch_size // size)

    def adopt_if_compatible(self, saved: "BatchConfig") -> "BatchConfig":
        """`saved`, to which an earlier attempt reduced the batch, unless the effective batch size has changed since."""
        return saved if saved.effective_batch_size == self.effective_batch_size else self

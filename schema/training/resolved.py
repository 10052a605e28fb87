"""What the service chose where a request said "auto"."""

from pydantic import JsonValue

from schema.base import ForwardCompatible


class ResolvedValue(ForwardCompatible):
    """One field, what was chosen, and why."""

    field: str  # a path of the request, such as training_config.hyperparameters.batch_size
    value: JsonValue
    reason: str

"""Base models: requests are validated strictly, messages between Tunesmith's own parts leniently."""

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, StringConstraints
from pydantic_core import PydanticCustomError


class Strict(BaseModel):
    """What a caller sends. An unknown field, a wrong type, NaN or infinity is an error that names the field."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ForwardCompatible(BaseModel):
    """A message between Tunesmith's own parts. Unknown fields are ignored, so an older image works with a newer service."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    @classmethod
    def load(cls, text: str | bytes) -> Self:
        """Read JSON; fields that a newer version added are ignored at every depth. Raises ValidationError."""
        return cls.model_validate_json(text, extra="ignore")


# Safe in a path, a URL, a file name and a command line.
Id = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]

# For people: any language, but one line and no control characters.
Label = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]+$")]


def field_error(field: str, reason: str) -> PydanticCustomError:
    """The error for fields that conflict, to be raised by a validator. `field` is the one to change."""
    return PydanticCustomError("fields_conflict", "{reason}", {"field": field, "reason": reason})

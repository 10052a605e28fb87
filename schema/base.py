"""The two manners of reading JSON: requests are strict, messages between our own parts are lenient."""

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, StringConstraints
from pydantic_core import PydanticCustomError


class Strict(BaseModel):
    """What a caller sends: a typo, a wrong type, NaN or infinity is refused with the field's name."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ForwardCompatible(BaseModel):
    """What our own parts tell each other: unknown fields are ignored, for an older image must survive a newer service."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    @classmethod
    def load(cls, text: str | bytes) -> Self:
        """Read stored JSON; fields that a newer version added are ignored at every depth."""
        return cls.model_validate_json(text, extra="ignore")


# An id is safe in a path, a URL, a file name and a process's command line.
Id = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]

# A label is read by people: any language, but one line and nothing that moves a terminal's cursor.
Label = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]+$")]


def field_error(field: str, reason: str) -> PydanticCustomError:
    """An error of fields that do not fit each other, to be raised by a validator; `field` is the one to change."""
    return PydanticCustomError("fields_conflict", "{reason}", {"field": field, "reason": reason})

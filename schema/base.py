"""Base models: requests are validated strictly, messages between Tunesmith's own parts leniently."""

from datetime import UTC, datetime
from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, StringConstraints
from pydantic_core import PydanticCustomError


class Strict(BaseModel):
    """What a caller sends. An unknown field, a wrong type, NaN or infinity is an error that names the field."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ForwardCompatible(BaseModel):
    """A message between Tunesmith's own parts. Unknown fields are ignored, so an older image works with a newer service.

    NaN and infinity are errors: JSON has neither, so a record that held one could not be read back.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    @classmethod
    def load(cls, text: str | bytes) -> Self:
        """Read JSON; fields that a newer version added are ignored at every depth. Raises ValidationError."""
        return cls.model_validate_json(text, extra="ignore")


# Safe in a path, a URL, a file name and a command line.
Id = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]

# For people: any language, but one line and no control characters.
Label = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]+$")]

FIRST_YEAR, LAST_YEAR = 1970, 2100  # other years are mistakes, and at the ends of the calendar no time zone can be applied


def _check_timestamp(timestamp: datetime) -> datetime:
    if not FIRST_YEAR <= timestamp.year <= LAST_YEAR:
        raise PydanticCustomError(
            "timestamp_range", "must be a time in the years {first} to {last}", {"first": FIRST_YEAR, "last": LAST_YEAR}
        )
    return timestamp if timestamp.tzinfo else timestamp.replace(tzinfo=UTC)


# A time that an attempt's clock gave. Without a time zone it is UTC.
Timestamp = Annotated[datetime, AfterValidator(_check_timestamp)]


def field_error(field: str, reason: str) -> PydanticCustomError:
    """The error for fields that conflict, to be raised by a validator. `field` is the one to change."""
    return PydanticCustomError("fields_conflict", "{reason}", {"field": field, "reason": reason})

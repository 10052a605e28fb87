"""What the classes of settings share: where the source is, and how several names are written in one environment variable."""

from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field
from pydantic_settings import NoDecode

SOURCE_ROOT = Path(__file__).resolve().parent.parent


def _split_commas(value: object) -> object:
    return tuple(name.strip() for name in value.split(",") if name.strip()) if isinstance(value, str) else value


# "l4,cpu" in the environment; a tuple in code.
CommaList = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_commas)]


def _read_none(value: object) -> object:
    return None if isinstance(value, str) and value.strip().lower() == "none" else value


# "7" or "none" in the environment; None in code means forever.
RetentionDays = Annotated[float | None, Field(ge=0, le=36_500), BeforeValidator(_read_none)]

"""Where an attempt runs: a launcher, one of its hardware profiles, and the environment with the trainer's packages."""

import re
from typing import Annotated, cast

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

from schema.base import ForwardCompatible

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
PROFILE_NAME = re.compile(rf"{NAME}(/{NAME})?")
MAX_CANDIDATES = 8


def _check_hardware(value: object) -> object:
    """One error for a value of any type, instead of one for each form that it could have had."""
    names = cast(list[object], value) if isinstance(value, list) else [value]
    for name in names:
        if not isinstance(name, str) or not PROFILE_NAME.fullmatch(name):
            reason = "a hardware profile is named like 'l4', or 'cloud-run/l4' with its launcher, and several of them are a list"
            raise PydanticCustomError("hardware", "{name} is no such name: {reason}", {"name": repr(name)[:100], "reason": reason})
    if not 1 <= len(names) <= MAX_CANDIDATES:
        raise PydanticCustomError(
            "hardware", "a list names 1 to {most} profiles, not {count}", {"most": MAX_CANDIDATES, "count": len(names)}
        )
    return names if isinstance(value, list) else value


AUTO_HARDWARE = "auto"  # in a request to train: every profile where the job fits, the cheapest first

# What a request asks for: one profile, or several in order of preference. A profile stands alone where only one launcher has one of
# that name, else after its launcher.
Hardware = Annotated[str | list[str], BeforeValidator(_check_hardware)]


class Placement(ForwardCompatible):
    """One place where an attempt can run."""

    launcher: str
    profile: str
    environment: str

    @property
    def hardware(self) -> str:
        """The qualified name of the profile, as a request may write it."""
        return f"{self.launcher}/{self.profile}"

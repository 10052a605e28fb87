"""Where an attempt runs: a launcher, one of its hardware profiles, and the environment with the trainer's packages."""

from typing import Annotated

from pydantic import Field, StringConstraints

from schema.base import ForwardCompatible

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"

# A profile, alone where only one launcher offers one of that name, or after its launcher.
ProfileName = Annotated[str, StringConstraints(pattern=rf"^{NAME}(/{NAME})?$")]
# What a request asks for: one profile, or several in order of preference.
Hardware = ProfileName | Annotated[list[ProfileName], Field(min_length=1, max_length=8)]


class Placement(ForwardCompatible):
    """One place where an attempt can run."""

    launcher: str
    profile: str
    environment: str

    @property
    def hardware(self) -> str:
        """The qualified name of the profile, as a request may write it."""
        return f"{self.launcher}/{self.profile}"

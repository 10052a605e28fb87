"""Types that several parts of the contract share.

The names of dataset types, artifact kinds and phases are open: each family declares its own, and every other part passes them on.
"""

from typing import Annotated

from pydantic import Field, StringConstraints

DatasetType = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
ArtifactKind = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
Phase = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,31}$")]  # what an attempt is doing, such as "training"

HubId = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?$"),
    Field(description="A model's name as the Hugging Face Hub writes it: `owner/name`.", examples=["google/gemma-3-270m"]),
]

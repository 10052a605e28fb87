"""Types that several parts of the contract share.

The names of dataset types, artifact kinds and phases are open: each family declares its own, and every other part passes them on.
"""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, SecretStr, StringConstraints
from pydantic_core import PydanticCustomError

TextDatasetType = Literal["messages", "prompt_completion", "text", "preference", "unpaired_preference", "prompt"]
PromptForm = Literal["strings", "messages"]
DatasetType = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
ArtifactKind = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
Phase = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,31}$")]  # what an attempt is doing, such as "training"

HubId = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?$"),
    Field(description="A model's name as the Hugging Face Hub writes it: `owner/name`.", examples=["google/gemma-3-270m"]),
]

JOB_PREFIX = "job:"  # of a base model that is the model of an earlier job

BaseModelId = Annotated[
    str,
    StringConstraints(
        pattern=r"^(job:[A-Za-z0-9][A-Za-z0-9._-]{0,127}|[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?)$"
    ),
    Field(
        description="A model's name as the Hugging Face Hub writes it: `owner/name`. Or `job:` and the id of a completed job of yours: "
        "the training starts from the model that it published, its adapter or else its merged model.",
        examples=["google/gemma-3-270m", "job:training_rows_gemma-3-270m_1a2b3c4d"],
    ),
]

SECRET_PATTERN = r"^[!-~]+$"  # printable ASCII without spaces, as a header can carry it


def _check_secret(secret: SecretStr) -> SecretStr:
    if not re.fullmatch(SECRET_PATTERN.strip("^$"), secret.get_secret_value()):
        raise PydanticCustomError("secret_characters", "a token or key has printable ASCII characters only, without spaces or line breaks")
    return secret


# A token or an API key. It becomes part of a header, so a line break in it would become another header.
SecretText = Annotated[
    SecretStr, Field(min_length=1, max_length=4096, json_schema_extra={"pattern": SECRET_PATTERN}), AfterValidator(_check_secret)
]

"""What every export configuration has: where the artifacts go."""

from typing import Literal, Self

from pydantic import Field, model_validator

from schema.base import Strict, field_error
from schema.types import HubId


class BaseExportConfig(Strict):
    """The export settings of every family. A family's own adds its formats."""

    destination: Literal["gcs", "hfhub"] = Field(
        "gcs",
        description="`gcs` is this deployment's object store, of whatever kind. With `hfhub` the files are also pushed to the Hub.",
    )
    hf_repo_id: HubId | None = Field(None, description="The repository to push to with destination `hfhub`.")
    hf_private: bool = Field(True, description="Whether a repository that the push creates is private. An existing one is not changed.")

    @model_validator(mode="after")
    def _check_destination(self) -> Self:
        if self.destination == "hfhub" and self.hf_repo_id is None:
            raise field_error("hf_repo_id", "destination 'hfhub' needs hf_repo_id, the repository to push to")
        if self.destination != "hfhub" and self.hf_repo_id is not None:
            raise field_error("hf_repo_id", "hf_repo_id is only used with destination 'hfhub'; drop it or change the destination")
        return self

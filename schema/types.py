"""Types that several parts of the contract share."""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

Provider = Literal["huggingface", "unsloth"]
Method = Literal["Full", "LoRA", "QLoRA"]
Modality = Literal["text", "vision"]
DatasetType = Literal["messages", "prompt_completion", "text", "preference", "unpaired_preference", "prompt"]

HubId = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?$"),
    Field(description="A model's name as the Hugging Face Hub writes it: `owner/name`.", examples=["google/gemma-3-270m"]),
]

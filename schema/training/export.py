"""What a job hands back, in which forms, and where."""

from typing import Literal, Self

from pydantic import Field, model_validator

from schema.base import Strict, field_error
from schema.types import HubId

ExportFormat = Literal["adapter", "merged", "onnx"]
MergedDtype = Literal["bf16", "fp16", "fp32"]
# The names llama.cpp gives its file types, plus the seed's "none": the merged model's own precision.
GgufQuantization = Literal[
    "none", "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_0", "q4_k_m", "q4_k_s", "q4_0", "q3_k_m", "q2_k"
]


class ExportConfig(Strict):
    """What the job hands back, and where."""

    format: ExportFormat | list[ExportFormat] = Field(
        "adapter",
        description="One or several. `adapter`: the LoRA weights alone. `merged`: a model of its own. `onnx`: for ONNX Runtime, small "
        "models. Method Full always gives a whole model.",
    )
    merged_dtype: MergedDtype | None = Field(None, description="Precision of the merged model; left out, the base's own.")
    destination: Literal["gcs", "hfhub"] = Field(
        "gcs",
        description="`gcs` is this deployment's own object store, whatever it is. With `hfhub` the files are pushed to the Hub as well.",
    )
    hf_repo_id: HubId | None = Field(None, description="Where to push with destination `hfhub`.")
    hf_private: bool = Field(True, description="A repository that the push creates is private. One that exists stays as it is.")
    include_gguf: bool = Field(False, description="Also write GGUF files for llama.cpp and Ollama.")
    gguf_quantization: GgufQuantization | list[GgufQuantization] | None = Field(
        None, description="One or several; `none` keeps the merged model's precision; left out with include_gguf it is q8_0."
    )
    gguf_imatrix: bool | None = Field(
        None,
        description="Weigh what rounding may lose by an importance matrix of the training rows. Left out: done for the quantizations "
        "that gain by it, where llama.cpp's tool is installed.",
    )
    include_lora_gguf: bool = Field(False, description="Also write the adapter alone as GGUF, to be loaded beside the base's.")

    @model_validator(mode="after")
    def _check_compatibility(self) -> Self:
        if self.destination == "hfhub" and self.hf_repo_id is None:
            raise field_error("hf_repo_id", "destination 'hfhub' needs hf_repo_id, the repository to push to")
        if self.destination != "hfhub" and self.hf_repo_id is not None:
            raise field_error("hf_repo_id", "hf_repo_id is only used with destination 'hfhub'; drop it or change the destination")
        if self.gguf_quantization is not None and not self.include_gguf:
            raise field_error("gguf_quantization", "gguf_quantization needs include_gguf: true")
        if self.gguf_quantization == []:
            raise field_error("gguf_quantization", "gguf_quantization is an empty list; name at least one, or leave it out for q8_0")
        if len(set(self.gguf_quantizations)) != len(self.gguf_quantizations):
            raise field_error("gguf_quantization", "gguf_quantization names the same quantization twice")
        if self.gguf_imatrix and not self.include_gguf:
            raise field_error("gguf_imatrix", "gguf_imatrix needs include_gguf: true")
        if not self.formats:
            raise field_error("format", "format is an empty list; name at least one of adapter, merged, onnx")
        if len(set(self.formats)) != len(self.formats):
            raise field_error("format", "format names the same form twice")
        return self

    @property
    def formats(self) -> list[ExportFormat]:
        """The forms asked for, in that order."""
        return self.format if isinstance(self.format, list) else [self.format]

    @property
    def gguf_quantizations(self) -> list[GgufQuantization]:
        """The GGUF files to write, in the order asked for; empty without include_gguf."""
        match self.gguf_quantization:
            case _ if not self.include_gguf:
                return []
            case None:
                return ["q8_0"]
            case list() as several:
                return several
            case one:
                return [one]

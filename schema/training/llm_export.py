"""What a job of the LLM family publishes, and in which formats."""

from typing import Literal, Self

from pydantic import Field, model_validator

from schema.base import field_error
from schema.training.export import BaseExportConfig

ExportFormat = Literal["adapter", "merged", "onnx"]
MergedDtype = Literal["bf16", "fp16", "fp32"]
# llama.cpp's names of its file types, plus "none": the precision of the merged model.
GgufQuantization = Literal[
    "none", "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_0", "q4_k_m", "q4_k_s", "q4_0", "q3_k_m", "q2_k"
]


class ExportConfig(BaseExportConfig):
    """What the job publishes, and where."""

    format: ExportFormat | list[ExportFormat] = Field(
        "adapter",
        description="One or several. `adapter`: only the LoRA weights. `merged`: a complete model. `onnx`: for ONNX Runtime, small "
        "models. Method Full always produces a complete model.",
    )
    merged_dtype: MergedDtype | None = Field(
        None, description="Precision of the merged model. Default: the base model's, or a finer one where that rounds off the training."
    )
    include_gguf: bool = Field(False, description="Also write GGUF files for llama.cpp and Ollama.")
    gguf_quantization: GgufQuantization | list[GgufQuantization] | None = Field(
        None, description="One or several. `none` keeps the merged model's precision. Default with include_gguf: q8_0."
    )
    gguf_imatrix: bool | None = Field(
        None,
        description="Quantize with an importance matrix of the training rows. Default: for the quantizations that benefit, where "
        "llama.cpp's tool is installed.",
    )
    include_lora_gguf: bool = Field(False, description="Also write the adapter alone as GGUF, to be loaded with the base model's GGUF.")

    @model_validator(mode="after")
    def _check_compatibility(self) -> Self:
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
            raise field_error("format", "format names the same format twice")
        return self

    @property
    def formats(self) -> list[ExportFormat]:
        """The requested formats, in order."""
        return self.format if isinstance(self.format, list) else [self.format]

    @property
    def gguf_quantizations(self) -> list[GgufQuantization]:
        """The quantizations of the GGUF files to write, in order; empty without include_gguf."""
        match self.gguf_quantization:
            case _ if not self.include_gguf:
                return []
            case None:
                return ["q8_0"]
            case list() as quantizations:
                return quantizations
            case quantization:
                return [quantization]

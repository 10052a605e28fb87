"""The options that say what a job publishes, for `train` and `export` alike."""

from typing import Annotated

import typer

from cli.http_client import Json

FormatOption = Annotated[
    list[str] | None, typer.Option("--format", help="adapter, merged or onnx; can be repeated. Default: adapter; of a Full job: merged.")
]
GgufOption = Annotated[
    list[str] | None, typer.Option("--gguf", help="Also export a GGUF file with this quantization: q8_0, f16, …; can be repeated.")
]
MergedDtypeOption = Annotated[
    str | None, typer.Option("--merged-dtype", help="Precision of the merged model: bf16, fp16 or fp32. Default: the base model's.")
]
ImatrixOption = Annotated[
    bool | None,
    typer.Option(
        "--imatrix/--no-imatrix",
        help="Quantize GGUF files with an importance matrix of the training rows. Default: for the quantizations that benefit.",
    ),
]
LoraGgufOption = Annotated[bool, typer.Option("--lora-gguf", help="Also export the adapter as a GGUF file.")]
ToHubOption = Annotated[str | None, typer.Option("--to-hub", help="Also push to this Hub repository: owner/name.")]
HfPrivateOption = Annotated[
    bool | None,
    typer.Option("--hf-private/--hf-public", help="Whether a Hub repository that the job creates is private. Default: private."),
]


def build_export_config(
    *,
    formats: list[str] | None,
    gguf: list[str] | None,
    merged_dtype: str | None,
    imatrix: bool | None,
    lora_gguf: bool,
    to_hub: str | None,
    hf_private: bool | None,
) -> Json:
    """The fields of an `export_config` that the options set; the others are None."""
    return {
        "format": formats or None,
        "include_gguf": True if gguf else None,
        "gguf_quantization": gguf or None,
        "merged_dtype": merged_dtype,
        "gguf_imatrix": imatrix,
        "include_lora_gguf": lora_gguf or None,
        "destination": "hfhub" if to_hub else None,
        "hf_repo_id": to_hub,
        "hf_private": hf_private,
    }

"""What the exporters of one attempt share: a folder to work in, and the whole model, made from the trained one only once."""

import json
import shutil
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.llm.exporters.log_probs import make_passages
from jobs.llm.exporters.merge import MergedModel, MergeSpec, choose_compute_dtype, merge_model
from jobs.llm.exporters.model_files import Precision
from jobs.llm.exporters.tensor_merge import ModelKind
from jobs.runtime.artifacts import ExportedArtifact, artifact_key
from schema.job import ArtifactKind
from schema.training.export import GgufQuantization, MergedDtype

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jobs.llm.trained_model import HeldOutExample, TrainedModel
    from jobs.runtime.context import JobContext
    from schema.training.export import ExportConfig

PRECISION_OF_DTYPE: dict[MergedDtype, Precision] = {"bf16": "bf16", "fp16": "f16", "fp32": "f32"}
USAGE_ARTIFACT = "gguf-usage"


class ExportWorkspace:
    """The trained model, the job's context, and what was made of it so far."""

    def __init__(self, trained: "TrainedModel", context: "JobContext") -> None:
        self.trained = trained
        self.context = context
        self.folder = context.workdir / "exports"
        self.clear()
        self.folder.mkdir(parents=True)

    @cached_property
    def merged_model(self) -> MergedModel:
        """The trained model as one that needs no adapter, checked, and how it speaks. Raises JobFailed."""
        self.context.enter_phase("merging")
        wanted = self.export_config.merged_dtype
        return merge_model(
            MergeSpec(
                trained=self.trained,
                model_kind=self.model_kind,
                tokenizer=self.tokenizer,
                passages=make_passages(self.text_examples, self.tokenizer),
                dtype=PRECISION_OF_DTYPE[wanted] if wanted else None,
                dtype_and_device=choose_compute_dtype(self.trained.base_folder, self.context),
                workspace_folder=self.folder,
                context=self.context,
            )
        )

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer beside the trained model. Gemma's takes three seconds to load."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.trained.folder)

    @cached_property
    def text_examples(self) -> "tuple[HeldOutExample, ...]":
        """The held-out rows that can be read without their images: a file is heard by its words."""
        config = json.loads((self.trained.base_folder / "config.json").read_text())
        image = config.get("image_token_id", config.get("image_token_index"))
        readable = tuple(probe for probe in self.trained.held_out_examples if image is None or image not in probe.input_ids)
        unread = len(self.trained.held_out_examples) - len(readable)
        if unread:
            why = f"{unread} of {unread + len(readable)} held-out rows have images, which llama.cpp's engine alone cannot look at"
            self.context.log_decision("fidelity_texts", "held-out texts" if readable else "built-in texts", why)
        return readable

    @property
    def model_kind(self) -> ModelKind:
        """What sort of model was trained: one that speaks, one that also sees, or one that gives scores."""
        config = self.context.spec.training_config
        if config.trainer_type == "reward":
            return "score"
        return "image_text" if config.modality == "vision" else "causal"

    @property
    def export_config(self) -> "ExportConfig":
        """What is to be handed back."""
        return self.context.spec.training_config.export_config

    @property
    def model_name(self) -> str:
        """The base model's own name, as file names have it: google/gemma-3-270m is gemma-3-270m."""
        return self.context.spec.training_config.base_model_id.rpartition("/")[2].lower()

    def path(self, name: str) -> Path:
        """A new place below the bench's folder."""
        return self.folder / name

    def gguf_path(self, quantization: GgufQuantization) -> Path:
        """Where a quantized GGUF file is written."""
        return self.path(f"{self.model_name}-{quantization}.gguf")

    def key(self, kind: ArtifactKind, name: str = "") -> str:
        """Where this attempt uploads an artifact."""
        return artifact_key(kind, self.context.spec.job_id, self.context.attempt, name)

    def usage_folder(self) -> Path:
        """The folder of what is handed back beside the GGUF files."""
        folder = self.path("usage")
        folder.mkdir(exist_ok=True)
        return folder

    def usage_artifacts(self) -> list[ExportedArtifact]:
        """What lies beside the GGUF files, as one artifact; nothing without any."""
        folder = self.path("usage")
        return [ExportedArtifact(name=USAGE_ARTIFACT, kind="gguf", path=folder, key=self.key("gguf", "usage/"))] if folder.is_dir() else []

    def clear(self) -> None:
        """Remove everything that lies on the bench; what counts has been uploaded."""
        shutil.rmtree(self.folder, ignore_errors=True)

"""What the exporters of one attempt share: a working folder, and the merged model, which is made once."""

import json
import shutil
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.llm.exporters.log_probs import make_passages, select_sample_prompt
from jobs.llm.exporters.merge import MergedModel, MergeSpec, choose_compute_dtype, merge_model
from jobs.llm.exporters.model_files import Precision
from jobs.llm.exporters.modelfile import OllamaTemplate, make_ollama_template
from jobs.llm.exporters.user_path import check_tokenizer_path, rows_begin_with_bos
from jobs.llm.model_kinds import ModelKind
from schema.spec import artifact_key
from schema.training.llm_export import GgufQuantization, MergedDtype
from schema.types import ArtifactKind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jobs.llm.trained_model import HeldOutExample, TrainedModel
    from jobs.runtime.context import JobContext
    from schema.training.llm_export import ExportConfig

PRECISION_OF_DTYPE: dict[MergedDtype, Precision] = {"bf16": "bf16", "fp16": "f16", "fp32": "f32"}


class ExportWorkspace:
    """The trained model, the job's context, and the files that the exporters share."""

    def __init__(self, trained: "TrainedModel", context: "JobContext") -> None:
        self.trained = trained
        self.context = context
        self.folder = context.workdir / "exports"
        self.clear()  # of an earlier export in the same folder
        self.folder.mkdir(parents=True)

    @cached_property
    def merged_model(self) -> MergedModel:
        """The verified merged model; the first access enters phase "merging" and makes it. Raises JobFailed."""
        self.context.enter_phase("merging")
        dtype = self.export_config.merged_dtype
        return merge_model(
            MergeSpec(
                trained=self.trained,
                model_kind=self.model_kind,
                tokenizer=self.tokenizer,
                passages=make_passages(self.text_examples, self.tokenizer),
                sample_prompt_ids=self.sample_prompt[1],
                dtype=PRECISION_OF_DTYPE[dtype] if dtype else None,
                dtype_and_device=choose_compute_dtype(self.trained.base_folder, self.context),
                workspace_folder=self.folder,
                context=self.context,
            )
        )

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The trained model's tokenizer, which is loaded unless the training has it: Gemma's takes three seconds."""
        from transformers import AutoTokenizer

        return self.trained.tokenizer or AutoTokenizer.from_pretrained(self.trained.folder, trust_remote_code=False, local_files_only=True)

    @cached_property
    def text_examples(self) -> "tuple[HeldOutExample, ...]":
        """The held-out rows without images: a GGUF file is verified on text."""
        config = json.loads((self.trained.base_folder / "config.json").read_text())
        image_token = config.get("image_token_id", config.get("image_token_index"))
        examples = self.trained.held_out_examples
        text_only = tuple(example for example in examples if image_token is None or image_token not in example.input_ids)
        if len(text_only) < len(examples):
            reason = f"{len(examples) - len(text_only)} of {len(examples)} held-out rows have images; GGUF files are verified on text"
            self.context.log_decision("fidelity_texts", "held-out texts" if text_only else "built-in texts", reason)
        return text_only

    @cached_property
    def sample_prompt(self) -> tuple[str, tuple[int, ...]]:
        """A held-out question, or the beginning of a text, that every file answers, as text and as token ids."""
        return select_sample_prompt(self.trained.user_prompts, self.text_examples, self.tokenizer, self.trained.chat_format)

    @cached_property
    def ollama_template(self) -> OllamaTemplate:
        """How the Modelfiles render conversations."""
        return make_ollama_template(self.trained.chat_format, self.tokenizer, self.trained.user_prompts)

    @cached_property
    def adds_bos(self) -> bool | None:
        """Whether the training's rows begin with a BOS token; None without rows, or such a token."""
        rows = [*self.trained.user_prompts, *self.trained.held_out_examples]
        return rows_begin_with_bos(self.tokenizer, [row.input_ids for row in rows])

    @property
    def model_kind(self) -> ModelKind:
        """Whether the trained model generates text, reads images as well, or gives scores."""
        config = self.context.spec.training_config
        if config.trainer_type == "reward":
            return "score"
        return "image_text" if config.modality == "vision" else "causal"

    @property
    def export_config(self) -> "ExportConfig":
        """The request's export settings."""
        return self.context.spec.training_config.export_config

    @property
    def model_name(self) -> str:
        """The base model's name without its owner, for file names: google/gemma-3-270m is gemma-3-270m."""
        return self.context.spec.training_config.base_model_id.rpartition("/")[2].lower()

    def check_tokenizer(self, folder: Path, artifact: str) -> None:
        """Load a published folder's tokenizer as a user does, and check that it asks as in training. Raises JobFailed."""
        from transformers import AutoTokenizer

        prompts, chat_format = self.trained.user_prompts, self.trained.chat_format
        if prompts:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            check_tokenizer_path(tokenizer, chat_format, prompts, f"the tokenizer of {artifact}")

    def path(self, name: str) -> Path:
        """The path of that name in the workspace's folder; nothing is created."""
        return self.folder / name

    def gguf_path(self, quantization: GgufQuantization) -> Path:
        """Where a quantized GGUF file is written."""
        return self.path(f"{self.model_name}-{quantization}.gguf")

    def key(self, kind: ArtifactKind, name: str = "") -> str:
        """The object key under which this attempt uploads an artifact."""
        return artifact_key(self.context.spec.training_config.artifact_folder(kind), self.context.spec.job_id, self.context.attempt, name)

    def clear(self) -> None:
        """Delete the workspace's files."""
        shutil.rmtree(self.folder, ignore_errors=True)

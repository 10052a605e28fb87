"""What the exporters of one attempt share: a folder to work in, and the whole model, made from the trained one only once."""

import shutil
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.exporters.merge import WholeModel, adopt, merge
from jobs.publish import artifact_key
from schema.job import ArtifactKind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jobs.context import JobContext
    from jobs.trained import TrainedModel


class Bench:
    """The trained model, the job's context, and what was made of it so far."""

    def __init__(self, trained: "TrainedModel", context: "JobContext") -> None:
        self.trained = trained
        self.context = context
        self.folder = context.workdir / "exports"
        self.clear()
        self.folder.mkdir(parents=True)

    @cached_property
    def whole(self) -> WholeModel:
        """The trained model as one that needs no adapter, checked, and how it speaks. Raises JobFailed."""
        self.context.phase("merging")
        make = merge if self.trained.is_adapter else adopt
        return make(self.trained, self.tokenizer, self.folder, self.context)

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer beside the trained model. Gemma's takes three seconds to load."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.trained.folder)

    @property
    def model_name(self) -> str:
        """The base model's own name, as file names have it: google/gemma-3-270m is gemma-3-270m."""
        return self.context.spec.training_config.base_model_id.rpartition("/")[2].lower()

    def path(self, name: str) -> Path:
        """A new place below the bench's folder."""
        return self.folder / name

    def key(self, kind: ArtifactKind, name: str = "") -> str:
        """Where this attempt uploads an artifact."""
        return artifact_key(kind, self.context.spec.job_id, self.context.attempt, name)

    def clear(self) -> None:
        """Remove everything that lies on the bench; what counts has been uploaded."""
        shutil.rmtree(self.folder, ignore_errors=True)

"""What a trainer returns for the exporters: local files and measurements."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.llm.chat_format import ChatFormat
from schema.job import EvalMetrics


@dataclass(frozen=True)
class HeldOutExample:
    """A held-out row, rendered exactly as in training, for comparing exported files with the trained model.

    `input_ids` holds the prompt and the reference answer; the first `prompt_tokens` of them are the prompt,
    and `prompt_text` is its text.
    """

    prompt_text: str
    input_ids: tuple[int, ...]
    prompt_tokens: int


@dataclass(frozen=True)
class UserPrompt:
    """A question of a row, as a user asks it, and the tokens of the row in which the model was trained to answer it.

    A user who asks it must give the model the first `prompt_tokens` of `input_ids`, or more of them where the chat template writes the
    beginning of an answer. Without turns, `text` is continued: it is the row's own text.
    """

    messages: tuple[dict[str, Any], ...]  # Any: JSON; empty where `text` is continued
    tools: tuple[dict[str, Any], ...]  # that the assistant may call
    text: str | None
    input_ids: tuple[int, ...]
    prompt_tokens: int

    @property
    def content(self) -> str:
        """What the user writes, for messages."""
        return self.text if self.text is not None else str(self.messages[-1].get("content") or "")


@dataclass(frozen=True)
class TrainedModel:
    """A trained model on disk.

    `folder` holds safetensors with the tokenizer beside them: the LoRA adapter alone if `is_adapter`, else the
    full model. `base_folder` holds the unquantized base. `metrics` are of the trained model and `base_metrics`
    of the base, on the same held-out rows; None without held-out rows. `train_tokens` counts tokens without padding, over all epochs.
    """

    folder: Path
    is_adapter: bool
    base_folder: Path
    held_out_examples: tuple[HeldOutExample, ...]
    chat_format: ChatFormat
    metrics: EvalMetrics | None
    base_metrics: EvalMetrics | None
    train_rows: int
    train_tokens: int
    train_runtime_s: float
    user_prompts: tuple[UserPrompt, ...] = ()  # of text rows; every exported file must ask them as in training
    calibration: tuple[tuple[int, ...], ...] = ()  # token ids of training rows, for the importance matrix
    step: int | None = None  # the optimizer step of these weights
    tokenizer: Any = field(default=None, repr=False, compare=False)  # the one in `folder`, where the training has it in memory
    cuda: str | None = None  # the CUDA version that torch was built for

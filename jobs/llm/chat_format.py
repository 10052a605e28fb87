"""How a training turns conversations into text, and what the exported model needs to be asked in the same way.

`choose_chat_format` decides it once, before any row is rendered. Everything that renders, trains on, generates from or exports turns reads
the ChatFormat: no other module knows the tokens of a particular model's turns.
"""

from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from schema.training import TrainingConfig

# Who wrote the template: the base model's author, the caller, or nobody: then a neutral one is chosen that the tokenizer can carry.
# With `raw` there is none: the model continues texts.
FormatSource = Literal["base", "request", "neutral", "raw"]


@dataclass(frozen=True)
class ChatFormat:
    """The form of the texts that a model is trained on, and asked with."""

    source: FormatSource
    name: str  # for decisions and messages, such as "gemma3" or "of the base model"
    template: str | None  # the chat template that is exported with the model; None with source `raw`
    # Renders the same texts and marks what the assistant says; None where the answers are found by rendering the turns before them.
    training_template: str | None
    stop_token_ids: tuple[int, ...]  # sorted; each ends an answer: the tokenizer's EOS, and the end of a turn
    turn_token_ids: tuple[int, ...]  # sorted; the special tokens that the template writes around turns
    turn_tokens_are_trained: bool  # the base has seen its turn tokens in training: it came with a template


GEMMA_TURN_TOKENS = ("<start_of_turn>", "<end_of_turn>")


def choose_chat_format(tokenizer: "PreTrainedTokenizerBase", config: "TrainingConfig") -> ChatFormat:
    """The format for this tokenizer and request. The tokenizer's own template is replaced by the chosen one."""
    eos = {tokenizer.eos_token_id} - {None}
    if config.prompt_format == "raw":
        tokenizer.chat_template = None
        return ChatFormat("raw", "raw", None, None, tuple(sorted(eos)), (), turn_tokens_are_trained=True)
    has_own_template = bool(tokenizer.chat_template)
    if not has_own_template:
        tokenizer.chat_template = files("trl").joinpath("chat_templates/gemma3.jinja").read_text()
    vocabulary = tokenizer.get_vocab()
    turn_ids = [vocabulary[token] for token in GEMMA_TURN_TOKENS if token in vocabulary]
    stop_ids = eos | set(turn_ids[1:])
    return ChatFormat(
        source="base" if has_own_template else "neutral",
        name="of the base model" if has_own_template else "gemma3",
        template=str(tokenizer.chat_template),
        training_template=None,
        stop_token_ids=tuple(sorted(stop_ids)),
        turn_token_ids=tuple(sorted(turn_ids)),
        turn_tokens_are_trained=has_own_template,
    )

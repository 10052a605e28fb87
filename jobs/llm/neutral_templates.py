"""Chat templates for base models that come without one.

The first one is taken whose turn tokens are single tokens of the tokenizer: a base of that family was prepared for them. A tokenizer with
none of them gets plain words, which it can always carry.
"""

from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class NeutralTemplate:
    """A template and the tokens that it needs."""

    name: str
    package: str  # where the file is
    file: str
    tokens: tuple[str, ...]


NEUTRAL_TEMPLATES = (
    NeutralTemplate("gemma3", "trl", "chat_templates/gemma3.jinja", ("<start_of_turn>", "<end_of_turn>")),
    NeutralTemplate("gemma4", "trl", "chat_templates/gemma4_v5.jinja", ("<|turn>", "<turn|>")),
    NeutralTemplate("llama3", "trl", "chat_templates/llama3.jinja", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    NeutralTemplate("chatml", "trl", "chat_templates/qwen3_instruct_2507.jinja", ("<|im_start|>", "<|im_end|>")),
    NeutralTemplate("phi3", "trl", "chat_templates/phi3_5.jinja", ("<|user|>", "<|assistant|>", "<|end|>")),
    NeutralTemplate("glm4", "trl", "chat_templates/glm4moe.jinja", ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>")),
    NeutralTemplate("deepseek", "trl", "chat_templates/deepseekv3.jinja", ("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>")),
    NeutralTemplate(
        "cohere",
        "trl",
        "chat_templates/cohere.jinja",
        ("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"),
    ),
    NeutralTemplate("mistral", "jobs.llm", "templates/mistral.jinja", ("[INST]", "[/INST]")),
    NeutralTemplate("plain", "jobs.llm", "templates/plain.jinja", ()),
)


def choose_neutral_template(tokenizer: "PreTrainedTokenizerBase") -> tuple[NeutralTemplate, str, str]:
    """The first template that the tokenizer can carry, its text, and what goes before it."""
    single = {token.content for token in tokenizer.added_tokens_decoder.values()}
    chosen = next(candidate for candidate in NEUTRAL_TEMPLATES if single.issuperset(candidate.tokens))
    text = files(chosen.package).joinpath(chosen.file).read_text(encoding="utf-8")
    return chosen, text, "{{- bos_token }}" if "bos_token" not in text and _adds_bos(tokenizer) else ""


def _adds_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the base has seen its BOS token before every text."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]

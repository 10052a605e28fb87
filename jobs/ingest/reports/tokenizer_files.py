"""The tokenizer of a base model, read from its files without the model."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from schema.ingestion import InputProblem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HINT = "use another base_model_id, or leave it out: then tokens are estimated"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",  # has the tokens that end an answer
)


class UnusableTokenizer(ValueError):
    """A tokenizer cannot be read, or cannot count."""

    def __init__(self, message: str) -> None:
        self.problem = InputProblem(message=message, hint=HINT, param="base_model_id")
        super().__init__(message)


def digest_tokenizer(folder: Path) -> str:
    """Identifies the files that tokens depend on."""
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        path = folder / name
        if path.is_file():
            digest.update(f"{name}:{path.stat().st_size}:".encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"sha256:{digest.hexdigest()}"


def load_tokenizer(folder: Path, base_model_id: str) -> "PreTrainedTokenizerBase":
    """The tokenizer, as a training loads it. It runs no code of the base's author. Raises UnusableTokenizer."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError, RecursionError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        message = f"the tokenizer of {base_model_id} cannot be read: {reason.replace(str(folder), 'its folder')}"
        raise UnusableTokenizer(message) from error
    if not tokenizer.is_fast:
        raise UnusableTokenizer(f"the tokenizer of {base_model_id} has no tokenizer.json, so counting its tokens would take hours")
    return tokenizer

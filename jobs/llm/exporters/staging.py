"""A copy of a model folder that llama.cpp's converter reads correctly."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.llm.exporters.model_files import (
    MODEL_FILES,
    PROCESSOR_FILES,
    TOKENIZER_CONFIG_FILE,
    copy_files,
    copy_tokenizer,
    link_or_copy,
    list_weight_files,
    write_json,
)

SENTENCEPIECE_FILE = "tokenizer.model"


def make_staging_folder(model: Path, tokenizer: Path, sources: Sequence[Path], staging: Path) -> Path:
    """Copy a model folder, with the tokenizer of another, so that the converter marks control tokens; returns `staging`.

    `sources` are the folders searched for a tokenizer.model, in order. The converter reads the tokens from that file, and the
    type of each from `added_tokens_decoder`, which transformers 5 no longer writes. Without it `<start_of_turn>` is an ordinary
    word, and llama.cpp splits it.
    """
    copy_files(model, staging, [*MODEL_FILES, *PROCESSOR_FILES, *list_weight_files(model)])
    copy_tokenizer(tokenizer, staging)
    sentencepiece = next((folder / SENTENCEPIECE_FILE for folder in sources if (folder / SENTENCEPIECE_FILE).is_file()), None)
    if sentencepiece is not None:
        link_or_copy(sentencepiece, staging / SENTENCEPIECE_FILE)
        path = staging / TOKENIZER_CONFIG_FILE
        write_json(path, json.loads(path.read_text()) | {"added_tokens_decoder": _make_added_tokens_decoder(staging)})
    return staging


def _make_added_tokens_decoder(folder: Path) -> dict[str, dict[str, Any]]:  # Any: JSON
    """Every added token by id, in the form that `tokenizer_config.json` had before transformers 5."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString((folder / SENTENCEPIECE_FILE).read_bytes())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    tokens: dict[str, dict[str, Any]] = {
        str(i): {"content": piece.piece, **flags} for i, piece in enumerate(model.pieces) if piece.type == piece.USER_DEFINED
    }
    for token in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]:
        tokens[str(token.pop("id"))] = token
    return tokens

"""Rows as tokens, made once for each content: beside the dataset, under a name that is the digest of all that they depend on.

A second job on the same rows, with the same tokenizer, template and longest sequence, reads what the first one made, and a GPU that is
paid for by the second does not wait for a tokenizer. It goes with the dataset when that is deleted.
"""

import hashlib
import io
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.llm.data.preference import (
    PreferencePair,
    TokenizedPreferenceSplit,
    TokenizedUnpairedSplit,
    UnpairedExample,
    tokenize_pairs,
    tokenize_unpaired,
)
from jobs.llm.data.tokenize import IGNORE_INDEX, TokenizedExample, TokenizedSplit, read_rows, tokenize_split
from schema.types import DatasetType
from storage import NoSuchObject, ObjectStore, StorageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jobs.llm.training_context import TrainingContext

log = logging.getLogger(__name__)

VERSION = "3"  # of the rendering and of the file; a change of either makes other names
MIN_CACHED_BYTES = 1 << 20  # of rows: fewer are tokenized sooner than fetched


@dataclass
class CachedSplit:
    """What is kept of a split: its rows, how many were cut or left out, and a mark on each row where the form has one."""

    rows: list[TokenizedExample]
    truncated: int
    dropped: int
    good_flags: list[bool] = field(default_factory=list)


def load_or_tokenize_split(
    training: "TrainingContext", dataset_type: DatasetType, min_bytes: int = MIN_CACHED_BYTES
) -> dict[str, TokenizedSplit]:
    """The rows of every split as tokens and labels: from the cache, or made, and kept for the next job.

    Splits of fewer than `least_bytes` are always made.
    """
    knobs = training.config.hyperparameters

    def make(path: Path) -> CachedSplit:
        made = tokenize_split(read_rows(path), dataset_type, training.tokenizer, knobs.max_seq_length)
        return CachedSplit(made.rows, made.truncated, made.dropped)

    found = _load_or_tokenize(training, "rows", make, min_bytes)
    return {name: TokenizedSplit(kept.rows, kept.truncated, kept.dropped) for name, kept in found.items()}


def load_or_tokenize_pairs(training: "TrainingContext", min_bytes: int = MIN_CACHED_BYTES) -> dict[str, TokenizedPreferenceSplit]:
    """The same for rows of two answers."""

    def make(path: Path) -> CachedSplit:
        made = tokenize_pairs(read_rows(path), training.tokenizer, training.config.hyperparameters.max_seq_length)
        return CachedSplit([row for pair in made.rows for row in (pair.chosen, pair.rejected)], made.truncated, made.dropped)

    def pairs(kept: CachedSplit) -> TokenizedPreferenceSplit:
        answers = iter(kept.rows)
        return TokenizedPreferenceSplit(
            [PreferencePair(*both) for both in zip(answers, answers, strict=True)], kept.truncated, kept.dropped
        )

    return {name: pairs(kept) for name, kept in _load_or_tokenize(training, "pairs", make, min_bytes).items()}


def load_or_tokenize_unpaired(
    training: "TrainingContext", dataset_type: DatasetType, min_bytes: int = MIN_CACHED_BYTES
) -> dict[str, TokenizedUnpairedSplit]:
    """The same for answers that are each good or bad."""

    def make(path: Path) -> CachedSplit:
        made = tokenize_unpaired(read_rows(path), dataset_type, training.tokenizer, training.config.hyperparameters.max_seq_length)
        return CachedSplit([judged.row for judged in made.rows], made.truncated, made.dropped, [judged.is_good for judged in made.rows])

    def judged(kept: CachedSplit) -> TokenizedUnpairedSplit:
        return TokenizedUnpairedSplit(
            [UnpairedExample(*one) for one in zip(kept.rows, kept.good_flags, strict=True)], kept.truncated, kept.dropped
        )

    return {name: judged(kept) for name, kept in _load_or_tokenize(training, "unpaired", make, min_bytes).items()}


def _load_or_tokenize(
    training: "TrainingContext", layout: str, make: Callable[[Path], CachedSplit], min_bytes: int
) -> dict[str, CachedSplit]:
    dataset, store = training.context.spec.dataset, training.context.stores.datasets
    longest = training.config.hyperparameters.max_seq_length
    found: dict[str, CachedSplit] = {}
    for name, path in training.splits.items():
        split = dataset.splits[name]
        is_worth_it = split.size_bytes >= min_bytes
        settings = {"rows": split.sha256, "type": dataset.dataset_type, "layout": layout, "max_length": longest}
        key = _cache_key(split.key, settings, training.tokenizer)
        known = _read(store, key) if is_worth_it else None
        if known is not None:
            training.context.log_decision("tokens", "cached", f"{name} was tokenized before, in the same way")
        found[name] = known or make(path)
        if is_worth_it and known is None:
            _store(store, key, found[name])
    return found


def serialize_split(cached_split: CachedSplit) -> bytes:
    """The rows as one file, without pickles."""
    import numpy as np

    rows = cached_split.rows
    lengths = np.array([len(row.input_ids) for row in rows], np.int32)
    ids = np.array([token for row in rows for token in row.input_ids], np.int32)
    labeled = np.packbits(np.array([label != IGNORE_INDEX for row in rows for label in row.labels], bool))
    prompt_tokens = np.array([row.prompt_tokens for row in rows], np.int32)
    metadata = json.dumps(
        {
            "truncated": cached_split.truncated,
            "dropped": cached_split.dropped,
            "prompt_texts": [row.prompt_text for row in rows],
            "good_flags": cached_split.good_flags,
        }
    ).encode()
    out = io.BytesIO()
    np.savez_compressed(
        out, lengths=lengths, ids=ids, labeled=labeled, prompt_tokens=prompt_tokens, metadata=np.frombuffer(metadata, np.uint8)
    )
    return out.getvalue()


def deserialize_split(content: bytes) -> CachedSplit:
    """The rows of such a file. Raises ValueError, KeyError or OSError for one that is not whole."""
    import numpy as np

    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        lengths, ids, prompt_tokens = file["lengths"], file["ids"], file["prompt_tokens"]
        labeled = np.unpackbits(file["labeled"], count=len(ids)).astype(bool)
        metadata = json.loads(file["metadata"].tobytes())
    labels = np.where(labeled, ids, IGNORE_INDEX)
    ends = lengths.cumsum()[:-1]
    rows = [
        TokenizedExample(row.tolist(), wanted.tolist(), text, int(prompt))
        for row, wanted, text, prompt in zip(
            np.split(ids, ends), np.split(labels, ends), metadata["prompt_texts"], prompt_tokens, strict=True
        )
    ]
    return CachedSplit(rows, metadata["truncated"], metadata["dropped"], metadata["good_flags"])


def _cache_key(split_key: str, settings: dict[str, str | int], tokenizer: "PreTrainedTokenizerBase") -> str:
    """Below the dataset's own folder."""
    whole = settings | {"version": VERSION, "template": tokenizer.chat_template}
    digest = hashlib.sha256(json.dumps(whole, sort_keys=True).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    return f"{Path(split_key).parent.as_posix()}/tokens/{digest.hexdigest()}.npz"


def _read(store: ObjectStore, key: str) -> CachedSplit | None:
    """What is kept there; None when there is nothing, or nothing that can be read: then it is made anew."""
    from zipfile import BadZipFile

    try:
        return deserialize_split(store.read(key))
    except NoSuchObject:
        return None
    except (StorageError, ValueError, KeyError, OSError, BadZipFile) as error:
        log.warning("cached tokens are not used", extra={"key": key, "error": str(error)})
        return None


def _store(store: ObjectStore, key: str, tokens: CachedSplit) -> None:
    """For the next job. One that may not write there, or whose store is away, goes on without."""
    try:
        store.write(key, serialize_split(tokens))
    except StorageError as error:
        log.warning("tokens are not cached", extra={"key": key, "error": str(error)})

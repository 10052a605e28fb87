"""Caches tokenized rows beside the dataset, under the digest of everything that they depend on.

A second job on the same rows, with the same tokenizer, chat template and maximum length, reads the tokens that the first one stored, so
its GPU does not wait for the tokenizer. Deleting the dataset deletes its cache.
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
from jobs.llm.data.tokenize import IGNORE_INDEX, RowTokenizer, TokenizedExample, TokenizedSplit, read_rows, tokenize_split
from schema.types import DatasetType
from storage import NoSuchObject, ObjectStore, StorageError

if TYPE_CHECKING:
    from jobs.llm.training_context import TrainingContext

log = logging.getLogger(__name__)

VERSION = "3"  # of the rendering and the file format; increase it when either changes
MIN_CACHED_BYTES = 1 << 20  # of rows; fewer are tokenized faster than downloaded


@dataclass
class CachedSplit:
    """The cached content of a split. `good_flags` has one entry per row for unpaired preferences, else none."""

    rows: list[TokenizedExample]
    truncated: int
    dropped: int
    good_flags: list[bool] = field(default_factory=list)


def load_or_tokenize_split(
    training: "TrainingContext", dataset_type: DatasetType, min_bytes: int = MIN_CACHED_BYTES
) -> dict[str, TokenizedSplit]:
    """Tokens and labels of every split, from the cache or tokenized now and cached.

    Splits of fewer than `min_bytes` are not cached.
    """
    max_length = training.config.hyperparameters.max_seq_length

    def tokenize(path: Path) -> CachedSplit:
        split = tokenize_split(read_rows(path), dataset_type, training.row_tokenizer, max_length)
        return CachedSplit(split.rows, split.truncated, split.dropped)

    cached = _load_or_tokenize(training, "rows", tokenize, min_bytes)
    return {name: TokenizedSplit(split.rows, split.truncated, split.dropped) for name, split in cached.items()}


def load_or_tokenize_pairs(training: "TrainingContext", min_bytes: int = MIN_CACHED_BYTES) -> dict[str, TokenizedPreferenceSplit]:
    """`load_or_tokenize_split` for preference pairs; a pair is cached as two rows, chosen and rejected."""
    max_length = training.config.hyperparameters.max_seq_length

    def tokenize(path: Path) -> CachedSplit:
        split = tokenize_pairs(read_rows(path), training.row_tokenizer, max_length)
        return CachedSplit([row for pair in split.rows for row in (pair.chosen, pair.rejected)], split.truncated, split.dropped)

    splits: dict[str, TokenizedPreferenceSplit] = {}
    for name, cached in _load_or_tokenize(training, "pairs", tokenize, min_bytes).items():
        answers = iter(cached.rows)
        pairs = [PreferencePair(chosen, rejected) for chosen, rejected in zip(answers, answers, strict=True)]
        splits[name] = TokenizedPreferenceSplit(pairs, cached.truncated, cached.dropped)
    return splits


def load_or_tokenize_unpaired(
    training: "TrainingContext", dataset_type: DatasetType, min_bytes: int = MIN_CACHED_BYTES
) -> dict[str, TokenizedUnpairedSplit]:
    """`load_or_tokenize_split` for single answers that are good or bad."""
    max_length = training.config.hyperparameters.max_seq_length

    def tokenize(path: Path) -> CachedSplit:
        split = tokenize_unpaired(read_rows(path), dataset_type, training.row_tokenizer, max_length)
        good_flags = [example.is_good for example in split.rows]
        return CachedSplit([example.row for example in split.rows], split.truncated, split.dropped, good_flags)

    splits: dict[str, TokenizedUnpairedSplit] = {}
    for name, cached in _load_or_tokenize(training, "unpaired", tokenize, min_bytes).items():
        examples = [UnpairedExample(row, is_good) for row, is_good in zip(cached.rows, cached.good_flags, strict=True)]
        splits[name] = TokenizedUnpairedSplit(examples, cached.truncated, cached.dropped)
    return splits


def _load_or_tokenize(
    training: "TrainingContext", layout: str, tokenize: Callable[[Path], CachedSplit], min_bytes: int
) -> dict[str, CachedSplit]:
    dataset, store = training.context.spec.dataset, training.context.stores.datasets
    max_length = training.config.hyperparameters.max_seq_length
    splits: dict[str, CachedSplit] = {}
    for name, path in training.splits.items():
        split = dataset.splits[name]
        use_cache = split.size_bytes >= min_bytes
        settings = {"rows": split.sha256, "type": dataset.dataset_type, "layout": layout, "max_length": max_length}
        key = _cache_key(split.key, settings, training.row_tokenizer)
        cached = _read_cached_split(store, key) if use_cache else None
        if cached is not None:
            training.context.log_decision("tokens", "cached", f"an earlier job tokenized {name} with the same settings")
        splits[name] = cached or tokenize(path)
        if use_cache and cached is None:
            _write_cached_split(store, key, splits[name])
    return splits


def serialize_split(cached_split: CachedSplit) -> bytes:
    """A split as the content of an .npz file, without pickles."""
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
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer, lengths=lengths, ids=ids, labeled=labeled, prompt_tokens=prompt_tokens, metadata=np.frombuffer(metadata, np.uint8)
    )
    return buffer.getvalue()


def deserialize_split(content: bytes) -> CachedSplit:
    """The split in an .npz file. Raises ValueError, KeyError, OSError or BadZipFile for a damaged one."""
    import numpy as np

    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        lengths, ids, prompt_tokens = file["lengths"], file["ids"], file["prompt_tokens"]
        labeled = np.unpackbits(file["labeled"], count=len(ids)).astype(bool)
        metadata = json.loads(file["metadata"].tobytes())
    labels = np.where(labeled, ids, IGNORE_INDEX)
    ends = lengths.cumsum()[:-1]
    rows = [
        TokenizedExample(row.tolist(), row_labels.tolist(), prompt_text, int(row_prompt_tokens))
        for row, row_labels, prompt_text, row_prompt_tokens in zip(
            np.split(ids, ends), np.split(labels, ends), metadata["prompt_texts"], prompt_tokens, strict=True
        )
    ]
    return CachedSplit(rows, metadata["truncated"], metadata["dropped"], metadata["good_flags"])


def _cache_key(split_key: str, settings: dict[str, str | int], row_tokenizer: RowTokenizer) -> str:
    """The object key of a split's tokens, below the dataset's own prefix."""
    inputs = settings | row_tokenizer.settings | {"version": VERSION}
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode())
    digest.update(row_tokenizer.tokenizer.backend_tokenizer.to_str().encode())
    return f"{Path(split_key).parent.as_posix()}/tokens/{digest.hexdigest()}.npz"


def _read_cached_split(store: ObjectStore, key: str) -> CachedSplit | None:
    """The cached split; None when it is missing or damaged, and the rows are tokenized again."""
    from zipfile import BadZipFile

    try:
        return deserialize_split(store.read(key))
    except NoSuchObject:
        return None
    except (StorageError, ValueError, KeyError, OSError, BadZipFile) as error:
        log.warning("cached tokens cannot be read", extra={"key": key, "error": str(error)})
        return None


def _write_cached_split(store: ObjectStore, key: str, split: CachedSplit) -> None:
    """Store the split for the next job. A job without write access, or whose store is unavailable, continues without caching."""
    try:
        store.write(key, serialize_split(split))
    except StorageError as error:
        log.warning("tokens are not cached", extra={"key": key, "error": str(error)})

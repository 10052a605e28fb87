"""Tokenized splits of a dataset: rendered now, or as an earlier job stored them beside the dataset.

A second job on the same rows, with the same tokenizer, chat format and maximum length, reads the tokens that the first one stored, so its
GPU does not wait for the tokenizer. They are stored under the digest of everything that they depend on, as one compressed Arrow file.
Deleting the dataset deletes them.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.llm.data.arrow_rows import ArrowPairs, ArrowRows, compress_rows, decompress_rows
from jobs.llm.data.preference import TokenizedPreferenceSplit, TokenizedUnpairedSplit, UnpairedExample, split_pairs
from jobs.llm.data.rendering import Layout, RenderedSplit, RenderSettings, render_split
from jobs.llm.data.tokenize import RowTokenizer, TokenizedSplit
from schema.base import ForwardCompatible
from schema.types import DatasetType
from storage import NoSuchObject, ObjectStore, StorageError

if TYPE_CHECKING:
    from jobs.llm.training_context import TrainingContext

log = logging.getLogger(__name__)

VERSION = "4"  # of the rendering and the file format; increase it when either changes
MIN_CACHED_BYTES = 1 << 20  # of rows; fewer are tokenized faster than downloaded


class SplitCounts(ForwardCompatible):
    """What a stored split has beside its rows. `good_flags` is 1 or 0 for each row of layout `unpaired`."""

    truncated: int
    dropped: int
    good_flags: str


def load_or_tokenize_split(
    training: "TrainingContext", dataset_type: DatasetType, min_bytes: int = MIN_CACHED_BYTES
) -> dict[str, TokenizedSplit]:
    """Tokens and labels of every split, from the cache or tokenized now and cached.

    Splits of fewer than `min_bytes` are not cached.
    """
    rendered = _load_or_render(training, "rows", dataset_type, min_bytes)
    return {name: TokenizedSplit(split.rows, split.truncated, split.dropped) for name, split in rendered.items()}


def load_or_tokenize_pairs(training: "TrainingContext", min_bytes: int = MIN_CACHED_BYTES) -> dict[str, TokenizedPreferenceSplit]:
    """`load_or_tokenize_split` for preference pairs."""
    rendered = _load_or_render(training, "pairs", "preference", min_bytes)
    return {name: TokenizedPreferenceSplit(ArrowPairs(split.rows), split.truncated, split.dropped) for name, split in rendered.items()}


def load_or_tokenize_unpaired(
    training: "TrainingContext", dataset_type: DatasetType, min_bytes: int = MIN_CACHED_BYTES
) -> dict[str, TokenizedUnpairedSplit]:
    """`load_or_tokenize_split` for single answers that are good or bad; of pairs, all chosen answers and then all rejected ones."""
    if dataset_type == "preference":
        return {name: split_pairs(split) for name, split in load_or_tokenize_pairs(training, min_bytes).items()}
    rendered = _load_or_render(training, "unpaired", dataset_type, min_bytes)
    return {
        name: TokenizedUnpairedSplit(
            [UnpairedExample(row, is_good) for row, is_good in zip(split.rows, split.good_flags, strict=True)],
            split.truncated,
            split.dropped,
        )
        for name, split in rendered.items()
    }


def _load_or_render(training: "TrainingContext", layout: Layout, dataset_type: DatasetType, min_bytes: int) -> dict[str, RenderedSplit]:
    dataset, context = training.dataset, training.context
    store = context.stores.datasets
    settings = RenderSettings(layout, dataset_type, training.config.hyperparameters.max_seq_length, training.row_tokenizer)
    splits: dict[str, RenderedSplit] = {}
    for name, path in training.splits.items():
        split, folder = dataset.splits[name], context.workdir / "data" / "tokens" / layout / dataset.processed_dataset_id / name
        folder.mkdir(parents=True, exist_ok=True)
        use_cache = split.size_bytes >= min_bytes
        key = _cache_key(split.key, split.sha256, settings)
        cached = _read_cached_split(store, key, folder) if use_cache else None
        if cached is not None:
            context.log_decision("tokens", "cached", f"an earlier job tokenized {name} with the same settings")
        splits[name] = cached or render_split(path, settings, folder, context.check_stop)
        if use_cache and cached is None:
            _write_cached_split(store, key, splits[name], folder)
    return splits


def _cache_key(split_key: str, sha256: str, settings: RenderSettings) -> str:
    """The object key of a split's tokens, below the dataset's own prefix."""
    row_tokenizer: RowTokenizer = settings.row_tokenizer
    inputs = row_tokenizer.settings | {
        "version": VERSION,
        "rows": sha256,
        "type": settings.dataset_type,
        "layout": settings.layout,
        "max_length": settings.max_length,
    }
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode())
    digest.update(row_tokenizer.tokenizer.backend_tokenizer.to_str().encode())
    return f"{Path(split_key).parent.as_posix()}/tokens/{digest.hexdigest()}.arrow"


def _read_cached_split(store: ObjectStore, key: str, folder: Path) -> RenderedSplit | None:
    """The cached split; None when it is missing or damaged, and the rows are tokenized again."""
    stored, target = folder / "stored.arrow", folder / "part-0.arrow"
    try:
        counts = SplitCounts.load(decompress_rows(store.download(key, stored), target))
        rows = ArrowRows([target])
    except NoSuchObject:
        return None
    except (StorageError, ValueError, KeyError, OSError) as error:
        log.warning("cached tokens cannot be read", extra={"key": key, "error": str(error)})
        return None
    finally:
        stored.unlink(missing_ok=True)
    return RenderedSplit(rows, counts.truncated, counts.dropped, tuple(flag == "1" for flag in counts.good_flags))


def _write_cached_split(store: ObjectStore, key: str, split: RenderedSplit, folder: Path) -> None:
    """Store the split for the next job. A job without write access, or whose store is unavailable, continues without caching."""
    path = folder / "stored.arrow"
    counts = SplitCounts(
        truncated=split.truncated, dropped=split.dropped, good_flags="".join("1" if flag else "0" for flag in split.good_flags)
    )
    try:
        compress_rows(split.rows, path, counts.model_dump_json().encode())
        store.upload(path, key)
    except StorageError as error:
        log.warning("tokens are not cached", extra={"key": key, "error": str(error)})
    finally:
        path.unlink(missing_ok=True)

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

from jobs.data.pairs import JudgedRow, Pair, RenderedJudged, RenderedPairs, render_judged, render_pairs
from jobs.data.render import NO_LABEL, Rendered, TokenRow, read_rows, render
from schema.words import DatasetType
from storage import NoSuchObject, ObjectStore, StorageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jobs.trainers.loop import Ground

log = logging.getLogger(__name__)

VERSION = "2"  # of the rendering and of the file; a change of either makes other names
LEAST_BYTES = 1 << 20  # of rows: fewer are tokenized sooner than fetched


@dataclass
class Tokens:
    """What is kept of a split: its rows, how many were cut or left out, and a mark on each row where the form has one."""

    rows: list[TokenRow]
    cut: int
    dropped: int
    marks: list[bool] = field(default_factory=list)


def render_cached(ground: "Ground", dataset_type: DatasetType, least_bytes: int = LEAST_BYTES) -> dict[str, Rendered]:
    """The rows of every split as tokens and labels: from the cache, or made, and kept for the next job.

    Splits of fewer than `least_bytes` are always made.
    """
    knobs = ground.config.hyperparameters

    def make(path: Path) -> Tokens:
        made = render(read_rows(path), dataset_type, ground.tokenizer, knobs.max_seq_length)
        return Tokens(made.rows, made.cut, made.dropped)

    found = _cached(ground, "rows", make, least_bytes)
    return {name: Rendered(kept.rows, kept.cut, kept.dropped) for name, kept in found.items()}


def pairs_cached(ground: "Ground", least_bytes: int = LEAST_BYTES) -> dict[str, RenderedPairs]:
    """The same for rows of two answers."""

    def make(path: Path) -> Tokens:
        made = render_pairs(read_rows(path), ground.tokenizer, ground.config.hyperparameters.max_seq_length)
        return Tokens([row for pair in made.rows for row in (pair.chosen, pair.rejected)], made.cut, made.dropped)

    def pairs(kept: Tokens) -> RenderedPairs:
        answers = iter(kept.rows)
        return RenderedPairs([Pair(*both) for both in zip(answers, answers, strict=True)], kept.cut, kept.dropped)

    return {name: pairs(kept) for name, kept in _cached(ground, "pairs", make, least_bytes).items()}


def judged_cached(ground: "Ground", dataset_type: DatasetType, least_bytes: int = LEAST_BYTES) -> dict[str, RenderedJudged]:
    """The same for answers that are each good or bad."""

    def make(path: Path) -> Tokens:
        made = render_judged(read_rows(path), dataset_type, ground.tokenizer, ground.config.hyperparameters.max_seq_length)
        return Tokens([judged.row for judged in made.rows], made.cut, made.dropped, [judged.is_good for judged in made.rows])

    def judged(kept: Tokens) -> RenderedJudged:
        return RenderedJudged([JudgedRow(*one) for one in zip(kept.rows, kept.marks, strict=True)], kept.cut, kept.dropped)

    return {name: judged(kept) for name, kept in _cached(ground, "judged", make, least_bytes).items()}


def _cached(ground: "Ground", form: str, make: Callable[[Path], Tokens], least_bytes: int) -> dict[str, Tokens]:
    dataset, store = ground.context.spec.dataset, ground.context.stores.datasets
    longest = ground.config.hyperparameters.max_seq_length
    found: dict[str, Tokens] = {}
    for name, path in ground.splits.items():
        split = dataset.splits[name]
        is_worth_it = split.size_bytes >= least_bytes
        settings = {"rows": split.sha256, "type": dataset.dataset_type, "form": form, "longest": longest}
        key = _key(split.key, settings, ground.tokenizer)
        known = _read(store, key) if is_worth_it else None
        if known is not None:
            ground.context.decided("tokens", "cached", f"{name} was tokenized before, in the same way")
        found[name] = known or make(path)
        if is_worth_it and known is None:
            _keep(store, key, found[name])
    return found


def packed_bytes(tokens: Tokens) -> bytes:
    """The rows as one file, without pickles."""
    import numpy as np

    rows = tokens.rows
    lengths = np.array([len(row.input_ids) for row in rows], np.int32)
    ids = np.array([token for row in rows for token in row.input_ids], np.int32)
    labelled = np.packbits(np.array([label != NO_LABEL for row in rows for label in row.labels], bool))
    prompts = np.array([row.prompt_tokens for row in rows], np.int32)
    rest = json.dumps(
        {"cut": tokens.cut, "dropped": tokens.dropped, "texts": [row.prompt_text for row in rows], "marks": tokens.marks}
    ).encode()
    out = io.BytesIO()
    np.savez_compressed(out, lengths=lengths, ids=ids, labelled=labelled, prompts=prompts, rest=np.frombuffer(rest, np.uint8))
    return out.getvalue()


def unpacked(content: bytes) -> Tokens:
    """The rows of such a file. Raises ValueError, KeyError or OSError for one that is not whole."""
    import numpy as np

    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        lengths, ids, prompts = file["lengths"], file["ids"], file["prompts"]
        labelled = np.unpackbits(file["labelled"], count=len(ids)).astype(bool)
        rest = json.loads(file["rest"].tobytes())
    labels = np.where(labelled, ids, NO_LABEL)
    ends = lengths.cumsum()[:-1]
    rows = [
        TokenRow(row.tolist(), wanted.tolist(), text, int(prompt))
        for row, wanted, text, prompt in zip(np.split(ids, ends), np.split(labels, ends), rest["texts"], prompts, strict=True)
    ]
    return Tokens(rows, rest["cut"], rest["dropped"], rest["marks"])


def _key(split_key: str, settings: dict[str, str | int], tokenizer: "PreTrainedTokenizerBase") -> str:
    """Below the dataset's own folder."""
    whole = settings | {"version": VERSION, "template": tokenizer.chat_template}
    digest = hashlib.sha256(json.dumps(whole, sort_keys=True).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    return f"{Path(split_key).parent.as_posix()}/tokens/{digest.hexdigest()}.npz"


def _read(store: ObjectStore, key: str) -> Tokens | None:
    """What is kept there; None when there is nothing, or nothing that can be read: then it is made anew."""
    from zipfile import BadZipFile

    try:
        return unpacked(store.read(key))
    except NoSuchObject:
        return None
    except (StorageError, ValueError, KeyError, OSError, BadZipFile) as error:
        log.warning("cached tokens are not used", extra={"key": key, "error": str(error)})
        return None


def _keep(store: ObjectStore, key: str, tokens: Tokens) -> None:
    """For the next job. One that may not write there, or whose store is away, goes on without."""
    try:
        store.write(key, packed_bytes(tokens))
    except StorageError as error:
        log.warning("tokens are not cached", extra={"key": key, "error": str(error)})

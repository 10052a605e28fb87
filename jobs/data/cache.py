"""Rows as tokens, made once for each content: beside the dataset, under a name that is the digest of all that they depend on.

A second job on the same rows, with the same tokenizer, template and longest sequence, reads what the first one made, and a GPU that is
paid for by the second does not wait for a tokenizer. It goes with the dataset when that is deleted.
"""

import hashlib
import io
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.data.render import NO_LABEL, Rendered, TokenRow, read_rows, render
from schema.words import DatasetType
from storage import NoSuchObject, ObjectStore, StorageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jobs.trainers.loop import Ground

log = logging.getLogger(__name__)

VERSION = "1"  # of the rendering and of the file; a change of either makes other names
LEAST_BYTES = 1 << 20  # of rows: fewer are tokenized sooner than fetched


def render_cached(ground: "Ground", dataset_type: DatasetType, least_bytes: int = LEAST_BYTES) -> dict[str, Rendered]:
    """The rows of every split as tokens and labels: from the cache, or made, and kept for the next job.

    Splits of fewer than `least_bytes` are always made.
    """
    found: dict[str, Rendered] = {}
    for name, path in ground.splits.items():
        split = ground.context.spec.dataset.splits[name]
        longest = ground.config.hyperparameters.max_seq_length
        key = _key(split.key, split.sha256, dataset_type, ground.tokenizer, longest)
        known = _read(ground.context.stores.datasets, key) if split.size_bytes >= least_bytes else None
        if known is None:
            known = render(read_rows(path), dataset_type, ground.tokenizer, longest)
            if split.size_bytes >= least_bytes:
                _keep(ground.context.stores.datasets, key, known)
        else:
            ground.context.decided("tokens", "cached", f"{name} was tokenized before, in the same way")
        found[name] = known
    return found


def packed_bytes(rendered: Rendered) -> bytes:
    """The rows as one file, without pickles."""
    import numpy as np

    rows = rendered.rows
    lengths = np.array([len(row.input_ids) for row in rows], np.int32)
    ids = np.array([token for row in rows for token in row.input_ids], np.int32)
    labelled = np.packbits(np.array([label != NO_LABEL for row in rows for label in row.labels], bool))
    prompts = np.array([row.prompt_tokens for row in rows], np.int32)
    rest = json.dumps({"cut": rendered.cut, "dropped": rendered.dropped, "texts": [row.prompt_text for row in rows]}).encode()
    out = io.BytesIO()
    np.savez_compressed(out, lengths=lengths, ids=ids, labelled=labelled, prompts=prompts, rest=np.frombuffer(rest, np.uint8))
    return out.getvalue()


def unpacked(content: bytes) -> Rendered:
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
    return Rendered(rows, rest["cut"], rest["dropped"])


def _key(split_key: str, split_sha256: str, dataset_type: DatasetType, tokenizer: "PreTrainedTokenizerBase", longest: int) -> str:
    """Below the dataset's own folder."""
    settings = {"version": VERSION, "rows": split_sha256, "type": dataset_type, "longest": longest, "template": tokenizer.chat_template}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    return f"{Path(split_key).parent.as_posix()}/tokens/{digest.hexdigest()}.npz"


def _read(store: ObjectStore, key: str) -> Rendered | None:
    """What is kept there; None when there is nothing, or nothing that can be read: then it is made anew."""
    from zipfile import BadZipFile

    try:
        return unpacked(store.read(key))
    except NoSuchObject:
        return None
    except (StorageError, ValueError, KeyError, OSError, BadZipFile) as error:
        log.warning("cached tokens are not used", extra={"key": key, "error": str(error)})
        return None


def _keep(store: ObjectStore, key: str, rendered: Rendered) -> None:
    """For the next job. One that may not write there, or whose store is away, goes on without."""
    try:
        store.write(key, packed_bytes(rendered))
    except StorageError as error:
        log.warning("tokens are not cached", extra={"key": key, "error": str(error)})

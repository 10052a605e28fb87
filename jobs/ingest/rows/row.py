"""A valid row as it is stored: one line of JSON, and what must be known to compare it with others.

A stored row ends in a line feed and contains no other; it may contain U+2028 and other separators unescaped, so readers must split at
line feeds only.
"""

import hashlib
from typing import NamedTuple

import orjson

from jobs.ingest.rows.forms import ValidatedRow
from jobs.ingest.rows.values import Number
from schema.types import PromptForm, TextDatasetType


class Row(NamedTuple):
    """One valid row."""

    dataset_type: TextDatasetType
    shape: str  # equal for rows that may be in one dataset
    canonical: bytes  # one line of JSON without its line feed: keys in a fixed order, no space between tokens, content unchanged
    digest: bytes  # equal for equal rows
    prompt_digest: bytes  # equal for rows that must stay on the same side of the split
    images: int = 0
    pixels: int = 0  # of all images
    columns: tuple[str, ...] = ()  # beside a prompt, sorted
    prompt_form: PromptForm = "strings"
    label: bool | None = None
    has_tools: bool = False
    has_weights: bool = False


def make_row(content: ValidatedRow) -> Row:
    """The row as it is stored."""
    canonical = _serialize(content.columns)
    digest = _digest(canonical)
    return Row(
        content.dataset_type,
        content.shape,
        canonical,
        digest,
        digest if content.prompt is None else _digest(_serialize(content.prompt)),
        len(content.images.uris),
        content.images.pixels,
        content.extra_columns,
        content.prompt_form,
        content.label,
        content.has_tools,
        content.has_weights,
    )


def _serialize(value: object) -> bytes:
    return orjson.dumps(value, default=_serialize_number, option=orjson.OPT_PASSTHROUGH_DATACLASS)


def _serialize_number(value: object) -> orjson.Fragment:
    """A number, exactly as the upload has it."""
    if not isinstance(value, Number):
        raise TypeError(f"{type(value).__name__} is not a value of a row")
    return orjson.Fragment(value.literal)


def _digest(canonical: bytes) -> bytes:
    return hashlib.blake2b(canonical, digest_size=16).digest()

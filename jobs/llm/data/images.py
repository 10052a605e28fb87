"""Tokenizes rows with images, and decodes the images when a batch needs them.

The chat template's image token, such as <start_of_image>, becomes a fixed number of soft tokens, which the model replaces with the
image's features. A tokenized row stores its position in the dataset file; its images are decoded for every batch and not kept.
"""

import binascii
import json
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.llm.data.tokenize import IGNORE_INDEX, RowTokenizer, TokenizedExample, tokenize_split
from jobs.runtime.errors import JobFailed
from schema.types import DatasetType

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


@dataclass(frozen=True)
class VisionInputConfig:
    """How a base model takes images: its image tokens in the text, and its image processor."""

    boi_token: str  # the chat template's token for an image
    full_image_sequence: str  # the text that replaces it before tokenizing
    soft_token_id: int  # an image has `tokens_per_image` of these
    boundary_token_ids: frozenset[int]  # the tokens before the first and after the last soft token
    tokens_per_image: int
    image_processor: Any = field(repr=False)  # an image processor of transformers
    chat_template: str | None = field(repr=False)  # the processor's, where it has one

    @property
    def image_token_ids(self) -> frozenset[int]:
        """The tokens that represent an image; they are never labels."""
        return self.boundary_token_ids | {self.soft_token_id}


@dataclass(frozen=True)
class TokenizedImageExample(TokenizedExample):
    """A tokenized row, and the position of its images in the dataset file."""

    split_path: Path
    byte_offset: int  # of its line in the file
    line_number: int  # from 1
    image_count: int


@dataclass
class TokenizedImageSplit:
    """The rows to learn from, and the numbers of truncated and dropped rows."""

    rows: list[TokenizedImageExample] = field(default_factory=list)
    text_only_rows: list[TokenizedExample] = field(default_factory=list)  # the same rows without their images
    truncated: int = 0
    dropped: int = 0


class BrokenImage(Exception):
    """An image cannot be decoded. It has only a message, because it may be raised in a data loader's worker process."""


def load_vision_input_config(base_folder: Path, base_model_id: str) -> VisionInputConfig:
    """The base model's image settings. Raises JobFailed for a model without image input, or with one that is not supported."""
    from transformers import AutoProcessor
    from transformers.models.gemma3 import Gemma3Processor

    hint = "use a multimodal Gemma 3, such as google/gemma-3-4b-it, or modality 'text' with rows without images"
    if "vision_config" not in json.loads((base_folder / "config.json").read_text()):
        raise JobFailed("invalid_config", f"modality 'vision' needs a multimodal base model; {base_model_id} accepts only text", hint)
    try:
        processor = AutoProcessor.from_pretrained(base_folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:  # a missing file, an unknown class, or a missing package
        message = f"the image processor of {base_model_id} cannot be loaded"
        raise JobFailed("invalid_config", message, "the base model needs its preprocessor_config.json; " + hint) from error
    if not isinstance(processor, Gemma3Processor):
        raise JobFailed("invalid_config", f"{base_model_id} has image processor {type(processor).__name__}, which is not supported", hint)
    tokenizer = processor.tokenizer
    return VisionInputConfig(
        boi_token=processor.boi_token,
        full_image_sequence=processor.full_image_sequence,
        soft_token_id=tokenizer.image_token_id,
        boundary_token_ids=frozenset((tokenizer.boi_token_id, tokenizer.eoi_token_id)),
        tokens_per_image=processor.image_seq_length,
        image_processor=processor.image_processor,
        chat_template=processor.chat_template if isinstance(processor.chat_template, str) else None,
    )


def tokenize_split_with_images(
    split_path: Path, dataset_type: DatasetType, row_tokenizer: RowTokenizer, vision_input: VisionInputConfig, max_length: int
) -> TokenizedImageSplit:
    """Tokens and labels of every row of a split. Raises JobFailed for an invalid row.

    A row is cut to `max_length` tokens after its last image. A row whose images do not all fit is dropped: an answer about a missing image
    would train the model to hallucinate.
    """
    split = TokenizedImageSplit()
    with_images = replace(row_tokenizer, image_text=(vision_input.boi_token, vision_input.full_image_sequence))
    text_only = replace(row_tokenizer, image_text=(vision_input.boi_token, ""))
    for offset, number, row in _iter_rows(split_path):
        images = extract_image_uris(row)
        with image_error_context():
            for n, image in enumerate(images, 1):
                _open_image(image, _describe_location(split_path, number, n))  # reads only the header
        stripped = _strip_image_data(row)
        full = _tokenize_row(stripped, dataset_type, with_images)
        if full is None:
            split.dropped += 1
            continue
        _check_soft_tokens(full, len(images), vision_input, _describe_location(split_path, number))
        cut = _truncate_after_images(full, vision_input, max_length)
        if cut is None:
            split.dropped += 1
            continue
        split.truncated += len(full.input_ids) > max_length
        prompt = cut.prompt_text.replace(vision_input.full_image_sequence, vision_input.boi_token)
        split.rows.append(
            TokenizedImageExample(cut.input_ids, cut.labels, prompt, cut.prompt_tokens, split_path, offset, number, len(images))
        )
        text_row = _tokenize_row(stripped, dataset_type, text_only)
        split.text_only_rows.append(text_row.truncate(max_length) if text_row else cut)
    return split


def extract_image_uris(row: dict[str, Any]) -> list[str]:
    """The `data:` URIs of a row's images, in order."""
    return [part["image"] for message in _messages(row) for part in _content_parts(message) if part["type"] == "image"]


def load_pixel_values(row: TokenizedImageExample, vision_input: VisionInputConfig, count: int | None = None) -> "Tensor | None":
    """The first `count` images of a row, or all, as pixels (images, channels, height, width). None without any. Raises BrokenImage."""
    count = row.image_count if count is None else count
    if not count:
        return None
    with row.split_path.open("rb") as lines:
        lines.seek(row.byte_offset)
        content = json.loads(lines.readline())
    images = [
        _decode_image(uri, _describe_location(row.split_path, row.line_number, n))
        for n, uri in enumerate(extract_image_uris(content)[:count], 1)
    ]
    # Without pan-and-scan: its crops would need more tokens than the row has for the image.
    return vision_input.image_processor(images=images, do_pan_and_scan=False, return_tensors="pt")["pixel_values"]


@contextmanager
def image_error_context() -> Iterator[None]:
    """Raise JobFailed for a BrokenImage, from this process or a data loader's worker."""
    try:
        yield
    except BrokenImage as error:
        message = str(error).strip().rpartition("BrokenImage: ")[2]  # a worker's error message starts with its traceback
        raise JobFailed("invalid_data", message, "save the image again as PNG, JPEG or WebP, and upload the dataset again") from error


# --- rows ----------------------------------------------------------------------------------------------------------------


def _iter_rows(split_path: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """The rows of a file, each with its byte offset and line number."""
    offset = 0
    with split_path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            yield offset, number, json.loads(line)
            offset += len(line)


def _messages(row: dict[str, Any]) -> list[dict[str, Any]]:
    if "messages" in row:
        return row["messages"]
    return [message for name in ("prompt", "completion") if isinstance(row.get(name), list) for message in row[name]]


def _content_parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message.get("content")  # null beside calls of tools
    return content if isinstance(content, list) else []


def _strip_image_data(row: dict[str, Any]) -> dict[str, Any]:
    """The row with image parts that have no data: a chat template must not render megabytes of base64."""

    def without_images(message: dict[str, Any]) -> dict[str, Any]:
        parts = [{"type": "image"} if part["type"] == "image" else part for part in _content_parts(message)]
        return message | {"content": parts} if parts else message

    return {name: [without_images(message) for message in value] if isinstance(value, list) else value for name, value in row.items()}


def _tokenize_row(row: dict[str, Any], dataset_type: DatasetType, row_tokenizer: RowTokenizer) -> TokenizedExample | None:
    """The tokenized row, not truncated; None when it has no labels."""
    rows = tokenize_split([row], dataset_type, row_tokenizer, sys.maxsize).rows
    return rows[0] if rows else None


def _check_soft_tokens(row: TokenizedExample, image_count: int, vision_input: VisionInputConfig, location: str) -> None:
    """Raise JobFailed when the text does not have exactly the soft tokens of its images."""
    actual, expected = row.input_ids.count(vision_input.soft_token_id), image_count * vision_input.tokens_per_image
    if actual != expected:
        hint = "use a base model whose chat template supports images"
        raise JobFailed("invalid_config", f"the base model's chat template does not render the images of {location}", hint)


def _truncate_after_images(row: TokenizedExample, vision_input: VisionInputConfig, max_length: int) -> TokenizedExample | None:
    """The row without labels on image tokens, cut after its last image; None when an image or every label is cut away."""
    labels = [IGNORE_INDEX if label in vision_input.image_token_ids else label for label in row.labels]
    first = next((n for n, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))
    row = replace(row, labels=labels, prompt_tokens=first)
    last = max((n for n, token in enumerate(row.input_ids) if token == vision_input.soft_token_id), default=-2)
    if last + 2 > max_length:  # the end-of-image token follows it
        return None
    row = row.truncate(max_length)
    return row if row.has_labels else None


# --- images --------------------------------------------------------------------------------------------------------------


def _describe_location(split_path: Path, line_number: int, image_number: int | None = None) -> str:
    """Where a row or an image is, for error messages."""
    return (
        f"row {line_number} of {split_path.stem}"
        if image_number is None
        else f"image {image_number} in row {line_number} of {split_path.stem}"
    )


def _open_image(uri: str, location: str) -> "Image":
    """An opened image; only its header has been read. Raises BrokenImage."""
    from PIL import Image

    try:
        return Image.open(BytesIO(binascii.a2b_base64(uri.partition(",")[2], strict_mode=True)), formats=("PNG", "JPEG", "WEBP"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BrokenImage(f"{location} cannot be opened: it is not a PNG, JPEG or WebP image, or it is damaged") from error


def _decode_image(uri: str, location: str) -> "Image":
    """The decoded image in RGB, rotated as its EXIF data says. Raises BrokenImage."""
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(_open_image(uri, location)).convert("RGB")
    except (OSError, ValueError, SyntaxError, IndexError, EOFError, struct.error) as error:  # what Pillow raises for damaged images
        raise BrokenImage(f"{location} is broken: its pixels cannot be decoded") from error

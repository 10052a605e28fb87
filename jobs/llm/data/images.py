"""Rows with images: as tokens, with places kept for each image, and the images themselves, read when a model is to look at them.

What the chat template writes for an image, such as <start_of_image>, becomes what the model reads in its place: a fixed number of soft
tokens, which the features of the image replace. A row keeps the tokens and where it lies in its file; its images are decoded once for
every batch, and never kept.
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
from typing import TYPE_CHECKING, Any, cast

from jobs.llm.data.tokenize import IGNORE_INDEX, TokenizedExample, tokenize_split
from jobs.runtime.errors import JobFailed
from schema.types import DatasetType

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor
    from transformers import BatchEncoding, PreTrainedTokenizerBase


@dataclass(frozen=True)
class VisionInputConfig:
    """How a base model is shown images: what stands for one in a text, and what makes pixels of it."""

    boi_token: str  # as the chat template writes an image
    full_image_sequence: str  # as the model reads it
    soft_token_id: int  # the soft token, of which a sequence has `tokens_per_image`
    boundary_token_ids: frozenset[int]  # the tokens before the first and after the last of them
    tokens_per_image: int
    image_processor: Any = field(repr=False)  # of transformers
    chat_template: str | None = field(repr=False)  # of the processor, where it has one

    @property
    def image_token_ids(self) -> frozenset[int]:
        """Tokens that stand for an image: no model is to say them."""
        return self.boundary_token_ids | {self.soft_token_id}


@dataclass(frozen=True)
class TokenizedImageExample(TokenizedExample):
    """A row as tokens, and where its images are."""

    split_path: Path
    byte_offset: int  # of its line, in bytes
    line_number: int  # of its line, from 1
    image_count: int


@dataclass
class TokenizedImageSplit:
    """The rows that can be learned from, and how many could not, or not wholly."""

    rows: list[TokenizedImageExample] = field(default_factory=list)
    text_only_rows: list[TokenizedExample] = field(default_factory=list)  # the same rows, their images left out
    truncated: int = 0
    dropped: int = 0


class BrokenImage(Exception):
    """An image cannot be decoded. It may come out of another process, so a message is all that it has."""


def load_vision_input_config(base_folder: Path, base_model_id: str) -> VisionInputConfig:
    """How this base sees. Raises JobFailed for one that does not, or not in a way known here."""
    from transformers import AutoProcessor
    from transformers.models.gemma3 import Gemma3Processor

    hint = "use a Gemma 3 that sees, such as google/gemma-3-4b-it, or modality 'text' with rows that have no images"
    if "vision_config" not in json.loads((base_folder / "config.json").read_text()):
        raise JobFailed("invalid_config", f"modality 'vision' needs a base model that sees, and {base_model_id} reads text alone", hint)
    try:
        processor = AutoProcessor.from_pretrained(base_folder, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:  # a file is not there, or names what nobody knows, or what is not installed
        message = f"{base_model_id} has no image processor that can be loaded here"
        raise JobFailed("invalid_config", message, "the base model needs its preprocessor_config.json; " + hint) from error
    if not isinstance(processor, Gemma3Processor):
        raise JobFailed("invalid_config", f"{base_model_id} sees in another way ({type(processor).__name__}) than Gemma 3 does", hint)
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
    split_path: Path, dataset_type: DatasetType, tokenizer: "PreTrainedTokenizerBase", vision: VisionInputConfig, max_length: int
) -> TokenizedImageSplit:
    """Tokens and labels of every row of a split. Raises JobFailed for a row that cannot be shown.

    A row is cut to `max_length` tokens behind its last image. One whose images do not all fit is dropped: half an image is none, and an
    answer about one that is missing teaches to invent.
    """
    found = TokenizedImageSplit()
    seeing, reading = (
        _ImageExpandingTokenizer(tokenizer, vision.boi_token, vision.full_image_sequence),
        _ImageExpandingTokenizer(tokenizer, vision.boi_token, ""),
    )
    for offset, number, row in _iter_rows(split_path):
        images = extract_image_uris(row)
        with image_error_context():
            for n, image in enumerate(images, 1):
                _open_image(image, _describe_location(split_path, number, n))  # its header alone: whether it is an image at all
        shown = _strip_image_data(row)
        whole = _tokenize_row(shown, dataset_type, seeing)
        if whole is None:
            found.dropped += 1
            continue
        _check_soft_tokens(whole, len(images), vision, _describe_location(split_path, number))
        fitting = _truncate_after_images(whole, vision, max_length)
        if fitting is None:
            found.dropped += 1
            continue
        found.truncated += len(whole.input_ids) > max_length
        prompt = fitting.prompt_text.replace(vision.full_image_sequence, vision.boi_token)
        row_at = TokenizedImageExample(
            fitting.input_ids, fitting.labels, prompt, fitting.prompt_tokens, split_path, offset, number, len(images)
        )
        found.rows.append(row_at)
        words = _tokenize_row(shown, dataset_type, reading)
        found.text_only_rows.append(words.truncate(max_length) if words else fitting)
    return found


def extract_image_uris(row: dict[str, Any]) -> list[str]:
    """The `data:` URIs of a row, in the order in which they are looked at."""
    return [part["image"] for message in _messages(row) for part in _content_parts(message) if part["type"] == "image"]


def load_pixel_values(row: TokenizedImageExample, vision: VisionInputConfig, count: int | None = None) -> "Tensor | None":
    """The first `count` images of a row, or all, as pixels (images, channels, height, width). None without any. Raises BrokenImage."""
    wanted = row.image_count if count is None else count
    if not wanted:
        return None
    with row.split_path.open("rb") as lines:
        lines.seek(row.byte_offset)
        content = json.loads(lines.readline())
    places = [
        (image, _describe_location(row.split_path, row.line_number, n)) for n, image in enumerate(extract_image_uris(content)[:wanted], 1)
    ]
    pictures = [_decode_image(image, place) for image, place in places]
    # Cut into crops, an image would take more tokens than its row has for it.
    return vision.image_processor(images=pictures, do_pan_and_scan=False, return_tensors="pt")["pixel_values"]


@contextmanager
def image_error_context() -> Iterator[None]:
    """Raises JobFailed where an image is broken, in whichever process that was found."""
    try:
        yield
    except BrokenImage as error:
        message = str(error).strip().rpartition("BrokenImage: ")[2]  # a worker's traceback comes before it
        raise JobFailed("invalid_data", message, "save the image again as PNG, JPEG or WebP, and upload the dataset again") from error


# --- rows ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _ImageExpandingTokenizer:
    """A tokenizer whose chat template writes something else for an image. As much of one as `render` needs."""

    tokenizer: "PreTrainedTokenizerBase"
    boi_token: str
    replacement: str

    @property
    def bos_token_id(self) -> int | None:
        return self.tokenizer.bos_token_id

    @property
    def eos_token_id(self) -> int | None:
        return self.tokenizer.eos_token_id

    def apply_chat_template(self, messages: list[dict[str, Any]], **how: bool) -> str:
        return str(self.tokenizer.apply_chat_template(messages, **how)).replace(self.boi_token, self.replacement)

    def __call__(self, text: str, **how: bool) -> "BatchEncoding":
        return self.tokenizer(text, **how)


def _iter_rows(split_path: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """The rows of a file, each with where it begins and its number."""
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
    return message["content"] if isinstance(message["content"], list) else []


def _strip_image_data(row: dict[str, Any]) -> dict[str, Any]:
    """The row with nothing but a note of each image: no template may write megabytes of base64."""

    def without_images(message: dict[str, Any]) -> dict[str, Any]:
        parts = [{"type": "image"} if part["type"] == "image" else part for part in _content_parts(message)]
        return message | {"content": parts} if parts else message

    return {name: [without_images(message) for message in value] if isinstance(value, list) else value for name, value in row.items()}


def _tokenize_row(row: dict[str, Any], dataset_type: DatasetType, tokenizer: _ImageExpandingTokenizer) -> TokenizedExample | None:
    """The whole row; None when there is nothing to learn in it."""
    rows = tokenize_split(iter([row]), dataset_type, cast("PreTrainedTokenizerBase", tokenizer), sys.maxsize).rows
    return rows[0] if rows else None


def _check_soft_tokens(row: TokenizedExample, image_count: int, vision: VisionInputConfig, location: str) -> None:
    """Raises JobFailed when the text has more or fewer places for images than there are images."""
    found, wanted = row.input_ids.count(vision.soft_token_id), image_count * vision.tokens_per_image
    if found < wanted:
        hint = "use a base model whose chat template is made for images"
        raise JobFailed("invalid_config", f"the base model's chat template does not write the images of {location}", hint)
    if found > wanted:
        message = f"{location} writes in its text what stands for an image, such as {vision.boi_token}"
        raise JobFailed("invalid_data", message, "leave it out of the text: an image is a part of its own")


def _truncate_after_images(row: TokenizedExample, vision: VisionInputConfig, max_length: int) -> TokenizedExample | None:
    """The row with no image to be said, cut behind its last image; None when that, or an answer, is out of reach."""
    labels = [IGNORE_INDEX if label in vision.image_token_ids else label for label in row.labels]
    first = next((n for n, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))
    row = replace(row, labels=labels, prompt_tokens=first)
    last = max((n for n, token in enumerate(row.input_ids) if token == vision.soft_token_id), default=-2)
    if last + 2 > max_length:  # the token that ends an image is behind it
        return None
    row = row.truncate(max_length)
    return row if row.has_labels else None


# --- images --------------------------------------------------------------------------------------------------------------


def _describe_location(split_path: Path, line_number: int, image_number: int | None = None) -> str:
    """In words, for whoever has to mend it."""
    return (
        f"row {line_number} of {split_path.stem}"
        if image_number is None
        else f"image {image_number} in row {line_number} of {split_path.stem}"
    )


def _open_image(uri: str, location: str) -> "Image":
    """An image of which the header alone has been read. Raises BrokenImage."""
    from PIL import Image

    try:
        return Image.open(BytesIO(binascii.a2b_base64(uri.partition(",")[2], strict_mode=True)), formats=("PNG", "JPEG", "WEBP"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BrokenImage(f"{location} cannot be opened: it is no PNG, JPEG or WebP image, or is broken") from error


def _decode_image(uri: str, location: str) -> "Image":
    """An image in red, green and blue, the right way up. Raises BrokenImage."""
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(_open_image(uri, location)).convert("RGB")
    except (OSError, ValueError, SyntaxError, IndexError, EOFError, struct.error) as error:  # what Pillow raises for broken images
        raise BrokenImage(f"{location} is broken: its pixels cannot be decoded") from error

"""Images in rows: the forms that an upload may use, the one form in which they are stored, and the check that they decode.

Every image is fully decoded once, so that no training stops at a broken one. The service fetches nothing: a row contains its images.
"""

import binascii
import re
import struct
from io import BytesIO
from threading import Lock
from typing import Literal, cast

from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from jobs.ingest.rows.values import InvalidValue, as_object, check_keys, describe_type, preview

Format = Literal["png", "jpeg", "webp"]

MAX_SIDE_PX = 4096
MAX_ROW_PIXELS = 4 * MAX_SIDE_PX**2  # no model reads more; a solid image of the largest size has only some hundred bytes as WebP
MAX_SCANS = 100  # of a progressive JPEG, which usually has about ten; each scan is a pass over all pixels, however few bytes it has
HEADER_PREVIEW_CHARS = 32  # of a data: URI in an error
EXAMPLE_IMAGE_PART = '{"type": "image", "image": "data:image/png;base64,..."}'
IMAGE_PART_TYPES = ("image", "image_url", "input_image")
DATA_URI_HEADER = re.compile(r"data:image/(png|jpe?g|webp);base64,", re.IGNORECASE)
URL_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
FORMAT_NAMES: dict[Format, str] = {"png": "PNG", "jpeg": "JPEG", "webp": "WebP"}
# The classes themselves: `Image.open` would warn about large images before their size can be checked here.
READERS: dict[Format, type[PngImageFile | JpegImageFile | WebPImageFile]] = {
    "png": PngImageFile,
    "jpeg": JpegImageFile,
    "webp": WebPImageFile,
}
DECODE_LOCK = Lock()  # decodes one image at a time in the process: the largest takes 64 MiB, and 256 MiB as WebP


def is_image_part(part: dict[str, object]) -> bool:
    """Whether a part of a message is an image, in any of the accepted forms."""
    return part.get("type") in IMAGE_PART_TYPES or ("type" not in part and "image_url" in part)


def normalize_image_part(part: dict[str, object], field: str) -> str:
    """The image of a part as a `data:` URI in its stored form. Its bytes are not checked yet. Raises InvalidValue."""
    key = "image" if part.get("type") == "image" else "image_url"
    if key not in part:
        raise InvalidValue(f"{field}.{key}", f"is missing; an image is {EXAMPLE_IMAGE_PART}", "missing_field")
    check_keys(part, field, ("type", key) if "type" in part else (key,))
    value, path = part[key], f"{field}.{key}"
    if key == "image_url" and isinstance(value, dict):
        image_url = as_object(cast(object, value), path, EXAMPLE_IMAGE_PART)
        check_keys(image_url, path, ("url",))
        value, path = image_url["url"], f"{path}.url"
    return _normalize_data_uri(value, path)


def check_image(uri: str, field: str, max_pixels: int) -> int:
    """Decode an image; returns its number of pixels, which is read first and may be `max_pixels`, what the row has left.

    Raises InvalidValue when it is broken, animated, too large, or not of the declared format.
    """
    declared, content = _decode_data_uri(uri, field)
    detected = _detect_format(content)
    if detected is None:
        raise InvalidValue(field, "is not a PNG, JPEG or WebP image", "invalid_image")
    if detected != declared:
        reason = f"declares image/{declared}, but is a {FORMAT_NAMES[detected]} image; write data:image/{detected}"
        raise InvalidValue(field, reason, "invalid_image")
    if detected == "jpeg" and (scans := content.count(b"\xff\xda")) > MAX_SCANS:
        reason = f"is a JPEG image of {scans:,} scans; at most {MAX_SCANS} are allowed: save it again"
        raise InvalidValue(field, reason, "invalid_image")
    with DECODE_LOCK:
        result = _decode(detected, content, max_pixels)
    if isinstance(result, str):
        raise InvalidValue(field, result, "invalid_image")
    return result


def _normalize_data_uri(value: object, field: str) -> str:
    if not isinstance(value, str):
        raise InvalidValue(field, f"is {describe_type(value)}; an image is {EXAMPLE_IMAGE_PART}", "wrong_type")
    header = DATA_URI_HEADER.match(value)
    if header is None:
        raise InvalidValue(field, _data_uri_error(value), "invalid_image")
    declared = header[1].lower().replace("jpg", "jpeg")
    stored = f"data:image/{declared};base64,"
    return value if header[0] == stored else stored + value[header.end() :]


def _data_uri_error(value: str) -> str:
    if URL_SCHEME.match(value):
        return f"is the URL {preview(value)}; the service fetches nothing; put the image into the row: {EXAMPLE_IMAGE_PART}"
    if value[:5].lower() == "data:":
        return (
            f"begins {preview(value[:HEADER_PREVIEW_CHARS])}; it must be data:image/png, data:image/jpeg or data:image/webp, with ;base64"
        )
    return f"is not a data: URI; an image is {EXAMPLE_IMAGE_PART}"


def _decode_data_uri(uri: str, field: str) -> tuple[str, bytes]:
    header, _, payload = uri.partition(",")
    try:
        content = binascii.a2b_base64(payload, strict_mode=True)
    except ValueError as error:
        reason = str(error).lower()
        message = f"is not base64 ({reason}); write the standard alphabet, padded, without line breaks"
        raise InvalidValue(field, message, "invalid_image") from error
    return header.removeprefix("data:image/").removesuffix(";base64"), content


def _detect_format(content: bytes) -> Format | None:
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if content.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        return "webp"
    return None


def _decode(image_format: Format, content: bytes, max_pixels: int) -> int | str:
    """The number of pixels, or why the image is not valid. Its size is checked before any pixel is decoded."""
    try:
        with READERS[image_format](BytesIO(content)) as image:
            if max(image.size) > MAX_SIDE_PX:
                return _size_error(f"{image.width:,} x {image.height:,}")
            pixels = image.width * image.height
            if pixels > max_pixels:
                return f"brings the row to more than {MAX_ROW_PIXELS:,} pixels in its images; scale them down, or split the row"
            if isinstance(image, PngImageFile | WebPImageFile) and image.is_animated:
                return "is animated; save a single frame"
            image.load()
            return pixels
    except Image.DecompressionBombError:  # a WebP image above 179 million pixels, raised before its size can be read
        return _size_error("far more")
    except (SyntaxError, OSError, ValueError, IndexError, EOFError, struct.error) as error:  # what Pillow raises for broken images
        return f"is a broken {FORMAT_NAMES[image_format]} image: {preview(str(error))}"


def _size_error(pixels: str) -> str:
    return f"is {pixels} pixels; at most {MAX_SIDE_PX:,} x {MAX_SIDE_PX:,} are allowed: scale it down"

"""Images in rows: how an upload may write them, the one way in which they are stored, and the check that they are what they say.

Every image is decoded once, wholly, so that no training stops at a broken one. Nothing is ever fetched: an image is in its row.
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

from service.core.row_values import Refused, as_object, check_names, kind, shown

Format = Literal["png", "jpeg", "webp"]

MAX_SIDE = 4096  # pixels
MAX_SCANS = 100  # of a progressive JPEG, which has about ten; each costs a pass over all pixels, however few bytes it takes
SHOWN_HEADER = 32  # characters of a data: URI in an error
EXAMPLE = '{"type": "image", "image": "data:image/png;base64,..."}'
PART_TYPES = ("image", "image_url", "input_image")
HEADER = re.compile(r"data:image/(png|jpe?g|webp);base64,", re.IGNORECASE)
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
SPELLED: dict[Format, str] = {"png": "PNG", "jpeg": "JPEG", "webp": "WebP"}
# The classes themselves: `Image.open` would warn of large images before their size can be refused here.
READERS: dict[Format, type[PngImageFile | JpegImageFile | WebPImageFile]] = {
    "png": PngImageFile,
    "jpeg": JpegImageFile,
    "webp": WebPImageFile,
}
DECODING = Lock()  # one image at a time in the whole process: the largest takes 64 MiB, and 256 MiB as WebP


def is_image(part: dict[str, object]) -> bool:
    """Whether a part of a message means to be an image."""
    return part.get("type") in PART_TYPES or ("type" not in part and "image_url" in part)


def data_uri(part: dict[str, object], field: str) -> str:
    """The image of a part as a `data:` URI in the stored spelling. Its bytes are not looked at yet."""
    key = "image" if part.get("type") == "image" else "image_url"
    if key not in part:
        raise Refused(f"{field}.{key}", f"is missing; an image is {EXAMPLE}")
    check_names(part, field, ("type", key) if "type" in part else (key,))
    value, path = part[key], f"{field}.{key}"
    if key == "image_url" and isinstance(value, dict):
        holder = as_object(cast(object, value), path, EXAMPLE)
        check_names(holder, path, ("url",))
        value, path = holder["url"], f"{path}.url"
    return _normalised(value, path)


def check_image(uri: str, field: str) -> None:
    """Decode an image; Refused when it is broken, animated, too large, or not what it says."""
    declared, content = _content(uri, field)
    found = _format_of(content)
    if found is None:
        raise Refused(field, "holds bytes that are no PNG, JPEG or WebP image")
    if found != declared:
        raise Refused(field, f"says image/{declared}, but its bytes are a {SPELLED[found]} image; write data:image/{found}")
    if found == "jpeg" and (scans := content.count(b"\xff\xda")) > MAX_SCANS:
        raise Refused(field, f"is a JPEG image of {scans:,} scans; at most {MAX_SCANS}: save it again")
    with DECODING:
        problem = _problem(found, content)
    if problem:
        raise Refused(field, problem)


def _normalised(value: object, field: str) -> str:
    if not isinstance(value, str):
        raise Refused(field, f"is {kind(value)}; an image is {EXAMPLE}")
    header = HEADER.match(value)
    if header is None:
        raise Refused(field, _not_a_data_uri(value))
    declared = header[1].lower().replace("jpg", "jpeg")
    stored = f"data:image/{declared};base64,"
    return value if header[0] == stored else stored + value[header.end() :]


def _not_a_data_uri(value: str) -> str:
    if ADDRESS.match(value):
        return f"is the address {shown(value)}; the service fetches nothing; put the image into the row: {EXAMPLE}"
    if value[:5].lower() == "data:":
        return f"begins {shown(value[:SHOWN_HEADER])}; it must be data:image/png, data:image/jpeg or data:image/webp, with ;base64"
    return f"is no data: URI; an image is {EXAMPLE}"


def _content(uri: str, field: str) -> tuple[str, bytes]:
    header, _, payload = uri.partition(",")
    try:
        content = binascii.a2b_base64(payload, strict_mode=True)
    except ValueError as error:
        reason = str(error).lower()
        raise Refused(field, f"is not base64 ({reason}); write the standard alphabet, padded, without line breaks") from error
    return header.removeprefix("data:image/").removesuffix(";base64"), content


def _format_of(content: bytes) -> Format | None:
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if content.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        return "webp"
    return None


def _problem(found: Format, content: bytes) -> str | None:
    """Why an image cannot be used. Its size is known, and refused, before any pixel is decoded."""
    try:
        with READERS[found](BytesIO(content)) as image:
            if max(image.size) > MAX_SIDE:
                return _too_large(f"{image.width:,} x {image.height:,}")
            if isinstance(image, PngImageFile | WebPImageFile) and image.is_animated:
                return "is animated; save one picture of it"
            image.load()
    except Image.DecompressionBombError:  # a WebP image beyond 179 million pixels, before its size could be asked
        return _too_large("far more")
    except (SyntaxError, OSError, ValueError, IndexError, EOFError, struct.error) as error:  # what Pillow raises for broken images
        return f"is a broken {SPELLED[found]} image: {shown(str(error))}"
    return None


def _too_large(pixels: str) -> str:
    return f"is {pixels} pixels; at most {MAX_SIDE:,} x {MAX_SIDE:,}: scale it down"

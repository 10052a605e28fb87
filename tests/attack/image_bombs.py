"""Rows with images that are small as files and large, slow or malformed when they are read."""

import base64
import io
import json
import struct
import zlib
from collections.abc import Iterator

from PIL import Image

ANSWER = {"role": "assistant", "content": "an image"}
ROW_IMAGES = 16  # the most that the service allows in a row


def make_bombs(count: int) -> Iterator[tuple[str, bytes]]:
    """Names and uploads, each different."""
    makers = (
        ("a row of large WebP images", lambda n: _row(*[_solid("WEBP", 4096, 4096, n)] * ROW_IMAGES)),
        ("a PNG of 60,000 pixels a side", lambda n: _row(_patch_size(_solid("PNG", 8, 8, n), 60_000, 60_000))),
        ("a 1-bit PNG of 30,000 pixels a side", lambda n: _row(_one_bit(30_000 + n))),
        ("a PNG with a text chunk of 200 MB", lambda n: _row(_with_chunk(_solid("PNG", 8, 8, n), b"zTXt", b"k\0\0" + _zeros(200)))),
        ("a PNG with a color profile of 200 MB", lambda n: _row(_with_chunk(_solid("PNG", 8, 8, n), b"iCCP", b"k\0\0" + _zeros(200)))),
        ("a PNG with too much pixel data", lambda n: _row(_extra_pixels(n))),
        ("an animated PNG", lambda n: _row(_animated("PNG", n))),
        ("an animated WebP", lambda n: _row(_animated("WEBP", n))),
        ("a GIF", lambda n: _row(_animated("GIF", n), media_type="image/gif")),
        ("a TIFF", lambda n: _row(_solid("TIFF", 64, 64, n), media_type="image/tiff")),
        ("a TIFF that says that it is a PNG", lambda n: _row(_solid("TIFF", 64, 64, n))),
        ("an SVG with an entity bomb", lambda n: _row(_svg(n), media_type="image/svg+xml")),
        ("a PostScript file", lambda n: _row(f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%id) (r) file {n}".encode())),
        ("a truncated PNG", lambda n: _row(_solid("PNG", 4096, 4096, n)[:-40])),
        ("a PNG with half a million chunks", lambda n: _row(_with_chunk(_solid("PNG", 8, 8, n), b"tEXt", b"k\0v", times=500_000))),
        ("a JPEG of many scans", lambda n: _row(_many_scans(n), media_type="image/jpeg")),
        ("a JPEG of 65,000 pixels a side", lambda n: _row(_huge_jpeg(n), media_type="image/jpeg")),
        ("a data URI of 30 MB", lambda n: _row(b"\x89PNG\r\n\x1a\n" + bytes([n]) * 22_000_000)),
        ("more images than a row may have", lambda n: _row(*[_solid("PNG", 1, 1, n)] * (ROW_IMAGES + 1))),
        ("ten thousand tiny images", lambda n: _row(*[_solid("PNG", 1, 1, n)] * 10_000)),
    )
    for index in range(count):
        name, make = makers[index % len(makers)]
        yield f"{name} ({index})", make(index)


def make_largest(count: int, rows_each: int) -> Iterator[tuple[str, bytes]]:
    """Names and uploads that are as large as the service allows: nothing takes it longer to decode."""
    for index in range(count):
        rows = (_row(*[_solid("PNG", 4096, 4096, index * rows_each + row)] * ROW_IMAGES) for row in range(rows_each))
        yield f"{rows_each * ROW_IMAGES} images of the largest size ({index})", b"".join(rows)


def _row(*images: bytes, media_type: str | None = None) -> bytes:
    uris = {id(image): f"data:{media_type or _media_type(image)};base64,{base64.b64encode(image).decode()}" for image in images}
    parts = [{"type": "image", "image": uris[id(image)]} for image in images]
    return json.dumps({"messages": [{"role": "user", "content": parts}, ANSWER]}).encode() + b"\n"


def _media_type(image: bytes) -> str:
    return "image/webp" if image.startswith(b"RIFF") else "image/png"


def _solid(file_format: str, width: int, height: int, seed: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), (seed * 37 % 256, seed * 11 % 256, 9)).save(out, file_format, **_FAST.get(file_format, {}))
    return out.getvalue()


_FAST: dict[str, dict[str, int]] = {"PNG": {"compress_level": 1}, "WEBP": {"method": 0, "quality": 1}}


def _one_bit(side: int) -> bytes:
    row = b"\0" * (1 + (side + 7) // 8)
    packer = zlib.compressobj(1)
    pixels = b"".join([*(packer.compress(row) for _ in range(side)), packer.flush()])
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")


def _extra_pixels(seed: int) -> bytes:
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8 + seed % 8, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + _chunk(b"IDAT", _zeros(200)) + _chunk(b"IEND", b"")


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def _with_chunk(png: bytes, name: bytes, content: bytes, times: int = 1) -> bytes:
    return png[:33] + _chunk(name, content) * times + png[33:]


def _patch_size(png: bytes, width: int, height: int) -> bytes:
    return png[:8] + _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + png[33:]


def _zeros(megabytes: int) -> bytes:
    packer = zlib.compressobj(9)
    return b"".join([*(packer.compress(bytes(1 << 20)) for _ in range(megabytes)), packer.flush()])


def _animated(file_format: str, seed: int) -> bytes:
    out = io.BytesIO()
    frames = [Image.new("RGB", (32, 32), (n, seed % 256, 0)) for n in range(20)]
    frames[0].save(out, file_format, save_all=True, append_images=frames[1:])
    return out.getvalue()


def _svg(seed: int) -> bytes:
    entities = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 12))
    return f'<?xml version="1.0"?><!DOCTYPE s [<!ENTITY e0 "{seed}">{entities}]><svg>&e11;</svg>'.encode()


def _many_scans(seed: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (2048, 2048), (seed % 256, 1, 1)).save(out, "JPEG", progressive=True)
    content = out.getvalue()
    scan = content.index(b"\xff\xda")
    return content[:scan] + content[scan:-2] * 40 + content[-2:]


def _huge_jpeg(seed: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (16, 16), (seed % 256, 1, 1)).save(out, "JPEG")
    content = out.getvalue()
    frame = content.index(b"\xff\xc0") + 5
    return content[:frame] + struct.pack(">HH", 65_000, 65_000) + content[frame + 4 :]

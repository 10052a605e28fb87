"""Images that are small as a file and enormous when decoded: each is refused from its header, before it costs time or memory."""

import base64
import io
import json
import struct
import time
import zlib
from collections.abc import Callable
from typing import Any

import psutil
import pytest
from PIL import Image

from jobs.ingest.rows.images import MAX_ROW_PIXELS, MAX_SIDE_PX
from schema.ingestion import IngestLimits
from tests.ingest.dataset_harness import InvalidRow, get_bytes_error, ingest_bytes

SIDE = MAX_SIDE_PX
MIB = 1 << 20


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *chunks: bytes, data: bytes = b"\0", bits: int = 8, interlace: int = 0) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, interlace)
    parts = (chunk(b"IHDR", header), *chunks, chunk(b"IDAT", zlib.compress(data, 9)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def save(file_format: str, width: int, height: int, mode: str = "L", **options: Any) -> bytes:
    out = io.BytesIO()
    Image.new(mode, (width, height)).save(out, file_format, **options)
    return out.getvalue()


def animation(file_format: str) -> bytes:
    frames = [Image.new("L", (512, 512), n) for n in range(30)]
    out = io.BytesIO()
    frames[0].save(out, file_format, save_all=True, append_images=frames[1:])
    return out.getvalue()


def jpeg(width: int, height: int) -> bytes:
    """A JPEG whose header names another size than it has."""
    content = save("JPEG", 16, 16)
    start = content.index(b"\xff\xc0")
    return content[: start + 5] + struct.pack(">HH", height, width) + content[start + 9 :]


def webp(width: int, height: int) -> bytes:
    """An extended WebP file whose canvas has this size."""
    canvas = struct.pack("<I", 0) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    inner = save("WEBP", 16, 16)[12:]
    body = b"WEBP" + b"VP8X" + struct.pack("<I", len(canvas)) + canvas + inner
    return b"RIFF" + struct.pack("<I", len(body)) + body


def tiff(width: int, height: int) -> bytes:
    entries = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1), (278, 4, height)]
    fields = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(entries)) + fields + b"\0\0\0\0"


ZEROS = b"\0" * (64 * MIB)

BOMBS: dict[str, tuple[str, Callable[[], bytes]]] = {
    **{
        f"png {width}x{height}": ("png", lambda width=width, height=height: png(width, height))
        for width, height in ((SIDE + 1, 1), (1, SIDE + 1), (65_535, 65_535), (1 << 30, 1 << 30), ((1 << 31) - 1, 1), (1, (1 << 31) - 1))
    },
    **{f"png {bits} bits": ("png", lambda bits=bits: png(60_000, 60_000, bits=bits)) for bits in (1, 2, 4, 16)},
    "png interlaced": ("png", lambda: png(30_000, 30_000, interlace=1)),
    "png of no size": ("png", lambda: png(0, 0)),
    "png without data": ("png", lambda: png(SIDE, SIDE)),
    "png with compressed text": ("png", lambda: png(SIDE, SIDE, chunk(b"zTXt", b"a\0\0" + zlib.compress(ZEROS, 9)))),
    "png with compressed international text": ("png", lambda: png(SIDE, SIDE, chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(ZEROS, 9)))),
    "png with compressed profile": ("png", lambda: png(SIDE, SIDE, chunk(b"iCCP", b"a\0\0" + zlib.compress(ZEROS, 9)))),
    "png whose data is longer than its size": ("png", lambda: png(SIDE + 1, 16, data=ZEROS)),
    "png animation": ("png", lambda: animation("PNG")),
    "png animation that only says so": ("png", lambda: png(16, 16, chunk(b"acTL", struct.pack(">II", 1 << 20, 0)))),
    **{
        f"jpeg {width}x{height}": ("jpeg", lambda width=width, height=height: jpeg(width, height))
        for width, height in ((65_535, 65_535), (SIDE + 1, 8), (8, 65_000), (0, 0))
    },
    "jpeg of many scans": ("jpeg", lambda: save("JPEG", 16, 16) + b"\xff\xda" * 5000),
    **{
        f"webp {width}x{height}": ("webp", lambda width=width, height=height: webp(width, height))
        for width, height in ((1 << 24, 1 << 24), (16_384, 16_384), (SIDE + 1, 2))
    },
    "webp solid": ("webp", lambda: save("WEBP", 16_383, SIDE + 1, "RGB", lossless=True, method=0)),
    "webp animation": ("webp", lambda: animation("WEBP")),
    **{
        f"gif as {declared}": (declared, lambda: b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + b"\x80\0\0" + b"\0" * 6 + b"\x3b")
        for declared in ("png", "jpeg", "webp")
    },
    **{f"tiff as {declared}": (declared, lambda: tiff(100_000, 100_000)) for declared in ("png", "jpeg", "webp")},
    "bmp": ("png", lambda: b"BM" + struct.pack("<IHHIIiiHH", 54, 0, 0, 54, 40, 100_000, 100_000, 1, 24) + b"\0" * 24),
    "svg": ("png", lambda: b'<svg xmlns="http://www.w3.org/2000/svg" width="99999999" height="99999999"/>'),
    "eps": ("jpeg", lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99999 99999\n"),
    "psd": ("png", lambda: b"8BPS\0\1" + b"\0" * 6 + struct.pack(">HIIHH", 3, 30_000, 30_000, 8, 3)),
    "ico": ("png", lambda: b"\0\0\1\0\1\0\0\0\0\0\1\0\x20\0" + struct.pack("<II", 100, 22) + png(60_000, 60_000)),
    "icns": ("png", lambda: b"icns" + struct.pack(">I", 8 + 8) + b"ic10" + struct.pack(">I", 8)),
    "jpeg 2000": ("jpeg", lambda: b"\xff\x4f\xff\x51" + struct.pack(">HHIIII", 41, 0, 100_000, 100_000, 0, 0)),
    "avif": ("webp", lambda: struct.pack(">I", 32) + b"ftypavif" + b"\0" * 20),
    "ppm": ("png", lambda: b"P6\n99999 99999\n255\n"),
}  # fmt: skip


def make_line(*images: tuple[str, bytes]) -> bytes:
    parts = [
        {"type": "image", "image": f"data:image/{declared};base64,{base64.b64encode(content).decode()}"} for declared, content in images
    ]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "?"}]}, {"role": "assistant", "content": "!"}]
    return json.dumps({"messages": messages}).encode() + b"\n"


def refuse(upload: bytes, limits: IngestLimits | None = None) -> InvalidRow:
    return get_bytes_error(upload, limits)


def test_there_are_forty_bombs() -> None:
    assert len(BOMBS) >= 40


@pytest.mark.parametrize("name", BOMBS)
def test_bomb_is_refused_at_once(name: str) -> None:
    declared, build = BOMBS[name]
    upload = make_line((declared, build()))
    before, begun = psutil.Process().memory_info().rss, time.monotonic()
    refused = refuse(upload)
    assert (refused.line, refused.field) == (1, "messages[0].content[0]")
    assert time.monotonic() - begun < 2
    assert psutil.Process().memory_info().rss - before < 150 * MIB


def test_row_of_many_large_images_ends_at_its_limit() -> None:
    small_file = save("PNG", SIDE, SIDE)
    assert len(small_file) < 20_000
    refused = refuse(make_line(*[("png", small_file)] * 5))
    assert refused.field == "messages[0].content[4]"  # the first four are as many as a row may have
    assert f"{MAX_ROW_PIXELS:,} pixels" in refused.reason


def test_dataset_of_many_images_ends_at_its_limit() -> None:
    line = make_line(("png", save("PNG", 100, 100)))
    limits = IngestLimits(max_pixels=30_000)
    assert ingest_bytes(line * 3, limits=limits).outcome.rows_read == 3
    refused = refuse(line * 4, limits)
    assert refused.line == 4
    assert "30,000 pixels" in refused.reason

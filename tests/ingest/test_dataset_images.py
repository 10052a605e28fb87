"""Images in rows: what is accepted, how it is stored, what is rejected, and how large a row may be."""

import io
import struct
import zlib
from typing import Any

import pytest
from PIL import Image

from jobs.ingest.formats.jsonl import read_jsonl
from jobs.ingest.rows.forms import MAX_IMAGES
from schema.ingestion import IngestLimits, RowProblem
from tests.ingest.dataset_harness import (
    CHOSEN_ANSWER,
    QUESTION,
    REJECTED_ANSWER,
    SYSTEM,
    TEXT,
    get_row_error,
    make_data_uri,
    make_image_bytes,
    make_image_part,
    make_vision_row,
    parse_rows,
    read_bytes,
    store_rows,
    to_jsonl,
    upload,
)


@pytest.mark.parametrize(
    "part",
    [
        make_image_part(),
        {"image": make_data_uri(), "type": "image"},
        {"type": "image_url", "image_url": {"url": make_data_uri()}},
        {"type": "image_url", "image_url": make_data_uri()},
        {"image_url": make_data_uri()},
        {"image_url": {"url": make_data_uri()}},
        {"type": "input_image", "image_url": make_data_uri()},
        {"type": "image", "image": make_data_uri().replace("data:image/png", "DATA:image/PNG")},
    ],
)
def test_image_parts_are_normalized(part: object) -> None:
    ingested, train, _ = upload(make_vision_row({"text": "What is this?", "type": "input_text"}, part, TEXT))
    assert train == [make_vision_row(TEXT, make_image_part(), TEXT)]
    assert ingested.images == 1


@pytest.mark.parametrize(
    ("file_format", "media_type"), [("PNG", "image/png"), ("JPEG", "image/jpeg"), ("JPEG", "image/jpg"), ("WEBP", "image/webp")]
)
def test_png_jpeg_and_webp_are_accepted(file_format: str, media_type: str) -> None:
    content = make_image_bytes(file_format)
    assert store_rows(make_vision_row(make_image_part(content, media_type))) == [
        make_vision_row(make_image_part(content, f"image/{file_format.lower()}"))
    ]


@pytest.mark.parametrize(
    "options", [{"mode": "L"}, {"mode": "P"}, {"mode": "RGBA"}, {"file_format": "JPEG", "mode": "CMYK"}, {"file_format": "MPO"}]
)
def test_any_pixel_mode_is_accepted(options: dict[str, Any]) -> None:
    media_type = "image/jpeg" if options.get("file_format") else "image/png"
    assert upload(make_vision_row(make_image_part(make_image_bytes(**options), media_type)))[0].images == 1


def test_text_message_stays_string_beside_image_message() -> None:
    later = [{"role": "user", "content": [TEXT]}, CHOSEN_ANSWER]
    (row,) = store_rows({"messages": [SYSTEM, *make_vision_row(make_image_part())["messages"], *later]})
    assert [type(message["content"]) for message in row["messages"]] == [str, list, str, str, str]


def test_images_of_stored_rows_are_counted() -> None:
    rows = [
        make_vision_row(make_image_part(), make_image_part(), TEXT),
        {"messages": [QUESTION, CHOSEN_ANSWER]},
        make_vision_row(make_image_part(), TEXT),
        make_vision_row(make_image_part(), TEXT),
    ]
    ingested, _, _ = upload(*rows)
    assert (ingested.images, ingested.duplicates_dropped) == (3, 1)


def test_prompt_messages_may_contain_images() -> None:
    row = {"prompt": make_vision_row(make_image_part(), TEXT)["messages"][:1], "completion": [CHOSEN_ANSWER]}
    ingested, train, _ = upload(row)
    assert (ingested.images, train) == (1, [row])


def test_prompt_digest_includes_image() -> None:
    red, blue = (make_image_part(make_image_bytes(color=color)) for color in ("red", "blue"))
    rows = [
        make_vision_row(red, TEXT),
        make_vision_row(blue, TEXT),
        {"messages": [make_vision_row(red, TEXT)["messages"][0], REJECTED_ANSWER]},
    ]
    first, other_image, same_image = parse_rows(to_jsonl(rows))
    assert first.prompt_digest == same_image.prompt_digest != other_image.prompt_digest


def replace_png_chunk(name: bytes, data: bytes, png: bytes) -> bytes:
    """A PNG file with a changed header."""
    chunk = struct.pack(">I", len(data)) + name + data
    return png[:8] + chunk + struct.pack(">I", zlib.crc32(name + data)) + png[33:]


HUGE_PNG = replace_png_chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0), make_image_bytes())
ANIMATION_OPTIONS = {"save_all": True, "append_images": [Image.new("RGB", (8, 6), "blue")]}
PROGRESSIVE_JPEG = make_image_bytes("JPEG", progressive=True)
MANY_SCANS_JPEG = PROGRESSIVE_JPEG[:-2] + PROGRESSIVE_JPEG[PROGRESSIVE_JPEG.rindex(b"\xff\xda") : -2] * 200 + PROGRESSIVE_JPEG[-2:]


@pytest.mark.parametrize(
    ("part", "field", "reason"),
    [
        ({"type": "image"}, ".image", 'an image is {"type": "image", "image": "data:image/png;base64,..."}'),
        ({"type": "image", "image": 4}, ".image", "is a number"),
        ({"type": "image", "image": "cat.png"}, ".image", "is not a data: URI"),
        ({"type": "image", "image": "gs://bucket/cat.png"}, ".image", "the service fetches nothing; put the image into the row"),
        (
            {"type": "image_url", "image_url": {"url": "https://example.org/c.png"}},
            ".image_url.url",
            "is the URL 'https://example.org/c.png'",
        ),
        (
            {"type": "image_url", "image_url": {"url": make_data_uri(), "detail": "low"}},
            ".image_url.'detail'",
            "would not be used: only url is",
        ),
        ({"type": "image_url", "image_url": {}}, ".image_url.url", "is missing"),
        ({"type": "image", "image": {"url": make_data_uri()}}, ".image", "is an object"),
        ({**make_image_part(), "alt": "red"}, ".'alt'", "would not be used: only type and image are"),
        (
            {"type": "image", "image": "data:image/gif;base64,R0lG"},
            ".image",
            "it must be data:image/png, data:image/jpeg or data:image/webp",
        ),
        ({"type": "image", "image": "data:image/png,abc"}, ".image", "with ;base64"),
        ({"type": "image", "image": "data:image/png;base64,iVBO\nRw0K"}, "", "is not base64"),
        ({"type": "image", "image": "data:image/png;base64,iVBOé"}, "", "is not base64"),
        ({"type": "image", "image": "data:image/png;base64,iVBORw0"}, "", "is not base64 (incorrect padding)"),
        ({"type": "image", "image": "data:image/png;base64,"}, "", "not a PNG, JPEG or WebP image"),
        (make_image_part(b"GIF89a" + bytes(20)), "", "not a PNG, JPEG or WebP image"),
        (make_image_part(make_image_bytes("JPEG")), "", "declares image/png, but is a JPEG image; write data:image/jpeg"),
        (make_image_part(make_image_bytes(size=(64, 64))[:-40]), "", "is a broken PNG image"),
        (make_image_part(make_image_bytes("WEBP")[:-20], "image/webp"), "", "is a broken WebP image"),
        (make_image_part(make_image_bytes(size=(4097, 1))), "", "is 4,097 x 1 pixels; at most 4,096 x 4,096"),
        (make_image_part(HUGE_PNG), "", "is 60,000 x 60,000 pixels"),
        (make_image_part(make_image_bytes(**ANIMATION_OPTIONS)), "", "is animated"),
        (make_image_part(make_image_bytes("WEBP", **ANIMATION_OPTIONS), "image/webp"), "", "is animated"),
        (make_image_part(MANY_SCANS_JPEG, "image/jpeg"), "", "scans; at most 100"),
    ],
)
def test_invalid_image_is_rejected(part: object, field: str, reason: str) -> None:
    error = get_row_error(make_vision_row(TEXT, part))
    assert error.field == f"messages[0].content[1]{field}"
    assert reason in error.reason
    assert str(error).isprintable()


def test_image_at_size_limit_is_accepted() -> None:
    assert upload(make_vision_row(make_image_part(make_image_bytes(size=(4096, 4096), mode="L"))))[0].images == 1


def test_too_many_images_per_row_are_rejected() -> None:
    assert upload(make_vision_row(*[make_image_part()] * MAX_IMAGES))[0].images == MAX_IMAGES
    error = get_row_error(
        {"messages": [*make_vision_row(*[make_image_part()] * MAX_IMAGES)["messages"], *make_vision_row(make_image_part())["messages"]]}
    )
    assert (error.field, error.reason) == ("messages", "has 17 images; at most 16 are allowed in a row")


@pytest.mark.parametrize("role", ["system", "assistant"])
def test_images_are_allowed_only_in_user_messages(role: str) -> None:
    messages = {
        "system": [{"role": role, "content": [make_image_part()]}, QUESTION, CHOSEN_ANSWER],
        "assistant": [QUESTION, {"role": role, "content": [make_image_part()]}],
    }
    error = get_row_error({"messages": messages[role]})
    assert error.reason == f"is an image in a message of role '{role}'; only 'user' messages may have images"


@pytest.mark.parametrize(
    "columns",
    [{"chosen": [CHOSEN_ANSWER], "rejected": [REJECTED_ANSWER]}, {"completion": [CHOSEN_ANSWER], "label": True}, {"answer": "red"}],
)
def test_images_in_preference_and_prompt_rows_are_rejected(columns: dict[str, object]) -> None:
    error = get_row_error({"prompt": [{"role": "user", "content": [make_image_part()]}]} | columns)
    assert error.field == "prompt[0].content[0]"
    assert "images are allowed in rows of messages and of prompt and completion" in error.reason


def test_images_column_error_explains_placement() -> None:
    assert "put each image into its message" in get_row_error({"messages": [QUESTION, CHOSEN_ANSWER], "images": []}).reason


# --- row size limits -------------------------------------------------------------------------------------------------


def test_image_row_may_exceed_text_row_limit() -> None:
    row = make_vision_row(TEXT, *[make_image_part(make_image_bytes(size=(200, 200)))] * 4)
    limits = IngestLimits(max_row_bytes=400, max_image_row_bytes=len(to_jsonl([row])) - 1)
    assert len(to_jsonl([row])) > 2 * limits.max_row_bytes
    assert len(read_bytes(to_jsonl([row]) + to_jsonl([row])[:-1] + b"\r\n", limits)) == 2
    error = get_row_error(row, limits=IngestLimits(max_row_bytes=400, max_image_row_bytes=len(to_jsonl([row])) - 2))
    assert "bytes with its images; use fewer or smaller ones" in error.reason


@pytest.mark.parametrize(
    "row",
    [
        make_vision_row({"type": "text", "text": "x" * 500}, make_image_part()),
        make_vision_row({"type": "text", "text": "data:" + "x" * 500}, make_image_part()),
        {"text": "data:" + "x" * 500},
        {"text": "x" * 500},
        {"messages": [["data:"]] * 100},
    ],
)
def test_text_limit_applies_with_images(row: object) -> None:
    error = get_row_error(row, limits=IngestLimits(max_row_bytes=400))
    assert "longer than 400 bytes" in error.reason


class EndlessImage(io.RawIOBase):
    """A stream with one endless line, in an endless image."""

    read_bytes = 0

    def readline(self, size: int | None = -1, /) -> bytes:
        assert size is not None
        assert size >= 0, "the whole line was requested"
        start = b"" if self.read_bytes else b'{"image": "data:'
        if self.read_bytes > 5100:
            return b""  # what reads on skips the line
        self.read_bytes += size
        return start + b"x" * (size - len(start))


def test_endless_image_is_rejected_at_limit() -> None:
    stream = EndlessImage()
    limits = IngestLimits(max_row_bytes=1000, max_image_row_bytes=5000)
    problem = next(read_jsonl(stream, limits))  # type: ignore[arg-type]  # it has the one method that is called
    assert isinstance(problem, RowProblem)
    assert "longer than 5,000 bytes with its images" in problem.reason

"""Preferences, prompts for graders, and images: what is accepted, how it is stored, what is rejected."""

import base64
import io
import json
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from service.adapters.jobstores.memory import MemoryJobStore
from service.core.datasets.formats import MAX_COLUMNS, MAX_IMAGES
from service.core.datasets.records import Datasets, Upload
from service.core.datasets.rows import IngestResult, InvalidRow, RowLimits, ingest, read_rows
from storage.file import LocalStore
from tests.factories import START

QUICK_SETTINGS = settings(max_examples=60, deadline=None, database=None)
SYSTEM = {"role": "system", "content": "Be brief."}
QUESTION = {"role": "user", "content": "Why?"}
CHOSEN_ANSWER = {"role": "assistant", "content": "So."}
REJECTED_ANSWER = {"role": "assistant", "content": "Dunno."}
PREFERENCE = {"prompt": "Why?", "chosen": "So.", "rejected": "Dunno."}
LABELED_ROWS = [{"prompt": "Why?", "completion": "So.", "label": True}, {"prompt": "Why?", "completion": "Dunno.", "label": False}]


def to_jsonl(rows: Iterable[object]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def read_bytes(content: bytes, limits: RowLimits | None = None) -> list[bytes]:
    return [row.canonical for row in read_rows(io.BytesIO(content), limits or RowLimits())]


def store_rows(*rows: object) -> list[Any]:
    return [json.loads(line) for line in read_bytes(to_jsonl(rows))]


def get_row_error(*rows: object, limits: RowLimits | None = None) -> InvalidRow:
    return get_bytes_error(to_jsonl(rows), limits)


def get_bytes_error(content: bytes, limits: RowLimits | None = None) -> InvalidRow:
    with pytest.raises(InvalidRow) as excinfo:
        read_bytes(content, limits)
    return excinfo.value


def upload(*rows: object, eval_fraction: float = 0.0) -> tuple[IngestResult, list[Any], list[Any]]:
    train, held_out = io.BytesIO(), io.BytesIO()
    ingested = ingest(io.BytesIO(to_jsonl(rows)), RowLimits(), eval_fraction, 0, train, held_out, io.BytesIO())
    train_rows, held_out_rows = ([json.loads(line) for line in out.getvalue().splitlines()] for out in (train, held_out))
    return ingested, train_rows, held_out_rows


# --- preferences -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        PREFERENCE,
        {"prompt": [QUESTION], "chosen": [CHOSEN_ANSWER], "rejected": [REJECTED_ANSWER]},
        {"prompt": [SYSTEM, QUESTION, REJECTED_ANSWER, QUESTION], "chosen": [CHOSEN_ANSWER], "rejected": [REJECTED_ANSWER]},
    ],
)
def test_preference_row_is_stored_unchanged(row: object) -> None:
    ingested, train, _ = upload(row)
    assert (ingested.dataset_type, train) == ("preference", [row])


def test_preference_conversations_are_split_into_shared_prompt() -> None:
    prompt = [SYSTEM, QUESTION, REJECTED_ANSWER, QUESTION]
    explicit = {"prompt": prompt, "chosen": [CHOSEN_ANSWER], "rejected": [REJECTED_ANSWER]}
    implicit = {"chosen": [*prompt, CHOSEN_ANSWER], "rejected": [*prompt, REJECTED_ANSWER]}
    assert store_rows(implicit, {"prompt": prompt, **implicit}, explicit) == [explicit] * 3


@pytest.mark.parametrize(
    ("row", "field", "reason"),
    [
        ({"chosen": "So.", "rejected": "Dunno."}, "prompt", "send chosen and rejected as whole conversations"),
        ({"prompt": "Why?", "chosen": "So."}, "rejected", "a preference row has the columns prompt, chosen and rejected"),
        ({"prompt": "Why?", "rejected": "So."}, "chosen", "is missing"),
        ({**PREFERENCE, "score_chosen": 7.5}, "'score_chosen'", "would not be used: a preference row has only"),
        ({**PREFERENCE, "rejected": "So."}, "rejected", "the same as chosen"),
        ({**PREFERENCE, "chosen": 4}, "chosen", "is a number; it must be a string or a list of messages"),
        (
            {**PREFERENCE, "chosen": [CHOSEN_ANSWER], "rejected": [REJECTED_ANSWER]},
            "chosen",
            "prompt is a string; prompt, chosen and rejected must all be strings",
        ),
        ({"prompt": [QUESTION], "chosen": [CHOSEN_ANSWER], "rejected": [CHOSEN_ANSWER]}, "rejected", "the same as chosen"),
        (
            {"prompt": [QUESTION, REJECTED_ANSWER], "chosen": [CHOSEN_ANSWER], "rejected": [REJECTED_ANSWER]},
            "prompt[1].role",
            "must be from 'user'",
        ),
        ({"prompt": [QUESTION], "chosen": [QUESTION], "rejected": [REJECTED_ANSWER]}, "chosen[0].role", "it must be 'assistant'"),
        (
            {"prompt": [QUESTION], "chosen": [CHOSEN_ANSWER], "rejected": [SYSTEM, QUESTION, REJECTED_ANSWER]},
            "rejected",
            "the messages before it are not the prompt",
        ),
        ({"chosen": [QUESTION, CHOSEN_ANSWER], "rejected": [QUESTION, CHOSEN_ANSWER]}, "rejected", "the same as chosen"),
        (
            {"chosen": [QUESTION, CHOSEN_ANSWER], "rejected": [QUESTION, CHOSEN_ANSWER, QUESTION, REJECTED_ANSWER]},
            "rejected",
            "differs from chosen before its last",
        ),
        (
            {"chosen": [QUESTION, CHOSEN_ANSWER], "rejected": [SYSTEM, QUESTION, REJECTED_ANSWER]},
            "rejected",
            "only the last answers may differ",
        ),
        ({"chosen": [CHOSEN_ANSWER], "rejected": [REJECTED_ANSWER]}, "chosen[0].role", "it must be 'user'"),
        ({"chosen": [QUESTION, CHOSEN_ANSWER], "rejected": [QUESTION]}, "rejected[0].role", "must be from 'assistant'"),
    ],
)
def test_invalid_preference_is_rejected(row: object, field: str, reason: str) -> None:
    error = get_row_error(row)
    assert error.field == field
    assert reason in error.reason


# --- labeled answers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows", [LABELED_ROWS, [{"prompt": [QUESTION], "completion": [CHOSEN_ANSWER], "label": label} for label in (True, False)]]
)
def test_labeled_rows_are_stored_unchanged(rows: list[object]) -> None:
    ingested, train, _ = upload(*rows)
    assert (ingested.dataset_type, train) == ("unpaired_preference", rows)


@pytest.mark.parametrize(("label", "kind"), [(1, "a number"), (0, "a number"), ("true", "a string"), (None, "null")])
def test_label_must_be_boolean(label: object, kind: str) -> None:
    error = get_row_error({**LABELED_ROWS[0], "label": label})
    assert (error.field, error.reason) == ("label", f"is {kind}; write true for a good completion, false for a bad one")


def test_identical_labels_are_rejected_with_counts() -> None:
    error = get_row_error(*[LABELED_ROWS[1]] * 3)
    assert (error.line, error.field) == (3, "label")
    assert "0 rows are true and 3 are false" in error.reason


def test_label_requires_prompt() -> None:
    assert get_row_error({"completion": "So.", "label": True}).field == "prompt"


# --- prompts for graders ---------------------------------------------------------------------------------------------


def test_prompt_columns_keep_exact_numbers() -> None:
    row = '{"prompt":"2 + 2 =","answer":4,"big":1234567890123456789012345678901234567890,"easy":true,"share":0.10,"why":""}'
    assert read_bytes(row.encode()) == [row.encode()]
    ingested, _, _ = upload(json.loads(row))
    assert (ingested.dataset_type, ingested.columns) == ("prompt", ("answer", "big", "easy", "share", "why"))


def test_prompt_messages_need_no_other_column() -> None:
    ingested, train, _ = upload({"prompt": [SYSTEM, QUESTION]})
    assert (ingested.dataset_type, ingested.columns, train) == ("prompt", (), [{"prompt": [SYSTEM, QUESTION]}])


def test_column_order_does_not_matter() -> None:
    ingested, _, _ = upload({"prompt": "a", "x": 1, "y": 2}, {"y": 2, "x": 1, "prompt": "a"})
    assert ingested.duplicates_dropped == 1


@pytest.mark.parametrize(
    ("columns", "field", "reason"),
    [
        ({"complation": "So."}, "complation", "is close to 'completion'"),
        ({"Chosen": "So."}, "Chosen", "is close to 'chosen'"),
        ({"labels": "So."}, "labels", "is close to 'label'"),
        ({"reject": "So."}, "reject", "is close to 'rejected'"),
        ({"the answer": "So."}, "'the answer'", "is not a valid column name"),
        ({"x" * 65: "So."}, "'" + "x" * 40 + "...'", "is not a valid column name"),
        ({"answer\n": "So."}, "'answer\\n'", "is not a valid column name"),
        ({"answer": None}, "answer", "is null"),
        ({"answer": ["So."]}, "answer", "is a list; a column beside a prompt is a string, a number, true or false"),
        ({"answer": "\0"}, "answer", "NUL"),
        ({"answer": 10**40}, "answer", "a number of 41 characters"),
        ({f"c{n}": 1 for n in range(MAX_COLUMNS + 1)}, "", "has 33 columns beside the prompt; at most 32"),
        ({"prompt": 4}, "prompt", "is a number"),
        ({"prompt": [QUESTION, CHOSEN_ANSWER]}, "prompt[1].role", "must be from 'user'"),
    ],
)
def test_unreadable_grader_column_is_rejected(columns: dict[str, object], field: str, reason: str) -> None:
    error = get_row_error({"prompt": "Why?"} | columns)
    assert error.field == field
    assert reason in error.reason


def test_number_beyond_float_range_is_rejected() -> None:
    error = get_bytes_error(b'{"prompt": "a", "n": 1e999}')
    assert (error.field, error.reason) == ("n", "is 1e999, which is too large for a number; write it as a string")


def test_label_column_is_allowed_with_prompt() -> None:
    assert upload({"prompt": "Good or bad?", "label": "good"})[0].dataset_type == "prompt"


@pytest.mark.parametrize(
    "other", [{"prompt": "b"}, {"prompt": "b", "answer": "4"}, {"prompt": "b", "answer": 4, "more": 1}, {"prompt": [QUESTION], "answer": 4}]
)
def test_prompt_rows_must_share_columns_and_types(other: object) -> None:
    error = get_row_error({"prompt": "a", "answer": 4}, other)
    assert error.line == 2
    assert "line 1 is prompt with strings and answer (a number)" in error.reason


@pytest.mark.parametrize(
    "make",
    [
        lambda prompt, n: {"prompt": prompt, "chosen": f"good {n}", "rejected": "bad"},
        lambda prompt, n: {"prompt": prompt, "completion": f"{n}", "label": bool(n % 2)},
        lambda prompt, n: {"prompt": prompt, "answer": n},
    ],
    ids=["preference", "unpaired", "prompt"],
)
def test_rows_with_same_prompt_stay_in_one_split(make: Any) -> None:
    _, train, held_out = upload(*(make(prompt, n) for n in range(4) for prompt in "abcdefgh"), eval_fraction=0.3)
    assert len(held_out) == 8  # two prompts of four rows; nine or ten would split the rows of one prompt
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}


# --- images ----------------------------------------------------------------------------------------------------------


def make_image_bytes(
    file_format: str = "PNG", size: tuple[int, int] = (8, 6), mode: str = "RGB", color: str = "red", **options: Any
) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, color).convert(mode).save(out, file_format, **options)
    return out.getvalue()


def make_data_uri(content: bytes | None = None, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(make_image_bytes() if content is None else content).decode()}"


def make_image_part(content: bytes | None = None, media_type: str = "image/png") -> dict[str, object]:
    return {"type": "image", "image": make_data_uri(content, media_type)}


def make_vision_row(*parts: object) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}, CHOSEN_ANSWER]}


TEXT = {"type": "text", "text": "What is this?"}


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
    first, other_image, same_image = read_rows(
        io.BytesIO(
            to_jsonl(
                [
                    make_vision_row(red, TEXT),
                    make_vision_row(blue, TEXT),
                    {"messages": [make_vision_row(red, TEXT)["messages"][0], REJECTED_ANSWER]},
                ]
            )
        ),
        RowLimits(),
    )
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
    limits = RowLimits(max_row_bytes=400, max_image_row_bytes=len(to_jsonl([row])) - 1)
    assert len(to_jsonl([row])) > 2 * limits.max_row_bytes
    assert len(read_bytes(to_jsonl([row]) + to_jsonl([row])[:-1] + b"\r\n", limits)) == 2
    error = get_row_error(row, limits=RowLimits(max_row_bytes=400, max_image_row_bytes=len(to_jsonl([row])) - 2))
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
    error = get_row_error(row, limits=RowLimits(max_row_bytes=400))
    assert "longer than 400 bytes" in error.reason


class EndlessImage(io.RawIOBase):
    """A stream with one endless line, in an endless image."""

    read_bytes = 0

    def readline(self, size: int | None = -1, /) -> bytes:
        assert size is not None
        assert size >= 0, "the whole line was requested"
        start = b"" if self.read_bytes else b'{"image": "data:'
        self.read_bytes += size
        return start + b"x" * (size - len(start))


def test_endless_image_is_rejected_at_limit() -> None:
    stream = EndlessImage()
    with pytest.raises(InvalidRow, match="longer than 5,000 bytes with its images"):
        next(read_rows(stream, RowLimits(max_row_bytes=1000, max_image_row_bytes=5000)))  # type: ignore[arg-type]  # it has the one method that read_rows calls
    assert stream.read_bytes < 5100


# --- the record and its preview --------------------------------------------------------------------------------------


def test_dataset_counts_images_and_preview_shows_only_size(tmp_path: Path) -> None:
    datasets = make_datasets(tmp_path)
    content = make_image_bytes(size=(700, 700), file_format="WEBP", lossless=True)
    rows = [make_vision_row(TEXT, make_image_part(content, "image/webp")), {"messages": [QUESTION, CHOSEN_ANSWER]}]
    dataset = datasets.ingest(Upload(io.BytesIO(to_jsonl(rows)), "images", None, 0.0), "local")
    assert (dataset.images, dataset.columns) == (1, ())
    preview_part = {"type": "image", "image": f"data:image/webp;base64,… ({len(content)} bytes)"}
    assert datasets.preview(dataset) == {"train": [make_vision_row(TEXT, preview_part), rows[1]]}


def test_prompt_dataset_records_columns(tmp_path: Path) -> None:
    datasets = make_datasets(tmp_path)
    row = {"prompt": "2 + 2 =", "level": 1, "answer": 10**39}
    dataset = datasets.ingest(Upload(io.BytesIO(to_jsonl([row])), "prompts", None, 0.0), "local")
    assert (dataset.dataset_type, dataset.columns, dataset.images) == ("prompt", ("answer", "level"), 0)
    assert datasets.preview(dataset) == {"train": [row]}


def make_datasets(folder: Path) -> Datasets:
    return Datasets(
        store=MemoryJobStore(),
        objects=LocalStore((folder / "objects").as_uri()),
        limits=RowLimits(),
        clock=lambda: START,
        random_suffix=lambda: "1",
        scratch=folder / "scratch",
        max_incoming_bytes=1 << 20,
    )


# --- what holds for every upload -------------------------------------------------------------------------------------

WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20).filter(
    lambda text: text.strip()
)
NUMBERS = st.integers(-(10**38), 10**39) | st.floats(allow_nan=False, allow_infinity=False)
NAMES = st.from_regex(r"[xyz_][A-Za-z0-9_]{0,3}", fullmatch=True)  # not similar to a column of another format
IMAGE_PARTS = st.builds(
    lambda file_format, size, color: make_image_part(make_image_bytes(file_format, size, color=color), f"image/{file_format.lower()}"),
    st.sampled_from(["PNG", "JPEG", "WEBP"]),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.sampled_from(["red", "green", "blue"]),
)


@st.composite
def prompts(draw: st.DrawFn) -> list[dict[str, str]]:
    turns = draw(st.lists(st.tuples(WORDS, WORDS), max_size=2))
    messages = [(role, text) for pair in turns for role, text in zip(("user", "assistant"), pair, strict=True)]
    return [{"role": role, "content": text} for role, text in [*messages, ("user", draw(WORDS))]]


def make_answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


PAIRS = st.lists(WORDS, min_size=2, max_size=2, unique=True)
PREFERENCES = st.one_of(
    st.lists(st.builds(lambda p, pair: {"prompt": p, "chosen": pair[0], "rejected": pair[1]}, WORDS, PAIRS), min_size=1, max_size=4),
    st.lists(
        st.builds(lambda p, pair: {"prompt": p, "chosen": make_answer(pair[0]), "rejected": make_answer(pair[1])}, prompts(), PAIRS),
        min_size=1,
        max_size=4,
    ),
)
UNPAIRED = st.lists(st.tuples(prompts(), WORDS), min_size=2, max_size=5).map(
    lambda rows: [{"prompt": p, "completion": make_answer(c), "label": n % 2 == 0} for n, (p, c) in enumerate(rows)]
)


@st.composite
def graded_rows(draw: st.DrawFn) -> list[dict[str, Any]]:
    kinds = draw(st.dictionaries(NAMES, st.sampled_from([WORDS, NUMBERS, st.booleans()]), max_size=3))
    row: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries({"prompt": WORDS, **kinds})
    return draw(st.lists(row, min_size=1, max_size=4))


@st.composite
def vision_rows(draw: st.DrawFn) -> dict[str, object]:
    parts = draw(st.lists(IMAGE_PARTS | WORDS.map(lambda text: {"type": "text", "text": text}), max_size=3))
    return make_vision_row(draw(IMAGE_PARTS), *parts)


VALID_ROWS = st.one_of(PREFERENCES, UNPAIRED, graded_rows(), st.lists(vision_rows(), min_size=1, max_size=3))


@QUICK_SETTINGS
@given(VALID_ROWS, st.booleans())
def test_valid_rows_are_accepted_unchanged(rows: list[object], escaped: bool) -> None:
    content = b"".join(json.dumps(row, ensure_ascii=escaped).encode() + b"\n" for row in rows)
    assert [json.loads(line) for line in read_bytes(content)] == rows


@QUICK_SETTINGS
@given(VALID_ROWS)
def test_storing_is_idempotent(rows: list[object]) -> None:
    once = read_bytes(to_jsonl(rows))
    assert read_bytes(b"\n".join(once)) == once


@QUICK_SETTINGS
@given(prompts(), PAIRS)
def test_implicit_prompt_equals_explicit_prompt(prompt: list[dict[str, str]], pair: list[str]) -> None:
    chosen, rejected = (make_answer(text) for text in pair)
    explicit = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    assert store_rows({"chosen": prompt + chosen, "rejected": prompt + rejected}) == [explicit]


COLUMNS = ["prompt", "completion", "chosen", "rejected", "label", "messages", "role", "content", "type", "image", "image_url", "url", "x"]
EDGE_CASE_STRINGS = st.sampled_from(
    ["user", "assistant", "image", "image_url", "text", "data:image/png;base64,", make_data_uri(), make_data_uri()[:-9], "\ud800", "\0"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | EDGE_CASE_STRINGS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(COLUMNS), inner, max_size=4)
        | st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": inner})
        | st.fixed_dictionaries({"type": st.sampled_from(["image", "image_url", "input_image"]), "image_url": inner})
        | st.fixed_dictionaries({"prompt": inner, "chosen": inner, "rejected": inner})
        | st.fixed_dictionaries({"prompt": inner, "completion": inner, "label": inner})
    ),
    max_leaves=10,
)


@settings(QUICK_SETTINGS, max_examples=200)
@given(st.lists(JSON, max_size=3), st.integers(0, 300), st.binary(max_size=2))
def test_any_upload_is_accepted_or_rejected_cleanly(rows: list[object], position: int, noise: bytes) -> None:
    content = to_jsonl(rows)
    try:
        read_bytes(content[:position] + noise + content[position:], RowLimits(max_row_bytes=300, max_image_row_bytes=600))
    except InvalidRow as error:
        assert error.line >= 1
        assert str(error).isprintable()
        str(error).encode()


@QUICK_SETTINGS
@given(st.sampled_from(["PNG", "JPEG", "WEBP"]), st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), min_size=1, max_size=6))
def test_corrupt_image_is_accepted_or_rejected_cleanly(file_format: str, damage: list[tuple[int, int]]) -> None:
    content = bytearray(make_image_bytes(file_format))
    for position, byte in damage:
        content[position % len(content)] = byte
    try:
        read_bytes(to_jsonl([make_vision_row(make_image_part(bytes(content), f"image/{file_format.lower()}"))]))
    except InvalidRow as error:
        assert error.field.startswith("messages[0].content[0]")
        assert str(error).isprintable()

"""Preferences, prompts for graders, and images: what is taken, how it is stored, what is refused and how."""

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
from service.core.dataset_rows import BadRow, Ingested, RowLimits, ingest, read_rows
from service.core.datasets import Datasets, Upload
from service.core.row_forms import MAX_COLUMNS, MAX_IMAGES
from storage.local import LocalStore
from tests.factories import START

QUICK = settings(max_examples=60, deadline=None, database=None)
SYSTEM = {"role": "system", "content": "Be brief."}
QUESTION = {"role": "user", "content": "Why?"}
GOOD = {"role": "assistant", "content": "So."}
BAD = {"role": "assistant", "content": "Dunno."}
PREFERENCE = {"prompt": "Why?", "chosen": "So.", "rejected": "Dunno."}
LABELLED = [{"prompt": "Why?", "completion": "So.", "label": True}, {"prompt": "Why?", "completion": "Dunno.", "label": False}]


def jsonl(rows: Iterable[object]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def read_bytes(content: bytes, limits: RowLimits | None = None) -> list[bytes]:
    return [row.canonical for row in read_rows(io.BytesIO(content), limits or RowLimits())]


def stored(*rows: object) -> list[Any]:
    return [json.loads(line) for line in read_bytes(jsonl(rows))]


def refusal(*rows: object, limits: RowLimits | None = None) -> BadRow:
    return refusal_of_bytes(jsonl(rows), limits)


def refusal_of_bytes(content: bytes, limits: RowLimits | None = None) -> BadRow:
    with pytest.raises(BadRow) as caught:
        read_bytes(content, limits)
    return caught.value


def upload(*rows: object, eval_fraction: float = 0.0) -> tuple[Ingested, list[Any], list[Any]]:
    train, held_out = io.BytesIO(), io.BytesIO()
    ingested = ingest(io.BytesIO(jsonl(rows)), RowLimits(), eval_fraction, 0, train, held_out, io.BytesIO())
    kept, kept_apart = ([json.loads(line) for line in out.getvalue().splitlines()] for out in (train, held_out))
    return ingested, kept, kept_apart


# --- preferences


@pytest.mark.parametrize(
    "row",
    [
        PREFERENCE,
        {"prompt": [QUESTION], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [SYSTEM, QUESTION, BAD, QUESTION], "chosen": [GOOD], "rejected": [BAD]},
    ],
)
def test_a_preference_is_stored_as_it_came(row: object) -> None:
    ingested, train, _ = upload(row)
    assert (ingested.dataset_type, train) == ("preference", [row])


def test_whole_conversations_are_stored_as_the_prompt_they_share_and_their_answers() -> None:
    before = [SYSTEM, QUESTION, BAD, QUESTION]
    explicit = {"prompt": before, "chosen": [GOOD], "rejected": [BAD]}
    implicit = {"chosen": [*before, GOOD], "rejected": [*before, BAD]}
    assert stored(implicit, {"prompt": before, **implicit}, explicit) == [explicit] * 3


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
            {**PREFERENCE, "chosen": [GOOD], "rejected": [BAD]},
            "chosen",
            "prompt is a string; prompt, chosen and rejected must all be strings",
        ),
        ({"prompt": [QUESTION], "chosen": [GOOD], "rejected": [GOOD]}, "rejected", "the same as chosen"),
        ({"prompt": [QUESTION, BAD], "chosen": [GOOD], "rejected": [BAD]}, "prompt[1].role", "must be from 'user'"),
        ({"prompt": [QUESTION], "chosen": [QUESTION], "rejected": [BAD]}, "chosen[0].role", "it must be 'assistant'"),
        (
            {"prompt": [QUESTION], "chosen": [GOOD], "rejected": [SYSTEM, QUESTION, BAD]},
            "rejected",
            "what comes before it is not the prompt",
        ),
        ({"chosen": [QUESTION, GOOD], "rejected": [QUESTION, GOOD]}, "rejected", "the same as chosen"),
        ({"chosen": [QUESTION, GOOD], "rejected": [QUESTION, GOOD, QUESTION, BAD]}, "rejected", "differs from chosen before its last"),
        ({"chosen": [QUESTION, GOOD], "rejected": [SYSTEM, QUESTION, BAD]}, "rejected", "only the last answers may differ"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "chosen[0].role", "it must be 'user'"),
        ({"chosen": [QUESTION, GOOD], "rejected": [QUESTION]}, "rejected[0].role", "must be from 'assistant'"),
    ],
)
def test_a_preference_that_teaches_nothing_or_too_much_is_refused(row: object, field: str, reason: str) -> None:
    refused = refusal(row)
    assert refused.field == field
    assert reason in refused.reason


# --- answers that are each good or bad


@pytest.mark.parametrize("rows", [LABELLED, [{"prompt": [QUESTION], "completion": [GOOD], "label": label} for label in (True, False)]])
def test_labelled_answers_are_stored_as_they_came(rows: list[object]) -> None:
    ingested, train, _ = upload(*rows)
    assert (ingested.dataset_type, train) == ("unpaired_preference", rows)


@pytest.mark.parametrize(("label", "found"), [(1, "a number"), (0, "a number"), ("true", "a string"), (None, "null")])
def test_a_label_is_true_or_false_and_nothing_like_it(label: object, found: str) -> None:
    refused = refusal({**LABELLED[0], "label": label})
    assert (refused.field, refused.reason) == ("label", f"is {found}; write true for a good completion, false for a bad one")


def test_labels_that_are_all_the_same_are_refused_with_their_numbers() -> None:
    refused = refusal(*[LABELLED[1]] * 3)
    assert (refused.line, refused.field) == (3, "label")
    assert "0 rows are true and 3 are false" in refused.reason


def test_a_label_needs_its_prompt() -> None:
    assert refusal({"completion": "So.", "label": True}).field == "prompt"


# --- prompts for graders


def test_a_prompt_keeps_its_columns_and_numbers_to_the_digit() -> None:
    row = '{"prompt":"2 + 2 =","answer":4,"big":1234567890123456789012345678901234567890,"easy":true,"share":0.10,"why":""}'
    assert read_bytes(row.encode()) == [row.encode()]
    ingested, _, _ = upload(json.loads(row))
    assert (ingested.dataset_type, ingested.columns) == ("prompt", ("answer", "big", "easy", "share", "why"))


def test_a_prompt_of_messages_needs_no_other_column() -> None:
    ingested, train, _ = upload({"prompt": [SYSTEM, QUESTION]})
    assert (ingested.dataset_type, ingested.columns, train) == ("prompt", (), [{"prompt": [SYSTEM, QUESTION]}])


def test_the_order_of_columns_makes_no_other_row() -> None:
    ingested, _, _ = upload({"prompt": "a", "x": 1, "y": 2}, {"y": 2, "x": 1, "prompt": "a"})
    assert ingested.duplicates_dropped == 1


@pytest.mark.parametrize(
    ("columns", "field", "reason"),
    [
        ({"complation": "So."}, "complation", "is nearly 'completion'"),
        ({"Chosen": "So."}, "Chosen", "is nearly 'chosen'"),
        ({"labels": "So."}, "labels", "is nearly 'label'"),
        ({"reject": "So."}, "reject", "is nearly 'rejected'"),
        ({"the answer": "So."}, "'the answer'", "cannot name a column"),
        ({"x" * 65: "So."}, "'" + "x" * 40 + "...'", "cannot name a column"),
        ({"answer\n": "So."}, "'answer\\n'", "cannot name a column"),
        ({"answer": None}, "answer", "is null"),
        ({"answer": ["So."]}, "answer", "is a list; a column beside a prompt is a string, a number, true or false"),
        ({"answer": "\0"}, "answer", "NUL"),
        ({"answer": 10**40}, "answer", "a number of 41 characters"),
        ({f"c{n}": 1 for n in range(MAX_COLUMNS + 1)}, "", "has 33 columns beside the prompt; at most 32"),
        ({"prompt": 4}, "prompt", "is a number"),
        ({"prompt": [QUESTION, GOOD]}, "prompt[1].role", "must be from 'user'"),
    ],
)
def test_a_column_that_no_grader_could_read_is_refused(columns: dict[str, object], field: str, reason: str) -> None:
    refused = refusal({"prompt": "Why?"} | columns)
    assert refused.field == field
    assert reason in refused.reason


def test_a_number_beyond_every_float_is_refused() -> None:
    refused = refusal_of_bytes(b'{"prompt": "a", "n": 1e999}')
    assert (refused.field, refused.reason) == ("n", "is 1e999, which is too large for a number; write it as a string")


def test_a_column_named_label_may_stand_beside_a_prompt() -> None:
    assert upload({"prompt": "Good or bad?", "label": "good"})[0].dataset_type == "prompt"


@pytest.mark.parametrize(
    "other", [{"prompt": "b"}, {"prompt": "b", "answer": "4"}, {"prompt": "b", "answer": 4, "more": 1}, {"prompt": [QUESTION], "answer": 4}]
)
def test_all_prompts_have_the_same_columns_of_the_same_kind(other: object) -> None:
    refused = refusal({"prompt": "a", "answer": 4}, other)
    assert refused.line == 2
    assert "line 1 is prompt with strings and answer (a number)" in refused.reason


@pytest.mark.parametrize(
    "make",
    [
        lambda prompt, n: {"prompt": prompt, "chosen": f"good {n}", "rejected": "bad"},
        lambda prompt, n: {"prompt": prompt, "completion": f"{n}", "label": bool(n % 2)},
        lambda prompt, n: {"prompt": prompt, "answer": n},
    ],
    ids=["preference", "unpaired", "prompt"],
)
def test_rows_of_one_prompt_stay_on_one_side(make: Any) -> None:
    _, train, held_out = upload(*(make(prompt, n) for n in range(4) for prompt in "abcdefgh"), eval_fraction=0.3)
    assert len(held_out) == 8  # two prompts of four rows; nine or ten would tear one apart
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}


# --- images


def picture(file_format: str = "PNG", size: tuple[int, int] = (8, 6), mode: str = "RGB", colour: str = "red", **options: Any) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, colour).convert(mode).save(out, file_format, **options)
    return out.getvalue()


def uri(content: bytes | None = None, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(picture() if content is None else content).decode()}"


def image(content: bytes | None = None, media_type: str = "image/png") -> dict[str, object]:
    return {"type": "image", "image": uri(content, media_type)}


def seen(*parts: object) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}, GOOD]}


TEXT = {"type": "text", "text": "What is this?"}


@pytest.mark.parametrize(
    "part",
    [
        image(),
        {"image": uri(), "type": "image"},
        {"type": "image_url", "image_url": {"url": uri()}},
        {"type": "image_url", "image_url": uri()},
        {"image_url": uri()},
        {"image_url": {"url": uri()}},
        {"type": "input_image", "image_url": uri()},
        {"type": "image", "image": uri().replace("data:image/png", "DATA:image/PNG")},
    ],
)
def test_an_image_is_stored_in_one_spelling_whatever_the_upload_uses(part: object) -> None:
    ingested, train, _ = upload(seen({"text": "What is this?", "type": "input_text"}, part, TEXT))
    assert train == [seen(TEXT, image(), TEXT)]
    assert ingested.images == 1


@pytest.mark.parametrize(
    ("file_format", "media_type"), [("PNG", "image/png"), ("JPEG", "image/jpeg"), ("JPEG", "image/jpg"), ("WEBP", "image/webp")]
)
def test_three_formats_are_taken(file_format: str, media_type: str) -> None:
    content = picture(file_format)
    assert stored(seen(image(content, media_type))) == [seen(image(content, f"image/{file_format.lower()}"))]


@pytest.mark.parametrize(
    "options", [{"mode": "L"}, {"mode": "P"}, {"mode": "RGBA"}, {"file_format": "JPEG", "mode": "CMYK"}, {"file_format": "MPO"}]
)
def test_the_pixels_may_be_of_any_kind(options: dict[str, Any]) -> None:
    media_type = "image/jpeg" if options.get("file_format") else "image/png"
    assert upload(seen(image(picture(**options), media_type)))[0].images == 1


def test_a_message_without_an_image_keeps_its_string_beside_one_that_has() -> None:
    later = [{"role": "user", "content": [TEXT]}, GOOD]
    (row,) = stored({"messages": [SYSTEM, *seen(image())["messages"], *later]})
    assert [type(message["content"]) for message in row["messages"]] == [str, list, str, str, str]


def test_the_images_of_all_kept_rows_are_counted() -> None:
    rows = [seen(image(), image(), TEXT), {"messages": [QUESTION, GOOD]}, seen(image(), TEXT), seen(image(), TEXT)]
    ingested, _, _ = upload(*rows)
    assert (ingested.images, ingested.duplicates_dropped) == (3, 1)


def test_a_prompt_of_messages_may_have_images() -> None:
    row = {"prompt": seen(image(), TEXT)["messages"][:1], "completion": [GOOD]}
    ingested, train, _ = upload(row)
    assert (ingested.images, train) == (1, [row])


def test_the_image_belongs_to_the_prompt() -> None:
    red, blue = (image(picture(colour=colour)) for colour in ("red", "blue"))
    one, other, again = read_rows(
        io.BytesIO(jsonl([seen(red, TEXT), seen(blue, TEXT), {"messages": [seen(red, TEXT)["messages"][0], BAD]}])), RowLimits()
    )
    assert one.prompt_digest == again.prompt_digest != other.prompt_digest


def with_chunk(name: bytes, data: bytes, png: bytes) -> bytes:
    """The PNG with another header."""
    chunk = struct.pack(">I", len(data)) + name + data
    return png[:8] + chunk + struct.pack(">I", zlib.crc32(name + data)) + png[33:]


HUGE = with_chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0), picture())
ANIMATED = {"save_all": True, "append_images": [Image.new("RGB", (8, 6), "blue")]}
SCAN = picture("JPEG", progressive=True)
SCANS = SCAN[:-2] + SCAN[SCAN.rindex(b"\xff\xda") : -2] * 200 + SCAN[-2:]


@pytest.mark.parametrize(
    ("part", "field", "reason"),
    [
        ({"type": "image"}, ".image", 'an image is {"type": "image", "image": "data:image/png;base64,..."}'),
        ({"type": "image", "image": 4}, ".image", "is a number"),
        ({"type": "image", "image": "cat.png"}, ".image", "is no data: URI"),
        ({"type": "image", "image": "gs://bucket/cat.png"}, ".image", "the service fetches nothing; put the image into the row"),
        (
            {"type": "image_url", "image_url": {"url": "https://example.org/c.png"}},
            ".image_url.url",
            "is the address 'https://example.org/c.png'",
        ),
        ({"type": "image_url", "image_url": {"url": uri(), "detail": "low"}}, ".image_url.'detail'", "would not be used: only url is"),
        ({"type": "image_url", "image_url": {}}, ".image_url.url", "is missing"),
        ({"type": "image", "image": {"url": uri()}}, ".image", "is an object"),
        ({**image(), "alt": "red"}, ".'alt'", "would not be used: only type and image are"),
        (
            {"type": "image", "image": "data:image/gif;base64,R0lG"},
            ".image",
            "it must be data:image/png, data:image/jpeg or data:image/webp",
        ),
        ({"type": "image", "image": "data:image/png,abc"}, ".image", "with ;base64"),
        ({"type": "image", "image": "data:image/png;base64,iVBO\nRw0K"}, "", "is not base64"),
        ({"type": "image", "image": "data:image/png;base64,iVBOé"}, "", "is not base64"),
        ({"type": "image", "image": "data:image/png;base64,iVBORw0"}, "", "is not base64 (incorrect padding)"),
        ({"type": "image", "image": "data:image/png;base64,"}, "", "no PNG, JPEG or WebP image"),
        (image(b"GIF89a" + bytes(20)), "", "no PNG, JPEG or WebP image"),
        (image(picture("JPEG")), "", "says image/png, but its bytes are a JPEG image; write data:image/jpeg"),
        (image(picture(size=(64, 64))[:-40]), "", "is a broken PNG image"),
        (image(picture("WEBP")[:-20], "image/webp"), "", "is a broken WebP image"),
        (image(picture(size=(4097, 1))), "", "is 4,097 x 1 pixels; at most 4,096 x 4,096"),
        (image(HUGE), "", "is 60,000 x 60,000 pixels"),
        (image(picture(**ANIMATED)), "", "is animated"),
        (image(picture("WEBP", **ANIMATED), "image/webp"), "", "is animated"),
        (image(SCANS, "image/jpeg"), "", "scans; at most 100"),
    ],
)
def test_an_image_that_is_not_what_it_should_be_is_refused(part: object, field: str, reason: str) -> None:
    refused = refusal(seen(TEXT, part))
    assert refused.field == f"messages[0].content[1]{field}"
    assert reason in refused.reason
    assert str(refused).isprintable()


def test_an_image_of_the_largest_size_is_taken() -> None:
    assert upload(seen(image(picture(size=(4096, 4096)))))[0].images == 1


def test_a_row_has_so_many_images_and_no_more() -> None:
    assert upload(seen(*[image()] * MAX_IMAGES))[0].images == MAX_IMAGES
    refused = refusal({"messages": [*seen(*[image()] * MAX_IMAGES)["messages"], *seen(image())["messages"]]})
    assert (refused.field, refused.reason) == ("messages", "has 17 images; at most 16 a row")


@pytest.mark.parametrize("role", ["system", "assistant"])
def test_only_the_user_shows_images(role: str) -> None:
    messages = {
        "system": [{"role": role, "content": [image()]}, QUESTION, GOOD],
        "assistant": [QUESTION, {"role": role, "content": [image()]}],
    }
    refused = refusal({"messages": messages[role]})
    assert refused.reason == f"is an image in a message of role '{role}'; images are for 'user'"


@pytest.mark.parametrize("columns", [{"chosen": [GOOD], "rejected": [BAD]}, {"completion": [GOOD], "label": True}, {"answer": "red"}])
def test_preferences_and_prompts_have_no_images(columns: dict[str, object]) -> None:
    refused = refusal({"prompt": [{"role": "user", "content": [image()]}]} | columns)
    assert refused.field == "prompt[0].content[0]"
    assert "images are for rows of messages, and of prompt and completion" in refused.reason


def test_a_column_of_images_is_told_where_they_belong() -> None:
    assert "put each image into its message" in refusal({"messages": [QUESTION, GOOD], "images": []}).reason


# --- how long a row may be


def test_a_row_with_images_may_be_longer_than_its_text() -> None:
    row = seen(TEXT, *[image(picture(size=(200, 200)))] * 4)
    limits = RowLimits(max_row_bytes=400, max_image_row_bytes=len(jsonl([row])) - 1)
    assert len(jsonl([row])) > 2 * limits.max_row_bytes
    assert len(read_bytes(jsonl([row]) + jsonl([row])[:-1] + b"\r\n", limits)) == 2
    refused = refusal(row, limits=RowLimits(max_row_bytes=400, max_image_row_bytes=len(jsonl([row])) - 2))
    assert "bytes with its images; use fewer or smaller ones" in refused.reason


@pytest.mark.parametrize(
    "row",
    [
        seen({"type": "text", "text": "x" * 500}, image()),
        seen({"type": "text", "text": "data:" + "x" * 500}, image()),
        {"text": "data:" + "x" * 500},
        {"text": "x" * 500},
        {"messages": [["data:"]] * 100},
    ],
)
def test_the_text_of_a_row_is_as_short_with_images_as_without(row: object) -> None:
    refused = refusal(row, limits=RowLimits(max_row_bytes=400))
    assert "longer than 400 bytes" in refused.reason


class EndlessImage(io.RawIOBase):
    """A line that never ends, whose image never ends either."""

    read_bytes = 0

    def readline(self, size: int | None = -1, /) -> bytes:
        assert size is not None
        assert size >= 0, "the whole line was asked for"
        start = b"" if self.read_bytes else b'{"image": "data:'
        self.read_bytes += size
        return start + b"x" * (size - len(start))


def test_an_endless_image_is_refused_at_the_limit() -> None:
    stream = EndlessImage()
    with pytest.raises(BadRow, match="longer than 5,000 bytes with its images"):
        next(read_rows(stream, RowLimits(max_row_bytes=1000, max_image_row_bytes=5000)))  # type: ignore[arg-type]  # it has the one method that is used
    assert stream.read_bytes < 5100


# --- the record and its preview


def test_a_dataset_knows_its_images_and_shows_their_size_alone(tmp_path: Path) -> None:
    datasets = datasets_in(tmp_path)
    content = picture(size=(700, 700), file_format="WEBP", lossless=True)
    rows = [seen(TEXT, image(content, "image/webp")), {"messages": [QUESTION, GOOD]}]
    dataset = datasets.ingest(Upload(io.BytesIO(jsonl(rows)), "seen", None, 0.0), "local")
    assert (dataset.images, dataset.columns) == (1, ())
    shown = {"type": "image", "image": f"data:image/webp;base64,… ({len(content)} bytes)"}
    assert datasets.preview(dataset) == {"train": [seen(TEXT, shown), rows[1]]}


def test_a_dataset_of_prompts_knows_its_columns(tmp_path: Path) -> None:
    datasets = datasets_in(tmp_path)
    row = {"prompt": "2 + 2 =", "level": 1, "answer": 10**39}
    dataset = datasets.ingest(Upload(io.BytesIO(jsonl([row])), "prompts", None, 0.0), "local")
    assert (dataset.dataset_type, dataset.columns, dataset.images) == ("prompt", ("answer", "level"), 0)
    assert datasets.preview(dataset) == {"train": [row]}


def datasets_in(folder: Path) -> Datasets:
    return Datasets(
        store=MemoryJobStore(),
        objects=LocalStore((folder / "objects").as_uri()),
        limits=RowLimits(),
        clock=lambda: START,
        random_tail=lambda: "1",
        scratch=folder / "scratch",
        max_incoming_bytes=1 << 20,
    )


# --- what holds for every upload

WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20).filter(
    lambda text: text.strip()
)
NUMBERS = st.integers(-(10**38), 10**39) | st.floats(allow_nan=False, allow_infinity=False)
NAMES = st.from_regex(r"[xyz_][A-Za-z0-9_]{0,3}", fullmatch=True)  # nothing like the column of another form
PICTURES = st.builds(
    lambda file_format, size, colour: image(picture(file_format, size, colour=colour), f"image/{file_format.lower()}"),
    st.sampled_from(["PNG", "JPEG", "WEBP"]),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.sampled_from(["red", "green", "blue"]),
)


@st.composite
def prompts(draw: st.DrawFn) -> list[dict[str, str]]:
    turns = draw(st.lists(st.tuples(WORDS, WORDS), max_size=2))
    said = [(role, text) for pair in turns for role, text in zip(("user", "assistant"), pair, strict=True)]
    return [{"role": role, "content": text} for role, text in [*said, ("user", draw(WORDS))]]


def answers(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


PAIRS = st.lists(WORDS, min_size=2, max_size=2, unique=True)
PREFERENCES = st.one_of(
    st.lists(st.builds(lambda p, pair: {"prompt": p, "chosen": pair[0], "rejected": pair[1]}, WORDS, PAIRS), min_size=1, max_size=4),
    st.lists(
        st.builds(lambda p, pair: {"prompt": p, "chosen": answers(pair[0]), "rejected": answers(pair[1])}, prompts(), PAIRS),
        min_size=1,
        max_size=4,
    ),
)
UNPAIRED = st.lists(st.tuples(prompts(), WORDS), min_size=2, max_size=5).map(
    lambda rows: [{"prompt": p, "completion": answers(c), "label": n % 2 == 0} for n, (p, c) in enumerate(rows)]
)


@st.composite
def graded(draw: st.DrawFn) -> list[dict[str, Any]]:
    kinds = draw(st.dictionaries(NAMES, st.sampled_from([WORDS, NUMBERS, st.booleans()]), max_size=3))
    row: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries({"prompt": WORDS, **kinds})
    return draw(st.lists(row, min_size=1, max_size=4))


@st.composite
def illustrated(draw: st.DrawFn) -> dict[str, object]:
    parts = draw(st.lists(PICTURES | WORDS.map(lambda text: {"type": "text", "text": text}), max_size=3))
    return seen(draw(PICTURES), *parts)


FORMS = st.one_of(PREFERENCES, UNPAIRED, graded(), st.lists(illustrated(), min_size=1, max_size=3))


@QUICK
@given(FORMS, st.booleans())
def test_what_is_valid_is_taken_and_never_changed(rows: list[object], escaped: bool) -> None:
    content = b"".join(json.dumps(row, ensure_ascii=escaped).encode() + b"\n" for row in rows)
    assert [json.loads(line) for line in read_bytes(content)] == rows


@QUICK
@given(FORMS)
def test_a_stored_row_is_stored_again_as_it_is(rows: list[object]) -> None:
    once = read_bytes(jsonl(rows))
    assert read_bytes(b"\n".join(once)) == once


@QUICK
@given(prompts(), PAIRS)
def test_a_conversation_written_twice_is_its_explicit_form(prompt: list[dict[str, str]], pair: list[str]) -> None:
    chosen, rejected = (answers(text) for text in pair)
    explicit = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    assert stored({"chosen": prompt + chosen, "rejected": prompt + rejected}) == [explicit]


COLUMNS = ["prompt", "completion", "chosen", "rejected", "label", "messages", "role", "content", "type", "image", "image_url", "url", "x"]
STRINGS = st.sampled_from(["user", "assistant", "image", "image_url", "text", "data:image/png;base64,", uri(), uri()[:-9], "\ud800", "\0"])
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | STRINGS,
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


@settings(QUICK, max_examples=200)
@given(st.lists(JSON, max_size=3), st.integers(0, 300), st.binary(max_size=2))
def test_whatever_is_uploaded_is_either_taken_or_refused_politely(rows: list[object], place: int, noise: bytes) -> None:
    content = jsonl(rows)
    try:
        read_bytes(content[:place] + noise + content[place:], RowLimits(max_row_bytes=300, max_image_row_bytes=600))
    except BadRow as refused:
        assert refused.line >= 1
        assert str(refused).isprintable()
        str(refused).encode()


@QUICK
@given(st.sampled_from(["PNG", "JPEG", "WEBP"]), st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), min_size=1, max_size=6))
def test_a_damaged_image_is_taken_or_refused_and_nothing_else(file_format: str, damage: list[tuple[int, int]]) -> None:
    content = bytearray(picture(file_format))
    for place, byte in damage:
        content[place % len(content)] = byte
    try:
        read_bytes(jsonl([seen(image(bytes(content), f"image/{file_format.lower()}"))]))
    except BadRow as refused:
        assert refused.field.startswith("messages[0].content[0]")
        assert str(refused).isprintable()

"""The rows of an upload: read, checked and split as they stream by.

A file of gigabytes is fine: one row is held at a time, plus about 150 bytes for each row already seen. The first row that
cannot be used ends the reading with a BadRow, which names the line, the field and what would work. Nothing is dropped in
silence: a column that no trainer would use is refused, and exact duplicates are counted.

The three forms of a row are in `schema/dataset.py`. An upload may also write the content of a message as typed text parts,
`[{"type": "text", "text": "..."}]`; they are joined. A stored row is one line of JSON that ends in a line feed and holds no
other; U+2028 and its like may stand in it as they are, so readers split at line feeds only.

Held-out rows are chosen by the hash of their prompt (everything before the last answer; a whole `text`), so that a row never
lies on both sides, nor two answers to one prompt, and so that the choice does not depend on the order of the rows.
"""

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, groupby
from typing import BinaryIO, Literal, NamedTuple, NoReturn, cast

import orjson

from schema.dataset import EVAL_SPLIT, TRAIN_SPLIT
from schema.training import DatasetType

MAX_MESSAGES = 1000
MAX_EVAL_FRACTION = 0.5
FORMS = '{"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": "..."}'
COLUMNS: dict[DatasetType, tuple[str, ...]] = {"messages": ("messages",), "prompt_completion": ("prompt", "completion"), "text": ("text",)}
FORM_OF_COLUMN: dict[str, DatasetType] = {
    "messages": "messages",
    "prompt": "prompt_completion",
    "completion": "prompt_completion",
    "text": "text",
}
ROLES = ("system", "user", "assistant")
TURNS = "after one optional system message, user and assistant take turns, and user begins"
IMAGE_PARTS = ("image", "image_url", "input_image")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
JSON_WHITESPACE = b" \t\r\n"
SHOWN_CHARS = 40  # of a caller's own word in an error


class BadRow(ValueError):
    """A row that cannot be used. `line` counts from 1, blank lines too; `field` is a path such as messages[2].content, or empty."""

    def __init__(self, line: int, field: str, reason: str) -> None:
        self.line = line
        self.field = field
        self.reason = reason
        super().__init__(f"line {line}: {field}: {reason}" if field else f"line {line}: {reason}")


@dataclass(frozen=True)
class RowLimits:
    """How much one upload may hold."""

    max_row_bytes: int = 1 << 20
    max_rows: int = 1_000_000


class Row(NamedTuple):
    """One usable row."""

    line: int
    dataset_type: DatasetType
    canonical: bytes  # one line of JSON without its line feed: fixed order of keys, no space between tokens, content untouched
    digest: bytes  # equal for equal rows
    prompt_digest: bytes  # equal for rows that must stay on the same side of the split


@dataclass(frozen=True)
class SplitFacts:
    """What was written for one split."""

    rows: int
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Ingested:
    """What an upload came to."""

    dataset_type: DatasetType
    rows_read: int
    duplicates_dropped: int
    train: SplitFacts
    eval: SplitFacts | None  # None: nothing was to be held out, or all rows have the same prompt


def ingest(
    stream: BinaryIO,
    limits: RowLimits,
    eval_fraction: float,
    seed: int,
    train_out: BinaryIO,
    eval_out: BinaryIO,
    scratch: BinaryIO,
) -> Ingested:
    """Read an upload, drop exact duplicates, and write both splits, each in the order of the upload.

    `scratch` is an empty file open for writing and reading; it grows to the size of the rows. The outputs are only written
    once every row was found usable. Raises BadRow.
    """
    splitter = Splitter(eval_fraction, seed)
    dataset_type: DatasetType = "text"
    rows_read = 0
    for row in read_rows(stream, limits):
        dataset_type = row.dataset_type
        rows_read += 1
        if splitter.add(row):
            scratch.write(row.canonical + b"\n")
    scratch.seek(0)
    train, held_out = _SplitWriter(train_out), _SplitWriter(eval_out)
    for side, line in zip(splitter.sides(), scratch, strict=True):
        (train if side == TRAIN_SPLIT else held_out).write(line)
    return Ingested(dataset_type, rows_read, splitter.duplicates_dropped, train.facts(), held_out.facts() if held_out.rows else None)


def read_rows(stream: BinaryIO, limits: RowLimits) -> Iterator[Row]:
    """The rows of a JSONL upload, one by one; blank lines are skipped. Raises BadRow, also when there are no rows or too many."""
    rows = 0
    first_line, first_shape = 0, ""
    for number, line in _lines(stream, limits.max_row_bytes):
        if rows == limits.max_rows:
            raise BadRow(number, "", f"more than {limits.max_rows:,} rows; split the file into several datasets")
        try:
            content = _content(_parse(line))
        except _Refused as refused:
            raise BadRow(number, refused.field, refused.reason) from refused
        if not rows:
            first_line, first_shape = number, content.shape
        elif content.shape != first_shape:
            raise BadRow(number, "", f"this row is {content.shape}, but line {first_line} is {first_shape}; a dataset has rows of one form")
        rows += 1
        yield _row(number, content)
    if not rows:
        raise BadRow(1, "", f"no rows; a row is one line such as {FORMS}")


class Splitter:
    """Decides which rows are held out, once it has seen them all.

    Exactly the nearest whole number to `eval_fraction` of the distinct rows is held out when no two rows share a prompt.
    Prompts are never torn apart, so where they are shared it may be fewer; it is more only when even the rarest prompt
    has more rows than asked for. Without two different prompts nothing can be held out.
    """

    def __init__(self, eval_fraction: float, seed: int) -> None:
        if not 0 <= eval_fraction <= MAX_EVAL_FRACTION:
            raise ValueError(f"eval_fraction is {eval_fraction}; it lies between 0 and {MAX_EVAL_FRACTION}")
        self.duplicates_dropped = 0
        self._eval_fraction = eval_fraction
        self._seed = f"{seed}:".encode()
        self._seen: set[int] = set()  # 128 bits each; as int they take less memory than as bytes
        self._keys = array("Q")  # where each kept row's prompt stands in the seed's order

    def add(self, row: Row) -> bool:
        """Take note of a row; False for a duplicate, which is to be dropped."""
        digest = int.from_bytes(row.digest)
        if digest in self._seen:
            self.duplicates_dropped += 1
            return False
        self._seen.add(digest)
        self._keys.append(int.from_bytes(hashlib.blake2b(self._seed + row.prompt_digest, digest_size=8).digest()))
        return True

    def sides(self) -> Iterator[Literal["train", "eval"]]:
        """The side of each row that was kept, in the order they were added."""
        held_out = _held_out(self._keys, self._eval_fraction)
        return (EVAL_SPLIT if key in held_out else TRAIN_SPLIT for key in self._keys)


def _held_out(keys: "array[int]", eval_fraction: float) -> set[int]:
    """The prompts to hold out: in the seed's order, every one whose rows still fit into the number asked for."""
    if eval_fraction == 0 or not keys or min(keys) == max(keys):
        return set()
    ordered = sorted(keys)
    room = max(1, round(eval_fraction * len(ordered)))
    held_out: set[int] = set()
    for key, rows in _prompts(ordered):
        if rows <= room:
            held_out.add(key)
            room -= rows
        if not room:
            break
    return held_out or {min(_prompts(ordered), key=lambda prompt: prompt[1])[0]}


def _prompts(ordered: list[int]) -> Iterator[tuple[int, int]]:
    """Each prompt's key, with its number of rows."""
    return ((key, sum(1 for _ in rows)) for key, rows in groupby(ordered))


class _SplitWriter:
    """Writes the lines of one split, and keeps count."""

    def __init__(self, out: BinaryIO) -> None:
        self.rows = 0
        self._out = out
        self._size_bytes = 0
        self._sha256 = hashlib.sha256()

    def write(self, line: bytes) -> None:
        self._out.write(line)
        self._sha256.update(line)
        self._size_bytes += len(line)
        self.rows += 1

    def facts(self) -> SplitFacts:
        return SplitFacts(self.rows, self._size_bytes, self._sha256.hexdigest())


def _lines(stream: BinaryIO, max_row_bytes: int) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers. Never holds more of a line than is allowed."""
    number = 0
    while raw := stream.readline(max_row_bytes + len(b"\r\n") + (0 if number else len(BYTE_ORDER_MARK))):
        number += 1
        line = raw.removesuffix(b"\n").removesuffix(b"\r")
        if number == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)
        if len(line) > max_row_bytes:
            raise BadRow(number, "", f"longer than {max_row_bytes:,} bytes; shorten the row, or cut it into several")
        if line.strip(JSON_WHITESPACE):
            yield number, line


class _Refused(ValueError):
    """A BadRow before its line is known."""

    def __init__(self, field: str, reason: str) -> None:
        self.field = field
        self.reason = reason
        super().__init__(reason)


def _parse(line: bytes) -> dict[str, object]:
    try:
        value: object = DECODER.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _Refused("", f"not UTF-8 at byte {error.start + 1}; save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise _Refused("", f"not JSON at column {error.colno}: {error.msg}; each line is one JSON object") from error
    except RecursionError as error:
        raise _Refused("", f"nested too deeply; a row is {FORMS}") from error
    return _object(value, "", f"a row is {FORMS}")


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    columns = dict(pairs)
    if len(columns) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise _Refused(_shown(counts.most_common(1)[0][0]), "stands twice in the same object; keep one")
    return columns


def _refuse_constant(name: str) -> NoReturn:
    raise _Refused("", f"{name} is not JSON")


# No field of a row is a number, and unlike int, float reads one of any length in linear time; it is refused by its kind.
DECODER = json.JSONDecoder(object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant, parse_int=float)


class _Content(NamedTuple):
    """A checked row. A file has rows of one shape only, for a column that is now a string and now a list cannot be loaded."""

    dataset_type: DatasetType
    shape: str
    columns: dict[str, object]
    prompt: object  # None where the row has no answer apart


def _row(number: int, content: _Content) -> Row:
    canonical = orjson.dumps(content.columns)
    digest = _digest(canonical)
    prompt_digest = digest if content.prompt is None else _digest(orjson.dumps(content.prompt))
    return Row(number, content.dataset_type, canonical, digest, prompt_digest)


def _digest(canonical: bytes) -> bytes:
    return hashlib.blake2b(canonical, digest_size=16).digest()


def _content(columns: dict[str, object]) -> _Content:
    dataset_type = _form(columns)
    match dataset_type:
        case "messages":
            messages = _conversation(columns["messages"], "messages", last_role="assistant")
            return _Content(dataset_type, dataset_type, {"messages": messages}, messages[:-1])
        case "prompt_completion":
            return _prompt_completion(columns["prompt"], columns["completion"])
        case "text":
            return _Content(dataset_type, dataset_type, {"text": _text(columns["text"], "text")}, None)


def _form(columns: dict[str, object]) -> DatasetType:
    """Which form the row has: it has all the columns of that form, and no other."""
    form: DatasetType | None = next((FORM_OF_COLUMN[name] for name in columns if name in FORM_OF_COLUMN), None)
    if form is None:
        found = ", ".join(_shown(name) for name in list(columns)[:5])
        raise _Refused("", f"has {f'the columns {found}' if found else 'no columns'}; a row is {FORMS}")
    names = COLUMNS[form]
    for name in names:
        if name not in columns:
            raise _Refused(name, f"is missing; a {form} row has the columns {' and '.join(names)}")
    for name in columns:
        if name not in names:
            raise _Refused(_shown(name), f"would not be used: a {form} row has only {' and '.join(names)}; drop the column")
    return form


def _prompt_completion(prompt: object, completion: object) -> _Content:
    if isinstance(prompt, str) and isinstance(completion, str):
        columns: dict[str, object] = {"prompt": _text(prompt, "prompt"), "completion": _text(completion, "completion")}
        return _Content("prompt_completion", "prompt_completion with strings", columns, prompt)
    for name, value in (("prompt", prompt), ("completion", completion)):
        if not isinstance(value, list | str):
            raise _Refused(name, f"is {_kind(value)}; it must be a string or a list of messages")
    if isinstance(prompt, str) or isinstance(completion, str):
        raise _Refused(
            "completion", f"is {_kind(completion)} and prompt is {_kind(prompt)}; both must be strings, or both lists of messages"
        )
    turns = _conversation(prompt, "prompt", last_role="user")
    return _Content("prompt_completion", "prompt_completion with messages", {"prompt": turns, "completion": _answer(completion)}, turns)


def _answer(completion: object) -> list[dict[str, str]]:
    """The completion of a prompt of messages: one assistant message."""
    answer = _messages(completion, "completion")
    if len(answer) != 1:
        raise _Refused("completion", f"has {len(answer)} messages; it must have one, and what comes before it belongs to the prompt")
    if answer[0]["role"] != "assistant":
        raise _Refused("completion[0].role", f"is '{answer[0]['role']}'; it must be 'assistant'")
    return answer


def _conversation(value: object, field: str, *, last_role: Literal["user", "assistant"]) -> list[dict[str, str]]:
    """Messages in an order that every chat template accepts."""
    messages = _messages(value, field)
    first = 1 if messages[0]["role"] == "system" else 0
    for index, (message, expected) in enumerate(zip(messages[first:], cycle(("user", "assistant")), strict=False), start=first):
        if message["role"] != expected:
            raise _Refused(f"{field}[{index}].role", f"is '{message['role']}'; it must be '{expected}': {TURNS}")
    if messages[-1]["role"] != last_role:
        raise _Refused(f"{field}[{len(messages) - 1}].role", f"is '{messages[-1]['role']}'; the last message must be from '{last_role}'")
    return messages


def _messages(value: object, field: str) -> list[dict[str, str]]:
    if not isinstance(value, list):
        raise _Refused(field, f"is {_kind(value)}; it must be a list of messages")
    messages = cast(list[object], value)
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise _Refused(field, f"has {len(messages)} messages; it must have 1 to {MAX_MESSAGES}")
    return [_message(message, f"{field}[{index}]") for index, message in enumerate(messages)]


def _message(value: object, field: str) -> dict[str, str]:
    message = _object(value, field, 'a message is {"role": ..., "content": ...}')
    _check_names(message, field, ("role", "content"))
    role = message["role"]
    if not isinstance(role, str) or role not in ROLES:
        found = _shown(role) if isinstance(role, str) else _kind(role)
        raise _Refused(f"{field}.role", f"is {found}; known roles: {', '.join(ROLES)}")
    content = message["content"]
    text = _joined_parts(cast(list[object], content), f"{field}.content") if isinstance(content, list) else content
    return {"role": role, "content": _text(text, f"{field}.content")}


def _joined_parts(parts: list[object], field: str) -> str:
    return "".join(_part(part, f"{field}[{index}]") for index, part in enumerate(parts))


def _part(value: object, field: str) -> str:
    part = _object(value, field, 'a part is {"type": "text", "text": "..."}')
    if part.get("type") in IMAGE_PARTS:
        raise _Refused(field, "images are not supported for text datasets")
    _check_names(part, field, ("type", "text"))
    if part["type"] != "text":
        raise _Refused(f"{field}.type", "only 'text' parts are supported")
    text = part["text"]
    if not isinstance(text, str):
        raise _Refused(f"{field}.text", f"is {_kind(text)}; it must be a string")
    return text


def _check_names(found: dict[str, object], field: str, names: tuple[str, str]) -> None:
    if tuple(found) == names:  # nearly always
        return
    for name in names:
        if name not in found:
            raise _Refused(f"{field}.{name}", "is missing")
    for extra in (name for name in found if name not in names):
        raise _Refused(f"{field}.{_shown(extra)}", f"would not be used: only {' and '.join(names)} are; drop it")


def _text(value: object, field: str) -> str:
    """A string that says something and can be stored."""
    if not isinstance(value, str):
        raise _Refused(field, f"is {_kind(value)}; it must be a string")
    if not value or value.isspace():
        raise _Refused(field, "is empty; drop the row, or write something there")
    if "\0" in value:
        raise _Refused(field, f"has a NUL character at position {value.index(chr(0)) + 1}; remove it")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        surrogate = f"\\u{ord(value[error.start]):04x}"
        raise _Refused(field, f"has half a character, {surrogate}, at position {error.start + 1}; write both halves of the pair") from error
    return value


def _object(value: object, field: str, example: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise _Refused(field, f"is {_kind(value)}, not an object; {example}")
    return cast(dict[str, object], value)


def _kind(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "true or false"
        case str():
            return "a string"
        case list():
            return "a list"
        case dict():
            return "an object"
        case _:
            return "a number"


def _shown(word: str) -> str:
    """A caller's own word, short and printable whatever it holds."""
    return ascii(word if len(word) <= SHOWN_CHARS else word[:SHOWN_CHARS] + "...")

"""The six formats of a row: how each is recognized, checked and stored.

`schema/dataset.py` describes the formats. An upload may write the content of a message as typed parts,
`[{"type": "text", "text": "..."}]`: they are joined if all are texts, and stay a list if one is an image. It may leave out the
prompt of a preference between two whole conversations; the prompt is then the beginning they share.
"""

import re
from collections.abc import Iterator
from difflib import get_close_matches
from functools import lru_cache
from typing import Literal, NamedTuple, cast

from schema.dataset import TextDatasetType
from service.core.datasets.images import MAX_ROW_PIXELS, check_image, is_image_part, normalize_image_part
from service.core.datasets.values import (
    InvalidValue,
    Number,
    as_object,
    check_finite,
    check_keys,
    check_text,
    describe_type,
    join_names,
    json_safe,
    parse,
    preview,
)

Part = dict[str, str]
Message = dict[str, str | list[Part]]
Values = list[object]

MAX_MESSAGES = 1000
MAX_IMAGES = 16  # in a row
MAX_COLUMNS = 32  # beside a prompt
FORMATS = (
    '{"messages": [...]}, {"prompt": ..., "completion": ...}, {"text": "..."}, {"prompt": ..., "chosen": ..., "rejected": ...}, '
    '{"prompt": ..., "completion": ..., "label": true} or {"prompt": ..., and columns for graders}'
)
EXPECTED_ROW = f"a row is {FORMATS}"
COLUMNS_BY_TYPE: dict[TextDatasetType, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
    "preference": ("prompt", "chosen", "rejected"),
    "unpaired_preference": ("prompt", "completion", "label"),
    "prompt": ("prompt",),
}
COLUMN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
ROLES = ("system", "user", "assistant")
TURN_ORDER_RULE = "after one optional system message, user and assistant take turns, and user begins"
TEXT_PART_TYPES = ("text", "input_text")


class Images(NamedTuple):
    """The images of a row, all of which were decoded."""

    uris: tuple[str, ...]
    pixels: int  # of all of them


NO_IMAGES = Images((), 0)


class ValidatedRow(NamedTuple):
    """A checked row. All rows of a file must have one shape: a column that mixes strings and lists cannot be loaded."""

    dataset_type: TextDatasetType
    shape: str
    columns: dict[str, object]  # as they are stored; a Number is written as its literal
    prompt: object  # None where the row does not separate prompt and answer
    images: Images = NO_IMAGES
    extra_columns: tuple[str, ...] = ()  # the columns beside a prompt
    label: bool | None = None


def parse_row(line: bytes) -> ValidatedRow:
    """Parse a line of an upload. Raises InvalidValue."""
    columns = parse(line, EXPECTED_ROW)
    row_format = _detect_format(columns)
    match row_format:
        case "messages":
            return _parse_chat(columns["messages"])
        case "prompt_completion":
            return _parse_prompt_completion(row_format, columns)
        case "text":
            return ValidatedRow(row_format, row_format, {"text": check_text(columns["text"], "text")}, None)
        case "preference":
            return _parse_preference(columns)
        case "unpaired_preference":
            return _parse_unpaired_preference(columns)
        case "prompt":
            return _parse_prompt(columns)


def _detect_format(columns: dict[str, object]) -> TextDatasetType:
    """The format of a row, which must have all columns of that format and no others. Raises InvalidValue."""
    row_format = _detect_format_by_columns(columns)
    names = COLUMNS_BY_TYPE[row_format]
    for name in names:
        if name not in columns and not (row_format == "preference" and name == "prompt"):
            raise InvalidValue(name, f"is missing; a {row_format} row has the columns {join_names(names)}")
    for name in columns:
        if name not in names and row_format != "prompt":
            advice = "; put each image into its message" if name in ("image", "images") else ""
            raise InvalidValue(
                preview(name), f"would not be used: a {row_format} row has only {join_names(names)}; drop the column{advice}"
            )
    return row_format


def _detect_format_by_columns(columns: dict[str, object]) -> TextDatasetType:
    if "messages" in columns:
        return "messages"
    if "text" in columns:
        return "text"
    if "chosen" in columns or "rejected" in columns:
        return "preference"
    if "completion" in columns:
        return "unpaired_preference" if "label" in columns else "prompt_completion"
    if "prompt" in columns:
        return "prompt"
    names = ", ".join(preview(name) for name in list(columns)[:5])
    raise InvalidValue("", f"has {f'the columns {names}' if names else 'no columns'}; {EXPECTED_ROW}")


def _parse_chat(value: object) -> ValidatedRow:
    messages = _parse_conversation(value, "messages", last_role="assistant")
    return ValidatedRow("messages", "messages", {"messages": messages}, messages[:-1], _check_images(messages, "messages"))


def _parse_prompt_completion(row_format: Literal["prompt_completion", "unpaired_preference"], columns: dict[str, object]) -> ValidatedRow:
    prompt, completion = columns["prompt"], columns["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        strings: dict[str, object] = {"prompt": check_text(prompt, "prompt"), "completion": check_text(completion, "completion")}
        return ValidatedRow(row_format, f"{row_format} with strings", strings, prompt)
    _check_same_type(columns, ("prompt", "completion"))
    turns = _parse_conversation(prompt, "prompt", last_role="user")
    images = _check_images(turns, "prompt") if row_format == "prompt_completion" else _reject_images(turns, "prompt")
    return ValidatedRow(
        row_format, f"{row_format} with messages", {"prompt": turns, "completion": _parse_answer(completion, "completion")}, turns, images
    )


def _parse_preference(columns: dict[str, object]) -> ValidatedRow:
    if "prompt" not in columns:
        prompt, chosen, rejected = _split_shared_prompt(columns)
    elif all(isinstance(value, str) for value in columns.values()):
        prompt, chosen, rejected = (check_text(columns[name], name) for name in COLUMNS_BY_TYPE["preference"])
    else:
        _check_same_type(columns, COLUMNS_BY_TYPE["preference"], hint="; or leave out prompt where both conversations begin with it")
        prompt = _parse_text_conversation(columns["prompt"], "prompt", last_role="user")
        chosen, rejected = (_parse_answer(columns[name], name, prompt) for name in ("chosen", "rejected"))
    if chosen == rejected:
        raise InvalidValue("rejected", "is the same as chosen, which gives nothing to learn; drop the row")
    shape = f"preference with {'strings' if isinstance(prompt, str) else 'messages'}"
    return ValidatedRow("preference", shape, {"prompt": prompt, "chosen": chosen, "rejected": rejected}, prompt)


def _split_shared_prompt(columns: dict[str, object]) -> tuple[list[Message], list[Message], list[Message]]:
    """Split two whole conversations that differ only in their last message into prompt, chosen and rejected answer."""
    if not (isinstance(columns["chosen"], list) and isinstance(columns["rejected"], list)):
        raise InvalidValue("prompt", "is missing; add it, or send chosen and rejected as whole conversations, two lists of messages")
    chosen, rejected = (_parse_text_conversation(columns[name], name, last_role="assistant") for name in ("chosen", "rejected"))
    shared = len(chosen) - 1
    if len(rejected) != len(chosen) or rejected[:shared] != chosen[:shared]:
        raise InvalidValue("rejected", "differs from chosen before its last message; without a prompt, only the last answers may differ")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _parse_unpaired_preference(columns: dict[str, object]) -> ValidatedRow:
    label = columns["label"]
    if not isinstance(label, bool):
        raise InvalidValue("label", f"is {describe_type(label)}; write true for a good completion, false for a bad one")
    pair = _parse_prompt_completion("unpaired_preference", columns)
    return pair._replace(columns={**pair.columns, "label": label}, label=label)


def _parse_prompt(columns: dict[str, object]) -> ValidatedRow:
    value = columns["prompt"]
    if not isinstance(value, list | str):
        raise InvalidValue("prompt", f"is {describe_type(value)}; it must be a string or a list of messages")
    prompt = (
        check_text(value, "prompt") if isinstance(value, str) else _parse_text_conversation(cast(object, value), "prompt", last_role="user")
    )
    if len(columns) - 1 > MAX_COLUMNS:
        raise InvalidValue("", f"has {len(columns) - 1:,} columns beside the prompt; at most {MAX_COLUMNS}")
    extra = tuple(sorted(name for name in columns if name != "prompt"))
    stored: dict[str, object] = {"prompt": prompt}
    for name in extra:
        stored[name] = _parse_extra_column(name, columns[name])
    return ValidatedRow("prompt", _describe_prompt_shape(stored, extra), stored, prompt, extra_columns=extra)


def _describe_prompt_shape(stored: dict[str, object], extra: tuple[str, ...]) -> str:
    kinds = join_names([f"{name} ({describe_type(stored[name])})" for name in extra]) if extra else "no other column"
    return f"prompt with {'strings' if isinstance(stored['prompt'], str) else 'messages'} and {kinds}"


def _parse_extra_column(name: str, value: object) -> str | bool | Number:
    """A column beside a prompt, which graders may read."""
    if not COLUMN_NAME.fullmatch(name):
        raise InvalidValue(preview(name), "is not a valid column name: use letters, digits and _, 64 at most, and no digit first")
    if similar := _suggest_column(name):
        raise InvalidValue(name, f"is close to {similar!r}; name it {similar!r}, or choose a clearly different name for a grader column")
    match value:
        case bool():
            return value
        case Number():
            return check_finite(value, name)
        case str():
            return json_safe(value, name)
        case _:
            raise InvalidValue(name, f"is {describe_type(value)}; a column beside a prompt is a string, a number, true or false")


@lru_cache(maxsize=1024)
def _suggest_column(name: str) -> str | None:
    """The column of another format that was probably meant. `label` itself is a valid column beside a prompt."""
    if name == "label":
        return None
    matches = get_close_matches(name.lower(), ("completion", "chosen", "rejected", "label", "messages"), n=1, cutoff=0.8)
    return matches[0] if matches else None


def _check_same_type(columns: dict[str, object], names: tuple[str, ...], hint: str = "") -> None:
    for name in names:
        if not isinstance(columns[name], list | str):
            raise InvalidValue(name, f"is {describe_type(columns[name])}; it must be a string or a list of messages")
    first = names[0]
    for name in names:
        if isinstance(columns[name], str) != isinstance(columns[first], str):
            types = f"is {describe_type(columns[name])} and {first} is {describe_type(columns[first])}"
            raise InvalidValue(name, f"{types}; {join_names(names)} must all be strings, or all lists of messages{hint}")


def _parse_answer(value: object, field: str, prompt: list[Message] | None = None) -> list[Message]:
    """The answer to a prompt of messages: one assistant message. If `prompt` is given, the answer may repeat it first."""
    answer = _parse_messages(value, field)
    if prompt and answer[:-1] == prompt:
        answer = answer[-1:]
    if len(answer) != 1:
        reason = "the messages before it are not the prompt" if prompt else "the messages before it belong to the prompt"
        raise InvalidValue(field, f"has {len(answer)} messages; it must have one, and {reason}")
    if answer[0]["role"] != "assistant":
        raise InvalidValue(f"{field}[0].role", f"is '{answer[0]['role']}'; it must be 'assistant'")
    return answer


def _parse_conversation(value: object, field: str, *, last_role: Literal["user", "assistant"]) -> list[Message]:
    """Messages whose order every chat template accepts."""
    messages = _parse_messages(value, field)
    first_turn = 1 if messages[0]["role"] == "system" else 0
    for index in range(first_turn, len(messages)):
        expected = "assistant" if (index - first_turn) % 2 else "user"
        if messages[index]["role"] != expected:
            raise InvalidValue(f"{field}[{index}].role", f"is '{messages[index]['role']}'; it must be '{expected}': {TURN_ORDER_RULE}")
    if messages[-1]["role"] != last_role:
        raise InvalidValue(
            f"{field}[{len(messages) - 1}].role", f"is '{messages[-1]['role']}'; the last message must be from '{last_role}'"
        )
    return messages


def _parse_text_conversation(value: object, field: str, *, last_role: Literal["user", "assistant"]) -> list[Message]:
    """A conversation of a format that does not allow images."""
    messages = _parse_conversation(value, field, last_role=last_role)
    _reject_images(messages, field)
    return messages


def _reject_images(messages: list[Message], field: str) -> Images:
    for path, _ in _iter_image_parts(messages, field):
        raise InvalidValue(path, "is an image; images are allowed in rows of messages and of prompt and completion")
    return NO_IMAGES


def _check_images(messages: list[Message], field: str) -> Images:
    """The checked images of a conversation."""
    parts = list(_iter_image_parts(messages, field))
    if len(parts) > MAX_IMAGES:
        raise InvalidValue(field, f"has {len(parts)} images; at most {MAX_IMAGES} are allowed in a row")
    pixels = 0
    for path, image in parts:
        pixels += check_image(image, path, MAX_ROW_PIXELS - pixels)
    return Images(tuple(image for _, image in parts), pixels)


def _iter_image_parts(messages: list[Message], field: str) -> Iterator[tuple[str, str]]:
    for index, message in enumerate(messages):
        if isinstance(message["content"], list):
            for part_index, part in enumerate(message["content"]):
                if part["type"] == "image":
                    yield f"{field}[{index}].content[{part_index}]", part["image"]


def _parse_messages(value: object, field: str) -> list[Message]:
    if not isinstance(value, list):
        raise InvalidValue(field, f"is {describe_type(value)}; it must be a list of messages")
    messages = cast(Values, value)
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise InvalidValue(field, f"has {len(messages)} messages; it must have 1 to {MAX_MESSAGES}")
    return [_parse_message(message, f"{field}[{index}]") for index, message in enumerate(messages)]


def _parse_message(value: object, field: str) -> Message:
    message = as_object(value, field, 'a message is {"role": ..., "content": ...}')
    check_keys(message, field, ("role", "content"))
    role = message["role"]
    if not isinstance(role, str) or role not in ROLES:
        described = preview(role) if isinstance(role, str) else describe_type(role)
        raise InvalidValue(f"{field}.role", f"is {described}; known roles: {', '.join(ROLES)}")
    content = message["content"]
    if isinstance(content, list):
        return {"role": role, "content": _parse_parts(cast(Values, content), role, f"{field}.content")}
    return {"role": role, "content": check_text(content, f"{field}.content")}


def _parse_parts(values: Values, role: str, field: str) -> str | list[Part]:
    """The content of a message written in parts: one text if there is no image, else a list."""
    parts = [_parse_part(value, f"{field}[{index}]") for index, value in enumerate(values)]
    first_image = next((index for index, part in enumerate(parts) if part["type"] == "image"), None)
    if first_image is None:
        return check_text("".join(part["text"] for part in parts), field)
    if role != "user":
        raise InvalidValue(f"{field}[{first_image}]", f"is an image in a message of role '{role}'; only 'user' messages may have images")
    return parts


def _parse_part(value: object, field: str) -> Part:
    part = as_object(value, field, 'a part is {"type": "text", "text": "..."}')
    if is_image_part(part):
        return {"type": "image", "image": normalize_image_part(part, field)}
    check_keys(part, field, ("type", "text"))
    if part["type"] not in TEXT_PART_TYPES:
        raise InvalidValue(f"{field}.type", "only 'text' and 'image' parts are supported")
    text = part["text"]
    if not isinstance(text, str):
        raise InvalidValue(f"{field}.text", f"is {describe_type(text)}; it must be a string")
    return {"type": "text", "text": json_safe(text, f"{field}.text")}

"""The six forms of a row: how each is recognized, checked and stored.

`schema/dataset.py` describes the forms. An upload may write the content of a message as typed parts,
`[{"type": "text", "text": "..."}]`: they are joined if all are texts, and stay a list if one is an image. It may leave out the
prompt of a preference between two whole conversations; the prompt is then the beginning they share. Rows with and without tools may be
in one dataset: a trainer reads rows one by one.
"""

import re
from difflib import get_close_matches
from functools import lru_cache
from typing import Literal, NamedTuple, cast

from jobs.ingest.rows.images import MAX_ROW_PIXELS, check_image
from jobs.ingest.rows.messages import (
    LastRole,
    Message,
    is_plain_conversation,
    iter_calls,
    iter_image_parts,
    parse_conversation,
    parse_messages,
)
from jobs.ingest.rows.tools import get_tool_names, parse_tools
from jobs.ingest.rows.values import (
    InvalidValue,
    JsonObject,
    Number,
    check_finite,
    check_text,
    describe_type,
    join_names,
    json_safe,
    preview,
    suggest,
)
from schema.types import PromptForm, TextDatasetType

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
KNOWN_COLUMNS = tuple(dict.fromkeys(name for names in COLUMNS_BY_TYPE.values() for name in names))
MAX_SUGGESTED_COLUMNS = 20  # of an unknown row, for which similar names are looked for
TOOLS_COLUMN = "tools"  # of rows with messages, beside the columns of their type


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
    has_tools: bool = False  # or calls of tools
    has_weights: bool = False

    @property
    def prompt_form(self) -> PromptForm:
        """Whether prompts and answers are strings or messages."""
        return "messages" if "messages" in self.columns or isinstance(self.columns.get("prompt"), list) else "strings"


def check_row(columns: JsonObject) -> ValidatedRow:
    """Check a row, whose columns are as `values.parse` makes them. Raises InvalidValue."""
    if len(columns) == 1 and is_plain_conversation(messages := columns.get("messages")):
        return ValidatedRow("messages", "messages", columns, cast(list[Message], messages)[:-1])
    columns = dict(columns)
    row_format = detect_form(columns)
    tools = parse_tools(columns.pop(TOOLS_COLUMN, None), TOOLS_COLUMN)
    return _add_tools(_parse_columns(row_format, columns), tools)


def _parse_columns(row_format: TextDatasetType, columns: dict[str, object]) -> ValidatedRow:
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


def _add_tools(row: ValidatedRow, tools: list[JsonObject]) -> ValidatedRow:
    """The row with the tools that it offers, which are part of its prompt. Raises InvalidValue."""
    if row.prompt_form == "strings":
        if tools:
            raise InvalidValue(
                TOOLS_COLUMN, "would not be used: tools need messages; write prompt and answer as lists of messages", "unused_field"
            )
        return row
    known = get_tool_names(tools) if tools else ()
    has_tools = bool(tools)
    for name in COLUMNS_BY_TYPE[row.dataset_type]:
        messages = row.columns[name]
        if not isinstance(messages, list):
            continue  # a label
        for field, call in iter_calls(cast(list[Message], messages), name):
            has_tools = True
            function = call["function"]["name"]
            if tools and function not in known:
                names = join_names([preview(each) for each in known[:10]])
                raise InvalidValue(f"{field}.function.name", f"is {preview(function)}; the row's tools are {names}", "call_mismatch")
    if has_tools and row.images.uris:
        raise InvalidValue("", "has images and tools; a row may have one or the other", "images_and_tools")
    if not tools:
        return row._replace(has_tools=True) if has_tools else row
    prompt = {TOOLS_COLUMN: tools, "prompt": row.prompt}
    return row._replace(columns=row.columns | {TOOLS_COLUMN: tools}, prompt=prompt, has_tools=True)


def detect_form(columns: dict[str, object]) -> TextDatasetType:
    """The format of a row, which must have all columns of that format and no others. Raises InvalidValue."""
    row_format = _detect_form_by_columns(columns)
    names = COLUMNS_BY_TYPE[row_format]
    for name in names:
        if name not in columns and not (row_format == "preference" and name == "prompt"):
            meant = suggest(name, [other for other in columns if other not in names])
            raise InvalidValue(name, f"is missing; a {row_format} row has the columns {join_names(names)}{meant}", "missing_field")
    for name in columns:
        if name not in names and row_format != "prompt" and (name != TOOLS_COLUMN or row_format == "text"):
            advice = "; put each image into its message" if name in ("image", "images") else ""
            reason = f"would not be used: a {row_format} row has only {join_names(names)}; drop the column{advice}"
            raise InvalidValue(preview(name), reason, "unused_field")
    return row_format


def _detect_form_by_columns(columns: dict[str, object]) -> TextDatasetType:
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
    meant = next(filter(None, (suggest(name, KNOWN_COLUMNS) for name in list(columns)[:MAX_SUGGESTED_COLUMNS])), "")
    raise InvalidValue("", f"has {f'the columns {names}' if names else 'no columns'}{meant}; {EXPECTED_ROW}", "unknown_form")


def _parse_chat(value: object) -> ValidatedRow:
    messages = parse_conversation(value, "messages", last_role="assistant", has_weights=True)
    has_weights = any("weight" in message for message in messages)
    if has_weights and all("weight" in message for message in messages if message["role"] == "assistant"):
        raise InvalidValue(
            "messages", "has weight 0 on every assistant message, which leaves nothing to learn; drop the row", "nothing_to_learn"
        )
    # Rows that differ in weights only have the same prompt.
    prompt = (
        [{key: value for key, value in message.items() if key != "weight"} for message in messages[:-1]] if has_weights else messages[:-1]
    )
    images = _check_images(messages, "messages")
    return ValidatedRow("messages", "messages", {"messages": messages}, prompt, images, has_weights=has_weights)


def _parse_prompt_completion(row_format: Literal["prompt_completion", "unpaired_preference"], columns: dict[str, object]) -> ValidatedRow:
    prompt, completion = columns["prompt"], columns["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        strings: dict[str, object] = {"prompt": check_text(prompt, "prompt"), "completion": check_text(completion, "completion")}
        return ValidatedRow(row_format, f"{row_format} with strings", strings, prompt)
    _check_same_type(columns, ("prompt", "completion"))
    turns = parse_conversation(prompt, "prompt", last_role="user")
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
        raise InvalidValue("rejected", "is the same as chosen, which gives nothing to learn; drop the row", "nothing_to_learn")
    shape = f"preference with {'strings' if isinstance(prompt, str) else 'messages'}"
    return ValidatedRow("preference", shape, {"prompt": prompt, "chosen": chosen, "rejected": rejected}, prompt)


def _split_shared_prompt(columns: dict[str, object]) -> tuple[list[Message], list[Message], list[Message]]:
    """Split two whole conversations that differ only in their last message into prompt, chosen and rejected answer."""
    if not (isinstance(columns["chosen"], list) and isinstance(columns["rejected"], list)):
        reason = "is missing; add it, or send chosen and rejected as whole conversations, two lists of messages"
        raise InvalidValue("prompt", reason, "missing_field")
    chosen, rejected = (_parse_text_conversation(columns[name], name, last_role="assistant") for name in ("chosen", "rejected"))
    shared = len(chosen) - 1
    if len(rejected) != len(chosen) or rejected[:shared] != chosen[:shared]:
        reason = "differs from chosen before its last message; without a prompt, only the last answers may differ"
        raise InvalidValue("rejected", reason, "different_prompts")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _parse_unpaired_preference(columns: dict[str, object]) -> ValidatedRow:
    label = columns["label"]
    if not isinstance(label, bool):
        raise InvalidValue("label", f"is {describe_type(label)}; write true for a good completion, false for a bad one", "wrong_type")
    pair = _parse_prompt_completion("unpaired_preference", columns)
    return pair._replace(columns={**pair.columns, "label": label}, label=label)


def _parse_prompt(columns: dict[str, object]) -> ValidatedRow:
    value = columns["prompt"]
    if not isinstance(value, list | str):
        raise InvalidValue("prompt", f"is {describe_type(value)}; it must be a string or a list of messages", "wrong_type")
    prompt = (
        check_text(value, "prompt") if isinstance(value, str) else _parse_text_conversation(cast(object, value), "prompt", last_role="user")
    )
    if len(columns) - 1 > MAX_COLUMNS:
        raise InvalidValue("", f"has {len(columns) - 1:,} columns beside the prompt; at most {MAX_COLUMNS}", "too_many")
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
        reason = "is not a valid column name: use letters, digits and _, 64 at most, and no digit first"
        raise InvalidValue(preview(name), reason, "wrong_name")
    if similar := _suggest_column(name):
        reason = f"is close to {similar!r}; name it {similar!r}, or choose a clearly different name for a grader column"
        raise InvalidValue(name, reason, "wrong_name")
    match value:
        case bool():
            return value
        case Number():
            return check_finite(value, name)
        case str():
            return json_safe(value, name)
        case _:
            reason = f"is {describe_type(value)}; a column beside a prompt is a string, a number, true or false"
            raise InvalidValue(name, reason, "wrong_type")


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
            raise InvalidValue(name, f"is {describe_type(columns[name])}; it must be a string or a list of messages", "wrong_type")
    first = names[0]
    for name in names:
        if isinstance(columns[name], str) != isinstance(columns[first], str):
            types = f"is {describe_type(columns[name])} and {first} is {describe_type(columns[first])}"
            raise InvalidValue(name, f"{types}; {join_names(names)} must all be strings, or all lists of messages{hint}", "wrong_type")


def _parse_answer(value: object, field: str, prompt: list[Message] | None = None) -> list[Message]:
    """The answer to a prompt of messages: one assistant message. If `prompt` is given, the answer may repeat it first."""
    answer = parse_messages(value, field)
    if prompt and answer[:-1] == prompt:
        answer = answer[-1:]
    if len(answer) != 1:
        reason = "the messages before it are not the prompt" if prompt else "the messages before it belong to the prompt"
        raise InvalidValue(field, f"has {len(answer)} messages; it must have one, and {reason}", "role_order")
    if answer[0]["role"] != "assistant":
        raise InvalidValue(f"{field}[0].role", f"is '{answer[0]['role']}'; it must be 'assistant'", "role_order")
    return answer


def _parse_text_conversation(value: object, field: str, *, last_role: LastRole) -> list[Message]:
    """A conversation of a format that does not allow images."""
    messages = parse_conversation(value, field, last_role=last_role)
    _reject_images(messages, field)
    return messages


def _reject_images(messages: list[Message], field: str) -> Images:
    for path, _ in iter_image_parts(messages, field):
        raise InvalidValue(path, "is an image; images are allowed in rows of messages and of prompt and completion", "image_not_allowed")
    return NO_IMAGES


def _check_images(messages: list[Message], field: str) -> Images:
    """The checked images of a conversation."""
    parts = list(iter_image_parts(messages, field))
    if len(parts) > MAX_IMAGES:
        raise InvalidValue(field, f"has {len(parts)} images; at most {MAX_IMAGES} are allowed in a row", "too_many")
    pixels = 0
    for path, image in parts:
        pixels += check_image(image, path, MAX_ROW_PIXELS - pixels)
    return Images(tuple(image for _, image in parts), pixels)

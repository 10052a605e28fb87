"""Records and events as the JSON that every job store keeps. What is written here can be read back.

A record that could be written and not read would stop everything that has to read it: its job, and the work lists that it is in.
"""

import re

from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError, from_json

from schema.base import ForwardCompatible
from schema.events import Event, WarningRaised
from schema.json_limits import JsonLimits, JsonProblem, find_json_problem
from service.core.errors import InvalidRequest, TooLarge

MAX_RECORD_BYTES = 900_000  # Firestore stores up to 1 MiB in a document, which has other fields too
# What events may make of a job's record. The rest is room for its result and for what the service notes in it.
MAX_RECORD_BYTES_BY_EVENTS = 256 << 10
MAX_RESULT_BYTES = 512 << 10

MAX_EVENT_BYTES = 64 << 10
MAX_SAMPLES_EVENT_BYTES = 256 << 10  # prompts and answers of a model
STORED_LIMITS = JsonLimits(max_depth=100, max_values=200_000)
LONG_INTEGER = re.compile(r"[0-9]{19}")  # most records have none, and need no closer look

EVENT_ADAPTER: TypeAdapter[Event] = TypeAdapter(Event)


def dump_record(record: ForwardCompatible, max_bytes: int = MAX_RECORD_BYTES) -> str:
    """The JSON to store. Raises InvalidRequest for a record that could not be read back, and TooLarge."""
    kind = type(record).__name__.lower()
    text = _dump(record, kind)
    if len(text) > max_bytes or len(text.encode()) > max_bytes:
        raise TooLarge(f"the record of the {kind} would be larger than {max_bytes} bytes")
    try:
        type(record).load(text)
    except (ValueError, RecursionError) as error:  # a ValidationError is a ValueError
        raise InvalidRequest(f"the {kind} cannot be stored: {_first_line(error)}") from error
    return text


def make_storable(event: Event) -> tuple[Event, str]:
    """The event to store and its JSON: instead of an event that is too long a warning that names it. Raises InvalidRequest."""
    text = _dump(event, f"event {event.type!r}")
    size_bytes, max_bytes = len(text.encode()), MAX_SAMPLES_EVENT_BYTES if event.type == "samples" else MAX_EVENT_BYTES
    if size_bytes <= max_bytes:
        return event, text
    message = f"an event of type {event.type} was dropped: it has {size_bytes} bytes, and at most {max_bytes} are stored"
    warning = WarningRaised(code="event_too_large", message=message)
    return warning, warning.model_dump_json()


def load_event(text: str) -> Event:
    """An event from its JSON. Raises ValueError for one that cannot be shown, which an earlier version stored without a check."""
    event = EVENT_ADAPTER.validate_json(text)
    if (problem := _find_problem(text)) is not None:
        raise ValueError(problem.reason)
    return event


def _dump(message: ForwardCompatible, kind: str) -> str:
    try:
        text = message.model_dump_json()
    except (PydanticSerializationError, UnicodeError, RecursionError) as error:
        raise InvalidRequest(f"the {kind} cannot be stored: {_first_line(error)}") from error
    if (problem := _find_problem(text)) is not None:
        field = ".".join(map(str, problem.path))
        raise InvalidRequest(f"the {kind} cannot be stored: {field} {problem.reason}", param=field or None)
    return text


def _find_problem(text: str) -> JsonProblem | None:
    """Why JSON that pydantic wrote cannot be stored: it has integers of any length."""
    if not LONG_INTEGER.search(text):
        return None
    try:
        return find_json_problem(from_json(text), STORED_LIMITS)
    except ValueError as error:
        return JsonProblem((), _first_line(error))


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        problem = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}".lstrip(": ")
    return str(error).partition("\n")[0].encode(errors="backslashreplace").decode()

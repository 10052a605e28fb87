"""Rows in one of the six forms as they are stored: nothing is converted, and what is wrong with them is an error of their lines."""

from typing import cast

from jobs.ingest.mapping.headings import NATIVE, REFERENCE_ANSWERS, normalize_heading
from jobs.ingest.mapping.labels import find_label
from jobs.ingest.mapping.sample import PRINTED_LIST, Reading, Sample, as_messages
from jobs.ingest.rows.forms import detect_form
from jobs.ingest.rows.values import InvalidValue, JsonObject, Number
from schema.types import TextDatasetType

_TYPES: dict[str, TextDatasetType] = {
    "messages": "messages",
    "text": "text",
    "prompt": "prompt",
    "completion": "prompt_completion",
    "chosen": "preference",
    "rejected": "preference",
}


def recognize(sample: Sample) -> Reading | None:
    """Recognize files of which at least half of the first records are rows as they are."""
    forms: list[TextDatasetType] = [form for record in sample.records if (form := _find_form(record))]
    if not forms or 2 * len(forms) < len(sample.records):
        return None
    with_answers: list[TextDatasetType] = [form for form in forms if form != "prompt"]
    if with_answers or sample.columns == ("prompt",):
        return Reading("native", (with_answers or forms)[0], sample.columns, certainty="certain")
    return Reading("native", "prompt", sample.columns, certainty="fallback", note=_advise(sample))


def read_as_native(sample: Sample) -> Reading:
    """The reading of records that have columns of rows, but are none: each then says what is wrong with it."""
    for record in sample.records:
        for name in NATIVE:
            if name in record:
                return Reading("native", _TYPES[name], sample.columns)
    return Reading("native", "text", sample.columns)


def _find_form(record: JsonObject) -> TextDatasetType | None:
    try:
        form = detect_form(record)
    except InvalidValue:
        return None
    return None if _needs_conversion(record) else form


def _needs_conversion(record: JsonObject) -> bool:
    """Whether a row has what another shape can read and a row may not have: JSON as text, other keys of messages, spelled labels."""
    if isinstance(record.get("tools"), str):
        return True
    messages = record.get("messages")
    if isinstance(messages, str) and messages.startswith(PRINTED_LIST):
        return True
    if isinstance(messages, list) and messages and isinstance(messages[0], dict):
        first = cast(JsonObject, messages[0])
        if "role" not in first and "from" in first:
            return True
    if "completion" in record and isinstance(label := record.get("label"), str | Number) and find_label(label) is not None:
        return True
    return any(isinstance(value := record.get(name), str) and _is_json_messages(value) for name in NATIVE if name != "text")


def _is_json_messages(text: str) -> bool:
    messages = as_messages(text)
    return bool(messages) and ("role" in messages[0] or "from" in messages[0])


def _advise(sample: Sample) -> str:
    """How to learn an answer that is taken for one of graders."""
    answers = [name for name in sample.columns if normalize_heading(name) in REFERENCE_ANSWERS]
    if len(answers) != 1:
        return ""
    return f'; to learn {answers[0]}, send the mapping {{"prompt": "prompt", "completion": "{answers[0]}"}}'

"""What people read about a mapping: what was recognized, why a file was not, and a mapping for this very file that would work."""

import json
from collections.abc import Sequence

from jobs.ingest.mapping.sample import Ambiguous, Reading, Sample, can_be_mapped
from jobs.ingest.mapping.templates import list_columns, shorten
from jobs.ingest.records import InvalidInput
from jobs.ingest.rows.values import join_names
from schema.ingestion import MAPPED_FIELDS, RowMapping

PARAM = "mapping"
MAX_EXAMPLES = 3


def describe_mapping(mapping: RowMapping, columns: Sequence[str]) -> str:
    """One line: `columns question and answer -> prompt and completion`."""
    names = list(dict.fromkeys(name for _, required, optional in MAPPED_FIELDS for name in (*required, *optional)))
    fields = [name for name in names if getattr(mapping, name)]
    return f"{list_columns(columns).removeprefix('the ')} -> {join_names(fields)}"


def format_mapping(mapping: RowMapping) -> str:
    """The mapping as it is sent."""
    return json.dumps(mapping.model_dump(exclude_defaults=True), ensure_ascii=False)


def explain_ambiguous(sample: Sample, readings: Sequence[Reading], doubts: Sequence[Ambiguous]) -> InvalidInput:
    """The error for records that mean several things, with a mapping for each."""
    mappings = [mapping for doubt in doubts for mapping in doubt.mappings]
    mappings = [*(reading.mapping for reading in readings if reading.mapping), *mappings]
    examples = list(dict.fromkeys(format_mapping(mapping) for mapping in mappings))[:MAX_EXAMPLES]
    in_question = {column for reading in readings for column in reading.columns} | {column for doubt in doubts for column in doubt.columns}
    columns = [column for column in sample.columns if column in in_question]
    message = f"{list_columns(columns)} can be read in more than one way"
    return InvalidInput(message[0].upper() + message[1:], f"choose one with a mapping: {' or '.join(examples)}", PARAM)


def explain_unknown(sample: Sample, shapes: Sequence[str]) -> InvalidInput:
    """The error for records that are in no known form."""
    texts = [name for name in sample.columns if can_be_mapped(name) and sample.is_text(name) and sample.values(name)]
    longest = sorted(texts, key=lambda name: -sum(len(str(value)) for value in sample.values(name)))[:2]  # ids and dates are short
    named = [name for name in texts if name in longest]
    if len(named) > 1:
        example = RowMapping(prompt=named[0], completion=named[1])
    else:
        example = RowMapping(text=named[0]) if named else RowMapping(prompt="question", completion="answer")
    hint = f"say what they mean with a mapping such as {format_mapping(example)}; recognized without one: {join_names(shapes)}"
    return InvalidInput(f"The file has {list_columns(sample.columns)}, which are in no known form", hint, PARAM)


def explain_left_out(column: str, reading: Reading) -> InvalidInput:
    """The error for a column that says something, and of which a row has no part."""
    assert reading.mapping is not None
    advice = (
        f"to leave it out, send the mapping {format_mapping(reading.mapping)}; otherwise make it part of another column, or of messages"
    )
    return InvalidInput(f"The column {shorten(column)} would be left out, but it may be part of what is asked", advice, PARAM)

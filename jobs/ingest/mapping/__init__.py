"""What the records of a file mean: which known form they have, and how their columns become rows.

Each known form has a module with a function `recognize`, and a line in `SHAPES`. How files hold records does not belong here, nor
whether a row is valid.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import cast

from jobs.ingest.mapping.converter import RowConverter
from jobs.ingest.mapping.explanations import describe_mapping, explain_ambiguous, explain_left_out, explain_unknown
from jobs.ingest.mapping.headings import INSTRUCTIONS, NATIVE, QUESTIONS, TELLING, TOOLS
from jobs.ingest.mapping.native import read_as_native
from jobs.ingest.mapping.sample import Ambiguous, Reading, Sample, make_printable
from jobs.ingest.rows.values import JsonObject
from schema.ingestion import IngestOptions, RowMapping
from schema.types import TextDatasetType

SAMPLE_RECORDS = 200  # the first records, by which a form is recognized

# The known forms, in the order in which they are tried.
SHAPES = {
    "native": "jobs.ingest.mapping.native:recognize",
    "openai": "jobs.ingest.mapping.openai:recognize",
    "sharegpt": "jobs.ingest.mapping.sharegpt:recognize",
    "alpaca": "jobs.ingest.mapping.alpaca:recognize",
    "question_answer": "jobs.ingest.mapping.question_answer:recognize",
    "dpo_pair": "jobs.ingest.mapping.dpo_pair:recognize",
    "kto": "jobs.ingest.mapping.kto:recognize",
    "text": "jobs.ingest.mapping.text:recognize",
}


@dataclass(frozen=True)
class RowMapper:
    """Turns records into rows."""

    shape: str  # the form that was recognized; "mapped" if the request says what columns mean
    dataset_type: TextDatasetType
    mapping: RowMapping | None = None  # None: records are rows as they are
    reason: str = ""
    converter: RowConverter | None = None

    def convert(self, columns: JsonObject) -> JsonObject:
        """The row that a record means. Raises InvalidValue, whose field is one of the row."""
        return columns if self.converter is None else self.converter.convert(columns)

    def describe_field(self, field: str) -> str:
        """What the file calls a field of the row that was made last: `completion` may be its column `answer`."""
        return field if self.converter is None else self.converter.describe_field(field)

    @property
    def unused_columns(self) -> tuple[str, ...]:
        """The columns, and the keys of messages, that became part of no row so far."""
        return () if self.converter is None else tuple(make_printable(name) for name in self.converter.unused)


def choose_mapper(sample: Sequence[JsonObject], options: IngestOptions, columns: Sequence[str] = ()) -> RowMapper:
    """Recognize the form of the first records, or use the mapping of the request. Raises InvalidInput."""
    seen = Sample(sample, columns)
    if options.mapping is not None:
        return _make_mapper("mapped", options.mapping, seen, "")
    reading = _recognize(seen)
    if reading.mapping is None:
        return RowMapper(reading.shape, reading.dataset_type, reason=f"rows of {reading.dataset_type} as they are{reading.note}")
    return _make_mapper(reading.shape, reading.mapping, seen, reading.note)


def _make_mapper(shape: str, mapping: RowMapping, sample: Sample, note: str) -> RowMapper:
    converter = RowConverter(mapping, sample.columns)
    dataset_type = mapping.dataset_type
    assert dataset_type is not None  # a RowMapping without one is not valid
    return RowMapper(shape, dataset_type, mapping, describe_mapping(mapping, converter.columns) + note, converter)


def _recognize(sample: Sample) -> Reading:
    """The one thing that the records mean. Raises InvalidInput if they mean nothing known, or several things."""
    readings: list[Reading] = []
    doubts_by_shape: dict[str, Ambiguous] = {}
    for shape, target in SHAPES.items():
        module, name = target.split(":")
        recognize = cast(Callable[[Sample], Reading | None], getattr(import_module(module), name))
        try:
            reading = recognize(sample)
        except Ambiguous as doubt:
            doubts_by_shape[shape] = doubt
            continue
        if reading is None:
            continue
        if reading.certainty == "certain":
            return reading
        readings.append(reading)
    fallback = next((reading for reading in readings if reading.certainty == "fallback"), None)
    likely = _drop_contained([reading for reading in readings if reading.certainty == "likely"], sample)
    if fallback is not None:
        # Beside a prompt, columns of texts and answers may be for graders; two answers to compare, labels and other prompts hardly are.
        prompts = sample.find(INSTRUCTIONS | QUESTIONS)
        likely = [reading for reading in likely if reading.shape != "text"]
        doubts_by_shape = {
            shape: doubt
            for shape, doubt in doubts_by_shape.items()
            if shape in ("dpo_pair", "kto") or len(set(doubt.columns).intersection(prompts)) > 1
        }
        if not doubts_by_shape and len(likely) != 1:
            return fallback
    doubts = [doubt for doubt in doubts_by_shape.values() if not any(_says_all(sample, reading, doubt.columns) for reading in likely)]
    if len(likely) == 1 and not doubts:
        return _check_left_out(sample, likely[0])
    if likely or doubts:
        raise explain_ambiguous(sample, likely, doubts)
    if any(name in sample.columns for name in NATIVE) or not sample.columns:
        return read_as_native(sample)
    raise explain_unknown(sample, tuple(SHAPES))


def _drop_contained(readings: list[Reading], sample: Sample) -> list[Reading]:
    """The readings without those of which another one says everything, and more. Of two that say the same, the larger one stays."""
    ordered = sorted(readings, key=lambda reading: -len(set(reading.columns)))  # stable: earlier shapes stay first
    kept: list[Reading] = []
    for index, reading in enumerate(ordered):
        later = (other for other in ordered[index + 1 :] if not _says_all(sample, reading, other.columns))
        if not any(_says_all(sample, other, reading.columns) for other in (*kept, *later)):
            kept.append(reading)
    return kept


def _says_all(sample: Sample, reading: Reading, columns: Sequence[str]) -> bool:
    """Whether the columns are part of a reading, or only repeat what is."""
    return all(column in reading.columns or sample.repeats(column, reading.columns) for column in columns)


def _check_left_out(sample: Sample, reading: Reading) -> Reading:
    """The reading, unless it leaves out a column that says something. Raises InvalidInput."""
    left_out = [column for column in sample.columns if column not in reading.columns and sample.values(column)]
    native = [column for column in left_out if column in NATIVE and not sample.repeats(column, reading.columns)]
    telling = [column for column in sample.find(TELLING | TOOLS) if column in left_out]
    if native or (telling and any(column in NATIVE for column in reading.columns)):
        return read_as_native(sample)
    if telling:
        raise explain_left_out(telling[0], reading)
    return reading

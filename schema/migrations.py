"""Reads stored records, including those that an older version of Tunesmith wrote.

A record is a JSON object with a `schema_version`. A release that changes the meaning of a stored field raises its model's version by one
and adds a migration: a pure function from the JSON object of one version to that of the next. Adding an optional field needs neither.
`VersionedRecord.load` applies the migrations before it validates, so every reader gets the current form. The stored text does not change
until the record is next written.
"""

import json
from collections.abc import Callable, Mapping
from typing import ClassVar, Self, cast

from schema.base import ForwardCompatible

Document = dict[str, object]
Migration = Callable[[Document], Document]

UNVERSIONED = 1  # the version of a record that has none: written by 0.1 before records carried one


class NewerRecord(ValueError):
    """A newer version of Tunesmith wrote the record; this one must not guess what it means."""


class VersionedRecord(ForwardCompatible):
    """A stored record, which may be read by a newer version of Tunesmith than the one that wrote it.

    A subclass declares its current version as the default of `schema_version`, and a migration for each earlier one.
    """

    migrations: ClassVar[Mapping[int, Migration]] = {}  # from version → the JSON object in the next version's form

    schema_version: int = 1  # the first field, so that `load` recognizes a current record by the beginning of its text

    @classmethod
    def load(cls, text: str | bytes) -> Self:
        """Read stored JSON of any version up to the current one. Raises NewerRecord, and ValidationError for a damaged record."""
        # Nearly every record is current: comparing a prefix costs nothing, parsing twice would double the cost of a read.
        current = cls.model_fields["schema_version"].default
        prefix = f'{{"schema_version":{current},'
        if text.startswith(prefix) if isinstance(text, str) else text.startswith(prefix.encode()):
            return super().load(text)
        return super().load(_migrate(text, cls.__name__, current, cls.migrations))


def _migrate(text: str | bytes, name: str, current: int, migrations: Mapping[int, Migration]) -> str | bytes:
    """The record's text in the current form; the text itself if nothing is to be done."""
    try:
        parsed: object = json.loads(text)
    except (ValueError, RecursionError):
        return text  # validation reports what is wrong with it
    if not isinstance(parsed, dict):
        return text
    document = cast(Document, parsed)
    version = document.get("schema_version", UNVERSIONED)
    if not isinstance(version, int) or version == current:
        return text
    if version > current:
        raise NewerRecord(f"a newer version of Tunesmith wrote this {name} record (schema {version}; this version reads up to {current})")
    for step in range(version, current):
        if step not in migrations:
            raise ValueError(f"this {name} record has schema {version}, and there is no migration from {step}")
        document = migrations[step](document)
    return json.dumps(document | {"schema_version": current})

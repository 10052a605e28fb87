"""The options that say how a file of rows is read, for `train`, `datasets upload` and `datasets check` alike."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, cast

import typer

from cli.errors import CliError
from cli.http_client import Json
from cli.request import parse_pairs

LIST_FIELDS = ("keep",)  # of a mapping: several columns, by comma

MappingOption = Annotated[
    str | None,
    typer.Option("--mapping", metavar="JSON", help='How columns become rows: \'{"prompt": "question", "completion": "answer"}\'.'),
]
MapOption = Annotated[
    list[str] | None,
    typer.Option(
        "--map", metavar="FIELD=COLUMN", help='A field of the mapping: --map prompt="{title}: {question}" --map completion=answer.'
    ),
]
FileFormatOption = Annotated[
    str | None, typer.Option("--file-format", help="jsonl, json, csv, parquet, arrow, xlsx or text. Default: what the file is.")
]
EncodingOption = Annotated[str | None, typer.Option("--encoding", help="Of a text file, such as cp1252. Default: what the file is.")]
DelimiterOption = Annotated[str | None, typer.Option("--delimiter", help="Of a CSV file. Default: what the file has.")]
SheetOption = Annotated[str | None, typer.Option("--sheet", help="Of a spreadsheet. Default: the only one that has rows.")]
TextUnitOption = Annotated[
    str | None, typer.Option("--text-unit", help="What becomes one row of a text file: file, paragraph or line. Default: paragraph.")
]
DropInvalidOption = Annotated[bool, typer.Option("--drop-invalid", help="Leave out rows that are not valid instead of refusing the file.")]
SourceCredentialsOption = Annotated[
    Path | None,
    typer.Option(
        "--source-credentials",
        exists=True,
        dir_okay=False,
        help="For rows in a bucket that is not public, a JSON file: google_access_token, or access_key_id and secret_access_key.",
    ),
]


@dataclass(frozen=True)
class RowOptions:
    """How the service reads the rows and keeps them."""

    name: str | None = None
    eval_fraction: float = 0.1
    project: str | None = None
    reading: dict[str, str] = field(default_factory=dict[str, str])  # as `build_reading` makes it
    secrets: dict[str, str] = field(default_factory=dict[str, str], repr=False)  # for a source elsewhere

    @property
    def check_fields(self) -> dict[str, str]:
        """As `POST /datasets/check` takes them."""
        return {"eval_fraction": str(self.eval_fraction), **self.reading}

    @property
    def form_fields(self) -> dict[str, str]:
        """As `POST /datasets` takes them."""
        names = ({"name": self.name} if self.name else {}) | ({"project_id": self.project} if self.project else {})
        return self.check_fields | names


def build_reading(
    *,
    mapping: str | None,
    pairs: list[str] | None,
    file_format: str | None,
    encoding: str | None,
    delimiter: str | None,
    sheet: str | None,
    text_unit: str | None,
    drop_invalid: bool,
) -> dict[str, str]:
    """The form fields that say how a file is read. Raises CliError."""
    fields = {
        "format": file_format,
        "encoding": encoding,
        "delimiter": "\t" if delimiter == "\\t" else delimiter,  # as a shell lets one type it
        "sheet": sheet,
        "text_unit": text_unit,
        "mapping": _build_mapping(mapping, pairs),
        "on_invalid": "drop" if drop_invalid else None,
    }
    return {name: value for name, value in fields.items() if value is not None}


def build_secrets(source: str, hf_token: str | None, credentials: Path | None) -> dict[str, str]:
    """The secrets that reading a source takes, as form fields."""
    token = {"hf_token": hf_token} if hf_token and source.startswith("hf://") else {}
    return token | ({"source_credentials": credentials.read_text()} if credentials else {})


def _build_mapping(text: str | None, pairs: list[str] | None) -> str | None:
    """The mapping as JSON: that of --mapping, with the fields of --map."""
    mapping: Json = {}
    if text is not None:
        try:
            parsed: object = json.loads(text)
        except ValueError as error:
            hint = 'quote it for the shell: --mapping \'{"prompt": "question", "completion": "answer"}\', or use --map'
            raise CliError(f"is not JSON: {error}", hint, param="mapping") from error
        if not isinstance(parsed, dict):
            raise CliError("is not a JSON object", 'such as {"prompt": "question", "completion": "answer"}', param="mapping")
        mapping = cast(Json, parsed)
    for name, value in (parse_pairs("--map", pairs) or {}).items():
        mapping[name] = value.split(",") if name in LIST_FIELDS else value
    return json.dumps(mapping, ensure_ascii=False) if mapping else None

"""The forms with which files arrive: fields of multipart/form-data, validated as strictly as a JSON body."""

import json
from pathlib import PurePath
from typing import Annotated, cast

from fastapi import UploadFile
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from schema.base import Id, Label, Strict
from schema.ingestion import IngestOptions
from schema.placement import Hardware
from schema.types import SecretText
from service.api.json_body import parse_body
from service.api.validation_errors import BodyError
from service.core.datasets.ingestion import Upload
from service.core.errors import InvalidRequest
from service.core.jobs.secrets import HF_SECRET

CREDENTIALS_SECRET = "source_credentials"  # the name of a secret
MAX_MAPPING_CHARACTERS = 100_000
OPTION_FIELDS = tuple(IngestOptions.model_fields)


class CheckForm(BaseModel):
    """A file, and how to read it."""

    model_config = ConfigDict(extra="forbid")

    file: UploadFile | None = Field(
        None,
        description="JSONL, JSON, CSV, TSV, Parquet, Arrow, XLSX, text or Markdown, each also as .gz or .zst or in a .zip. Its name says "
        "how to read it, unless `format` does.",
    )
    incoming: str | None = Field(
        None, max_length=900, description="Instead of `file`: the key of such a file below `incoming/` of the dataset store."
    )
    format: str | None = Field(None, max_length=100, description="`jsonl`, `json`, `csv`, `parquet`, `arrow`, `xlsx` or `text`.")
    encoding: str | None = Field(None, max_length=100, description="Of a text file, such as `cp1252`. Default: UTF-8.")
    delimiter: str | None = Field(None, max_length=100, description="Of a CSV file.")
    sheet: str | None = Field(None, max_length=100, description="Of a spreadsheet. Default: the only one that has rows.")
    text_unit: str | None = Field(None, max_length=100, description="What becomes one row of a text file: `file`, `paragraph`, `line`.")
    mapping: str | None = Field(
        None,
        max_length=MAX_MAPPING_CHARACTERS,
        description="How columns become rows, as JSON; an answer shows the one that was recognized as `detected.mapping`.",
        examples=['{"prompt": "{instruction}\\n\\n{input}", "completion": "output"}'],
    )
    eval_fraction: float | None = Field(
        None, ge=0, le=0.5, allow_inf_nan=False, description="Share of the rows held out for evaluation. Default: 0.1."
    )
    on_invalid: str | None = Field(
        None, max_length=100, description="`refuse` keeps nothing if a row is not valid; `drop` keeps the others. Default: `refuse`."
    )
    base_model_id: str | None = Field(None, max_length=300, description="Count tokens with the tokenizer of this base model.")
    max_seq_length: int | None = Field(None, ge=8, le=1_048_576, description="Count the rows that are longer, in tokens.")
    full_report: bool | None = Field(
        None, description="Look for near-duplicates, languages and personal data in all rows, not in a sample. Default: false."
    )

    @field_validator("file", mode="before")
    @classmethod
    def _check_file(cls, file: object) -> object:
        if isinstance(file, str):
            raise PydanticCustomError("file", "is text; send a file with a name, as a form of a browser does: curl -F file=@rows.jsonl")
        return file

    def make_upload(self) -> Upload:
        """What the core checks or keeps. Raises InvalidRequest, and BodyError for options that are not valid."""
        if (self.file is None) == (self.incoming is None):
            raise InvalidRequest("send either the rows as `file` or their key as `incoming`, not both", param="file")
        return Upload(
            filename=self._find_filename(),
            name=sanitize_filename(self._find_filename()),
            stream=self.file.file if self.file else None,
            incoming=self.incoming,
            options=self.make_options(),
        )

    def make_options(self) -> IngestOptions:
        """The options of the form. Raises BodyError that names the field, of a mapping with its path."""
        given: dict[str, object] = {name: value for name in OPTION_FIELDS if (value := getattr(self, name)) is not None}
        if self.format is not None:
            given["format"] = self.format.lower().removeprefix(".")
        if self.mapping is not None:
            given["mapping"] = _parse_object(self.mapping, "mapping")
        try:
            return IngestOptions.model_validate(given)
        except ValidationError as error:
            raise BodyError(error, IngestOptions) from error

    def _find_filename(self) -> str:
        """The name of the file as its caller knows it."""
        return (self.file.filename if self.file else PurePath(self.incoming or "").name) or "rows"


class DatasetForm(CheckForm):
    """A file that becomes a dataset, or a source elsewhere."""

    source: str | None = Field(
        None,
        max_length=2000,
        description="Instead of `file`: `gs://`, `s3://`, `hf://dataset[:config][@revision]` or `https://`. A job reads it.",
    )
    hf_token: SecretText | None = Field(None, description="For a source on the Hugging Face Hub that is not public.")
    source_credentials: SecretStr | None = Field(
        None,
        max_length=20_000,
        description="For a bucket that is not public, as JSON: `google_access_token`, or `access_key_id` and `secret_access_key`, and "
        "where needed `session_token`, `endpoint_url`, `region`.",
    )
    name: Annotated[Label | None, Field(description="Default: the file's name.")] = None
    project_id: Id | None = None
    hardware: Annotated[str | None, Field(max_length=200, description="Profile of the job, if one is needed. Default: the cheapest.")] = (
        None
    )
    wait: bool = Field(True, description="false: answer at once with 202 and let a job read the file.")

    def make_upload(self) -> Upload:
        """What becomes a dataset. Raises InvalidRequest, and BodyError for options that are not valid."""
        if [self.file is None, self.incoming is None, self.source is None].count(False) != 1:
            message = "send the rows as `file`, or their key as `incoming`, or where they are as `source`: exactly one of the three"
            raise InvalidRequest(message, param="file")
        filename = PurePath(self.source).name or "rows" if self.source else self._find_filename()
        return Upload(
            filename=filename,
            name=self.name or sanitize_filename(self.source.partition("://")[2] if self.source else filename),
            stream=self.file.file if self.file else None,
            incoming=self.incoming,
            source=self.source,
            project_id=self.project_id,
            options=self.make_options(),
            secrets=self._collect_secrets(),
            hardware=_check_hardware(self.hardware),
            wait=self.wait,
        )

    def _collect_secrets(self) -> dict[str, str]:
        """The secrets for the source, by name. Raises InvalidRequest, BodyError."""
        secrets = {HF_SECRET: self.hf_token.get_secret_value()} if self.hf_token else {}
        if self.source_credentials is not None:
            secrets[CREDENTIALS_SECRET] = self.source_credentials.get_secret_value()
        if secrets and self.source is None:
            raise InvalidRequest("credentials are for a `source`, and there is none", param=next(iter(secrets)))
        return secrets


class _HardwareField(Strict):
    hardware: Hardware | None = None


def _check_hardware(hardware: str | None) -> Hardware | None:
    try:
        return _HardwareField(hardware=hardware).hardware
    except ValidationError as error:
        raise BodyError(error, _HardwareField) from error


def sanitize_filename(filename: str) -> str:
    """A label from a file's name, which a caller chose: printable characters only."""
    readable = "".join(c for c in PurePath(filename).name if c.isprintable())
    return readable[:128] or "unnamed dataset"


def _parse_object(text: str, param: str) -> dict[str, object]:
    """The JSON object in a field. Raises InvalidRequest."""
    hint = 'it is written like {"prompt": "question", "completion": "answer"}'
    try:
        parsed: object = parse_body(text.encode())
    except json.JSONDecodeError as error:
        message = f"{param} is not JSON: {error.msg} at character {error.pos + 1}"
        raise InvalidRequest(message, hint=hint, param=param) from error
    if not isinstance(parsed, dict):
        raise InvalidRequest(f"{param} is not a JSON object", hint=hint, param=param)
    return cast(dict[str, object], parsed)

"""Where the rows of a dataset come from, besides an upload: how a source is written, and what it names.

    incoming/rows.jsonl                   an object of the dataset bucket, which the caller put there
    gs://bucket/key, s3://bucket/key      one object; with `*`, `**` or `?` several; with a `/` at the end a folder
    hf://owner/name[:config[/split]][@revision]   the data files of a dataset of the Hugging Face Hub
    https://host/path                     one file of the web

A source names files only. Whether a caller may read them, and with whose rights, is decided elsewhere.
"""

import re
from dataclasses import dataclass
from typing import Literal

from schema.egress import EgressRefused, parse_url

INCOMING_PREFIX = "incoming/"
SOURCE_FORMS = "gs://bucket/path, s3://bucket/path, hf://owner/dataset[:config][@revision], https://host/path"
MAX_SOURCE_CHARACTERS = 2000
WILDCARDS = re.compile(r"[*?]")

_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
_HUB_SOURCE = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]{0,95}(?:/[A-Za-z0-9][\w.-]{0,95})?)"
    r"(?::(?P<config>[^@/:\s]{1,100})(?:/(?P<split>[^@/:\s]{1,100}))?)?"
    r"(?:@(?P<revision>[\w./-]{1,200}))?"
)


class InvalidSource(ValueError):
    """A text that names no source. The message says what is wrong, the hint what would work."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True)
class IncomingSource:
    """An object of the dataset bucket."""

    key: str

    @property
    def kind(self) -> str:
        """Which reader takes it."""
        return "incoming"


@dataclass(frozen=True)
class BucketSource:
    """One or several objects of a bucket."""

    scheme: Literal["gs", "s3"]
    bucket: str
    pattern: str  # a key, a folder that ends in "/", or a key with wildcards

    @property
    def kind(self) -> str:
        """Which reader takes it."""
        return self.scheme

    @property
    def is_single(self) -> bool:
        """Whether the pattern is one key."""
        return not self.pattern.endswith("/") and WILDCARDS.search(self.pattern) is None

    @property
    def prefix(self) -> str:
        """What the keys begin with: the pattern up to its first wildcard."""
        return WILDCARDS.split(self.pattern, maxsplit=1)[0]

    @property
    def folder(self) -> str:
        """The folder that has all the keys: empty, or ends in "/"."""
        return self.prefix[: self.prefix.rfind("/") + 1]

    def matches(self, key: str) -> bool:
        """Whether the source names that object. In a folder, hidden files and markers such as `_SUCCESS` are left out."""
        if self.pattern.endswith("/"):
            return key.startswith(self.pattern) and not key.endswith("/") and not key.rpartition("/")[2].startswith((".", "_"))
        return re.fullmatch(_translate(self.pattern), key, re.DOTALL) is not None


@dataclass(frozen=True)
class HubSource:
    """The data files of a repository of the Hub, of one of its configurations and splits."""

    repo_id: str
    config: str | None = None
    split: str | None = None
    revision: str | None = None

    @property
    def kind(self) -> str:
        """Which reader takes it."""
        return "hf"


@dataclass(frozen=True)
class WebSource:
    """A file of the web."""

    url: str

    @property
    def kind(self) -> str:
        """Which reader takes it."""
        return "https"

    @property
    def without_query(self) -> str:
        """The URL without what follows a `?`, which may be a signature."""
        return re.split(r"[?#]", self.url, maxsplit=1)[0]


Source = IncomingSource | BucketSource | HubSource | WebSource


def parse_source(text: str) -> Source:
    """What a source names. Raises InvalidSource."""
    scheme, separator, rest = text.partition("://")
    if len(text) > MAX_SOURCE_CHARACTERS or any(ord(c) < 32 for c in text):
        raise InvalidSource("a source is one line of at most 2000 characters", f"known forms: {SOURCE_FORMS}")
    if not separator and text.startswith(INCOMING_PREFIX):
        return IncomingSource(text)
    match scheme:
        case "gs" | "s3" if separator:
            return _parse_bucket(scheme, rest)
        case "hf" if separator:
            return _parse_hub(rest)
        case "https" | "http" if separator:
            return _parse_web(text)
        case _:
            raise InvalidSource(f"{_shorten(text)} is no source", f"known forms: {SOURCE_FORMS}")


def _parse_bucket(scheme: Literal["gs", "s3"], rest: str) -> BucketSource:
    bucket, _, pattern = rest.partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise InvalidSource(f"{_shorten(bucket)} is no name of a bucket", f"write {scheme}://bucket/path")
    parts = pattern.removesuffix("/").split("/")
    if not pattern or len(pattern.encode()) > 900 or any(part in ("", ".", "..") for part in parts):
        hint = f"name a file, files such as {scheme}://{bucket}/folder/*.jsonl, or a folder, which ends in /"
        raise InvalidSource(f"{_shorten(pattern)} is no path in {scheme}://{bucket}", hint)
    return BucketSource(scheme, bucket, pattern)


def _parse_hub(rest: str) -> HubSource:
    found = _HUB_SOURCE.fullmatch(rest.removeprefix("datasets/"))
    if found is None:
        raise InvalidSource(f"hf://{_shorten(rest)} names no dataset of the Hub", "write hf://owner/dataset[:config[/split]][@revision]")
    return HubSource(found["repo"], found["config"], found["split"], found["revision"])


def _parse_web(url: str) -> WebSource:
    try:
        parse_url(url)
    except EgressRefused as error:
        raise InvalidSource(str(error), error.hint) from error
    return WebSource(url)


def _translate(pattern: str) -> str:
    """The regular expression of a pattern. A `*` ends at a `/`, two do not."""
    forms = {"**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(forms.get(part, re.escape(part)) for part in re.split(r"(\*\*|\*|\?)", pattern))


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 100 else f"{text[:99]}…")

"""The encoding of text files: UTF-8, UTF-16 or UTF-32 with a byte order mark, or the one that the request names.

What a file of another encoding may be is suggested in the error, and never assumed.
"""

import codecs
import io
from typing import BinaryIO, TextIO

from jobs.ingest.formats.parts import SAMPLE_BYTES, Part
from jobs.ingest.records import InvalidInput
from schema.ingestion import IngestOptions

# The UTF-32 mark begins with that of UTF-16, so it comes first. These codecs drop the mark.
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
GUESS_BYTES = 1 << 14  # around the first byte that is not UTF-8
SHOWN_NAMES = {"utf-8-sig": "utf-8"}


def choose_encoding(sample: bytes, options: IngestOptions) -> str:
    """The codec of a file that begins with the sample. Raises InvalidInput for a name that is no encoding of text."""
    if options.encoding:
        try:
            info = codecs.lookup(options.encoding)
            # Codecs such as hex, which are not of text, raise LookupError; others that decode no file raise UnicodeError.
            io.TextIOWrapper(io.BytesIO("\n".encode(options.encoding)), options.encoding, errors="replace").read()
        except (LookupError, UnicodeError) as error:
            raise InvalidInput(
                f"no encoding {options.encoding!r}", "some that are known: utf-8, utf-16, cp1252, latin-1, gb18030", "encoding"
            ) from error
        return "utf-8-sig" if info.name == "utf-8" else info.name
    return next((codec for mark, codec in BYTE_ORDER_MARKS if sample.startswith(mark)), "utf-8-sig")


def describe_encoding(codec: str) -> str:
    """The name of a codec, for people."""
    return SHOWN_NAMES.get(codec, codec)


def decode_sample(part: Part, sample: bytes, codec: str) -> str:
    """The text of a sample, which may end within a character. Raises InvalidInput."""
    try:
        return codecs.getincrementaldecoder(codec)("strict").decode(sample)
    except UnicodeError as error:
        raise refuse_encoding(part, codec) from error


def open_text(part: Part, codec: str, newline: str) -> TextIO:
    """The text of a part, with its line ends as they are; `newline` is that of `io.TextIOWrapper`."""
    return io.TextIOWrapper(part.open(), codec, newline=newline)


def refuse_encoding(part: Part, codec: str) -> InvalidInput:
    """The error for a part that cannot be decoded: where, and what it may be. It reads the part once more, up to there."""
    decoder = codecs.getincrementaldecoder(codec)("strict")
    offset, before = 0, b""
    with part.open() as stream:
        while True:
            block = stream.read(SAMPLE_BYTES)
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                position = offset - pending + error.start
                return _describe(part, codec, position, _cut(before + block, position - offset + len(before)))
            except UnicodeError as error:  # of UTF-16 and UTF-32 without a byte order mark
                hint = f"name the order of its bytes: encoding={codec}-le or {codec}-be"
                return part.refuse(f"is not {codec}: {error}", hint, "encoding")
            offset += len(block)
            before = block
            if not block:
                return part.refuse(f"is not {describe_encoding(codec)}", "name its encoding, for example encoding=cp1252", "encoding")


def _cut(window: bytes, position: int) -> bytes:
    return window[max(0, position - GUESS_BYTES // 2) : position + GUESS_BYTES // 2]


def _describe(part: Part, codec: str, position: int, window: bytes) -> InvalidInput:
    message = f"is not {describe_encoding(codec).upper()} at byte {position + 1:,}"
    guess = _guess(window)
    hint = f"it looks like {guess}: send encoding={guess}, or save it as UTF-8" if guess else "save it as UTF-8, or name its encoding"
    return part.refuse(message, hint, "encoding")


def _guess(window: bytes) -> str | None:
    """What the bytes may be encoded in, if that can be told."""
    from charset_normalizer import from_bytes  # takes 50 ms to import, and is needed for an error only

    matches = from_bytes(window)
    best = matches.best()
    if best is None or best.encoding == "ascii":
        return None
    as_good = [match for match in matches if (match.chaos, match.coherence) == (best.chaos, best.coherence)]
    # Of code pages that fit as well, the one of Windows in the West is the most frequent.
    return "cp1252" if any("cp1252" in (match.encoding, *match.could_be_from_charset) for match in as_good) else best.encoding


class Utf8Stream(io.RawIOBase):
    """The bytes of a text in UTF-8, whatever it was encoded in."""

    def __init__(self, text: TextIO) -> None:
        self._text = text
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]  # of any buffer, io.BufferedReader passes a memoryview
        if not self._rest:
            self._rest = self._text.read(len(buffer)).encode("utf-8", "surrogatepass")
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size

    def close(self) -> None:
        self._text.close()
        super().close()


def open_utf8(part: Part, codec: str) -> BinaryIO:
    """The part as UTF-8."""
    return io.BufferedReader(Utf8Stream(open_text(part, codec, newline="")))

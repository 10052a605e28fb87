"""The files that hold the records: as they were sent, or inside an archive. Each can be read again from its beginning.

What a compressed file becomes is counted while it is read, so that a decompression bomb ends at the limit, not at the end of the memory.
"""

import gzip
import io
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

from jobs.ingest.records import InvalidInput
from jobs.ingest.rows.values import ProblemCode
from schema.ingestion import IngestLimits, RowProblem

SAMPLE_BYTES = 1 << 16  # of a part, by which its format is recognized
BUFFER_BYTES = 1 << 20
# What text is compressed to is seldom under a twentieth, and 1,000 equal rows of a dataset are worth one. Small files may be anything.
MAX_RATIO = 250
RATIO_FREE_BYTES = 64 << 20
ZSTD_CHUNK_BYTES = 1 << 12  # at most 32,768 times as long after decompression
ZSTD_WINDOW_BYTES = 128 << 20  # what `zstd` itself accepts without --long


class Meter:
    """Counts what one pass over the files has read."""

    def __init__(self, limits: IngestLimits) -> None:
        self.bytes_read = 0  # of the files as they are
        self.bytes_unpacked = 0
        self._limits = limits

    def start(self) -> None:
        """Begin a new pass."""
        self.bytes_read = self.bytes_unpacked = 0

    def add_unpacked(self, size: int) -> None:
        """Count bytes after decompression. Raises InvalidInput."""
        self.bytes_unpacked += size
        if self.bytes_unpacked > self._limits.max_total_bytes:
            raise InvalidInput(f"is more than {self._limits.max_total_bytes:,} bytes after decompression", "split it into several datasets")


class MeteredFile(io.FileIO):
    """A local file whose reads are counted."""

    def __init__(self, path: str | Path, meter: Meter) -> None:
        super().__init__(path, "rb")
        self._meter = meter

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]  # of any buffer, io.BufferedReader passes a memoryview
        size = super().readinto(buffer)
        self._meter.bytes_read += size
        return size


@dataclass(frozen=True)
class Part:
    """One file with records."""

    name: str  # with its suffix, as it is after decompression; in an archive with its folders
    open: Callable[[], BinaryIO]  # from its beginning
    scratch_folder: Path  # where it may be unpacked if it must be read in any order
    meter: Meter = field(repr=False)
    path: Path | None = None  # if it is a file as it is
    size_bytes: int | None = None  # if it is known
    label: str = ""  # in messages; empty if it is the only part

    @property
    def suffix(self) -> str:
        """In lower case, with its dot; empty if there is none."""
        return Path(self.name).suffix.lower()

    def read_sample(self) -> bytes:
        """Its beginning."""
        with self.open() as stream:
            return stream.read(SAMPLE_BYTES)

    @contextmanager
    def open_seekable(self) -> Iterator[BinaryIO]:
        """The part for a reader that needs it in any order: the file itself, or a temporary copy, gone afterwards."""
        if self.path:
            with io.BufferedReader(MeteredFile(self.path, self.meter), BUFFER_BYTES) as stream:
                yield stream
            return
        with tempfile.TemporaryFile(dir=self.scratch_folder) as copy, self.open() as stream:
            while block := stream.read(BUFFER_BYTES):
                copy.write(block)
            copy.seek(0)
            yield copy

    def refuse(self, message: str, hint: str = "", param: str = "file") -> InvalidInput:
        """The error that this part cannot be read; the message continues its name."""
        return InvalidInput(f"{self.label or self.name} {message}", hint, param)

    def problem(self, line: int, reason: str, code: ProblemCode, *, field: str = "", is_row: bool = False) -> RowProblem:
        """What is wrong with one of its rows."""
        return RowProblem(part=self.label, line=line, unit="row" if is_row else "line", field=field, reason=reason, code=code)


class ByteSource(Protocol):
    """What bytes are read from."""

    def read(self, size: int, /) -> bytes: ...

    def close(self) -> None: ...


class Unpacked(io.RawIOBase):
    """What a compressed stream becomes, counted. A broken stream raises InvalidInput."""

    def __init__(self, stream: ByteSource, meter: Meter, name: str, compressed_size: Callable[[], int]) -> None:
        self._stream = stream
        self._meter = meter
        self._name = name
        self._compressed_size = compressed_size  # of what was read so far
        self._size = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]  # as in MeteredFile
        try:
            block = self._stream.read(min(len(buffer), BUFFER_BYTES))
        except InvalidInput:
            raise
        except (EOFError, OSError, zlib.error) as error:  # BadGzipFile is an OSError
            raise InvalidInput(f"{self._name} is broken: {error}", "it may have been cut off; send it again") from error
        self._size += len(block)
        self._meter.add_unpacked(len(block))
        if self._size > RATIO_FREE_BYTES and self._size > MAX_RATIO * self._compressed_size():
            raise refuse_bomb(self._name)
        buffer[: len(block)] = block
        return len(block)

    def close(self) -> None:
        self._stream.close()
        super().close()


def refuse_bomb(name: str) -> InvalidInput:
    """The error for what becomes far longer than data would."""
    return InvalidInput(
        f"{name} becomes more than {MAX_RATIO} times as long when it is decompressed", "send it without compression, or drop repeated rows"
    )


def open_gzip(path: Path, name: str, meter: Meter) -> BinaryIO:
    """The content of a .gz file."""
    file = MeteredFile(path, meter)
    source = io.BufferedReader(file, BUFFER_BYTES)
    stream = gzip.GzipFile(fileobj=source, mode="rb")
    return io.BufferedReader(Unpacked(_Closing(stream, source), meter, name, source.tell), BUFFER_BYTES)


def open_zstd(path: Path, name: str, meter: Meter) -> BinaryIO:
    """The content of a .zst file."""
    source = io.BufferedReader(MeteredFile(path, meter), BUFFER_BYTES)
    return io.BufferedReader(Unpacked(io.BufferedReader(_ZstdStream(source)), meter, name, source.tell), BUFFER_BYTES)


class _Closing:
    """A stream that closes what it reads from."""

    def __init__(self, stream: gzip.GzipFile, source: BinaryIO) -> None:
        self._stream = stream
        self._source = source

    def read(self, size: int, /) -> bytes:
        return self._stream.read(size)

    def close(self) -> None:
        self._stream.close()
        self._source.close()


class _ZstdStream(io.RawIOBase):
    """Frames of zstd, one after another. Unlike the library's reader it notices a frame that is cut off."""

    def __init__(self, source: BinaryIO) -> None:
        import zstandard  # only where it is needed: the service's tests run without it

        self._error = zstandard.ZstdError
        self._make = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES).decompressobj
        self._source = source
        self._frame = self._make()
        self._is_inside = False  # a frame
        self._rest = b""  # of what was read, from the next frame on
        self._output = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]  # as in MeteredFile
        while not self._output:
            chunk = self._rest or self._source.read(ZSTD_CHUNK_BYTES)
            if not chunk:
                if self._is_inside:
                    raise EOFError("it ends before its end marker")
                return 0
            self._decompress(chunk)
        size = min(len(buffer), len(self._output))
        buffer[:size] = self._output[:size]
        self._output = self._output[size:]
        return size

    def _decompress(self, chunk: bytes) -> None:
        try:
            self._output = self._frame.decompress(chunk)
        except self._error as error:
            raise OSError(str(error)) from error
        self._rest = b""
        self._is_inside = not self._frame.eof
        if self._frame.eof:
            self._rest = self._frame.unused_data
            self._frame = self._make()

    def close(self) -> None:
        self._source.close()
        super().close()

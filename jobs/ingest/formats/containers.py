"""From the files of a request to the parts that hold records: .gz, .zst and .zip, folders, and data sets that were saved to disk."""

import io
import stat
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO, Literal, NamedTuple, cast

from jobs.ingest.formats.parts import (
    BUFFER_BYTES,
    MAX_RATIO,
    RATIO_FREE_BYTES,
    Meter,
    MeteredFile,
    Part,
    Unpacked,
    open_gzip,
    open_zstd,
    refuse_bomb,
)
from jobs.ingest.records import InvalidInput
from schema.ingestion import IngestLimits, InputFile

GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
ZIP_MAGICS = (b"PK\x03\x04", b"PK\x05\x06")
OFFICE_MEMBERS = {"[content_types].xml", "mimetype"}  # of .xlsx, .docx and .ods, which are .zip files too
READABLE_COMPRESSION = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # others may take gigabytes to decompress

Container = Literal["gzip", "zstd", "zip", "folder"]


class Contents(NamedTuple):
    """The parts of the files of a request, in their order."""

    parts: tuple[Part, ...]
    container: Container | None


def open_container(files: Sequence[InputFile], limits: IngestLimits, meter: Meter) -> Contents:
    """The parts of the files. Raises InvalidInput."""
    if not files:
        raise InvalidInput("there are no files")
    if len(files) > limits.max_parts:
        raise _refuse_many(f"{len(files):,} files", limits)
    if len(files) == 1:
        return _open_file(files[0], limits, meter)
    inner = [_open_file(file, limits, meter) for file in files]
    for file, contents in zip(files, inner, strict=True):
        if contents.container == "zip":
            raise InvalidInput(f"{file.name} is an archive beside other files", "send each archive by itself")
    return Contents(_label([part for contents in inner for part in contents.parts]), "folder")


def _open_file(file: InputFile, limits: IngestLimits, meter: Meter) -> Contents:
    path = Path(file.path)
    name = file.name or path.name
    with path.open("rb") as stream:
        magic = stream.read(4)
    if magic.startswith(GZIP_MAGIC):
        inner = _drop_suffix(name, (".gz", ".gzip"))
        return Contents((Part(inner, lambda: open_gzip(path, name, meter), path.parent, meter),), "gzip")
    if magic == ZSTD_MAGIC:
        inner = _drop_suffix(name, (".zst", ".zstd"))
        return Contents((Part(inner, lambda: open_zstd(path, name, meter), path.parent, meter),), "zstd")
    if magic in ZIP_MAGICS:
        archive = _Archive(path, name, limits, meter)
        if not archive.is_document:
            return Contents(_label(archive.list_parts()), "zip")
    part = Part(name, lambda: io.BufferedReader(MeteredFile(path, meter), BUFFER_BYTES), path.parent, meter, path, path.stat().st_size)
    return Contents((part,), None)


def _drop_suffix(name: str, suffixes: tuple[str, ...]) -> str:
    return name[: -len(Path(name).suffix)] if name.lower().endswith(suffixes) else name


def _label(parts: Sequence[Part]) -> tuple[Part, ...]:
    if len(parts) == 1:
        return tuple(parts)
    return tuple(Part(part.name, part.open, part.scratch_folder, part.meter, part.path, part.size_bytes, part.name) for part in parts)


class _Archive:
    """A .zip file."""

    def __init__(self, path: Path, name: str, limits: IngestLimits, meter: Meter) -> None:
        self._path = path
        self._name = name
        self._limits = limits
        self._meter = meter
        try:
            with zipfile.ZipFile(path) as archive:
                self._members = archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
            raise InvalidInput(f"{name} is a broken .zip file: {error}", "it may have been cut off; pack it again") from error
        self.is_document = any(member.filename.lower() in OFFICE_MEMBERS for member in self._members)

    def list_parts(self) -> list[Part]:
        """The members that may hold records, in the order of their names. Raises InvalidInput."""
        if len(self._members) > self._limits.max_parts:
            raise _refuse_many(f"{self._name} has {len(self._members):,} files", self._limits)
        members = [member for member in self._members if not member.is_dir() and not _is_hidden(member.filename)]
        for member in members:
            self._check_member(member)
        total = sum(member.file_size for member in members)
        if total > self._limits.max_total_bytes:
            message = f"{self._name} has {total:,} bytes after decompression; at most {self._limits.max_total_bytes:,} are read"
            raise InvalidInput(message, "split it into several datasets")
        if not members:
            raise InvalidInput(f"{self._name} has no files in it", "pack the files of the dataset")
        return [self._make_part(member) for member in sorted(members, key=lambda member: member.filename)]

    def _check_member(self, member: zipfile.ZipInfo) -> None:
        name = f"{self._name}: {member.filename}"
        original = member.orig_filename.replace("\\", "/")
        if original.startswith("/") or ".." in PurePosixPath(original).parts or original[1:2] == ":":
            raise InvalidInput(f"{name} has a path outside the archive", "pack the files with relative names")
        if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG):
            raise InvalidInput(f"{name} is a link or a device, not a file", "pack the file itself")
        if member.flag_bits & 0x1:
            raise InvalidInput(f"{name} is encrypted", "pack it without a password")
        if member.compress_type not in READABLE_COMPRESSION:
            raise InvalidInput(
                f"{name} is compressed by method {member.compress_type}, which is not read", "pack it with deflate, the usual method"
            )
        if member.file_size > RATIO_FREE_BYTES and member.file_size > MAX_RATIO * member.compress_size:
            raise refuse_bomb(name)

    def _make_part(self, member: zipfile.ZipInfo) -> Part:
        return Part(
            member.filename,
            lambda: self._open_member(member),
            self._path.parent,
            self._meter,
            size_bytes=member.file_size,
        )

    def _open_member(self, member: zipfile.ZipInfo) -> BinaryIO:
        name = f"{self._name}: {member.filename}"
        try:
            archive = zipfile.ZipFile(cast(BinaryIO, io.BufferedReader(MeteredFile(self._path, self._meter), BUFFER_BYTES)))
            stream = archive.open(member)
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
            raise InvalidInput(f"{name} is broken: {error}", "pack it again") from error
        return io.BufferedReader(Unpacked(_Member(stream, archive), self._meter, name, lambda: member.compress_size), BUFFER_BYTES)


class _Member:
    """The stream of a member, which closes its archive."""

    def __init__(self, stream: IO[bytes], archive: zipfile.ZipFile) -> None:
        self._stream = stream
        self._archive = archive

    def read(self, size: int, /) -> bytes:
        try:
            return self._stream.read(size)
        except zipfile.BadZipFile as error:
            raise OSError(str(error)) from error

    def close(self) -> None:
        file = self._archive.fp
        self._stream.close()
        self._archive.close()
        if file:  # which the archive leaves open, because it did not open it
            file.close()


def _is_hidden(name: str) -> bool:
    """Whether a file belongs to the system that packed the archive."""
    return any(step == "__MACOSX" or (step.startswith(".") and step not in (".", "..")) for step in name.split("/")) or name.endswith(
        "Thumbs.db"
    )


def _refuse_many(found: str, limits: IngestLimits) -> InvalidInput:
    return InvalidInput(f"{found}; at most {limits.max_parts:,} are read", "join them into fewer files")

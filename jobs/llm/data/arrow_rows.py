"""Tokenized rows in memory-mapped Arrow files: rows that are read from disk as they are needed, whatever their number.

    RowFileWriter   writes rows to one file, as record batches
    ArrowRows       the rows of one or several files, a sequence; pickled, it is the paths of its files
    ArrowPairs      the same rows two by two: the chosen and the rejected answer of each preference

A file stores token ids as int32, labels as spans (the token itself is its label), and the texts of the first prompts, which reports show.
A million rows of 300 tokens are 1.2 GB on disk; in memory they are 40 MB of positions, and the pages of the file that were read last,
which the kernel takes back when memory is short.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, overload

from jobs.llm.data.tokenize import IGNORE_INDEX, TokenizedExample

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from jobs.llm.data.preference import PreferencePair

BATCH_ROWS = 1024  # of a record batch
PROMPT_TEXTS = 256  # of each file; reports and exports show the first held-out prompts only
METADATA_KEY = b"tunesmith"  # of a compressed file's schema


class RowFileWriter:
    """Writes rows to an Arrow file. A context manager: the file is complete when the block ends without an error."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        self._pa = pa
        self._schema = pa.schema(
            [
                ("input_ids", pa.large_list(pa.int32())),
                ("label_spans", pa.large_list(pa.int32())),  # start and end, by turns
                ("prompt_tokens", pa.int32()),
                ("prompt_text", pa.string()),  # null beyond PROMPT_TEXTS
            ]
        )
        self._writer = pa.ipc.new_file(str(path), self._schema)
        self._pending: list[TokenizedExample] = []
        self.rows = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._writer.close()

    def write(self, row: TokenizedExample) -> None:
        """Append a row."""
        self._pending.append(row)
        if len(self._pending) == BATCH_ROWS:
            self._flush()

    def _flush(self) -> None:
        rows, pa = self._pending, self._pa
        if not rows:
            return
        texts = [row.prompt_text if self.rows + n < PROMPT_TEXTS else None for n, row in enumerate(rows)]
        self._writer.write_batch(
            pa.record_batch(
                [
                    pa.array([row.input_ids for row in rows], pa.large_list(pa.int32())),
                    pa.array([find_label_spans(row.labels) for row in rows], pa.large_list(pa.int32())),
                    pa.array([row.prompt_tokens for row in rows], pa.int32()),
                    pa.array(texts, pa.string()),
                ],
                schema=self._schema,
            )
        )
        self.rows += len(rows)
        self._pending = []


def find_label_spans(labels: Sequence[int]) -> list[int]:
    """The start and end of each run of labels, by turns."""
    spans: list[int] = []
    is_labeled = False
    for n, label in enumerate(labels):
        if (label != IGNORE_INDEX) != is_labeled:
            spans.append(n)
            is_labeled = not is_labeled
    return [*spans, len(labels)] if is_labeled else spans


@dataclass(frozen=True)
class _Batch:
    """The columns of one record batch as arrays over the mapped file."""

    tokens: "NDArray[np.int32]"  # of all rows, one after the other
    token_ends: "NDArray[np.int64]"  # with a leading first start
    spans: "NDArray[np.int32]"
    span_ends: "NDArray[np.int64]"
    prompt_tokens: "NDArray[np.int32]"
    prompt_texts: Any  # pyarrow.StringArray


class ArrowRows(Sequence[TokenizedExample]):
    """The rows of Arrow files, in order. The files must not change while it exists."""

    def __init__(self, paths: Sequence[Path]) -> None:
        import numpy as np

        self.paths = tuple(paths)
        self._batches = [batch for path in self.paths for batch in _map_batches(path)]
        counts = [len(batch.prompt_tokens) for batch in self._batches]
        self._batch_ends = np.cumsum(np.array(counts, np.int64)) if counts else np.zeros(0, np.int64)

    def __reduce__(self) -> tuple[type[Self], tuple[tuple[Path, ...]]]:
        return type(self), (self.paths,)

    def __len__(self) -> int:
        return int(self._batch_ends[-1]) if len(self._batch_ends) else 0

    def __iter__(self) -> Iterator[TokenizedExample]:
        return (_read_row(batch, n) for batch in self._batches for n in range(len(batch.prompt_tokens)))

    @overload
    def __getitem__(self, index: int) -> TokenizedExample: ...

    @overload
    def __getitem__(self, index: slice) -> list[TokenizedExample]: ...

    def __getitem__(self, index: int | slice) -> TokenizedExample | list[TokenizedExample]:
        if isinstance(index, slice):
            return [self[n] for n in range(*index.indices(len(self)))]
        size = len(self)
        if not -size <= index < size:
            raise IndexError(f"row {index} of {size}")
        position = index % size
        batch = int(self._batch_ends.searchsorted(position, side="right"))
        start = int(self._batch_ends[batch - 1]) if batch else 0
        return _read_row(self._batches[batch], position - start)

    @property
    def lengths(self) -> "NDArray[np.int64]":
        """The number of tokens of each row."""
        import numpy as np

        return np.concatenate([np.diff(batch.token_ends) for batch in self._batches]) if self._batches else np.zeros(0, np.int64)

    def find_tokens(self, token_ids: Collection[int]) -> set[int]:
        """Those of the tokens that occur in any row."""
        import numpy as np

        found: set[int] = set()
        for batch in self._batches:
            tokens = batch.tokens[int(batch.token_ends[0]) : int(batch.token_ends[-1])]
            wanted = np.array(sorted(set(token_ids) - found), np.int32)
            found.update(tokens[np.isin(tokens, wanted)].tolist())
        return found


class ArrowPairs(Sequence["PreferencePair"]):
    """Pairs of rows that follow each other: the chosen answer, then the rejected one."""

    def __init__(self, rows: Sequence[TokenizedExample]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows) // 2

    @overload
    def __getitem__(self, index: int) -> "PreferencePair": ...

    @overload
    def __getitem__(self, index: slice) -> "list[PreferencePair]": ...

    def __getitem__(self, index: int | slice) -> "PreferencePair | list[PreferencePair]":
        from jobs.llm.data.preference import PreferencePair

        if isinstance(index, slice):
            return [self[n] for n in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        position = 2 * (index % len(self))
        return PreferencePair(self.rows[position], self.rows[position + 1])

    @property
    def chosen(self) -> "ChosenRows":
        """The chosen answers, in order."""
        return ChosenRows(self)


class ChosenRows(Sequence[TokenizedExample]):
    """The chosen answer of each pair."""

    def __init__(self, pairs: Sequence["PreferencePair"]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    @overload
    def __getitem__(self, index: int) -> TokenizedExample: ...

    @overload
    def __getitem__(self, index: slice) -> list[TokenizedExample]: ...

    def __getitem__(self, index: int | slice) -> TokenizedExample | list[TokenizedExample]:
        return [pair.chosen for pair in self.pairs[index]] if isinstance(index, slice) else self.pairs[index].chosen


def count_lengths(rows: Sequence[TokenizedExample]) -> "NDArray[np.int64]":
    """The number of tokens of each row."""
    import numpy as np

    return rows.lengths if isinstance(rows, ArrowRows) else np.array([len(row.input_ids) for row in rows], np.int64)


def find_tokens(rows: Iterable[TokenizedExample], token_ids: Collection[int]) -> set[int]:
    """Those of the tokens that occur in any row."""
    if isinstance(rows, ArrowRows):
        return rows.find_tokens(token_ids)
    wanted, found = set(token_ids), set[int]()
    for row in rows:
        found |= wanted.intersection(row.input_ids)
    return found


def _map_batches(path: Path) -> Iterator[_Batch]:
    """The record batches of a file, mapped. Raises ValueError (pyarrow.ArrowInvalid) for a damaged file, OSError."""
    import numpy as np
    import pyarrow as pa

    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    for number in range(reader.num_record_batches):
        ids, spans, prompt_tokens, prompt_texts = reader.get_batch(number).columns
        yield _Batch(
            np.asarray(ids.values),
            np.asarray(ids.offsets),
            np.asarray(spans.values),
            np.asarray(spans.offsets),
            np.asarray(prompt_tokens),
            prompt_texts,
        )


def _read_row(batch: _Batch, n: int) -> TokenizedExample:
    input_ids = batch.tokens[batch.token_ends[n] : batch.token_ends[n + 1]].tolist()
    spans = batch.spans[batch.span_ends[n] : batch.span_ends[n + 1]].tolist()
    labels = [IGNORE_INDEX] * len(input_ids)
    for start, end in zip(spans[::2], spans[1::2], strict=True):
        labels[start:end] = input_ids[start:end]
    text = batch.prompt_texts[n].as_py() or ""
    return TokenizedExample(input_ids, labels, text, int(batch.prompt_tokens[n]))


def compress_rows(rows: ArrowRows, path: Path, metadata: bytes) -> None:
    """Write the rows to one compressed Arrow file, with metadata of the caller's."""
    import pyarrow as pa

    readers = [pa.ipc.open_file(pa.memory_map(str(source))) for source in rows.paths]
    schema = readers[0].schema.with_metadata({METADATA_KEY: metadata})
    with pa.ipc.new_file(str(path), schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        for reader in readers:
            for number in range(reader.num_record_batches):
                writer.write_batch(reader.get_batch(number).replace_schema_metadata(schema.metadata))


def decompress_rows(path: Path, target: Path) -> bytes:
    """Write the rows of a compressed file to one that can be mapped; returns the caller's metadata.

    Raises ValueError (pyarrow.ArrowInvalid), KeyError or OSError for a damaged file.
    """
    import pyarrow as pa

    with pa.ipc.open_file(str(path)) as reader:
        metadata = (reader.schema.metadata or {})[METADATA_KEY]
        with pa.ipc.new_file(str(target), reader.schema) as writer:
            for number in range(reader.num_record_batches):
                batch = reader.get_batch(number)
                batch.validate(full=True)
                writer.write_batch(batch)
    return metadata

"""Renders the rows of a split to tokens, into memory-mapped files; in several processes where there are rows enough.

Each process takes a range of the file's lines and writes its own part, so the order of the rows is that of the file, however many
processes there are. `render_process.py` is such a process.
"""

import json
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jobs.llm.data.arrow_rows import ArrowRows, RowFileWriter
from jobs.llm.data.preference import tokenize_pairs, tokenize_unpaired
from jobs.llm.data.tokenize import TokenizedExample, tokenize_split
from jobs.runtime.errors import JobFailed
from jobs.runtime.settings import cpu_thread_count
from jobs.runtime.subprocesses import SubprocessFailed, run_modules
from schema.base import ForwardCompatible
from schema.job import Failure
from schema.types import DatasetType

if TYPE_CHECKING:
    from jobs.llm.data.tokenize import RowTokenizer

# rows      one answer, or several, to learn from each row
# pairs     the chosen and the rejected answer of each row, one after the other
# unpaired  one answer of each row, and whether it is good
Layout = Literal["rows", "pairs", "unpaired"]

CHUNK_ROWS = 1024  # tokenized at a time
MIN_BYTES_PER_PROCESS = 8 << 20  # of rows: about as much work as starting the process


@dataclass(frozen=True)
class RenderSettings:
    """How rows become tokens. Pickled to the processes that render."""

    layout: Layout
    dataset_type: DatasetType
    max_length: int  # tokens
    row_tokenizer: "RowTokenizer"


class RenderRequest(ForwardCompatible):
    """The part of a split that one process renders. `settings` is a file with pickled RenderSettings."""

    settings: str
    rows: str
    start: int  # in bytes, at the beginning of a line
    end: int
    target: str


class RenderResponse(ForwardCompatible):
    """What a part has beside its rows, or why it could not be rendered."""

    truncated: int = 0  # rows longer than the maximum length
    dropped: int = 0  # rows without anything to learn within it
    good_flags: str = ""  # of layout `unpaired`: 1 or 0 for each row
    failure: Failure | None = None


@dataclass(frozen=True)
class RenderedSplit:
    """The tokens of a split. `good_flags` has one entry per row with layout `unpaired`, else none."""

    rows: ArrowRows
    truncated: int
    dropped: int
    good_flags: tuple[bool, ...] = ()


def render_split(
    path: Path, settings: RenderSettings, folder: Path, check_stop: Callable[[], None], processes: int | None = None
) -> RenderedSplit:
    """Render the rows of a JSONL file into `folder`; `processes` is by default what the file and the machine suggest.

    Raises JobFailed for a row that cannot be rendered, and what `check_stop` raises.
    """
    folder.mkdir(parents=True, exist_ok=True)
    size = path.stat().st_size
    count = processes or max(1, min(cpu_thread_count(), size // MIN_BYTES_PER_PROCESS))
    targets = [folder / f"part-{number}.arrow" for number in range(count)]
    if count == 1:
        responses = [render_range(settings, path, 0, size, targets[0], check_stop)]
    else:
        responses = _render_in_processes(path, settings, targets, folder, check_stop)
    return RenderedSplit(
        ArrowRows(targets),
        truncated=sum(response.truncated for response in responses),
        dropped=sum(response.dropped for response in responses),
        good_flags=tuple(flag == "1" for response in responses for flag in response.good_flags),
    )


def render_range(
    settings: RenderSettings, path: Path, start: int, end: int, target: Path, check_stop: Callable[[], None] = lambda: None
) -> RenderResponse:
    """Render the lines of a file from byte `start` to `end` into one Arrow file. Raises JobFailed."""
    truncated = dropped = 0
    flags: list[bool] = []
    with RowFileWriter(target) as writer:
        lines = _read_lines(path, start, end)
        while rows := [json.loads(line) for line in islice(lines, CHUNK_ROWS)]:
            check_stop()
            chunk = _tokenize_chunk(rows, settings)
            for row in chunk.rows:
                writer.write(row)
            truncated, dropped = truncated + chunk.truncated, dropped + chunk.dropped
            flags += chunk.good_flags
    return RenderResponse(truncated=truncated, dropped=dropped, good_flags="".join("1" if flag else "0" for flag in flags))


def find_line_starts(path: Path, count: int) -> list[int]:
    """Where `count` parts of about equal size begin, at the beginnings of lines, followed by the size of the file."""
    size = path.stat().st_size
    starts = [0]
    with path.open("rb") as file:
        for number in range(1, count):
            file.seek(max(starts[-1], number * size // count - 1))
            file.readline()  # the rest of the line in which the part would begin; all of it ends the part before
            starts.append(max(starts[-1], file.tell()))
    return [*starts, size]


@dataclass(frozen=True)
class _Chunk:
    """The tokens of some rows in the order in which they are written."""

    rows: Sequence[TokenizedExample]
    truncated: int
    dropped: int
    good_flags: tuple[bool, ...] = ()


def _tokenize_chunk(rows: list[dict[str, Any]], settings: RenderSettings) -> _Chunk:
    tokenizer, max_length = settings.row_tokenizer, settings.max_length
    match settings.layout:
        case "rows":
            split = tokenize_split(rows, settings.dataset_type, tokenizer, max_length)
            return _Chunk(split.rows, split.truncated, split.dropped)
        case "pairs":
            pairs = tokenize_pairs(rows, tokenizer, max_length)
            return _Chunk([row for pair in pairs.rows for row in (pair.chosen, pair.rejected)], pairs.truncated, pairs.dropped)
        case "unpaired":
            unpaired = tokenize_unpaired(rows, tokenizer, max_length)
            flags = tuple(example.is_good for example in unpaired.rows)
            return _Chunk([example.row for example in unpaired.rows], unpaired.truncated, unpaired.dropped, flags)


def _read_lines(path: Path, start: int, end: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while file.tell() < end:
            yield file.readline()


def _render_in_processes(
    path: Path, settings: RenderSettings, targets: list[Path], folder: Path, check_stop: Callable[[], None]
) -> list[RenderResponse]:
    """Render each part in its own process, without secrets and network. Raises JobFailed."""
    settings_path = folder / "settings.pickle"
    settings_path.write_bytes(pickle.dumps(settings))
    exchanges: list[tuple[Path, Path]] = []
    for number, (start, end) in enumerate(pairwise(find_line_starts(path, len(targets)))):
        request_path, response_path = folder / f"request-{number}.json", folder / f"response-{number}.json"
        request = RenderRequest(settings=str(settings_path), rows=str(path), start=start, end=end, target=str(targets[number]))
        request_path.write_text(request.model_dump_json())
        exchanges.append((request_path, response_path))
    try:
        run_modules("rendering", "jobs.llm.data.render_process", exchanges, folder, check_stop)
    except SubprocessFailed as error:
        hint = "retry the job, on hardware with more memory if it ran out"
        raise JobFailed("internal", f"the rows could not be turned into tokens: {error}", hint) from error
    responses = [RenderResponse.load(response_path.read_bytes()) for _, response_path in exchanges]
    for response in responses:
        if response.failure is not None:
            raise JobFailed(response.failure.code, response.failure.message, response.failure.hint)
    settings_path.unlink()
    return responses

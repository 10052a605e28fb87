"""Rows rendered in several processes are those that one process renders, in order; failures and stops end all processes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.llm.data.rendering import Layout, RenderSettings, find_line_starts, render_split
from jobs.llm.data.tokenize import read_rows
from jobs.runtime.errors import JobFailed, Stopped
from tests.jobs.conftest import make_row_tokenizer, messages

PAIRS = [{"prompt": f"what is {n}", "chosen": f"a list of {n}", "rejected": f"no {n}"} for n in range(40)]
UNPAIRED = [{"prompt": f"what is {n}", "completion": f"a list of {n}", "label": n % 3 == 0} for n in range(40)]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def make_settings(tokenizer: Any) -> Callable[..., RenderSettings]:
    return lambda layout="rows", dataset_type="messages", max_length=24: RenderSettings(
        layout, dataset_type, max_length, make_row_tokenizer(tokenizer)
    )


def never_stop() -> None:
    """Let the rendering go on."""


@pytest.mark.parametrize(
    ("layout", "dataset_type", "rows"),
    [("rows", "messages", messages(50)), ("pairs", "preference", PAIRS), ("unpaired", "unpaired_preference", UNPAIRED)],
)
def test_three_processes_render_as_one_does(
    layout: Layout, dataset_type: str, rows: list[dict[str, Any]], make_settings: Callable[..., RenderSettings], tmp_path: Path
) -> None:
    path, settings = write_jsonl(tmp_path / "rows.jsonl", rows), make_settings(layout, dataset_type)
    one = render_split(path, settings, tmp_path / "one", never_stop, processes=1)
    three = render_split(path, settings, tmp_path / "three", never_stop, processes=3)
    assert len(three.rows.paths) == 3
    assert list(three.rows) == list(one.rows)
    assert (three.truncated, three.dropped, three.good_flags) == (one.truncated, one.dropped, one.good_flags)
    assert one.truncated > 0 or layout != "rows"
    assert len(one.rows) + one.dropped == len(rows) * (2 if layout == "pairs" else 1)


def test_rendered_rows_are_the_tokenized_rows(make_settings: Callable[..., RenderSettings], tmp_path: Path) -> None:
    rows, settings = messages(50), make_settings(max_length=1000)
    rendered = render_split(write_jsonl(tmp_path / "rows.jsonl", rows), settings, tmp_path / "parts", never_stop).rows
    assert list(rendered) == [settings.row_tokenizer.tokenize(row, "messages") for row in rows]


def test_failing_row_in_another_process_is_the_same_failure(make_settings: Callable[..., RenderSettings], tmp_path: Path) -> None:
    path, settings = write_jsonl(tmp_path / "rows.jsonl", [{"text": "a"}] * 20), make_settings(dataset_type="no_such_type")
    failures = []
    for processes in (1, 2):
        with pytest.raises(JobFailed) as failed:
            render_split(path, settings, tmp_path / str(processes), never_stop, processes=processes)
        failures.append(failed.value.failure)
    assert failures[0] == failures[1]
    assert failures[0].code == "invalid_data"


def test_stop_ends_every_process(make_settings: Callable[..., RenderSettings], tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", messages(50))

    def stop() -> None:
        assert len(psutil.Process().children(recursive=True)) >= 2
        raise Stopped("cancel")

    with pytest.raises(Stopped):
        render_split(path, make_settings(), tmp_path / "parts", stop, processes=2)
    assert not psutil.Process().children(recursive=True)


def test_killed_process_is_a_failure_in_words(make_settings: Callable[..., RenderSettings], tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", messages(50))

    def kill_one() -> None:
        for child in psutil.Process().children(recursive=True)[:1]:
            child.kill()

    with pytest.raises(JobFailed, match="could not be turned into tokens: rendering was killed by SIGKILL"):
        render_split(path, make_settings(), tmp_path / "parts", kill_one, processes=2)


@given(st.lists(st.integers(min_value=1, max_value=30), max_size=30), st.integers(min_value=1, max_value=8))
def test_parts_begin_with_lines_and_cover_the_file(tmp_path_factory: pytest.TempPathFactory, sizes: list[int], count: int) -> None:
    path = tmp_path_factory.mktemp("lines") / "lines.jsonl"
    path.write_bytes(b"".join(json.dumps({"n": "x" * size}).encode() + b"\n" for size in sizes))
    starts = find_line_starts(path, count)
    content = path.read_bytes()
    assert (starts[0], starts[-1], len(starts)) == (0, len(content), count + 1)
    assert starts == sorted(starts)
    assert all(start in (0, len(content)) or content[start - 1 : start] == b"\n" for start in starts)
    assert len(list(read_rows(path))) == len(sizes)

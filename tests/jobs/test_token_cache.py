"""Rows that were tokenized once are not tokenized again."""

from pathlib import Path
from typing import Any

import pytest

from jobs.data import cache
from jobs.data.render import render
from tests.jobs.conftest import Record, a_context, a_spec, messages


def test_rows_come_out_as_they_went_in(tokenizer: Any) -> None:
    rendered = render(iter(messages(7)), "messages", tokenizer, 24)
    rendered.dropped = 3
    assert cache.unpacked(cache.packed_bytes(rendered)) == rendered
    assert rendered.cut


@pytest.fixture
def large(store: Path) -> Any:
    """A job on rows that are all kept."""
    rows = messages(60)
    return lambda **knobs: a_spec(store, job_id="cached", train=rows, held_out=[], hyperparameters=knobs)


def test_the_second_job_reads_what_the_first_one_made(large: Any, tmp_path: Path) -> None:
    told = [_render(large(**knobs), tmp_path / str(n)) for n, knobs in enumerate([{}, {}, {"max_seq_length": 24}])]
    assert [record.decisions.get("tokens") for _, record in told] == [None, "cached", None]
    assert told[0][0] == told[1][0] != told[2][0]


def test_a_damaged_file_is_made_anew(large: Any, store: Path, tmp_path: Path) -> None:
    first, _ = _render(large(), tmp_path / "one")
    for path in (store / "datasets/cached/tokens").glob("*.npz"):
        path.write_bytes(path.read_bytes()[:-200])
    again, record = _render(large(), tmp_path / "two")
    assert again == first
    assert "tokens" not in record.decisions


def _render(spec: Any, workdir: Path) -> tuple[Any, Record]:
    from jobs.trainers.loop import lay_ground

    record = Record()
    ground = lay_ground(spec.training_config, a_context(spec, workdir, record))
    return cache.render_cached(ground, "messages", least_bytes=1)["train"].rows, record

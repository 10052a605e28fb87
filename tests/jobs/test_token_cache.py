"""Rows that were tokenized once are not tokenized again."""

from pathlib import Path
from typing import Any

import pytest

from jobs.data import cache
from jobs.data.render import render
from jobs.trainers.loop import lay_ground
from tests.jobs.conftest import Record, a_context, a_spec, messages


def test_rows_come_out_as_they_went_in(tokenizer: Any) -> None:
    rendered = render(iter(messages(7)), "messages", tokenizer, 24)
    tokens = cache.Tokens(rendered.rows, rendered.cut, 3, [True, False] * 3)
    assert tokens.cut
    assert cache.unpacked(cache.packed_bytes(tokens)) == tokens


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


PAIR = {"prompt": "what is a list", "chosen": "a list of names", "rejected": "no list"}
THUMBS = [{"prompt": "what is a list", "completion": f"a list of {word}", "label": word == "names"} for word in ("names", "values", "no")]


@pytest.mark.parametrize(
    ("dataset_type", "rows", "trainer_type"),
    [("preference", [PAIR] * 2, "dpo"), ("preference", [PAIR] * 2, "kto"), ("unpaired_preference", THUMBS, "kto")],
)
def test_preferences_are_kept_too_and_not_mistaken_for_each_other(
    store: Path, tmp_path: Path, dataset_type: Any, rows: list[dict[str, Any]], trainer_type: str
) -> None:
    spec = a_spec(store, job_id=f"cached-{trainer_type}", train=rows, held_out=[], dataset_type=dataset_type, trainer_type=trainer_type)
    found, records = [], [Record(), Record()]
    for number, record in enumerate(records):
        ground = lay_ground(spec.training_config, a_context(spec, tmp_path / str(number), record))
        judged = cache.judged_cached(ground, dataset_type, least_bytes=1)["train"]
        pairs = cache.pairs_cached(ground, least_bytes=1)["train"] if trainer_type == "dpo" else None
        found.append((judged, pairs))
    assert [record.decisions.get("tokens") for record in records] == [None, "cached"]
    assert found[0] == found[1]
    assert [row.is_good for row in found[0][0].rows] == ([True, False, False] if rows is THUMBS else [True, True, False, False])
    if trainer_type == "dpo":
        assert (found[0][1].rows[0].chosen, len(found[0][1].rows)) == (found[0][0].rows[0].row, 2)


def _render(spec: Any, workdir: Path) -> tuple[Any, Record]:
    record = Record()
    ground = lay_ground(spec.training_config, a_context(spec, workdir, record))
    return cache.render_cached(ground, "messages", least_bytes=1)["train"].rows, record

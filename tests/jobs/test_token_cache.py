"""The cache of tokenized rows."""

from pathlib import Path
from typing import Any

import pytest

from jobs.llm.data import cache
from jobs.llm.data.tokenize import tokenize_split
from jobs.llm.training_context import prepare_training
from tests.jobs.conftest import EventRecorder, make_context, make_row_tokenizer, make_spec, messages


def test_rows_roundtrip_through_cache(tokenizer: Any) -> None:
    split = tokenize_split(iter(messages(7)), "messages", make_row_tokenizer(tokenizer), 24)
    cached = cache.CachedSplit(split.rows, split.truncated, 3, [True, False] * 3)
    assert cached.truncated
    assert cache.deserialize_split(cache.serialize_split(cached)) == cached


@pytest.fixture
def make_cached_spec(store: Path) -> Any:
    """Makes the spec of a job whose rows are all cached."""
    rows = messages(60)
    return lambda **hyperparameters: make_spec(store, job_id="cached", train=rows, held_out=[], hyperparameters=hyperparameters)


def test_second_job_reads_cached_tokens(make_cached_spec: Any, tmp_path: Path) -> None:
    runs = [
        _tokenize(make_cached_spec(**hyperparameters), tmp_path / str(n))
        for n, hyperparameters in enumerate([{}, {}, {"max_seq_length": 24}])
    ]
    assert [record.decisions.get("tokens") for _, record in runs] == [None, "cached", None]
    assert runs[0][0] == runs[1][0] != runs[2][0]


def test_damaged_cache_file_is_recreated(make_cached_spec: Any, store: Path, tmp_path: Path) -> None:
    first, _ = _tokenize(make_cached_spec(), tmp_path / "one")
    for path in (store / "datasets/cached/tokens").glob("*.npz"):
        path.write_bytes(path.read_bytes()[:-200])
    recreated, record = _tokenize(make_cached_spec(), tmp_path / "two")
    assert recreated == first
    assert "tokens" not in record.decisions


PAIR = {"prompt": "what is a list", "chosen": "a list of names", "rejected": "no list"}
UNPAIRED_ROWS = [
    {"prompt": "what is a list", "completion": f"a list of {word}", "label": word == "names"} for word in ("names", "values", "no")
]


@pytest.mark.parametrize(
    ("dataset_type", "rows", "trainer_type"),
    [("preference", [PAIR] * 2, "dpo"), ("preference", [PAIR] * 2, "kto"), ("unpaired_preference", UNPAIRED_ROWS, "kto")],
)
def test_preference_rows_are_cached_per_trainer_type(
    store: Path, tmp_path: Path, dataset_type: Any, rows: list[dict[str, Any]], trainer_type: str
) -> None:
    spec = make_spec(store, job_id=f"cached-{trainer_type}", train=rows, held_out=[], dataset_type=dataset_type, trainer_type=trainer_type)
    splits, records = [], [EventRecorder(), EventRecorder()]
    for number, record in enumerate(records):
        training = prepare_training(spec.training_config, make_context(spec, tmp_path / str(number), record))
        unpaired = cache.load_or_tokenize_unpaired(training, dataset_type, min_bytes=1)["train"]
        pairs = cache.load_or_tokenize_pairs(training, min_bytes=1)["train"] if trainer_type == "dpo" else None
        splits.append((unpaired, pairs))
    assert [record.decisions.get("tokens") for record in records] == [None, "cached"]
    assert splits[0] == splits[1]
    assert [row.is_good for row in splits[0][0].rows] == ([True, False, False] if rows is UNPAIRED_ROWS else [True, True, False, False])
    if trainer_type == "dpo":
        assert (splits[0][1].rows[0].chosen, len(splits[0][1].rows)) == (splits[0][0].rows[0].row, 2)


def _tokenize(spec: Any, workdir: Path) -> tuple[Any, EventRecorder]:
    record = EventRecorder()
    training = prepare_training(spec.training_config, make_context(spec, workdir, record))
    return cache.load_or_tokenize_split(training, "messages", min_bytes=1)["train"].rows, record

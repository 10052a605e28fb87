"""The cache of tokenized rows."""

from pathlib import Path
from typing import Any

import pytest

from jobs.llm.data import cache
from jobs.llm.training_context import prepare_training
from tests.jobs.conftest import EventRecorder, make_context, make_spec, messages


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
    assert list(runs[0][0]) == list(runs[1][0]) != list(runs[2][0])


def test_damaged_cache_file_is_recreated(make_cached_spec: Any, store: Path, tmp_path: Path) -> None:
    first, _ = _tokenize(make_cached_spec(), tmp_path / "one")
    for path in (store / "datasets/cached/tokens").glob("*.arrow"):
        path.write_bytes(path.read_bytes()[:-200])
    recreated, record = _tokenize(make_cached_spec(), tmp_path / "two")
    assert list(recreated) == list(first)
    assert "tokens" not in record.decisions


PAIR = {"prompt": "what is a list", "chosen": "a list of names", "rejected": "no list"}
UNPAIRED_ROWS = [
    {"prompt": "what is a list", "completion": f"a list of {word}", "label": word == "names"} for word in ("names", "values", "no")
]


def test_preference_rows_are_cached_once_for_pairs_and_for_single_answers(store: Path, tmp_path: Path) -> None:
    spec = make_spec(store, job_id="cached-pairs", train=[PAIR] * 2, held_out=[], dataset_type="preference", trainer_type="dpo")
    records = [EventRecorder(), EventRecorder()]
    first, second = (prepare_training(spec.training_config, make_context(spec, tmp_path / str(n), records[n])) for n in range(2))
    pairs = cache.load_or_tokenize_pairs(first, min_bytes=1)["train"].rows
    answers = cache.load_or_tokenize_unpaired(second, "preference", min_bytes=1)["train"].rows
    assert [record.decisions.get("tokens") for record in records] == [None, "cached"]
    assert [row.is_good for row in answers] == [True, True, False, False]
    assert [answers[0].row, answers[2].row] == [pairs[0].chosen, pairs[0].rejected]


def test_flags_of_single_answers_are_cached(store: Path, tmp_path: Path) -> None:
    spec = make_spec(store, train=UNPAIRED_ROWS, held_out=[], dataset_type="unpaired_preference", trainer_type="kto")
    splits, records = [], [EventRecorder(), EventRecorder()]
    for number, record in enumerate(records):
        training = prepare_training(spec.training_config, make_context(spec, tmp_path / str(number), record))
        splits.append(cache.load_or_tokenize_unpaired(training, "unpaired_preference", min_bytes=1)["train"])
    assert [record.decisions.get("tokens") for record in records] == [None, "cached"]
    assert splits[0] == splits[1]
    assert [row.is_good for row in splits[0].rows] == [True, False, False]


def _tokenize(spec: Any, workdir: Path) -> tuple[Any, EventRecorder]:
    record = EventRecorder()
    training = prepare_training(spec.training_config, make_context(spec, workdir, record))
    return cache.load_or_tokenize_split(training, "messages", min_bytes=1)["train"].rows, record

"""Several datasets in one training: the rows of an epoch, the held-out rows, and the cache of tokens of each dataset."""

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.llm.data.cache import load_or_tokenize_split
from jobs.llm.data.mixing import SelectedRows, load_mixed, mix_indices, take_turns
from jobs.llm.training_context import TrainingContext, prepare_training
from schema.dataset import WeightedDataset
from schema.mixing import count_mixed_rows
from schema.spec import JobSpec
from tests.jobs.conftest import EventRecorder, load_trainer, make_context, make_spec, messages
from tests.jobs.test_grpo import HYPERPARAMETERS, make_grpo_job, prompts
from tests.jobs.test_preferences import pairs

Weighted = list[tuple[int, float]]


def mix_specs(first: JobSpec, second: JobSpec, weights: tuple[float, float]) -> JobSpec:
    """The first job, trained on the rows of both."""
    datasets = [spec.dataset.model_copy(update={"processed_dataset_id": f"dataset_{index}"}) for index, spec in enumerate((first, second))]
    mixed = tuple(WeightedDataset(dataset=dataset, weight=weight) for dataset, weight in zip(datasets, weights, strict=True))
    return first.model_copy(update={"mixed_datasets": mixed})


def make_mix(store: Path, weights: tuple[float, float] = (1.0, 1.0), **second: Any) -> JobSpec:
    """A job on 12 rows with 3 held out, and 4 other rows with 2 held out."""
    first = make_spec(store, train=messages(12), held_out=messages(3, first=100))
    return mix_specs(first, make_spec(store, train=messages(4, first=50), **({"held_out": messages(2, first=200)} | second)), weights)


def prepare(spec: JobSpec, workdir: Path, record: EventRecorder | None = None) -> TrainingContext:
    return prepare_training(spec.training_config, make_context(spec, workdir, record))


def load(training: TrainingContext, min_bytes: int = 1 << 20) -> dict[str, list[str]]:
    """The prompts of every split."""
    splits = load_mixed(training, lambda source: load_or_tokenize_split(source, source.dataset.dataset_type, min_bytes))
    return {name: [row.prompt_text for row in split.rows] for name, split in splits.items()}


# --- the rows of an epoch ---

WEIGHTED_DATASETS = st.lists(st.tuples(st.integers(0, 60), st.floats(1e-6, 1e6)), min_size=1, max_size=16)


@given(WEIGHTED_DATASETS, st.integers(0, 2**31 - 1))
def test_epoch_has_whole_passes_and_a_sample(datasets: Weighted, seed: int) -> None:
    row_counts, weights = [rows for rows, _ in datasets], [weight for _, weight in datasets]
    indices = mix_indices(row_counts, weights, seed)
    assert indices == mix_indices(row_counts, weights, seed)
    assert len(indices) == sum(row_counts)
    by_dataset = Counter(dataset for dataset, _ in indices)
    present = [index for index, count in enumerate(row_counts) if count]
    shares = count_mixed_rows([row_counts[index] for index in present], [weights[index] for index in present])
    assert [by_dataset[index] for index in present] == shares
    repeats = Counter(indices)
    for dataset in present:
        passes = by_dataset[dataset] // row_counts[dataset]
        assert {repeats[dataset, row] - passes for row in range(row_counts[dataset])} <= {0, 1}


def test_another_seed_samples_other_rows() -> None:
    assert mix_indices([100, 100], [1, 3], 1) != mix_indices([100, 100], [1, 3], 2)


@given(st.lists(st.integers(0, 5), max_size=5))
def test_taking_turns_keeps_every_row(row_counts: list[int]) -> None:
    taken = take_turns(row_counts)
    assert sorted(taken) == [(dataset, row) for dataset, count in enumerate(row_counts) for row in range(count)]
    assert taken == sorted(taken, key=lambda pair: (pair[1], pair[0]))


def test_selected_rows_are_read_one_by_one() -> None:
    rows = SelectedRows([["a", "b"], [], ["c"]], np.array([[2, 0], [0, 1], [0, 1]]))
    assert (list(rows), rows[0], rows[-1], rows[1:]) == (["c", "b", "b"], "c", "b", ["b", "b"])
    assert list(pickle.loads(pickle.dumps(rows))) == list(rows)
    with pytest.raises(IndexError):
        rows[3]


# --- trainings ---


def test_training_rows_follow_the_weights(store: Path, tmp_path: Path) -> None:
    record = EventRecorder()
    spec = make_mix(store, weights=(1.0, 3.0))
    rows = load(prepare(spec, tmp_path, record))
    second = Counter(prompt for prompt in rows["train"] if any(f" {n}<" in prompt or f" {n}\n" in prompt for n in range(50, 54)))
    assert len(rows["train"]) == 16
    assert set(second.values()) == {3}
    assert len(second) == 4
    assert len(set(rows["train"])) == 4 + 4
    assert record.decisions["dataset_mix"] == "4 rows of dataset_0, which has 12; 12 rows of dataset_1, which has 4"


def test_held_out_rows_are_all_of_them_in_turn(store: Path, tmp_path: Path) -> None:
    spec = make_mix(store, weights=(1.0, 1000.0))
    mixed = load(prepare(spec, tmp_path / "mixed"))["eval"]
    alone = [
        load(prepare(spec.model_copy(update={"mixed_datasets": (each,), "dataset": each.dataset}), tmp_path / str(index)))["eval"]
        for index, each in enumerate(spec.datasets)
    ]
    assert mixed == [alone[0][0], alone[1][0], alone[0][1], alone[1][1], alone[0][2]]


def test_dataset_without_held_out_rows_can_be_mixed(store: Path, tmp_path: Path) -> None:
    assert len(load(prepare(make_mix(store, held_out=[]), tmp_path))["eval"]) == 3


def test_every_dataset_keeps_its_own_cache(store: Path, tmp_path: Path) -> None:
    record = EventRecorder()
    spec = make_mix(store)
    first = load(prepare(spec, tmp_path / "a"), min_bytes=0)
    folders = [store / each.dataset.splits["train"].key.rpartition("/")[0] / "tokens" for each in spec.datasets]
    assert [len(list(folder.iterdir())) for folder in folders] == [2, 2]
    assert load(prepare(spec, tmp_path / "b", record), min_bytes=0) == first
    assert record.decisions["tokens"] == "cached"


@pytest.mark.parametrize("trainer_type", ["sft", "dpo", "kto"])
def test_every_trainer_mixes(store: Path, tmp_path: Path, trainer_type: str) -> None:
    rows, dataset_type = (messages, "messages") if trainer_type == "sft" else (pairs, "preference")
    config: dict[str, Any] = {"trainer_type": trainer_type, "dataset_type": dataset_type, "hyperparameters": {"max_steps": 1}}
    first, second = (
        make_spec(store, train=rows(count, first=first), held_out=rows(2, first=first + 100), **config)
        for count, first in ((6, 0), (2, 50))
    )
    spec, record = mix_specs(first, second, (1.0, 1.0)), EventRecorder()
    model = load_trainer(spec)(spec.training_config, make_context(spec, tmp_path, record))
    assert model.train_rows == (16 if trainer_type == "kto" else 8)  # KTO reads a pair as two rows
    assert model.metrics is not None
    assert record.decisions["dataset_mix"].startswith("8 rows" if trainer_type == "kto" else "4 rows")


def test_prompts_of_several_datasets_are_mixed(store: Path, tmp_path: Path) -> None:
    hyperparameters = HYPERPARAMETERS | {"max_steps": 1}
    first, second = (
        make_spec(
            store,
            **make_grpo_job(train=prompts(count, first=start), held_out=prompts(1, first=90 + start)),
            hyperparameters=hyperparameters,
        )
        for count, start in ((6, 0), (2, 50))
    )
    spec, record = mix_specs(first, second, (1.0, 1.0)), EventRecorder()
    model = load_trainer(spec)(spec.training_config, make_context(spec, tmp_path, record))
    assert (model.train_rows, record.decisions["dataset_mix"][:6]) == (8, "4 rows")
    assert model.metrics is not None
    assert model.metrics.eval_rows == 2

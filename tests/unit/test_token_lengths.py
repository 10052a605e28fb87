"""Token lengths of stored datasets: counted once for each dataset and tokenizer, and what follows from earlier counts."""

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest

from schema.ingestion import InputProblem, TokenLengths, TokenLengthsOutcome, TokenLengthsTask
from schema.models import model_prefix
from service.core.datasets.assembly import DatasetServices
from service.core.datasets.ingestion import Upload
from service.core.datasets.ports import IngestTimeout
from service.core.datasets.token_lengths import apply_max_seq_length, find_token_lengths
from service.core.datasets.tokenizers import Tokenizers
from service.core.errors import InvalidRequest, TooLarge
from service.core.principals import LOCAL_PRINCIPAL
from storage import ObjectStore
from storage.file import LocalStore
from tests.ingest.dataset_harness import to_jsonl
from tests.unit.dataset_records import InProcessIngester, make_datasets

BASE = "google/gemma-3-270m"


def make_lengths(**changes: object) -> TokenLengths:
    lengths = {"base_model_id": BASE, "tokenizer_digest": "d", "exact": True, "rows": 100, "total_tokens": 5000, "mean": 50.0}
    shape = {"percentiles": {"50": 50}, "histogram": [(48, 60), (64, 30), (512, 10)], "longest": [400, 390, 300]}
    return TokenLengths.model_validate(lengths | shape | changes)


@dataclass
class CountingIngester(InProcessIngester):
    """Counts how often it counts."""

    outcome: TokenLengthsOutcome = field(default_factory=lambda: TokenLengthsOutcome(lengths=make_lengths()))
    tasks: list[TokenLengthsTask] = field(default_factory=list[TokenLengthsTask])
    is_slow: bool = False

    def count_tokens(self, task: TokenLengthsTask, *, timeout_s: float | None = None) -> TokenLengthsOutcome:
        if self.is_slow:
            raise IngestTimeout
        assert all(Path(path).read_bytes() for path in task.splits.values())
        self.tasks.append(task)
        return self.outcome


def store_tokenizer(objects: ObjectStore, content: bytes = b"{}") -> None:
    for name in ("tokenizer.json", "config.json", "model.safetensors"):
        objects.write(model_prefix(BASE) + name, content)


@pytest.fixture
def ingester() -> CountingIngester:
    return CountingIngester()


@pytest.fixture
def objects(tmp_path: Path) -> LocalStore:
    objects = LocalStore((tmp_path / "objects").as_uri())
    store_tokenizer(objects)
    return objects


@pytest.fixture
def datasets(tmp_path: Path, ingester: CountingIngester, objects: LocalStore) -> DatasetServices:
    return make_datasets(tmp_path, ingester=ingester)


@pytest.fixture
def dataset_id(datasets: DatasetServices) -> str:
    rows = [{"text": f"text {number}"} for number in range(20)]
    upload = Upload("rows.jsonl", "rows", stream=io.BytesIO(to_jsonl(rows)))
    return datasets.ingestion.ingest(LOCAL_PRINCIPAL, upload).processed_dataset_id


def count(datasets: DatasetServices, dataset_id: str, max_seq_length: int | None = None, base: str = BASE) -> TokenLengths:
    return datasets.token_counts.count(LOCAL_PRINCIPAL, dataset_id, base, max_seq_length)


def test_tokens_are_counted_once(datasets: DatasetServices, dataset_id: str, ingester: CountingIngester, objects: LocalStore) -> None:
    first = count(datasets, dataset_id)
    assert first == count(datasets, dataset_id)
    assert len(ingester.tasks) == 1
    assert set(ingester.tasks[0].splits) == {"train", "eval"}
    dataset = datasets.records.find(LOCAL_PRINCIPAL, dataset_id)
    assert find_token_lengths(objects, dataset, BASE) == first
    assert find_token_lengths(objects, dataset, "google/gemma-3-1b") is None


def test_another_tokenizer_of_the_same_name_counts_again(
    datasets: DatasetServices, dataset_id: str, ingester: CountingIngester, objects: LocalStore
) -> None:
    count(datasets, dataset_id)
    store_tokenizer(objects, b'{"another": 1}')
    count(datasets, dataset_id)
    assert len(ingester.tasks) == 2


@pytest.mark.parametrize(("length", "longer"), [(512, 0), (64, 10), (48, 40), (399, 1), (300, 2), (1000, 0)])
def test_other_lengths_follow_from_the_first_count(length: int, longer: int) -> None:
    lengths = apply_max_seq_length(make_lengths(), length)
    assert lengths is not None
    assert (lengths.max_seq_length, lengths.truncated_rows) == (length, longer)


def test_length_between_buckets_is_counted_again(datasets: DatasetServices, dataset_id: str, ingester: CountingIngester) -> None:
    assert apply_max_seq_length(make_lengths(), 100) is None
    count(datasets, dataset_id)
    count(datasets, dataset_id, 100)
    assert [task.max_seq_length for task in ingester.tasks] == [None, 100]


def test_lengths_of_the_upload_are_known(datasets: DatasetServices, dataset_id: str, objects: LocalStore) -> None:
    dataset = datasets.records.find(LOCAL_PRINCIPAL, dataset_id)
    assert dataset.report is not None
    report = dataset.report.model_copy(update={"token_lengths": make_lengths()})
    assert find_token_lengths(objects, dataset.model_copy(update={"report": report}), BASE) == make_lengths()


@pytest.mark.parametrize(
    ("base", "message", "hint"),
    [
        ("google/gemma-3-1b", "does not have the model", "did you mean google/gemma-3-270m"),
        ("mistral/other", "does not have the model", "models pull"),
        ("job:training_1", "is the model of a job", "base_model_id"),
    ],
)
def test_model_without_tokenizer_says_what_would_work(
    datasets: DatasetServices, dataset_id: str, base: str, message: str, hint: str
) -> None:
    with pytest.raises(InvalidRequest, match=message) as excinfo:
        count(datasets, dataset_id, base=base)
    assert hint in excinfo.value.hint
    assert excinfo.value.param == "base_model_id"


def test_tokenizer_that_cannot_be_used_is_refused(datasets: DatasetServices, dataset_id: str, ingester: CountingIngester) -> None:
    ingester.outcome = TokenLengthsOutcome(refused=InputProblem(message="no fast tokenizer", hint="another base"))
    with pytest.raises(InvalidRequest, match="no fast tokenizer"):
        count(datasets, dataset_id)


def test_count_that_takes_too_long_names_another_way(datasets: DatasetServices, dataset_id: str, ingester: CountingIngester) -> None:
    ingester.is_slow = True
    with pytest.raises(TooLarge, match="20 rows takes longer than 60 seconds") as excinfo:
        count(datasets, dataset_id)
    assert "wait=false" in excinfo.value.hint


class Bucket:
    """A store whose objects are not files of this machine, as far as others see."""

    def __init__(self, folder: Path) -> None:
        self._store = LocalStore(folder.as_uri())

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)


def test_only_the_tokenizer_is_copied_from_a_bucket(tmp_path: Path) -> None:
    objects = cast(ObjectStore, Bucket(tmp_path / "objects"))
    store_tokenizer(objects)
    tokenizers = Tokenizers(objects, tmp_path / "cache")
    folder = tokenizers.fetch(BASE)
    assert {path.name for path in folder.iterdir()} == {"tokenizer.json", "config.json"}
    assert tokenizers.fetch(BASE) == folder
    store_tokenizer(objects, b'{"another": 1}')
    assert tokenizers.fetch(BASE) != folder
    assert not list((tmp_path / "cache").glob(".part-*"))


def test_tokenizer_in_a_folder_is_not_copied(tmp_path: Path) -> None:
    objects = LocalStore((tmp_path / "objects").as_uri())
    store_tokenizer(objects)
    folder = Tokenizers(objects, tmp_path / "cache").fetch(BASE)
    assert folder == tmp_path / "objects" / model_prefix(BASE)
    assert not (tmp_path / "cache").exists()

"""How many tokens the rows of a dataset have: counted once for each dataset and tokenizer, and kept beside the dataset."""

import hashlib
import logging
import tempfile
from pathlib import Path

from pydantic import ValidationError

from schema.dataset import Dataset
from schema.ingestion import IngestLimits, TokenLengths, TokenLengthsTask
from service.core.datasets.ports import Ingester, IngestTimeout
from service.core.datasets.records import Datasets, dataset_prefix
from service.core.datasets.tokenizers import Tokenizers
from service.core.errors import InvalidRequest, TooLarge
from service.core.principals import Principal, Scope
from storage import NoSuchObject, ObjectStore
from storage.file import LocalStore

log = logging.getLogger(__name__)


class TokenCounts:
    """Counts tokens, unless they were counted before."""

    def __init__(
        self,
        *,
        records: Datasets,
        objects: ObjectStore,
        tokenizers: Tokenizers,
        ingester: Ingester,
        limits: IngestLimits,
        scratch: Path,
        wait_s: float,
    ) -> None:
        self._records = records
        self._objects = objects
        self._tokenizers = tokenizers
        self._ingester = ingester
        self._limits = limits
        self._scratch = scratch
        self._wait_s = wait_s

    def count(self, principal: Principal, dataset_id: str, base_model_id: str, max_seq_length: int | None) -> TokenLengths:
        """The lengths of a dataset's rows by the tokenizer of a base model.

        Raises NotFound, Conflict for a dataset that is not ready, InvalidRequest for a model that is not stored, TooLarge, Unavailable.
        """
        principal.require(Scope.DATASETS_WRITE)
        dataset = self._records.find_ready(principal, dataset_id)
        version = self._tokenizers.find_version(base_model_id)
        known = find_token_lengths(self._objects, dataset, base_model_id)
        if known and known.tokenizer_version in ("", version) and (answer := apply_max_seq_length(known, max_seq_length)):
            return answer
        counted = self._count(dataset, base_model_id, max_seq_length).model_copy(update={"tokenizer_version": version})
        self._objects.write(_lengths_key(dataset_id, base_model_id), counted.model_dump_json().encode())
        return counted

    def _count(self, dataset: Dataset, base_model_id: str, max_seq_length: int | None) -> TokenLengths:
        tokenizer = self._tokenizers.fetch(base_model_id)
        self._scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._scratch) as name:
            folder = Path(name)
            task = TokenLengthsTask(
                splits={name: str(self._fetch(split.key, folder / name)) for name, split in dataset.splits.items()},
                base_model_id=base_model_id,
                tokenizer_folder=str(tokenizer),
                max_seq_length=max_seq_length,
                limits=self._limits,
                output=str(folder),
            )
            try:
                outcome = self._ingester.count_tokens(task, timeout_s=self._wait_s)
            except IngestTimeout:
                message = f"counting the tokens of {dataset.rows:,} rows takes longer than {self._wait_s:g} seconds"
                hint = "POST /datasets with `base_model_id` and `wait=false`: the job that makes the dataset counts them"
                raise TooLarge(message, hint=hint, param="processed_dataset_id") from None
        if outcome.lengths is None:
            reason = outcome.refused.message if outcome.refused else f"the tokenizer of {base_model_id} cannot be used"
            raise InvalidRequest(reason, hint=outcome.refused.hint if outcome.refused else "", param="base_model_id")
        return outcome.lengths

    def _fetch(self, key: str, target: Path) -> Path:
        """A split on this machine: where it lies, or else a copy."""
        return self._objects.path_for_key(key) if isinstance(self._objects, LocalStore) else self._objects.download(key, target)


def find_token_lengths(objects: ObjectStore, dataset: Dataset, base_model_id: str) -> TokenLengths | None:
    """The token lengths of a dataset that are known: counted when it was made, or since then. Raises StorageError."""
    try:
        return TokenLengths.load(objects.read(_lengths_key(dataset.processed_dataset_id, base_model_id)))
    except NoSuchObject:
        pass
    except ValidationError:
        log.warning("token lengths cannot be read", extra={"dataset": dataset.processed_dataset_id, "base_model": base_model_id})
    lengths = dataset.report.token_lengths if dataset.report else None
    return lengths if lengths and lengths.base_model_id == base_model_id else None


def apply_max_seq_length(lengths: TokenLengths, max_seq_length: int | None) -> TokenLengths | None:
    """The lengths with the rows that are longer than a length; None if they do not tell how many these are."""
    if max_seq_length is None or max_seq_length == lengths.max_seq_length:
        return lengths
    if _is_bucket_bound(max_seq_length):
        longer = sum(rows for bound, rows in lengths.histogram if bound > max_seq_length)
    elif len(lengths.longest) == lengths.rows or (lengths.longest and lengths.longest[-1] <= max_seq_length):
        longer = sum(length > max_seq_length for length in lengths.longest)
    else:
        return None
    return lengths.model_copy(update={"max_seq_length": max_seq_length, "truncated_rows": longer})


def _is_bucket_bound(length: int) -> bool:
    """Whether a histogram tells how many rows are longer: its buckets end at powers of 2, and at halves between them."""
    return any(length > 0 and length & (length - 1) == 0 for length in (length, length // 3 if length % 3 == 0 else 0))


def _lengths_key(dataset_id: str, base_model_id: str) -> str:
    """Where the lengths by a model's tokenizer lie. The name is a digest: a model's own has a slash."""
    return f"{dataset_prefix(dataset_id)}token_lengths/{hashlib.sha256(base_model_id.encode()).hexdigest()[:16]}.json"

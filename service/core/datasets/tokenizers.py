"""The tokenizers of base models, for counting tokens: their files, and nothing else of the model, in a folder of this machine."""

import hashlib
import shutil
import tempfile
from pathlib import Path

from schema.models import COMPLETION_MARKER, TOKENIZER_FILES, is_model_name, model_prefix
from service.core.errors import InvalidRequest
from service.core.models.names import describe_suggestions, suggest
from service.core.models.stored import describe_stored, list_stored_names
from storage import ObjectStore, StoredObject
from storage.file import LocalStore

PULL_HINT = "`tunesmith models pull NAME` puts one there; without `base_model_id` the tokens are not counted"
MAX_TOKENIZER_BYTES = 256 << 20  # the largest known one has 35 MB


class Tokenizers:
    """Finds tokenizers in the model store. Those of a bucket are copied to a folder, once for each version of their files."""

    def __init__(self, models: ObjectStore, cache: Path) -> None:
        self._models = models
        self._cache = cache

    def require(self, base_model_id: str) -> None:
        """Raise InvalidRequest unless the model store has the base model with a tokenizer."""
        self._find_files(base_model_id)

    def find_version(self, base_model_id: str) -> str:
        """Changes whenever one of the tokenizer's files does. Raises InvalidRequest for a model that is not stored, StorageError."""
        return _find_version(self._find_files(base_model_id))

    def fetch(self, base_model_id: str) -> Path:
        """A folder with the tokenizer's files. Raises InvalidRequest for a model that is not stored, StorageError."""
        files = self._find_files(base_model_id)
        if isinstance(self._models, LocalStore):
            return self._models.path_for_key(next(iter(files.values())).key).parent
        folder = self._cache / _find_version(files)
        if not folder.exists():
            self._copy(files, folder)
        return folder

    def _find_files(self, base_model_id: str) -> dict[str, StoredObject]:
        """The objects of the tokenizer, by their names."""
        if not is_model_name(base_model_id):
            hint = "send the `base_model_id` that the job shows: its model has the same tokenizer"
            raise InvalidRequest(f"{base_model_id!r} is the model of a job, not a base model", hint=hint, param="base_model_id")
        prefix = model_prefix(base_model_id)
        names = {stored.key.removeprefix(prefix): stored for stored in self._models.iter_objects(prefix)}
        files = {name: stored for name, stored in names.items() if name in TOKENIZER_FILES}
        if COMPLETION_MARKER not in files:
            raise self._not_stored(base_model_id)
        if len(files) == 1 or sum(stored.size_bytes for stored in files.values()) > MAX_TOKENIZER_BYTES:
            raise InvalidRequest(f"{base_model_id} has no tokenizer that can be read", hint="import the model again", param="base_model_id")
        return files

    def _not_stored(self, base_model_id: str) -> InvalidRequest:
        names = list_stored_names(self._models)
        suggestion = describe_suggestions(suggest(base_model_id, names))
        message = f"the tokenizer of {base_model_id} is not here: the model store does not have the model"
        return InvalidRequest(message, hint=suggestion or f"{describe_stored(names)}; {PULL_HINT}", param="base_model_id")

    def _copy(self, files: dict[str, StoredObject], folder: Path) -> None:
        """Copy the files into the folder, which appears when it is complete: several requests may do so at once."""
        self._cache.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=self._cache, prefix=".part-"))
        try:
            for name, stored in files.items():
                self._models.download(stored.key, part / name)
            part.rename(folder)
        except OSError:
            if not folder.exists():  # another request was not faster
                raise
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _find_version(files: dict[str, StoredObject]) -> str:
    return hashlib.sha256("\n".join(f"{name} {files[name].generation}" for name in sorted(files)).encode()).hexdigest()[:32]

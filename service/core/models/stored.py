"""The models in the model store, found by listing it."""

from collections.abc import Sequence
from dataclasses import dataclass

from schema.models import COMPLETION_MARKER, MODELS_PREFIX, is_model_name
from storage import ObjectStore, StoredObject

MAX_LISTED = 10  # names in a message


@dataclass(frozen=True)
class StoredModel:
    """The objects of one model, by their names in its folder."""

    name: str
    objects: dict[str, StoredObject]

    @property
    def fingerprint(self) -> frozenset[tuple[str, str]]:
        """Changes whenever one of the objects does."""
        return frozenset((path, stored.generation) for path, stored in self.objects.items())

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each object by its name."""
        return {path: stored.size_bytes for path, stored in self.objects.items()}


def list_stored(models: ObjectStore, prefix: str = MODELS_PREFIX) -> list[StoredModel]:
    """The complete models below a prefix, by name. Raises StorageError."""
    folders: dict[str, dict[str, StoredObject]] = {}
    for stored in models.iter_objects(prefix):
        name, _, path = stored.key.removeprefix(MODELS_PREFIX).rpartition("/")
        if is_model_name(name):
            folders.setdefault(name, {})[path] = stored
    return [StoredModel(name, objects) for name, objects in sorted(folders.items()) if COMPLETION_MARKER in objects]


def list_stored_names(models: ObjectStore) -> list[str]:
    """The names of the models in the store. Raises StorageError."""
    return [each.name for each in list_stored(models)]


def describe_stored(names: Sequence[str]) -> str:
    """Which models are there, in half a sentence."""
    shown = ", ".join(names[:MAX_LISTED]) + (f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else "")
    return f"the model store has {shown}" if names else "the model store has no model yet"

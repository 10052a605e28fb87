"""How large a base model in the model store is: its config and the bytes of its weights, kept in memory until its config changes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from schema.models import COMPLETION_MARKER, MAX_CONFIG_BYTES, model_prefix
from storage import NoSuchObject, ObjectStore, StorageError

WEIGHT_SUFFIXES = (".safetensors", ".bin")
MAX_KEPT = 256


@dataclass(frozen=True)
class StoredBase:
    """A base model of the model store."""

    config: Mapping[str, object]  # config.json
    weights_bytes: int


class BaseSizes:
    """Finds the sizes of base models. What a model's config tells is read once."""

    def __init__(self, models: ObjectStore) -> None:
        self._models = models
        self._kept: dict[str, tuple[str, StoredBase]] = {}  # by name: the generation of its config, and what it told

    def find(self, name: str) -> StoredBase | None:
        """The model of that name; None if the store does not have it whole, cannot be read, or has a config that is not a JSON object."""
        prefix = model_prefix(name)
        try:
            marker = self._models.stat(prefix + COMPLETION_MARKER)
            if marker is None or marker.size_bytes > MAX_CONFIG_BYTES:
                return None
            kept = self._kept.get(name)
            if kept is not None and kept[0] == marker.generation:
                return kept[1]
            found = self._read(prefix)
        except StorageError:
            return None
        if found is not None:
            if len(self._kept) >= MAX_KEPT:
                self._kept = {}
            self._kept = self._kept | {name: (marker.generation, found)}
        return found

    def _read(self, prefix: str) -> StoredBase | None:
        try:
            config: object = json.loads(self._models.read(prefix + COMPLETION_MARKER))
        except (NoSuchObject, ValueError, RecursionError):
            return None
        if not isinstance(config, dict):
            return None
        sizes = {stored.key.removeprefix(prefix): stored.size_bytes for stored in self._models.iter_objects(prefix)}
        suffix = next((suffix for suffix in WEIGHT_SUFFIXES if any(name.endswith(suffix) for name in sizes)), None)
        weights = sum(size for name, size in sizes.items() if suffix and name.endswith(suffix) and "/" not in name)
        return StoredBase(cast(Mapping[str, object], config), weights) if weights else None

"""The base models of the deployment. They belong to no tenant: every caller sees the same ones."""

from collections.abc import Sequence
from dataclasses import dataclass

from schema.models import MODEL_RECORD, ModelRecord, describe_model, is_model_name, model_prefix, read_model_record
from service.core.errors import InvalidRequest, NotFound
from service.core.models.names import describe_suggestions, find_by_short_name, suggest
from service.core.models.stored import StoredModel, describe_stored, list_stored
from service.core.ports import Hub, HubAccess
from service.core.principals import Principal, Scope
from service.core.validation.hub import NoHub
from service.core.validation.known_models import KnownModel, find_known_model
from storage import NoSuchObject, ObjectStore, StoredObject, map_concurrently

MAX_RECORD_BYTES = 1 << 20  # of a model with some thousand files
GET_HINT = "`tunesmith models pull NAME` or `tunesmith models import FOLDER --name NAME` puts one there"


@dataclass(frozen=True)
class ModelView:
    """A base model as a caller sees it."""

    record: ModelRecord
    available: bool  # in the model store, so that jobs need no download
    hub: HubAccess | None = None  # whether an anonymous caller can read it on the Hub; None: the Hub was not asked
    known: KnownModel | None = None  # what its name tells


class ModelRegistry:
    """Lists and finds base models. What a model's files tell is kept in memory until one of them changes."""

    def __init__(self, models: ObjectStore, hub: Hub) -> None:
        self._models = models
        self._hub = hub
        self._described: dict[str, tuple[frozenset[tuple[str, str]], ModelRecord]] = {}

    @property
    def store_url(self) -> str:
        """The URL of the model store."""
        return self._models.url

    def list_models(self, principal: Principal) -> list[ModelView]:
        """Every model in the store, by name. Raises StorageError."""
        principal.require(Scope.JOBS_READ)
        found = list_stored(self._models)
        views = map_concurrently(self._view_stored, found)
        self._described = {name: entry for name, entry in self._described.items() if name in {each.name for each in found}}
        return views

    def find(self, principal: Principal, name: str) -> ModelView:
        """The model of that name, or the only one whose name without its owner it is. One that is not stored is looked up on the Hub.

        Raises InvalidRequest for what cannot be a name, NotFound that suggests similar names, StorageError.
        """
        principal.require(Scope.JOBS_READ)
        if not is_model_name(name):
            hint = "a name is written owner/name, such as google/gemma-3-270m; GET /models lists those in the model store"
            raise InvalidRequest(f"{name[:200]!r} is not the name of a model", hint=hint, param="name")
        exact = [each for each in list_stored(self._models, model_prefix(name)) if each.name == name]
        if not exact:
            return self._find_other(name)
        return self._view_stored(exact[0])

    def _find_other(self, name: str) -> ModelView:
        stored = list_stored(self._models)
        names = [each.name for each in stored]
        meant = find_by_short_name(name, names)
        if len(meant) == 1:
            return self._view_stored(next(each for each in stored if each.name == meant[0]))
        if meant:
            raise NotFound(f"{name!r} can be {' or '.join(meant)}", hint="write the name with its owner", param="name")
        known, access = find_known_model(name), self._hub.check_read_access(name, None)
        if access in ("yes", "gated", "refused", "bad_token") or (access == "unknown" and known and not isinstance(self._hub, NoHub)):
            return ModelView(ModelRecord(name=name, source="hub" if access != "unknown" else "unknown"), False, access, known)
        raise NotFound(_describe_missing(name, access, self._hub), hint=_hint_missing(name, names), param="name")

    def _view_stored(self, files: StoredModel) -> ModelView:
        return ModelView(self._describe(files), available=True, known=find_known_model(files.name))

    def _describe(self, files: StoredModel) -> ModelRecord:
        described = self._described.get(files.name)
        if described is not None and described[0] == files.fingerprint:
            return described[1]
        record = self._read_record(files) or self._describe_files(files)
        self._described = self._described | {files.name: (files.fingerprint, record)}
        return record

    def _read_record(self, files: StoredModel) -> ModelRecord | None:
        stored = files.objects.get(MODEL_RECORD)
        if stored is None or stored.size_bytes > MAX_RECORD_BYTES:
            return None
        try:
            return read_model_record(self._models.read(stored.key), files.name, files.sizes)
        except NoSuchObject:  # deleted since it was listed
            return None

    def _describe_files(self, files: StoredModel) -> ModelRecord:
        return describe_model(files.name, files.sizes, lambda path, max_bytes: self._read_start(files.objects[path], max_bytes))

    def _read_start(self, stored: StoredObject, max_bytes: int) -> bytes:
        try:
            with self._models.open_read(stored.key) as stream:
                return stream.read(max_bytes)
        except NoSuchObject:  # deleted since it was listed
            return b""


def _describe_missing(name: str, access: HubAccess, hub: Hub) -> str:
    if access == "absent":
        return f"no model {name!r}: it is not in the model store, and the Hub has none that everybody may read"
    if isinstance(hub, NoHub):
        return f"no model {name!r} in the model store, and this deployment is offline"
    return f"no model {name!r} in the model store, and the Hub does not answer"


def _hint_missing(name: str, names: Sequence[str]) -> str:
    suggestion = describe_suggestions(suggest(name, names))
    return suggestion or f"{describe_stored(names)}; {GET_HINT}"

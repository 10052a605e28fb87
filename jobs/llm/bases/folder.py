"""Importing a base model from a folder of this machine."""

from pathlib import Path

from jobs.llm.base_files import is_base_file
from jobs.llm.bases.store import Say, check_replaceable, find_model, store_model
from jobs.runtime.errors import JobFailed
from jobs.runtime.files import sha256_of
from schema.models import CONFIG_FILE, ModelRecord, model_prefix
from storage import ObjectStore
from storage.file import LocalStore

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def import_model(folder: Path, name: str, store: ObjectStore, *, replace: bool = False, say: Say) -> ModelRecord:
    """Store the model in a folder; within one file system its files are linked. Raises JobFailed."""
    folder = folder.expanduser().absolute()
    if not folder.is_dir():
        raise JobFailed("invalid_config", f"no folder at {folder}", "give the folder that has the model's config.json")
    _check_kind(folder)
    if isinstance(store, LocalStore) and folder.resolve() == store.path_for_key(model_prefix(name) + CONFIG_FILE).parent.resolve():
        raise JobFailed("invalid_config", f"{folder} is the model store's own folder of {name}", "jobs can use the model as it is")
    stored = find_model(store, name)
    if stored is not None and stored.source == "folder" and _has_same_files(folder, stored):
        say(f"{name} is in the model store already, with the same files")
        return stored
    check_replaceable(store, name, replace=replace)
    # The files of a snapshot in the Hub client's cache are links to its blobs.
    links_within = folder.parent.parent if folder.parent.name == "snapshots" else None
    return store_model(folder, store, name, source="folder", links_within=links_within, say=say)


def _has_same_files(folder: Path, stored: ModelRecord) -> bool:
    """Whether the folder has the files that were imported before, and no others that would be used."""
    names = {path.name for path in folder.iterdir() if is_base_file(path.name)}
    paths = {file.path: folder / file.path for file in stored.files}
    return names == paths.keys() and all(
        paths[file.path].is_file() and paths[file.path].stat().st_size == file.size_bytes and sha256_of(paths[file.path]) == file.sha256
        for file in stored.files
    )


def _check_kind(folder: Path) -> None:
    """Raise JobFailed for a folder that is no model, or a model in another form, saying how it gets into the right one."""
    names = sorted(path.name for path in folder.iterdir())
    if any(name.endswith(".safetensors") for name in names) and "config.json" in names:
        return
    if "adapter_config.json" in names:
        hint = "import the base, and start from the adapter's job with base_model_id job:ID; or merge the adapter into its base first"
        raise JobFailed("invalid_config", f"{folder} has an adapter, not a whole model", hint)
    if pickles := [name for name in names if name.endswith(PICKLE_SUFFIXES)]:
        hint = "load it where you trust it and save it as safetensors: model.save_pretrained(FOLDER); then import that folder"
        raise JobFailed("invalid_config", f"{folder} has pickled weights ({pickles[0]}), which can run code and are never loaded", hint)
    if ggufs := [name for name in names if name.endswith(".gguf")]:
        hint = "import the model that the GGUF file was made from; a quantized file cannot be trained"
        raise JobFailed("invalid_config", f"{folder} has a GGUF file ({ggufs[0]}), not safetensors weights", hint)
    missing = "config.json" if "config.json" not in names else "safetensors weights"
    hint = "give the folder that save_pretrained wrote, with config.json, *.safetensors and the tokenizer"
    raise JobFailed("invalid_config", f"{folder} has no {missing}", hint)

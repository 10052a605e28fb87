"""Where the base model comes from: the deployment's own object store if it is there, else the Hugging Face Hub."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.errors import JobFailed
from storage import ObjectStore
from storage.local import LocalStore

if TYPE_CHECKING:
    from jobs.context import JobContext

log = logging.getLogger(__name__)

# Weights without code: no pickles, no Python.
WANTED = ["*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer.model", "*.jinja"]


def fetch_base(context: "JobContext") -> Path:
    """The base model's folder on this machine: safetensors, config and tokenizer. Raises JobFailed `auth`, `invalid_config`."""
    base_model_id = context.spec.training_config.base_model_id
    stored = _from_store(context.stores.models, base_model_id, context.workdir / "base")
    if stored is not None:
        context.decided("base_model", base_model_id, "found in the object store")
        return stored
    context.decided("base_model", base_model_id, "not in the object store: from the Hugging Face Hub")
    return _from_hub(base_model_id, context.secrets.get("hf_token"))


def _from_store(store: ObjectStore, base_model_id: str, target: Path) -> Path | None:
    prefix = f"pretrained_weights/huggingface/{base_model_id}/"
    if store.stat(f"{prefix}config.json") is None:
        return None
    if isinstance(store, LocalStore):
        return store.path_of(prefix.rstrip("/"))  # no copy of gigabytes
    for stored in store.walk(prefix):
        store.download(stored.key, target / stored.key.removeprefix(prefix))
    return target


def _from_hub(base_model_id: str, token: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(base_model_id, token=token or False, allow_patterns=WANTED))
    except GatedRepoError as error:
        hint = f"accept the licence on the model's page at the Hub, and send {'the' if token else 'an'} hf_token of that account"
        raise JobFailed("auth", f"the base model {base_model_id} is gated, and the hf_token does not open it", hint) from error
    except RepositoryNotFoundError as error:
        hint = "check the spelling; for a private model send an hf_token that may read it"
        raise JobFailed("invalid_config", f"there is no base model {base_model_id} at the Hub, or it is private", hint) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        hint = f"put it into the object store at pretrained_weights/huggingface/{base_model_id}/, or let this machine reach the Hub"
        raise JobFailed("invalid_config", f"the base model {base_model_id} is not here, and the Hub cannot be reached", hint) from error
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise JobFailed("auth", f"the Hub refused the hf_token for {base_model_id}", "send a token that may read it") from error
        raise

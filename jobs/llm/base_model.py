"""Download the base model from the deployment's object store, or else from the Hugging Face Hub."""

import logging
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.llm.base_files import DOWNLOAD_PATTERNS, copy_base_files, is_base_file
from jobs.runtime.errors import JobFailed
from jobs.runtime.http_retry import http_status, retry_hub
from jobs.runtime.retry import download_all_with_retry, retry_store
from storage import ObjectStore
from storage.file import LocalStore

if TYPE_CHECKING:
    from jobs.runtime.context import JobContext

log = logging.getLogger(__name__)

HUB_TRIES = 4  # with waits of 0.5 + 1 + 2 s, beside the Hub client's own retries
IGNORE_PATTERNS = ["*/*", "consolidated*"]  # copies for other frameworks, and a second copy in some repositories


def fetch_base(context: "JobContext", name: str = "base") -> Path:
    """A folder with the base model's config, safetensors and tokenizer, as `copy_base_files` checked them. Raises JobFailed.

    The folder is of that `name` in the attempt's data, or below it. The model store is searched first, at
    pretrained_weights/huggingface/{base_model_id}/.
    """
    model_id = context.spec.training_config.base_model_id
    prefix = f"pretrained_weights/huggingface/{model_id}/"
    target = context.workdir / "data" / name
    folder = download_from_store(context.stores.models, prefix, target)
    if folder is not None:
        context.log_decision("base_model", model_id, "from the object store")
        return folder
    context.log_decision("base_model", model_id, f"from the Hugging Face Hub: the object store has no model at {prefix}")
    snapshot = _download_from_hub(model_id, context.secrets.get("hf_token"))
    # The names of its last two folders tell the revision; its files may be links to elsewhere in the repository's cache.
    target = target / snapshot.parent.name / snapshot.name
    return copy_base_files(snapshot, target, f"base model {model_id}", links_within=snapshot.parent.parent)


def download_from_store(store: ObjectStore, prefix: str, target: Path, kind: str = "base model") -> Path | None:
    """Copy the files of the model at `prefix` that are used to folder `target`, checked; None if there is none. Raises JobFailed."""
    keys = retry_store(f"the {kind} cannot be listed", lambda: [stored.key for stored in store.iter_objects(prefix)], code="internal")
    if prefix + "config.json" not in keys:
        return None
    if isinstance(store, LocalStore):
        source = store.path_for_key(prefix + "config.json").parent
    else:
        source = target.with_name(f"{target.name}-download")
        used = [key for key in keys if is_base_file(key.removeprefix(prefix))]
        download_all_with_retry(store, used, source, prefix=prefix)
    model_id = prefix.removeprefix("pretrained_weights/huggingface/").rstrip("/")
    return copy_base_files(source, target, f"{kind} {model_id}")


def _download_from_hub(model_id: str, token: str | None) -> Path:
    from huggingface_hub import snapshot_download

    with explain_hub_errors(model_id, token):
        return retry_hub(
            # False: never use a token that is stored on this machine.
            lambda: Path(
                snapshot_download(model_id, token=token or False, allow_patterns=list(DOWNLOAD_PATTERNS), ignore_patterns=IGNORE_PATTERNS)
            ),
            tries=HUB_TRIES,
        )


@contextmanager
def explain_hub_errors(model_id: str, token: str | None) -> Generator[None]:
    """Turn the errors of downloading a model into JobFailed, which says what would help."""
    from httpx2 import TransportError
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        hint = f"accept the license at https://huggingface.co/{model_id} and send the hf_token of the account that did"
        raise JobFailed("auth", f"base model {model_id} is gated, and {_describe_token(token)} has no access to it", hint) from error
    except RepositoryNotFoundError as error:
        # The Hub answers the same for a model that does not exist and one that is private.
        message = f"base model {model_id} does not exist on the Hub, or is private and {_describe_token(token)} has no access to it"
        raise JobFailed("invalid_config", message, "check base_model_id; for a private model, send hf_token") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, TransportError) as error:
        status = http_status(error)
        if status in (401, 403):
            hint = "check that hf_token is valid and has access to this model"
            raise JobFailed("auth", f"the Hub refused access to base model {model_id} ({status})", hint) from error
        if status:
            raise JobFailed(
                "internal", f"downloading base model {model_id} from the Hub failed with HTTP {status}", "retry the job later"
            ) from error
        hint = (
            f"allow network access, or put the model's files at pretrained_weights/huggingface/{model_id}/ in the model store: "
            f"tunesmith models import FOLDER --name {model_id}"
        )
        raise JobFailed(
            "invalid_config", f"base model {model_id} is not in the model store, and the Hub cannot be reached", hint
        ) from error


def _describe_token(token: str | None) -> str:
    return "the hf_token of the request" if token else "a request without hf_token"

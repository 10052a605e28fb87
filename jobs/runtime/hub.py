"""The Hugging Face Hub as a place for what was made: one commit with everything, visible in one step.

merged (or a whole model)   the root of the repository
adapter                     the root, or `adapter/` beside a merged model
GGUF, ONNX                  *.gguf with their Modelfiles at the root, `onnx/`
README.md, run.json         the model card, and where the model comes from

The token is given to the client by hand: it is not in the environment, in a log, or on the disk. The endpoint is the client's own,
HF_ENDPOINT.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

from jobs.runtime.artifacts import ExportedArtifact
from jobs.runtime.errors import JobFailed
from jobs.runtime.http_retry import exception_chain, http_status, retry_hub
from schema.job import Artifact, HubPush
from schema.provenance import RUN_RECORD

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from jobs.runtime.context import JobContext

log = logging.getLogger(__name__)

MODEL_CARD = "README.md"
WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", "adapter_config.json")  # what tells a library which model a folder holds
MAX_UPLOAD_THREADS = 4

ReturnT = TypeVar("ReturnT")


@dataclass(frozen=True)
class PushTarget:
    """Where a push goes, and by whose token."""

    repo_id: str
    private: bool
    token: str


def push(
    products: Sequence[ExportedArtifact],
    artifacts: Sequence[Artifact],
    card: str,
    run_record: bytes,
    context: "JobContext",
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[Artifact, ...]:
    """Push everything in one commit; the artifacts with the commit that has them. Raises JobFailed.

    What the Hub has already is not sent again, and a push that changes nothing makes no commit: a retry goes on where the last one broke.
    """
    target = push_target(context)
    files = repo_files(products) | {MODEL_CARD: card.encode(), RUN_RECORD: run_record}
    context.check_stop()
    api = _client(target.token)
    repo = _request(target, lambda: api.create_repo(target.repo_id, private=target.private, exist_ok=True), sleep)
    # With its owner from here on: a name alone is one of the account's own.
    revision = _request(target, lambda: _commit(api, repo.repo_id, files, context.spec.job_id), sleep)
    pushed = HubPush(repo_id=repo.repo_id, revision=revision, url=f"{repo.url}/tree/{revision}")
    log.info("pushed to the hub", extra={"repo": repo.repo_id, "revision": revision, "files": len(files)})
    return tuple(artifact.model_copy(update={"hub": pushed}) for artifact in artifacts)


def check_push(context: "JobContext") -> None:
    """Ask, before anything is computed, whether the push can succeed. Raises JobFailed `auth`.

    A Hub that cannot be reached now may be there when the model is done. Nothing is made on it yet.
    """
    from httpx2 import TransportError
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    target = push_target(context)
    try:
        _check_access(target, _client(target.token))
    except (HfHubHTTPError, TransportError, OfflineModeIsEnabled) as error:
        if http_status(error) in (401, 403):
            raise _no_access(target, error) from error
        log.warning("the hub did not say whether it can be written to", extra={"reason": http_status(error) or type(error).__name__})


def push_target(context: "JobContext") -> PushTarget:
    """Where the job's files are to be pushed. Raises JobFailed `auth` without a token."""
    export = context.spec.training_config.export_config
    if export.hf_repo_id is None:
        raise JobFailed("invalid_config", "the job has no hf_repo_id to push to", "set export_config.hf_repo_id")
    token = context.secrets.get("hf_token")
    if not token:
        message = f"pushing to {export.hf_repo_id} needs a token, and the job has none"
        raise JobFailed("auth", message, "send hf_token, of an account that may write to the repository")
    return PushTarget(export.hf_repo_id, export.hf_private, token)


def repo_files(products: Sequence[ExportedArtifact]) -> dict[str, Path | bytes]:
    """What goes where in the repository: path -> file."""
    has_whole_model = any(product.kind == "merged" for product in products)
    return {path: file for product in products for path, file in _artifact_repo_files(product, has_merged_model=has_whole_model)}


def _artifact_repo_files(product: ExportedArtifact, *, has_merged_model: bool) -> Iterator[tuple[str, Path]]:
    folder = {"adapter": "adapter/" if has_merged_model else "", "onnx": "onnx/"}.get(product.kind, "")
    files = sorted(file for file in product.path.rglob("*") if file.is_file()) if product.path.is_dir() else [product.path]
    for file in files:
        inside = file.relative_to(product.path).as_posix() if product.path.is_dir() else file.name
        if inside not in (MODEL_CARD, RUN_RECORD):  # of this push there is one of each
            yield folder + inside, file


def stale_weights(present: Sequence[str], files: Mapping[str, object]) -> list[str]:
    """The weights of an earlier model in a folder that gets new ones: a library that finds both would load a mixture.

    Everything else that is in the repository stays, GGUF files too: each of them is a model of its own.
    """
    replaced = {PurePosixPath(path).parent for path in files if path.endswith(WEIGHT_SUFFIXES)}
    return sorted(
        path for path in present if path.endswith(WEIGHT_SUFFIXES) and PurePosixPath(path).parent in replaced and path not in files
    )


def _client(token: str) -> "HfApi":
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()  # a log is no terminal
    return HfApi(token=token, library_name="tunesmith")


def _commit(api: "HfApi", repo_id: str, files: Mapping[str, Path | bytes], job_id: str) -> str:
    """One commit with all of the files; the hash of the one that has them."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    head = api.repo_info(repo_id).sha
    additions = [CommitOperationAdd(path, file) for path, file in sorted(files.items())]
    # Before the commit, so that a Hub which fails there has the large files already when it is asked again.
    api.preupload_lfs_files(repo_id, additions, num_threads=MAX_UPLOAD_THREADS, free_memory=False)
    deletions = [CommitOperationDelete(path) for path in stale_weights(api.list_repo_files(repo_id, revision=head), files)]
    made = api.create_commit(
        repo_id, [*additions, *deletions], commit_message=f"Trained by job {job_id}", parent_commit=head, num_threads=MAX_UPLOAD_THREADS
    )
    return str(made.oid)


def _request(target: PushTarget, operation: Callable[[], ReturnT], sleep: Callable[[float], None]) -> ReturnT:
    """Run a request, again while the Hub is unavailable. Raises JobFailed."""
    from httpx2 import TransportError
    from huggingface_hub.errors import HFValidationError

    try:
        return retry_hub(operation, sleep=sleep)
    except HFValidationError as error:
        raise JobFailed("invalid_config", f"{target.repo_id} is not a valid repository name", "use owner/name in hf_repo_id") from error
    except (TransportError, OSError, RuntimeError, ValueError) as error:  # the client's HTTP errors are OSErrors
        raise _failure(target, error) from error


def _failure(target: PushTarget, error: Exception) -> JobFailed:
    status, said = http_status(error), _server_message(error)
    if status in (402, 413) or "storage limit" in said or "quota" in said.lower():
        return JobFailed("upload_failed", f"{target.repo_id} has no room: {said}", "free some storage on the Hub, then retry the job")
    if status in (401, 403, 404):
        return _no_access(target, error)
    if status == 400 or isinstance(error, ValueError):
        return JobFailed("upload_failed", f"the Hub refused what was pushed to {target.repo_id}: {said}", "the log has the whole answer")
    hint = "retry the job when the Hub can be reached; what it has already is not sent again"
    return JobFailed("upload_failed", f"the Hub did not take the push to {target.repo_id} ({status or type(error).__name__})", hint)


def _no_access(target: PushTarget, error: Exception) -> JobFailed:
    message = f"hf_token may not write to {target.repo_id} ({http_status(error)}: {_server_message(error)})"
    return JobFailed("auth", message, f"send a token with write access to {target.repo_id}, or change hf_repo_id")


def _check_access(target: PushTarget, api: "HfApi") -> None:
    """Whether the token may write to the repository, or make it where it is not there. Raises the client's errors, and JobFailed."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        api.auth_check(target.repo_id, write=True)
    except RepositoryNotFoundError:
        why = repo_creation_denied_reason(target.repo_id, api.whoami())
        if why:
            owner = target.repo_id.rpartition("/")[0] or "the account"
            hint = f"send a token with write access to {owner}, or change hf_repo_id"
            raise JobFailed("auth", f"hf_token may not create {target.repo_id}: {why}", hint) from None


def repo_creation_denied_reason(repo_id: str, account: Mapping[str, Any]) -> str:
    """Why a token may not make that repository, as far as it tells by itself (`whoami-v2`); empty if nothing speaks against it."""
    owner, token = repo_id.rpartition("/")[0] or account["name"], account["auth"]["accessToken"]
    if owner not in {account["name"]} | {org["name"] for org in account.get("orgs", ()) if org.get("roleInOrg") != "read"}:
        return f"{account['name']} does not write for {owner}"
    if token["role"] == "read":
        return "it may only read"
    if token["role"] == "fineGrained":
        scoped = token.get("fineGrained", {}).get("scoped", ())
        allowed = {scope["entity"].get("name") for scope in scoped if "repo.write" in scope["permissions"]}
        if not allowed & {owner, repo_id}:
            return f"its scopes have no write access to {owner}"
    return ""


def _server_message(error: BaseException) -> str:
    """The Hub's own words, in one line."""
    for cause in exception_chain(error):
        words = getattr(cause, "server_message", None)
        if words:
            return str(words).partition("\n")[0]
    return str(error).strip().partition("\n")[0]

"""Pushes the artifacts of a job to the Hugging Face Hub, all of them in one commit.

an artifact's files     the root of the repository, or the folder that its exporter gives (`ExportedArtifact.hub_folder`)
README.md, run.json     the model card and the provenance record

The token is passed to the client as an argument: it is not in the environment, in a log, or on the disk. The client reads the Hub's
address from HF_ENDPOINT.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

from jobs.runtime.artifacts import ExportedArtifact
from jobs.runtime.context import JobContext
from jobs.runtime.errors import JobFailed, exception_chain
from jobs.runtime.http_retry import http_status, retry_hub
from schema.job import Artifact, HubPush
from schema.provenance import RUN_RECORD

if TYPE_CHECKING:
    from huggingface_hub import HfApi

log = logging.getLogger(__name__)

MODEL_CARD = "README.md"
# The files by which a library recognizes the model in a folder.
WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", "adapter_config.json")
MAX_UPLOAD_THREADS = 4

ReturnT = TypeVar("ReturnT")


@dataclass(frozen=True)
class PushTarget:
    """The repository to push to, and the token to use."""

    repo_id: str
    private: bool
    token: str


def push(
    exported_artifacts: Sequence[ExportedArtifact],
    artifacts: Sequence[Artifact],
    card: str,
    run_record: bytes,
    context: JobContext,
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[Artifact, ...]:
    """Push everything in one commit; returns the artifacts with that commit. Raises JobFailed.

    Files that the Hub already has are not sent again, and a push without changes makes no commit, so a retry continues an interrupted one.
    """
    target = push_target(context)
    files = repo_files(exported_artifacts) | {MODEL_CARD: card.encode(), RUN_RECORD: run_record}
    context.check_stop()
    api = _client(target.token)
    repo = _request_with_retry(target, lambda: api.create_repo(target.repo_id, private=target.private, exist_ok=True), sleep)
    # From here on use the id with the owner: a name without one belongs to the token's account.
    revision = _request_with_retry(target, lambda: _commit(api, repo.repo_id, files, context.spec.job_id), sleep)
    hub_push = HubPush(repo_id=repo.repo_id, revision=revision, url=f"{repo.url}/tree/{revision}")
    log.info("pushed to the hub", extra={"repo": repo.repo_id, "revision": revision, "files": len(files)})
    return tuple(artifact.model_copy(update={"hub": hub_push}) for artifact in artifacts)


def check_push(context: JobContext) -> None:
    """Check before the training that the token may push. Raises JobFailed `auth`.

    A Hub that cannot be reached now may be available when the model is done, so that is only logged. Nothing is created on the Hub.
    """
    from httpx2 import TransportError
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    target = push_target(context)
    try:
        _check_access(target, _client(target.token))
    except (HfHubHTTPError, TransportError, OfflineModeIsEnabled) as error:
        if http_status(error) in (401, 403):
            raise _access_error(target, error) from error
        log.warning("could not check write access to the hub", extra={"reason": http_status(error) or type(error).__name__})


def push_target(context: JobContext) -> PushTarget:
    """The target that the job asks for. Raises JobFailed `auth` without a token."""
    export = context.spec.training_config.export_config
    if export.hf_repo_id is None:
        raise JobFailed("invalid_config", "the job has no hf_repo_id to push to", "set export_config.hf_repo_id")
    token = context.secrets.get("hf_token")
    if not token:
        message = f"pushing to {export.hf_repo_id} needs a token, and the job has none"
        raise JobFailed("auth", message, "send the hf_token of an account with write access to the repository")
    return PushTarget(export.hf_repo_id, export.hf_private, token)


def repo_files(exported_artifacts: Sequence[ExportedArtifact]) -> dict[str, Path | bytes]:
    """The files of the repository, by their path in it."""
    return {path: file for exported in exported_artifacts for path, file in _artifact_repo_files(exported)}


def _artifact_repo_files(exported: ExportedArtifact) -> Iterator[tuple[str, Path]]:
    for file, root in exported.list_files():
        relative_path = file.name if file == root else file.relative_to(root).as_posix()
        if relative_path not in (MODEL_CARD, RUN_RECORD):  # the push adds one of each
            yield exported.hub_folder + relative_path, file


def stale_weights(existing: Sequence[str], files: Mapping[str, object]) -> list[str]:
    """The weights of an earlier model in folders that get new weights: a library that finds both would load a mixture.

    All other files of the repository are kept, including GGUF files, each of which is a complete model.
    """
    replaced = {PurePosixPath(path).parent for path in files if path.endswith(WEIGHT_SUFFIXES)}
    return sorted(
        path for path in existing if path.endswith(WEIGHT_SUFFIXES) and PurePosixPath(path).parent in replaced and path not in files
    )


def _client(token: str) -> "HfApi":
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()  # progress bars are unreadable in a log
    return HfApi(token=token, library_name="tunesmith")


def _commit(api: "HfApi", repo_id: str, files: Mapping[str, Path | bytes], job_id: str) -> str:
    """Commit all of the files; returns the hash of the commit that has them."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    head = api.repo_info(repo_id).sha
    additions = [CommitOperationAdd(path, file) for path, file in sorted(files.items())]
    # Before the commit: if the commit fails, a retry does not send the large files again.
    api.preupload_lfs_files(repo_id, additions, num_threads=MAX_UPLOAD_THREADS, free_memory=False)
    deletions = [CommitOperationDelete(path) for path in stale_weights(api.list_repo_files(repo_id, revision=head), files)]
    commit = api.create_commit(
        repo_id, [*additions, *deletions], commit_message=f"Trained by job {job_id}", parent_commit=head, num_threads=MAX_UPLOAD_THREADS
    )
    return str(commit.oid)


def _request_with_retry(target: PushTarget, operation: Callable[[], ReturnT], sleep: Callable[[float], None]) -> ReturnT:
    """Run a request and retry it while the Hub is unavailable. Raises JobFailed."""
    from httpx2 import TransportError
    from huggingface_hub.errors import HFValidationError

    try:
        return retry_hub(operation, sleep=sleep)
    except HFValidationError as error:
        raise JobFailed("invalid_config", f"{target.repo_id} is not a valid repository name", "use owner/name in hf_repo_id") from error
    except (TransportError, OSError, RuntimeError, ValueError) as error:  # the client's HTTP errors are OSErrors
        raise _push_error(target, error) from error


def _push_error(target: PushTarget, error: Exception) -> JobFailed:
    status, message = http_status(error), _server_message(error)
    if status in (402, 413) or "storage limit" in message or "quota" in message.lower():
        return JobFailed(
            "upload_failed",
            f"the Hub has no storage left for {target.repo_id}: {message}",
            "free some storage on the Hub, then retry the job",
        )
    if status in (401, 403, 404):
        return _access_error(target, error)
    if status == 400 or isinstance(error, ValueError):
        return JobFailed("upload_failed", f"the Hub rejected the push to {target.repo_id}: {message}", "the log has the full response")
    hint = "retry the job when the Hub can be reached; files that it already has are not sent again"
    return JobFailed("upload_failed", f"the push to {target.repo_id} failed ({status or type(error).__name__})", hint)


def _access_error(target: PushTarget, error: Exception) -> JobFailed:
    message = f"hf_token has no write access to {target.repo_id} ({http_status(error)}: {_server_message(error)})"
    return JobFailed("auth", message, f"send a token with write access to {target.repo_id}, or change hf_repo_id")


def _check_access(target: PushTarget, api: "HfApi") -> None:
    """Raises JobFailed if the token may neither write to the repository nor create it; also raises the client's errors."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        api.auth_check(target.repo_id, write=True)
    except RepositoryNotFoundError:
        reason = repo_creation_denied_reason(target.repo_id, api.whoami())
        if reason:
            owner = target.repo_id.rpartition("/")[0] or "the account"
            hint = f"send a token with write access to {owner}, or change hf_repo_id"
            raise JobFailed("auth", f"hf_token cannot create {target.repo_id}: {reason}", hint) from None


def repo_creation_denied_reason(repo_id: str, account: Mapping[str, Any]) -> str:
    """Why a token cannot create that repository, according to `whoami-v2`; empty if it can."""
    owner, token = repo_id.rpartition("/")[0] or account["name"], account["auth"]["accessToken"]
    if owner not in {account["name"]} | {org["name"] for org in account.get("orgs", ()) if org.get("roleInOrg") != "read"}:
        return f"{account['name']} has no write access to {owner}"
    if token["role"] == "read":
        return "it is a read-only token"
    if token["role"] == "fineGrained":
        scoped = token.get("fineGrained", {}).get("scoped", ())
        allowed = {scope["entity"].get("name") for scope in scoped if "repo.write" in scope["permissions"]}
        if not allowed & {owner, repo_id}:
            return f"its scopes have no write access to {owner}"
    return ""


def _server_message(error: BaseException) -> str:
    """The first line of the Hub's own error message."""
    for cause in exception_chain(error):
        message = getattr(cause, "server_message", None)
        if message:
            return str(message).partition("\n")[0]
    return str(error).strip().partition("\n")[0]

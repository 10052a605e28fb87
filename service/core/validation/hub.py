"""Checks against the Hugging Face Hub: whether a job can read its base model and push its results.

The Hub port returns facts; the functions here decide. When the Hub does not answer, the request passes, and the job checks again.
"""

from collections.abc import Callable

from schema.training import TrainingConfig
from service.core.errors import InvalidRequest
from service.core.jobs.secrets import HF_SECRET
from service.core.ports import Hub, HubAccess, HubAccount
from service.core.problems import Problems
from service.core.validation.common import is_stored
from storage import ObjectStore, StorageError
from storage.deadline import deadline

HUB_TIMEOUT_S = 2.5  # for all Hub calls of one request, which takes at most four seconds as a whole
WRITE_ROLES = ("contributor", "write", "admin")  # of an organization's members, those who can create repositories


class NoHub:
    """The Hub of an offline deployment: every answer is unknown."""

    def __init__(self, is_cached: Callable[[str], bool] | None = None) -> None:
        """`is_cached` tells which models attempts have in their cache, where they are offline too; None: they may reach the Hub."""
        self._is_cached = is_cached

    def is_unreachable_for_attempts(self, repo_id: str) -> bool:
        """Whether an attempt cannot get a model either, unless the model store has it."""
        return self._is_cached is not None and not self._is_cached(repo_id)

    def check_read_access(self, repo_id: str, token: str | None) -> HubAccess:  # noqa: ARG002
        return "unknown"

    def check_write_access(self, repo_id: str, token: str) -> HubAccess:  # noqa: ARG002
        return "unknown"

    def get_account(self, token: str) -> HubAccount | None:  # noqa: ARG002
        return None

    def list_commits(self, repo_id: str, token: str) -> list[str] | None:  # noqa: ARG002
        raise InvalidRequest("this deployment is offline: it does not call the Hub", hint="repeat the call without delete_hub")

    def delete_repository(self, repo_id: str, token: str) -> None:  # noqa: ARG002
        raise InvalidRequest("this deployment is offline: it does not call the Hub", hint="repeat the call without delete_hub")

    def close(self) -> None:
        return None


def check_token(config: TrainingConfig, token: str | None) -> None:
    """Raise InvalidRequest when the job is to write to the Hub and the request has no token."""
    writes = {
        "destination 'hfhub'": config.export_config.hf_repo_id,
        "trackio_config.space_id": config.trackio_config and config.trackio_config.space_id,
    }
    problems = Problems()
    for field, repo_id in writes.items():
        if repo_id and not token:
            hint = "create a token with write access: https://huggingface.co/settings/tokens"
            problems.add(InvalidRequest(f"{field} needs hf_token, to write to {repo_id}", hint=hint, param=HF_SECRET))
    problems.raise_found()


def check_hub(config: TrainingConfig, token: str | None, hub: Hub, models: ObjectStore, *, reads_base: bool = True) -> None:
    """Raise InvalidRequest when the Hub reports that the job cannot read its base model or cannot push. Takes HUB_TIMEOUT_S at most.

    `reads_base` is false for a job whose base is the whole model of an earlier job.
    """
    push_repo_id = config.export_config.hf_repo_id  # the schema requires it with destination hfhub, and forbids it otherwise
    if isinstance(hub, NoHub):
        return  # without looking for the base model in the model store
    problems = Problems()
    with deadline(HUB_TIMEOUT_S):
        base_model_id = config.hub_model_id if reads_base else None
        if base_model_id and not _is_base_stored(models, base_model_id):
            with problems.collect():
                check_base_access(base_model_id, hub.check_read_access(base_model_id, token), has_token=bool(token))
        if push_repo_id and token:
            access = hub.check_write_access(push_repo_id, token)
            with problems.collect():
                check_push_access(push_repo_id, access, hub.get_account(token) if access in ("refused", "absent", "unknown") else None)
    problems.raise_found()


def _is_base_stored(models: ObjectStore, base_model_id: str) -> bool:
    """Whether the job reads the base model from the model store. If the store does not answer now, the launch reports it."""
    try:
        return is_stored(models, base_model_id)
    except StorageError:
        return True


def check_base_access(base_model_id: str, access: HubAccess, *, has_token: bool) -> None:
    """Raise InvalidRequest when the base model cannot be read."""
    reader = "the hf_token that was sent" if has_token else "a request without hf_token"
    match access:
        case "gated":
            hint = f"accept the license at https://huggingface.co/{base_model_id} and send the hf_token of that account"
            raise InvalidRequest(f"base model {base_model_id} is gated, and {reader} may not read it", hint=hint, param=HF_SECRET)
        case "absent":
            message = f"base model {base_model_id} does not exist on the Hub, or is private and {reader} may not read it"
            hint = "check base_model_id; for a private model send the hf_token of an account that can read it"
            raise InvalidRequest(message, hint=hint, param="training_config.base_model_id")
        case "refused":
            message = f"the Hub does not let {reader} read base model {base_model_id}"
            raise InvalidRequest(message, hint="give the token read access to that repository", param=HF_SECRET)
        case "bad_token":
            raise _bad_token_error()
        case _:
            return


def check_push_access(repo_id: str, access: HubAccess, account: HubAccount | None) -> None:
    """Raise InvalidRequest when the results cannot be pushed. `account` decides where the repository's own answer does not."""
    namespace = repo_id.partition("/")[0] if "/" in repo_id else (account.user if account else "")
    if access == "bad_token":
        raise _bad_token_error()
    if account is not None and access != "yes":
        if account.role == "read":
            hint = "create one with write access: https://huggingface.co/settings/tokens"
            raise InvalidRequest("hf_token is read-only, and the job must push", hint=hint, param=HF_SECRET)
        if namespace != account.user and account.orgs.get(namespace) not in WRITE_ROLES:
            known = ", ".join([account.user, *(name for name, role in account.orgs.items() if role in WRITE_ROLES)])
            message = f"hf_token belongs to {account.user}, who cannot write to {namespace!r}"
            raise InvalidRequest(message, hint=f"push to one of: {known}", param="training_config.export_config.hf_repo_id")
        if account.role == "fineGrained" and not {namespace, f"{namespace}/{repo_id.rpartition('/')[2]}"} & account.writable:
            hint = f"give it write access to the repositories of {namespace}: https://huggingface.co/settings/tokens"
            raise InvalidRequest(f"hf_token is fine-grained and may not write to {repo_id}", hint=hint, param=HF_SECRET)
    if access == "refused":
        hint = "use a token with write access to it, or another hf_repo_id"
        raise InvalidRequest(f"hf_token may not write to {repo_id}", hint=hint, param="training_config.export_config.hf_repo_id")


def _bad_token_error() -> InvalidRequest:
    hint = "it may have been revoked; create another: https://huggingface.co/settings/tokens"
    return InvalidRequest("the Hub rejects the hf_token that was sent", hint=hint, param=HF_SECRET)


def check_only_our_commits(repo_id: str, commits: list[str], pushed: set[str]) -> None:
    """Raise InvalidRequest unless a repository holds only what one job pushed. The Hub itself makes the first commit."""
    others = [commit for commit in commits[1:] if commit not in pushed]
    if others or commits[:1] == []:
        message = f"{repo_id} has {len(others)} commits that are not of this job"
        hint = f"nothing was deleted; delete what you do not want at https://huggingface.co/{repo_id}/tree/main"
        raise InvalidRequest(message, hint=hint, param="delete_hub")

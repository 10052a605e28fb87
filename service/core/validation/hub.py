"""Whether the Hugging Face Hub will let a job read its base and write its results: asked before any compute is spent.

The Hub tells facts, the functions here decide. What the Hub does not say is not held against anybody: the job will see.
"""

from schema.training import TrainingConfig
from service.core.errors import InvalidRequest
from service.core.jobs.secrets import HF_SECRET
from service.core.ports import Hub, HubAccess, HubAccount
from service.core.validation.llm import is_stored
from storage import ObjectStore, StorageError
from storage.deadline import deadline

HUB_TIMEOUT_S = 2.5  # for all that is asked about one request: a caller waits four seconds for everything
WRITE_ROLES = ("contributor", "write", "admin")  # what a member of an organisation must be, to make a repository there


class NoHub:
    """A deployment without the Hub: nothing is known."""

    def check_read_access(self, repo_id: str, token: str | None) -> HubAccess:  # noqa: ARG002
        return "unknown"

    def check_write_access(self, repo_id: str, token: str) -> HubAccess:  # noqa: ARG002
        return "unknown"

    def get_account(self, token: str) -> HubAccount | None:  # noqa: ARG002
        return None

    def list_commits(self, repo_id: str, token: str) -> list[str] | None:  # noqa: ARG002
        raise InvalidRequest("this deployment does not reach the Hub")

    def delete_repository(self, repo_id: str, token: str) -> None:  # noqa: ARG002
        raise InvalidRequest("this deployment does not reach the Hub")

    def close(self) -> None:
        return None


def check_token(config: TrainingConfig, token: str | None) -> None:
    """Raise InvalidRequest when something is to be written to the Hub, and there is no token."""
    writes = {
        "destination 'hfhub'": config.export_config.hf_repo_id,
        "trackio_config.space_id": config.trackio_config and config.trackio_config.space_id,
    }
    for what, where in writes.items():
        if where and not token:
            hint = "a token with write access: https://huggingface.co/settings/tokens"
            raise InvalidRequest(f"{what} needs hf_token, to write to {where}", hint=hint, param=HF_SECRET)


def check_hub(config: TrainingConfig, token: str | None, hub: Hub, models: ObjectStore) -> None:
    """Raise InvalidRequest when the Hub says that the job could not read its base, or not push. Takes HUB_S at most."""
    pushes_to = config.export_config.hf_repo_id  # the schema wants it with destination hfhub, and only then
    if isinstance(hub, NoHub):
        return  # no use in looking for the base either
    with deadline(HUB_TIMEOUT_S):
        if not _is_base_stored(models, config.base_model_id):
            base_access_error(config.base_model_id, hub.check_read_access(config.base_model_id, token), has_token=bool(token))
        if pushes_to and token:
            access = hub.check_write_access(pushes_to, token)
            push_access_error(pushes_to, access, hub.get_account(token) if access in ("refused", "absent", "unknown") else None)


def _is_base_stored(models: ObjectStore, base_model_id: str) -> bool:
    """Whether the base need not come from the Hub. A store that does not answer now is told of when the job is launched."""
    try:
        return is_stored(models, base_model_id)
    except StorageError:
        return True


def base_access_error(base_model_id: str, access: HubAccess, *, has_token: bool) -> None:
    """Raise InvalidRequest when the base cannot be read."""
    whose = "the hf_token that was sent" if has_token else "a request without hf_token"
    match access:
        case "gated":
            hint = f"accept the licence at https://huggingface.co/{base_model_id} and send the hf_token of the account that did"
            raise InvalidRequest(f"base model {base_model_id} is gated, and {whose} may not read it", hint=hint, param=HF_SECRET)
        case "absent":
            message = f"base model {base_model_id} does not exist on the Hub, or is private and {whose} may not read it"
            hint = "check base_model_id; for a private model send the hf_token of an account that may read it"
            raise InvalidRequest(message, hint=hint, param="training_config.base_model_id")
        case "refused":
            message = f"the Hub does not let {whose} read base model {base_model_id}"
            raise InvalidRequest(message, hint="give the token read access to that repository", param=HF_SECRET)
        case "bad_token":
            raise InvalidRequest("the Hub does not know the hf_token that was sent", hint="it may have been revoked", param=HF_SECRET)
        case _:
            return


def push_access_error(repo_id: str, access: HubAccess, account: HubAccount | None) -> None:
    """Raise InvalidRequest when the results could not be pushed. `account` is asked for where the repository itself does not say."""
    namespace = repo_id.partition("/")[0] if "/" in repo_id else (account.user if account else "")
    if access == "bad_token":
        raise InvalidRequest("the Hub does not know the hf_token that was sent", hint="it may have been revoked", param=HF_SECRET)
    if account is not None and access != "yes":
        if account.role == "read":
            hint = "make one with write access: https://huggingface.co/settings/tokens"
            raise InvalidRequest("hf_token can only read, and the job is to push", hint=hint, param=HF_SECRET)
        if namespace != account.user and account.orgs.get(namespace) not in WRITE_ROLES:
            known = ", ".join([account.user, *(name for name, role in account.orgs.items() if role in WRITE_ROLES)])
            message = f"hf_token is {account.user}'s, who cannot write to {namespace!r}"
            raise InvalidRequest(message, hint=f"push to one of: {known}", param="training_config.export_config.hf_repo_id")
        if account.role == "fineGrained" and not {namespace, f"{namespace}/{repo_id.rpartition('/')[2]}"} & account.writable:
            hint = f"give it write access to the repositories of {namespace}: https://huggingface.co/settings/tokens"
            raise InvalidRequest(f"hf_token is fine-grained and may not write to {repo_id}", hint=hint, param=HF_SECRET)
    if access == "refused":
        hint = "use a token with write access to it, or another hf_repo_id"
        raise InvalidRequest(f"hf_token may not write to {repo_id}", hint=hint, param="training_config.export_config.hf_repo_id")


def check_only_our_commits(repo_id: str, commits: list[str], pushed: set[str]) -> None:
    """Raise InvalidRequest unless a repository holds nothing but what one job pushed. The first commit is the Hub's own."""
    others = [commit for commit in commits[1:] if commit not in pushed]
    if others or commits[:1] == []:
        message = f"{repo_id} has {len(others)} commits that are not of this job"
        hint = f"it is not deleted; remove what you do not want at https://huggingface.co/{repo_id}/tree/main"
        raise InvalidRequest(message, hint=hint, param="delete_hub")

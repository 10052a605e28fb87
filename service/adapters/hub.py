"""The Hugging Face Hub through its own client. Nothing is cached. After a call without an answer, calls fail at once for a minute.

The client is imported at first use: that takes a third of a second, and many deployments never need it.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# The client is loosely typed where it returns the Hub's JSON.

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextvars import copy_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from service.core.errors import InvalidRequest, Unavailable
from service.core.ports import HubAccess, HubAccount
from storage.deadline import remaining_s

if TYPE_CHECKING:
    from huggingface_hub import HfApi

log = logging.getLogger(__name__)

CALL_TIMEOUT_S = 3.0
MIN_CONCLUSIVE_TIMEOUT_S = 1.0  # a Hub that fails to answer in less than this may still be available
MAX_WORKERS = 8
ACCESS_BY_STATUS: dict[int, HubAccess] = {401: "bad_token", 403: "refused"}
COOLDOWN_S = 60.0  # after a call without an answer; otherwise each request would wait for another timeout

ReturnT = TypeVar("ReturnT")


class HuggingFaceHub:
    """The Hub at an endpoint."""

    def __init__(self, endpoint: str, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._endpoint = endpoint
        self._monotonic = monotonic
        self._cooldown_until = float("-inf")
        self._lock = threading.Lock()
        self._cached_api: HfApi | None = None
        self._pool = ThreadPoolExecutor(MAX_WORKERS, "hub")

    def check_read_access(self, repo_id: str, token: str | None) -> HubAccess:
        # False: never use a token stored on this machine.
        return self._check_access(lambda api: api.auth_check(repo_id, token=token or False))

    def check_write_access(self, repo_id: str, token: str) -> HubAccess:
        return self._check_access(lambda api: api.auth_check(repo_id, token=token, write=True))

    def get_account(self, token: str) -> HubAccount | None:
        from huggingface_hub.errors import HfHubHTTPError

        def whoami(api: "HfApi") -> dict[str, Any]:
            return api.whoami(token)

        try:
            return parse_account(self._call_with_timeout(whoami))
        except (HfHubHTTPError, Unavailable):
            return None

    def list_commits(self, repo_id: str, token: str) -> list[str] | None:
        from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

        try:
            return [commit.commit_id for commit in self._call_with_timeout(lambda api: api.list_repo_commits(repo_id, token=token))][::-1]
        except RepositoryNotFoundError:
            return None
        except HfHubHTTPError as error:
            raise _access_error(repo_id, error.response.status_code) from error

    def delete_repository(self, repo_id: str, token: str) -> None:
        from huggingface_hub.errors import HfHubHTTPError

        try:
            self._call_with_timeout(lambda api: api.delete_repo(repo_id, token=token, missing_ok=True))
        except HfHubHTTPError as error:
            raise _access_error(repo_id, error.response.status_code) from error

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _check_access(self, check: "Callable[[HfApi], None]") -> HubAccess:
        from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

        try:
            self._call_with_timeout(check)
        except GatedRepoError:
            return "gated"
        except RepositoryNotFoundError:
            return "absent"
        except HfHubHTTPError as error:
            return ACCESS_BY_STATUS.get(error.response.status_code, "unknown")
        except Unavailable:
            return "unknown"
        return "yes"

    def _call_with_timeout(self, call: "Callable[[HfApi], ReturnT]") -> ReturnT:
        """The Hub's answer within the caller's deadline. Raises HfHubHTTPError, and Unavailable without an answer.

        Runs in a thread because resolving a host name has no timeout.
        """
        from httpx2 import TransportError
        from huggingface_hub.errors import OfflineModeIsEnabled

        if self._monotonic() < self._cooldown_until:
            raise Unavailable("the Hugging Face Hub did not answer a moment ago", hint="try again in a minute")
        timeout_s = remaining_s(CALL_TIMEOUT_S)
        future = self._pool.submit(copy_context().run, lambda: call(self._api))
        try:
            return future.result(timeout_s)
        except (FutureTimeout, TransportError, OfflineModeIsEnabled) as error:
            future.cancel()
            if timeout_s >= MIN_CONCLUSIVE_TIMEOUT_S or not isinstance(error, FutureTimeout):
                self._cooldown_until = self._monotonic() + COOLDOWN_S
            log.warning("the Hugging Face Hub does not answer", extra={"endpoint": self._endpoint, "error": type(error).__name__})
            raise Unavailable(f"the Hugging Face Hub does not answer at {self._endpoint}", hint="try again in a minute") from error

    @property
    def _api(self) -> "HfApi":
        from huggingface_hub import HfApi, get_session

        with self._lock:
            if self._cached_api is None:
                get_session().timeout = CALL_TIMEOUT_S  # the client has no timeout by default
                self._cached_api = HfApi(endpoint=self._endpoint)
            return self._cached_api


class HubCache:
    """The folder in which the Hub's client keeps downloads, as an attempt that is offline reads it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def has_model(self, repo_id: str) -> bool:
        """Whether a revision of the model is there."""
        return any(self._folder.glob(f"models--{repo_id.replace('/', '--')}/snapshots/*/config.json"))


# Any: JSON of the Hub, whose shape is documented by example alone: https://huggingface.co/docs/hub/api
def parse_account(whoami: Mapping[str, Any]) -> HubAccount:
    """The account of a token, from the JSON of `/api/whoami-v2`. A permission that the JSON does not mention is assumed."""
    access: dict[str, Any] = whoami.get("auth", {}).get("accessToken") or {}
    fine_grained = access.get("fineGrained")
    scopes: list[dict[str, Any]] = fine_grained.get("scoped", []) if fine_grained else []
    return HubAccount(
        user=whoami["name"],
        role=access.get("role", "") if fine_grained or access.get("role") != "fineGrained" else "",
        orgs={org["name"]: org.get("roleInOrg") or "write" for org in whoami.get("orgs", [])},
        writable=frozenset(scope["entity"].get("name", "") for scope in scopes if "repo.write" in scope.get("permissions", [])),
    )


def _access_error(repo_id: str, status: int) -> InvalidRequest | Unavailable:
    if status in (401, 403):
        return InvalidRequest(
            f"the token may not change {repo_id} on the Hub", hint="send a token with write access to it", param="X-HF-Token"
        )
    return Unavailable(f"the Hugging Face Hub answered {status} about {repo_id}; try again")

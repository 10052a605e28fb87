"""In-memory fakes of the service's clock and ports, whose answers a test sets."""

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta

from schema.capabilities import EnvironmentManifest
from service.core.errors import Unavailable
from service.core.limits import Limits
from service.core.ports import ExecutionState, ExitReason, HubAccess, HubAccount, LaunchRequest
from tests.factories import START, make_manifest, make_profile


class FakeClock:
    """A clock that advances only when a test advances it."""

    def __init__(self, now: datetime = START) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now

    def advance(self, seconds: float) -> datetime:
        self.now += timedelta(seconds=seconds)
        return self.now


class FakeLauncher:
    """Records launches in a dictionary. A test can make it refuse a launch, lose the response to one, or hang."""

    polling_is_free = True

    def __init__(self, name: str = "fake", profiles: Sequence[str] = ("fake",), slots: int = 10) -> None:
        self.name = name
        self.limits = Limits()
        self.profiles = {profile: make_profile(profile) for profile in profiles}
        self.launched: dict[str, LaunchRequest] = {}
        self.states: dict[str, ExecutionState] = {}
        self.cancels: list[tuple[str, bool]] = []
        self.slots = slots
        self.refusal: Exception | None = None
        self.loses_response = False
        self.exit_reasons: dict[str, ExitReason] = {}
        self.manifests = {"llm": make_manifest()}
        self.on_call: Callable[[], None] = lambda: None  # called first, by every method that a real launcher calls over a network

    def list_environments(self) -> dict[str, EnvironmentManifest]:
        return self.manifests

    def launch(self, request: LaunchRequest) -> str:
        self.on_call()
        if self.refusal:
            raise self.refusal
        assert request.name not in self.launched, "launched twice"
        self.launched[request.name] = request
        self.states[f"handle of {request.name}"] = "running"
        if self.loses_response:
            raise Unavailable("the response was lost")
        return f"handle of {request.name}"

    def find_handle(self, name: str) -> str | None:
        self.on_call()
        return f"handle of {name}" if name in self.launched else None

    def check(self, handle: str) -> ExecutionState:
        self.on_call()
        self._check_own(handle)
        return self.states[handle]

    def cancel(self, handle: str, *, force: bool) -> None:
        self.on_call()
        self._check_own(handle)
        self.cancels.append((handle, force))

    def count_free_slots(self, active_jobs: int) -> int:
        return self.slots - sum(state == "running" for state in self.states.values())

    def ping(self) -> None:
        self.on_call()

    def get_exit_reason(self, handle: str) -> ExitReason | None:
        self.on_call()
        self._check_own(handle)
        return self.exit_reasons.get(handle)

    def close(self) -> None:
        return None

    def _check_own(self, handle: str) -> None:
        """The core never asks a launcher about a handle that it did not return."""
        assert handle in self.states, f"{self.name} is asked about {handle!r}, which is not its own"


class PullLauncher(FakeLauncher):
    """Offers attempts to machines that ask for work, instead of starting them. A test takes an offer as such a machine would."""

    def launch(self, request: LaunchRequest) -> str:
        handle = super().launch(request)
        self.states[handle] = "waiting"
        return handle

    def take_offer(self) -> LaunchRequest | None:
        """The oldest attempt that waits, which the machine now runs; None when none waits."""
        for name, request in self.launched.items():
            if self.states[f"handle of {name}"] == "waiting":
                self.states[f"handle of {name}"] = "running"
                return request
        return None

    def cancel(self, handle: str, *, force: bool) -> None:
        super().cancel(handle, force=force)
        if self.states[handle] == "waiting":
            self.states[handle] = "ended"


class FakeHub:
    """Returns the access and account that a test sets, records requests and holds repositories with commits."""

    def __init__(self) -> None:
        self.read_result: HubAccess = "unknown"
        self.write_result: HubAccess = "unknown"
        self.account_result: HubAccount | None = None
        self.repositories: dict[str, list[str]] = {}
        self.requests: list[tuple[str, str | None]] = []

    def check_read_access(self, repo_id: str, token: str | None) -> HubAccess:
        self.requests.append((repo_id, token))
        return self.read_result

    def check_write_access(self, repo_id: str, token: str) -> HubAccess:
        self.requests.append((repo_id, token))
        return self.write_result

    def get_account(self, token: str) -> HubAccount | None:
        return self.account_result

    def list_commits(self, repo_id: str, token: str) -> list[str] | None:
        return self.repositories.get(repo_id)

    def delete_repository(self, repo_id: str, token: str) -> None:
        del self.repositories[repo_id]

    def close(self) -> None:
        return None

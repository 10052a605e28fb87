"""In-memory fakes of the service's clock and ports, whose answers a test sets."""

from datetime import datetime, timedelta

from service.core.errors import Unavailable
from service.core.ports import ExecutionState, ExitReason, HubAccess, HubAccount, LaunchRequest, RuntimeCapabilities
from tests.factories import START, make_capabilities


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
    """Records launches in a dictionary. A test can make it reject a launch, or lose the response to one."""

    name = "fake"
    polling_is_free = True
    profiles = ("fake",)

    def __init__(self) -> None:
        self.launched: dict[str, LaunchRequest] = {}
        self.states: dict[str, ExecutionState] = {}
        self.cancels: list[tuple[str, bool]] = []
        self.slots = 10
        self.refusal: Exception | None = None
        self.loses_response = False
        self.exit_reasons: dict[str, ExitReason] = {}
        self.capabilities = make_capabilities()

    def launch(self, request: LaunchRequest) -> str:
        if self.refusal:
            raise self.refusal
        assert request.name not in self.launched, "launched twice"
        self.launched[request.name] = request
        self.states[f"handle of {request.name}"] = "running"
        if self.loses_response:
            raise Unavailable("the response was lost")
        return f"handle of {request.name}"

    def find_handle(self, name: str) -> str | None:
        return f"handle of {name}" if name in self.launched else None

    def check(self, handle: str) -> ExecutionState:
        return self.states[handle]

    def cancel(self, handle: str, *, force: bool) -> None:
        self.cancels.append((handle, force))

    def count_free_slots(self, active_jobs: int) -> int:
        return self.slots - sum(state == "running" for state in self.states.values())

    def get_capabilities(self, profile: str | None = None) -> RuntimeCapabilities:
        return self.capabilities

    def get_exit_reason(self, handle: str) -> ExitReason | None:
        return self.exit_reasons.get(handle)

    def close(self) -> None:
        return None


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

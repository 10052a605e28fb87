"""The launchers of a deployment, side by side: which of them a job may use, and which one answers for an attempt.

Each has its own limits, slots and queue. Nothing here calls a launcher except to ask what it offers, so one that is full or does not
answer delays no job of another.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from schema.capabilities import EnvironmentManifest
from schema.job import Job
from schema.placement import Placement
from service.core.errors import InvalidRequest, Unavailable, Unsupported
from service.core.ports import Launcher, Profile
from service.core.problems import Problems
from service.core.suggestions import did_you_mean


@dataclass(frozen=True)
class Offer:
    """A placement with what is known about it: the hardware, and the packages of its environment."""

    placement: Placement
    profile: Profile
    manifest: EnvironmentManifest


class LauncherPool:
    """Finds launchers by name, and placements by what a request asks for. The first launcher's first profile is the default."""

    def __init__(self, launchers: Sequence[Launcher]) -> None:
        """Raises ValueError for two launchers of one name, and without any."""
        self._launchers = {launcher.name: launcher for launcher in launchers}
        if len(self._launchers) != len(launchers) or not launchers:
            names = ", ".join(launcher.name for launcher in launchers)
            raise ValueError(f"a deployment needs one or more launchers with different names, not: {names or 'none'}")

    def __iter__(self) -> Iterator[Launcher]:
        return iter(self._launchers.values())

    def find(self, name: str) -> Launcher | None:
        """The launcher of that name; None when this deployment does not have it, or no longer."""
        return self._launchers.get(name)

    def get(self, name: str) -> Launcher:
        """The launcher of that name. Raises KeyError."""
        return self._launchers[name]

    def find_for_attempt(self, job: Job, number: int) -> Launcher | None:
        """The launcher that answers for an attempt's handle."""
        return self.find(job.attempts[number - 1].placement.launcher)

    def resolve(self, hardware: str | Sequence[str] | None, environment: str) -> tuple[Offer, ...]:
        """The placements that a request asks for, in its order. Raises Unsupported, InvalidRequest, and Unavailable."""
        if hardware is None:
            return (self._resolve_default(environment),)
        names = [hardware] if isinstance(hardware, str) else list(hardware)
        offers, problems = list[Offer](), Problems()
        for name in names:
            with problems.collect():
                offers.append(self._resolve_name(name, environment))
        problems.raise_found()
        if len({offer.placement.hardware for offer in offers}) != len(offers):
            raise InvalidRequest("hardware names the same profile twice", param="hardware")
        return tuple(offers)

    def list_offers(self, environment: str) -> list[Offer]:
        """Every placement with that environment. Raises Unsupported when there is none, and Unavailable when no launcher can tell."""
        offers, unavailable = list[Offer](), list[Unavailable]()
        for launcher in self:
            try:
                if environment in launcher.list_environments():
                    offers += [_offer(launcher, profile, environment) for profile in launcher.profiles]
            except Unavailable as error:
                unavailable.append(error)
        if not offers and unavailable:
            raise unavailable[0]
        return offers or [_offer(next(iter(self)), "", environment)]

    def describe_missing(self, job: Job) -> str | None:
        """Why a queued job waits for no launcher of this deployment; None when one of them can take it."""
        if any(name in self._launchers for name in job.launchers):
            return None
        wanted, known = ", ".join(placement.hardware for placement in job.placements), ", ".join(self._known_names())
        return f"this deployment has no launcher for {wanted}; pause the job and resume it with other hardware: {known}"

    def _resolve_name(self, name: str, environment: str) -> Offer:
        launcher_name, _, profile_name = name.rpartition("/")
        if launcher_name and launcher_name not in self._launchers:
            hint = did_you_mean(launcher_name, self._launchers)
            raise Unsupported(
                f"no launcher {launcher_name!r}; this deployment has: {', '.join(self._launchers)}", hint=hint, param="hardware"
            )
        candidates = [self._launchers[launcher_name]] if launcher_name else list(self)
        matching = [launcher for launcher in candidates if profile_name in launcher.profiles]
        if not matching:
            known = self._known_names()
            hint = did_you_mean(name, known)
            raise Unsupported(f"no hardware {name!r}; this deployment has: {', '.join(known)}", hint=hint, param="hardware")
        if len(matching) > 1:
            qualified = " or ".join(f"{launcher.name}/{profile_name}" for launcher in matching)
            raise InvalidRequest(f"several launchers have hardware {name!r}; name one: {qualified}", param="hardware")
        return _offer(matching[0], profile_name, environment)

    def _resolve_default(self, environment: str) -> Offer:
        """The default profile of the first launcher that has the environment."""
        unavailable: Unavailable | None = None
        for launcher in self:
            try:
                if environment in launcher.list_environments():
                    return _offer(launcher, next(iter(launcher.profiles)), environment)
            except Unavailable as error:
                unavailable = unavailable or error
        if unavailable:
            raise unavailable
        return _offer(next(iter(self)), "", environment)

    def _known_names(self) -> list[str]:
        """Every profile, qualified where a name is not unique."""
        names = [name for launcher in self for name in launcher.profiles]
        return [name if names.count(name) == 1 else f"{launcher.name}/{name}" for launcher in self for name in launcher.profiles]


def _offer(launcher: Launcher, profile_name: str, environment: str) -> Offer:
    """Raises Unsupported when the launcher does not have the environment."""
    environments: Mapping[str, EnvironmentManifest] = launcher.list_environments()
    if environment not in environments:
        installed = ", ".join(environments) or "none"
        message = f"this needs the environment {environment!r}, which launcher {launcher.name!r} does not have; it has: {installed}"
        raise Unsupported(message, hint=f"`make setup-{environment}` installs it, `make deploy` builds its image", param="hardware")
    placement = Placement(launcher=launcher.name, profile=profile_name, environment=environment)
    return Offer(placement, launcher.profiles[profile_name], environments[environment])

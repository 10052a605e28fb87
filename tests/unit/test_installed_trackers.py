"""Trackers that no environment of a deployment has are not offered, and a request for one is refused."""

from typing import Any

import pytest

from schema.capabilities import EnvironmentManifest
from schema.training.trackers import TRACKERS
from service.api.capabilities import capabilities_response
from service.core.errors import Unsupported
from service.core.launchers import LauncherPool
from service.core.validation.placement import check_trackers, list_trackers
from tests.factories import make_config, make_manifest
from tests.fakes import FakeLauncher
from tests.unit.jobs_harness import JobsHarness

WITH_TWO = make_manifest().model_copy(update={"trackers": ("mlflow", "wandb")})
WITH_ONE = make_manifest().model_copy(update={"trackers": ("trackio",)})
EARLIER = make_manifest()  # written before trackers were recorded
TRACKIO = {"trackio_config": {}}


@pytest.mark.parametrize(
    ("manifests", "trackers"),
    [
        ([WITH_TWO], ["wandb", "mlflow"]),
        ([WITH_TWO, WITH_ONE], ["wandb", "mlflow", "trackio"]),
        ([EARLIER], list(TRACKERS)),
        ([WITH_TWO, EARLIER], list(TRACKERS)),
        ([], []),
    ],
)
def test_trackers_are_those_that_some_environment_has(manifests: list[EnvironmentManifest], trackers: list[str]) -> None:
    assert list_trackers(manifests) == trackers


def test_capabilities_list_installed_trackers_only() -> None:
    launcher: Any = FakeLauncher()
    launcher.manifests = {"llm": WITH_TWO}
    assert capabilities_response(LauncherPool([launcher]))["trackers"] == ["wandb", "mlflow"]


def test_missing_tracker_is_refused_with_those_that_are_there(harness: JobsHarness) -> None:
    harness.launcher.manifests = {"llm": WITH_TWO}
    config = {"base_model_id": "g/m", **TRACKIO, "tensorboard_config": {}}
    with pytest.raises(Unsupported, match="it has: wandb, mlflow") as excinfo:
        harness.submit(training_config=config)
    assert [problem.param for problem in excinfo.value.problems] == ["training_config.tensorboard_config", "training_config.trackio_config"]
    assert harness.submit(training_config={"base_model_id": "g/m", "wandb_config": {"mode": "offline"}}).training_config.wandb_config


@pytest.mark.parametrize("manifests", [[WITH_TWO, WITH_ONE], [EARLIER]])
def test_tracker_of_one_possible_environment_is_accepted(manifests: list[EnvironmentManifest]) -> None:
    check_trackers(make_config(**TRACKIO), manifests)

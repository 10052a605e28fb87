"""The Cloud Run emulator with one job, and launchers that use it through Google's client library."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.loopback.cloud_run.server import CloudRun
from service.adapters.launchers.cloud_run.launcher import CloudRunLauncher
from service.core.ports import LaunchRequest
from service.setting_types import SOURCE_ROOT

JOB = "projects/demo/locations/here/jobs/tunesmith-cpu"
# Prints its environment and arguments, sleeps if BEHAVIOR is "sleep", and exits with code EXIT.
ATTEMPT_SCRIPT = """
import json, os, sys, time
print(json.dumps(dict(os.environ)), *sys.argv[1:], flush=True)
behavior = os.environ.get("BEHAVIOR", "end")
if behavior == "sleep": time.sleep(60)
sys.exit(int(os.environ.get("EXIT", "0")))
"""


@pytest.fixture
def cloud_run(tmp_path: Path) -> Iterator[CloudRun]:
    with CloudRun(tmp_path, {"llm": [sys.executable, "-c", ATTEMPT_SCRIPT]}, environment={"INHERITED": "yes"}, grace_s=0.2) as cloud_run:
        cloud_run.create_job(JOB, "llm")
        yield cloud_run


@pytest.fixture
def launcher(cloud_run: CloudRun) -> Iterator[CloudRunLauncher]:
    launcher = make_launcher(cloud_run.host)
    yield launcher
    launcher.close()


def make_launcher(emulator_host: str | None, **changes: Any) -> CloudRunLauncher:
    options = {
        "environments": SOURCE_ROOT / "tests",
        "time_limit_s": 600,
        "profiles": ("cpu",),
        "max_concurrent_jobs": 2,
        "service_audience": None,
    }
    location = {"project_id": "demo", "region": "here", "service_url": "https://tunesmith.example"}
    return CloudRunLauncher(**location, **options | changes, emulator_host=emulator_host)


def make_launch_request(name: str = "job-1.1", hardware: str = "cpu", environment: str = "llm", **variables: str) -> LaunchRequest:
    defaults = {"JOB_ID": "job-1", "JOB_ATTEMPT": "1", "JOB_TOKEN": "a token of this attempt", "JOB_SPEC_STORE_URL": "gs://demo-configs"}
    return LaunchRequest(name=name, job_id="job-1", attempt=1, profile=hardware, environment=environment, variables=defaults | variables)

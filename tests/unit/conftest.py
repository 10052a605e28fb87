"""Fixtures of the unit tests."""

from pathlib import Path

import pytest

from tests.unit.jobs_harness import JobsHarness


@pytest.fixture
def harness(tmp_path: Path) -> JobsHarness:
    return JobsHarness(tmp_path)

"""Fixtures of the unit tests."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from tests.unit.api_harness import ROWS, run_test_service, upload
from tests.unit.jobs_harness import JobsHarness


@pytest.fixture(scope="module", autouse=True)
def _no_fsync() -> Iterator[None]:
    """No unit test loses power, and fsync would take a third of their time. The contract suites run with it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture
def harness(tmp_path: Path) -> JobsHarness:
    return JobsHarness(tmp_path)


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    """A service of its own for each test."""
    with run_test_service(tmp_path / "home") as client:
        yield client


@pytest.fixture
def dataset_id(client: TestClient) -> str:
    return upload(client, ROWS).json()["processed_dataset_id"]


@pytest.fixture(scope="module")
def readonly_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """One service for the tests of a file whose requests change nothing."""
    with run_test_service(tmp_path_factory.mktemp("readonly")) as client:
        yield client


@pytest.fixture(scope="module")
def readonly_dataset_id(readonly_client: TestClient) -> str:
    return upload(readonly_client, ROWS).json()["processed_dataset_id"]

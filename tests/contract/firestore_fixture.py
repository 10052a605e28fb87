"""One Firestore emulator per test session, and a project in it per test."""

from collections.abc import Iterator
from uuid import uuid4

import pytest

from infra.loopback.firestore import run_firestore_emulator


@pytest.fixture(scope="session")
def firestore_emulator_host() -> Iterator[str]:
    """Its `host:port`. Without the SDK's emulator or Java the tests fail with instructions; they are not skipped."""
    with run_firestore_emulator() as host:
        yield host


@pytest.fixture
def firestore_project(firestore_emulator_host: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty project; Google's client finds its emulator."""
    monkeypatch.setenv("FIRESTORE_EMULATOR_HOST", firestore_emulator_host)
    return f"test-{uuid4().hex[:12]}"

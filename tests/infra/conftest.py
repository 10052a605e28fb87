"""One Google Cloud SDK for the session: each of its calls takes a second."""

import pytest

from tests.infra.gcloud import Gcloud


@pytest.fixture(scope="session")
def gcloud(tmp_path_factory: pytest.TempPathFactory) -> Gcloud:
    """The SDK, which knows no account and touches nobody's configuration."""
    return Gcloud(tmp_path_factory.mktemp("gcloud"))

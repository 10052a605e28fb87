"""One Google Cloud SDK for the session, because each of its calls takes a second."""

import pytest

from tests.infra.gcloud import Gcloud


@pytest.fixture(scope="session")
def gcloud(tmp_path_factory: pytest.TempPathFactory) -> Gcloud:
    """The SDK without an account, with a configuration folder of its own."""
    return Gcloud(tmp_path_factory.mktemp("gcloud"))

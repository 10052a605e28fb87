"""The loopback Hub, and the real client turned to it."""

from collections.abc import Generator

import pytest

from infra.loopback.http_faults import HttpFaultProxy, run_http_fault_proxy
from infra.loopback.hub import LoopbackHub, Token


@pytest.fixture
def hub() -> Generator[LoopbackHub]:
    """A Hub where ada may write and grace may read."""
    with LoopbackHub() as running:
        running.tokens["hf_ada"] = Token("ada", orgs={"lab": "write"})
        running.tokens["hf_reader"] = Token("ada", "read")
        running.tokens["hf_grace"] = Token("grace")
        yield running


@pytest.fixture
def hub_proxy(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> Generator[HttpFaultProxy]:
    """The way to the Hub, on which a test can let things go wrong; the client of this process takes it, by plain Git LFS."""
    from huggingface_hub import constants, hf_api

    with run_http_fault_proxy(hub.url) as front:
        monkeypatch.setattr(constants, "ENDPOINT", front.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", front.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(hf_api.api, "endpoint", front.url)  # the client of whoever makes none of his own
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield front

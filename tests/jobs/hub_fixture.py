"""Fixtures that run the loopback Hub and point the real client to it."""

from collections.abc import Generator

import pytest

from infra.loopback.http_faults import HttpFaultProxy, run_http_fault_proxy
from infra.loopback.hub import LoopbackHub, Token


@pytest.fixture
def hub() -> Generator[LoopbackHub]:
    """A Hub with three tokens: ada's, which can write to her own and the lab's repositories, ada's read-only one, and grace's."""
    with LoopbackHub() as running:
        running.tokens["hf_ada"] = Token("ada", orgs={"lab": "write"})
        running.tokens["hf_reader"] = Token("ada", "read")
        running.tokens["hf_grace"] = Token("grace")
        yield running


@pytest.fixture
def hub_proxy(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> Generator[HttpFaultProxy]:
    """A proxy in front of the Hub that can inject faults. The Hub client of this process connects to it, with Git LFS instead of Xet."""
    from huggingface_hub import constants, hf_api

    with run_http_fault_proxy(hub.url) as proxy:
        monkeypatch.setattr(constants, "ENDPOINT", proxy.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", proxy.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(hf_api.api, "endpoint", proxy.url)  # the default client of module-level functions
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield proxy

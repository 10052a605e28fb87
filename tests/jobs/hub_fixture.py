"""Fixtures that run the loopback Hub and point the real client to it."""

from collections.abc import Generator

import pytest

from infra.loopback.http_faults import HttpFaultProxy, run_http_fault_proxy
from infra.loopback.hub import LoopbackHub, Token


@pytest.fixture
def hub() -> Generator[LoopbackHub]:
    """A Hub with tokens: ada writes to her own and the lab's repositories, a read-only token of hers, and grace."""
    with LoopbackHub() as running:
        running.tokens["hf_ada"] = Token("ada", orgs={"lab": "write"})
        running.tokens["hf_reader"] = Token("ada", "read")
        running.tokens["hf_grace"] = Token("grace")
        yield running


@pytest.fixture
def hub_proxy(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> Generator[HttpFaultProxy]:
    """A proxy in front of the Hub that can inject faults. The client of this process uses it, with Git LFS instead of Xet."""
    from huggingface_hub import constants, hf_api

    with run_http_fault_proxy(hub.url) as front:
        monkeypatch.setattr(constants, "ENDPOINT", front.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", front.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(hf_api.api, "endpoint", front.url)  # the default client of module-level functions
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield front

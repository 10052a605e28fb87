"""The environment probe: its JSON, and its agreement with what training uses."""

import json
from collections.abc import Callable

from jobs.llm.probe import probe_environment
from tests.jobs.conftest import FinishedTraining


def test_probe_returns_json_with_all_facts() -> None:
    probed = json.loads(json.dumps(probe_environment()))
    assert {"device", "device_name", "bf16", "flash_attention_2", "gguf", "cpu_count", "memory_bytes", "packages"} == probed.keys()
    assert probed["device_name"]
    assert probed["memory_bytes"] > 1e8
    assert {"torch", "transformers", "peft"} <= probed["packages"].keys()


def test_training_decisions_match_probe(train: Callable[..., FinishedTraining]) -> None:
    probed, decided = probe_environment(), train(max_steps=1).record.decisions
    assert decided["device"] == probed["device"]
    assert decided["dtype"] == ("bfloat16" if probed["bf16"] else "float32")

"""What the environment can do is told as the service reads it."""

import json
from collections.abc import Callable

from jobs.llm.probe import probe_environment
from tests.jobs.conftest import FinishedTraining


def test_probe_returns_json_with_all_facts() -> None:
    found = json.loads(json.dumps(probe_environment()))
    assert {"device", "device_name", "bf16", "flash_attention_2", "gguf", "cpu_count", "memory_bytes", "packages"} == found.keys()
    assert found["device_name"]
    assert found["memory_bytes"] > 1e8
    assert {"torch", "transformers", "peft"} <= found["packages"].keys()


def test_training_decisions_match_probe(train: Callable[..., FinishedTraining]) -> None:
    found, decided = probe_environment(), train(max_steps=1).record.decisions
    assert decided["device"] == found["device"]
    assert decided["dtype"] == ("bfloat16" if found["bf16"] else "float32")

"""What the environment can do is told as the service reads it."""

import json
from collections.abc import Callable

from jobs.probe import probe
from tests.jobs.conftest import Trained


def test_it_is_one_json_object_with_every_fact_that_the_service_asks_for() -> None:
    found = json.loads(json.dumps(probe()))
    assert {"device", "device_name", "bf16", "flash_attention_2", "gguf", "cpu_count", "memory_bytes", "packages"} == found.keys()
    assert found["device_name"]
    assert found["memory_bytes"] > 1e8
    assert {"torch", "transformers", "peft"} <= found["packages"].keys()


def test_the_trainer_decides_as_the_probe_foretold(train: Callable[..., Trained]) -> None:
    found, decided = probe(), train(max_steps=1).record.decisions
    assert decided["device"] == found["device"]
    assert decided["dtype"] == ("bfloat16" if found["bf16"] else "float32")

"""The probe of an environment: its manifest, and its agreement with what training uses."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from jobs.llm.hardware import has_native_bf16
from jobs.runtime import probe
from schema.capabilities import EnvironmentManifest
from schema.training import TRAINER_TYPES
from schema.training.trackers import TRACKERS
from tests.jobs.conftest import FinishedTraining


def test_probe_writes_the_manifest_of_its_environment(tmp_path: Path) -> None:
    path = tmp_path / "capabilities.json"
    assert probe.main(["llm", "--output", str(path)]) == 0
    manifest = EnvironmentManifest.load(path.read_bytes())
    assert [*tmp_path.iterdir()] == [path]
    assert {"torch", "transformers", "peft"} <= manifest.packages.keys()
    family = manifest.families["llm"]
    assert family.trainer_types == tuple(name for name, config in TRAINER_TYPES.items() if config.family == "llm")
    assert set(family.features) == {"gguf", "onnx", "lm_eval", "flash_attention_2"}
    assert set(manifest.trackers or ()) == {name for name, module in probe.TRACKER_MODULES.items() if find_spec(module)}
    assert probe.TRACKER_MODULES.keys() == set(TRACKERS)
    assert ("QLoRA" in family.options["method"]) == ("bitsandbytes" in manifest.packages)
    assert "lm_eval_tasks" in family.notes or family.features["lm_eval"]


def test_probe_prints_without_an_output_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert probe.main(["llm"]) == 0
    assert json.loads(capsys.readouterr().out)["environment"] == "llm"


def test_unknown_environment_is_one_line_of_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert probe.main(["moon", "--output", str(tmp_path / "x")]) == 1
    assert capsys.readouterr().err == "environment 'moon' does not work: ValueError: no family uses it; known: data, llm\n"
    assert [*tmp_path.iterdir()] == []


def test_missing_package_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("jobs.llm.probe._is_installed", lambda package: package != "trl")
    assert probe.main(["llm"]) == 1
    assert "trl not installed" in capsys.readouterr().err


def test_training_decides_by_the_device(train: Callable[..., FinishedTraining]) -> None:
    decided = train(max_steps=1).record.decisions
    assert decided["device"] == "cpu"
    assert decided["dtype"] == ("bfloat16" if has_native_bf16() else "float32")

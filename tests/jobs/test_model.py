"""The model that is trained: four bits, adapters of every kind, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.llm.hardware import ACTIVATION_BYTES, DeviceConfig, estimate_training_bytes
from jobs.llm.model import load_base
from jobs.runtime.errors import JobFailed
from schema.training import TRAINING_CONFIG
from tests.jobs.conftest import BASE, FinishedTraining

Train = Callable[..., FinishedTraining]


def are_weights_equal(one: FinishedTraining, other: FinishedTraining) -> bool:
    return all(bool((part == other.weights()[name]).all()) for name, part in one.weights().items())


@pytest.mark.parametrize("knobs", [{}, {"use_dora": True}], ids=["QLoRA", "QDoRA"])
def test_qlora_trains_every_layer_even_after_evaluation(train: Train, knobs: dict[str, Any]) -> None:
    # bitsandbytes repacks the weights for a processor in evaluation; what it then computes with has no backward.
    measured = train("measured", spec={"method": "QLoRA"}, **knobs)
    unmeasured = train("unmeasured", spec={"method": "QLoRA", "held_out": []}, **knobs)
    moved = {name: float(part.abs().max()) for name, part in measured.lora_weights().items() if "lora_B" in name}
    assert min(moved.values()) > 1e-5
    assert are_weights_equal(measured, unmeasured)


def test_qlora_losses_differ_slightly_from_lora(train: Train) -> None:
    four, sixteen = train("four", spec={"method": "QLoRA"}), train("sixteen", spec={"method": "LoRA"})
    assert four.record.evaluations[0].metrics.eval_loss != sixteen.record.evaluations[0].metrics.eval_loss
    losses = zip(four.record.points, sixteen.record.points, strict=True)
    assert all(abs(a.values["loss"] - b.values["loss"]) < 0.5 for a, b in losses)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("knobs", "names", "advice"),
    [
        ({"target_modules": ["query"]}, "query", "q_proj"),
        ({"target_modules": ["lm_head"]}, "lm_head", "leave it out"),
        ({"lora_rank": 64}, "lora_rank 64", "at most 32"),
    ],
)
def test_impossible_adapter_config_is_rejected_by_name(train: Train, knobs: dict[str, Any], names: str, advice: str) -> None:
    with pytest.raises(JobFailed) as refused:
        train(**knobs)
    failure = refused.value.failure
    assert failure.code == "invalid_config"
    assert names in failure.message
    assert advice in failure.hint


def test_frozen_head_is_not_copied_per_row(store: Path) -> None:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    multiplied: list[tuple[int, ...]] = []

    class MatmulRecorder(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, inputs: Any = (), named: Any = None) -> Any:
            if function in (torch.ops.aten.bmm.default, torch.ops.aten.mm.default):
                multiplied.append(tuple(inputs[1].shape))
            return function(*inputs, **(named or {}))

    config = TRAINING_CONFIG.validate_python({"base_model_id": BASE})
    machine = DeviceConfig(
        torch.device("cpu"), torch.float32, autocast=False, on_gpu=False, gradient_checkpointing=False, dataloader_num_workers=0
    )
    model = load_base(config, machine, store / "pretrained_weights/huggingface" / BASE).requires_grad_(False).eval()
    with MatmulRecorder():
        model.generate(torch.tensor([[5, 6, 7]] * 3), max_new_tokens=2, do_sample=False)
    words = model.config.vocab_size
    heads = [shape for shape in multiplied if words in shape]
    assert heads == [(model.config.hidden_size, words)] * 2


def test_memory_estimate_depends_on_trained_weights(tmp_path: Path) -> None:
    vision = {"image_size": 896, "patch_size": 14, "hidden_size": 1152, "num_hidden_layers": 27}
    text = {"hidden_size": 2560, "num_hidden_layers": 34, "vocab_size": 262_208}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": text, "vision_config": vision}))
    (tmp_path / "model.safetensors").write_bytes(bytes(1_000_000))

    def needed(**config: Any) -> float:
        return estimate_training_bytes(TRAINING_CONFIG.validate_python({"base_model_id": "g/m"} | config), tmp_path)

    seeing = {"modality": "vision", "hyperparameters": {"packing": False, "batch_size": 2}}
    looking = {"modality": "vision", "hyperparameters": {"packing": False, "batch_size": 2, "train_vision_tower": True}}
    assert needed(**looking) - needed(**seeing) == 2 * 64 * 64 * 1152 * 27 * ACTIVATION_BYTES
    assert needed(method="Full") - needed() == pytest.approx(500_000 * (16 - 2), rel=0.01)


def test_unsloth_without_gpu_is_rejected(train: Train) -> None:
    with pytest.raises(JobFailed) as refused:
        train(spec={"provider": "unsloth"})
    assert "unsloth" in refused.value.failure.message
    assert "GPU" in refused.value.failure.message
    assert "huggingface" in refused.value.failure.hint


def has_unsloth() -> bool:
    from importlib.util import find_spec

    import torch

    return torch.cuda.is_available() and find_spec("unsloth") is not None


@pytest.mark.skipif(not has_unsloth(), reason="no GPU, or no unsloth: never run yet")
@pytest.mark.parametrize("method", ["LoRA", "QLoRA", "Full"])
def test_unsloth_gives_the_same_result(train: Train, method: str) -> None:
    ours, theirs = train("ours", spec={"method": method}), train("theirs", spec={"method": method, "provider": "unsloth"})
    assert ours.weights().keys() == theirs.weights().keys()
    losses = [[point.values["loss"] or 0.0 for point in trained.record.points] for trained in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_early_stopping_publishes_best_model(train: Train) -> None:
    judged = {"eval_strategy": "steps", "eval_steps": 1, "early_stopping_patience": 2, "load_best_model_at_end": True}
    trained = train(spec={"eval_config": judged}, learning_rate=0.5, max_steps=9, save_total_limit=1)
    losses = {each.step: each.metrics.eval_loss for each in trained.record.evaluations if each.when == "during"}
    best = min(losses, key=lambda step: losses[step] or 0.0)
    assert max(losses) == best + 2 < 9
    assert trained.model.step == best
    assert trained.record.evaluations[-1].metrics.eval_loss == losses[best]
    assert "early_stopping" in trained.record.decisions


def test_samples_are_generated_and_scored(train: Train) -> None:
    from schema.events import SamplesGenerated

    judged = {"sample_prompts": 2, "compute_eval_metrics": True, "task_rows": 4, "max_new_tokens": 4}
    trained = train(spec={"eval_config": judged})
    shown = [event for event in trained.record.events if isinstance(event, SamplesGenerated)]
    assert [(event.when, len(event.samples)) for event in shown] == [("before", 2), ("after", 2)]
    assert shown[0].samples[0].reference
    assert trained.model.metrics is not None
    assert {"exact_match", "rouge_l", "bleu"} <= trained.model.metrics.values.keys()


def test_sample_generation_does_not_change_training(train: Train) -> None:
    judged = {"eval_strategy": "steps", "eval_steps": 1, "sample_prompts": 2, "max_new_tokens": 3}
    asked = train("asked", spec={"eval_config": judged}, lora_dropout=0.3)
    silent = train("silent", spec={"eval_config": judged | {"sample_prompts": 0}}, lora_dropout=0.3)
    assert are_weights_equal(asked, silent)

"""Loading and adapting the model: quantization, adapter configs, memory estimates, and rejected options."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.llm.hardware import DeviceConfig
from jobs.llm.model import load_base
from jobs.runtime.errors import JobFailed
from schema.training import TRAINING_CONFIG
from tests.jobs.conftest import BASE, FinishedTraining

Train = Callable[..., FinishedTraining]


def are_weights_equal(one: FinishedTraining, other: FinishedTraining) -> bool:
    return all(bool((tensor == other.weights()[name]).all()) for name, tensor in one.weights().items())


@pytest.mark.parametrize("hyperparameters", [{}, {"use_dora": True}], ids=["QLoRA", "QDoRA"])
def test_qlora_trains_every_layer_even_after_evaluation(train: Train, hyperparameters: dict[str, Any]) -> None:
    # On some CPUs bitsandbytes repacks the weights in evaluation, and its kernel for repacked weights has no backward.
    evaluated = train("evaluated", spec={"method": "QLoRA"}, **hyperparameters)
    not_evaluated = train("not-evaluated", spec={"method": "QLoRA", "held_out": []}, **hyperparameters)
    changes = {name: float(tensor.abs().max()) for name, tensor in evaluated.lora_weights().items() if "lora_B" in name}
    assert min(changes.values()) > 1e-5
    assert are_weights_equal(evaluated, not_evaluated)


def test_qlora_losses_differ_slightly_from_lora(train: Train) -> None:
    qlora, lora = train("qlora", spec={"method": "QLoRA"}), train("lora", spec={"method": "LoRA"})
    assert qlora.record.evaluations[0].metrics.eval_loss != lora.record.evaluations[0].metrics.eval_loss
    losses = zip(qlora.record.points, lora.record.points, strict=True)
    assert all(abs(a.values["loss"] - b.values["loss"]) < 0.5 for a, b in losses)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("hyperparameters", "expected_message", "expected_hint"),
    [
        ({"target_modules": ["query"]}, "query", "q_proj"),
        ({"target_modules": ["lm_head"]}, "lm_head", "leave it out"),
        ({"lora_rank": 64}, "lora_rank 64", "at most 32"),
    ],
)
def test_impossible_adapter_config_is_rejected_by_name(
    train: Train, hyperparameters: dict[str, Any], expected_message: str, expected_hint: str
) -> None:
    with pytest.raises(JobFailed) as failed:
        train(**hyperparameters)
    failure = failed.value.failure
    assert failure.code == "invalid_config"
    assert expected_message in failure.message
    assert expected_hint in failure.hint


def test_frozen_head_is_not_copied_per_row(store: Path) -> None:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    shapes: list[tuple[int, ...]] = []

    class MatmulRecorder(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, inputs: Any = (), named: Any = None) -> Any:
            if function in (torch.ops.aten.bmm.default, torch.ops.aten.mm.default):
                shapes.append(tuple(inputs[1].shape))
            return function(*inputs, **(named or {}))

    config = TRAINING_CONFIG.validate_python({"base_model_id": BASE})
    device_config = DeviceConfig(
        torch.device("cpu"), torch.float32, autocast=False, on_gpu=False, gradient_checkpointing=False, dataloader_num_workers=0
    )
    model = load_base(config, device_config, store / "pretrained_weights/huggingface" / BASE).requires_grad_(False).eval()
    with MatmulRecorder():
        model.generate(torch.tensor([[5, 6, 7]] * 3), max_new_tokens=2, do_sample=False)
    vocab_size = model.config.vocab_size
    head_shapes = [shape for shape in shapes if vocab_size in shape]
    assert head_shapes == [(model.config.hidden_size, vocab_size)] * 2


def test_unsloth_without_gpu_is_rejected(train: Train) -> None:
    with pytest.raises(JobFailed) as failed:
        train(spec={"provider": "unsloth"})
    assert "unsloth" in failed.value.failure.message
    assert "GPU" in failed.value.failure.message
    assert "huggingface" in failed.value.failure.hint


def has_unsloth() -> bool:
    from importlib.util import find_spec

    import torch

    return torch.cuda.is_available() and find_spec("unsloth") is not None


@pytest.mark.skipif(not has_unsloth(), reason="needs a GPU and unsloth; not run yet")
@pytest.mark.parametrize("method", ["LoRA", "QLoRA", "Full"])
def test_unsloth_gives_the_same_result(train: Train, method: str) -> None:
    ours, theirs = train("ours", spec={"method": method}), train("theirs", spec={"method": method, "provider": "unsloth"})
    assert ours.weights().keys() == theirs.weights().keys()
    losses = [[point.values["loss"] or 0.0 for point in trained.record.points] for trained in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_early_stopping_publishes_best_model(train: Train) -> None:
    eval_config = {"eval_strategy": "steps", "eval_steps": 1, "early_stopping_patience": 2, "load_best_model_at_end": True}
    trained = train(spec={"eval_config": eval_config}, learning_rate=0.5, max_steps=9, save_total_limit=1)
    losses = {event.step: event.metrics.eval_loss for event in trained.record.evaluations if event.when == "during"}
    best = min(losses, key=lambda step: losses[step] or 0.0)
    assert max(losses) == best + 2 < 9
    assert trained.model.step == best
    assert trained.record.evaluations[-1].metrics.eval_loss == losses[best]
    assert "early_stopping" in trained.record.decisions


def test_samples_are_generated_and_scored(train: Train) -> None:
    from schema.events import SamplesGenerated

    eval_config = {"sample_prompts": 2, "compute_eval_metrics": True, "task_rows": 4, "max_new_tokens": 4}
    trained = train(spec={"eval_config": eval_config})
    shown = [event for event in trained.record.events if isinstance(event, SamplesGenerated)]
    assert [(event.when, len(event.samples)) for event in shown] == [("before", 2), ("after", 2)]
    assert shown[0].samples[0].reference
    assert trained.model.metrics is not None
    assert {"exact_match", "rouge_l", "bleu"} <= trained.model.metrics.values.keys()


def test_sample_generation_does_not_change_training(train: Train) -> None:
    eval_config = {"eval_strategy": "steps", "eval_steps": 1, "sample_prompts": 2, "max_new_tokens": 3}
    sampled = train("sampled", spec={"eval_config": eval_config}, lora_dropout=0.3)
    plain = train("plain", spec={"eval_config": eval_config | {"sample_prompts": 0}}, lora_dropout=0.3)
    assert are_weights_equal(sampled, plain)

"""The optimizer's settings, NEFTune's noise, and the clipping of trained token embeddings."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.llm.hardware import DeviceConfig
from jobs.llm.optimization import check_optimizer, check_schedule_length, clip_gradients
from jobs.runtime.errors import JobFailed
from schema.checkpoint import checkpoint_key
from schema.job import ExportSource
from schema.training.llm_hyperparameters import SftHyperparameters
from schema.training.llm_optimization import CPU_OPTIMIZERS, GPU_OPTIMIZERS, SCHEDULE_PARAMETERS
from tests.jobs.conftest import FinishedTraining, make_spec
from tests.jobs.test_continuation import TrainingRun, assert_runs_identical
from tests.jobs.test_trainable_tokens import compute_logits_and_gradients, make_input_ids, make_tuned_model

Train = Callable[..., FinishedTraining]

ON_CPU = DeviceConfig(device=None, dtype=None, autocast=False, on_gpu=False, gradient_checkpointing=False)
ON_GPU = replace(ON_CPU, on_gpu=True)


def test_names_and_parameters_are_those_of_transformers() -> None:
    import inspect

    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    assert set(CPU_OPTIMIZERS) | GPU_OPTIMIZERS <= {name.value for name in OptimizerNames}
    for schedule, parameters in SCHEDULE_PARAMETERS.items():
        accepted = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(schedule)]).parameters
        assert parameters.keys() <= accepted.keys()


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor"])
def test_resumed_run_continues_the_optimizer(store: Path, tmp_path: Path, optim: str) -> None:
    hyperparameters = {"optim": optim, "max_steps": 4, "learning_rate": 5e-3, "lr_scheduler_type": "warmup_stable_decay"}
    hyperparameters |= {"lr_scheduler_kwargs": {"num_decay_steps": 2}, "neftune_noise_alpha": 10.0, "lora_dropout": 0.2}
    uninterrupted = TrainingRun(make_spec(store, hyperparameters=hyperparameters), tmp_path / "uninterrupted")
    model = uninterrupted.finish()
    interrupted = TrainingRun(make_spec(store, hyperparameters=hyperparameters), tmp_path / "interrupted")
    assert interrupted.run_attempt(stop_after=1) == "pause"
    assert interrupted.run_attempt(stop_after=3) == "pause"
    assert_runs_identical(interrupted, interrupted.finish(), uninterrupted, model)


def test_embedding_noise_is_off_in_evaluations(train: Train) -> None:
    trained = train(
        spec={"eval_config": {"eval_strategy": "steps", "eval_steps": 1}}, neftune_noise_alpha=50.0, learning_rate=1e-12, max_steps=2
    )
    before, *others = [event.metrics.eval_loss for event in trained.record.evaluations]
    assert others == pytest.approx([before] * 3, rel=1e-6)


# --- clipping --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.0, 1e6])
def test_large_gradient_of_embeddings_does_not_shrink_the_adapters(base: Path, factor: float) -> None:
    import torch

    model = make_tuned_model(base)
    _, gradients = compute_logits_and_gradients(model, make_input_ids())
    adapter_norm = torch.stack([gradient.norm() for name, gradient in gradients.items() if "lora_" in name]).norm()
    embeddings = [weight for name, weight in model.named_parameters() if "trainable_tokens_delta" in name]
    for weight in embeddings:
        weight.grad *= factor
    embedding_norm = torch.stack([weight.grad.norm() for weight in embeddings]).norm()
    max_norm = float(adapter_norm) / 2
    norms = clip_gradients(model, max_norm)
    assert [float(norm) for norm in norms] == pytest.approx([float(adapter_norm), float(embedding_norm)], rel=1e-5)
    clipped = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    for name, gradient in clipped.items():
        if "lora_" in name:
            torch.testing.assert_close(gradient, gradients[name] / 2, rtol=1e-4, atol=1e-9)
    assert float(torch.stack([weight.grad.norm() for weight in embeddings]).norm()) <= max_norm * 1.0001


def test_both_norms_are_logged(train: Train) -> None:
    norms = [(point.values["grad_norm"], point.values["embedding_grad_norm"]) for point in train(max_steps=2).record.points]
    assert all(adapter and embedding and adapter != embedding for adapter, embedding in norms)
    full = train("full", spec={"method": "Full"}, max_steps=1).record.points[0].values
    assert "embedding_grad_norm" not in full


# --- what cannot run -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optim", "device_config", "sharded", "reason"),
    [
        ("adamw_8bit", ON_CPU, False, "needs an NVIDIA GPU"),
        ("adamw_8bit", ON_GPU, True, "sharded"),
        ("adafactor", ON_GPU, True, "sharded"),
        ("adafactor", ON_CPU, False, None),
        ("sgd", ON_GPU, True, None),
        ("paged_adamw_32bit", ON_GPU, False, None),
    ],
)
def test_optimizer_that_cannot_run_is_refused(optim: str, device_config: DeviceConfig, sharded: bool, reason: str | None) -> None:
    hyperparameters = SftHyperparameters.model_validate({"optim": optim})
    if reason is None:
        check_optimizer(hyperparameters, device_config, sharded=sharded)
        return
    with pytest.raises(JobFailed, match=reason) as failed:
        check_optimizer(hyperparameters, device_config, sharded=sharded)
    assert "adamw_torch" in failed.value.failure.hint


def test_eva_is_refused_for_a_sharded_model() -> None:
    with pytest.raises(JobFailed, match="lora_init 'eva' needs the whole model"):
        check_optimizer(SftHyperparameters.model_validate({"lora_init": "eva"}), ON_GPU, sharded=True)


def test_gpu_optimizer_fails_before_the_first_step_without_a_gpu(train: Train) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(JobFailed, match="optim 'paged_adamw_8bit' needs an NVIDIA GPU"):
        train(optim="paged_adamw_8bit")


def test_checkpoint_is_exported_whatever_its_optimizer_needs(store: Path, tmp_path: Path) -> None:
    """A checkpoint of a training on a GPU, with fewer steps than the schedule's decay, is exported on a CPU."""
    trained = TrainingRun(make_spec(store, hyperparameters={"max_steps": 2}), tmp_path / "trained")
    assert trained.run_attempt(stop_after=1) == "pause"
    key = checkpoint_key(trained.spec.checkpoints_prefix, attempt=1, step=1)
    source = ExportSource(job_id=trained.spec.job_id, attempt=1, step=1, key=key)
    hyperparameters: dict[str, Any] = {"optim": "paged_adamw_8bit", "lr_scheduler_type": "warmup_stable_decay"}
    spec = make_spec(store, hyperparameters=hyperparameters | {"lr_scheduler_kwargs": {"num_decay_steps": 2}, "max_steps": 2})
    assert TrainingRun(spec.model_copy(update={"export_of": source}), tmp_path / "exported").finish().step == 1


def test_decay_longer_than_the_training_is_refused() -> None:
    options: dict[str, Any] = {
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_decay_steps": 9},
        "warmup_ratio": 0.1,
    }
    hyperparameters = SftHyperparameters.model_validate(options)
    check_schedule_length(hyperparameters, 10)
    with pytest.raises(JobFailed) as failed:
        check_schedule_length(hyperparameters, 9)
    assert failed.value.failure.hint == "use at most 8 num_decay_steps"

"""LoRA initializations: the model starts as the base, trains as with peft, resumes exactly, and exports what was trained."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.llm.eva import initialize_from_activations
from jobs.llm.lora_init import ADAPTER, adapter_arguments, factorize, initialize_adapter, zero_initial_gradients
from jobs.runtime.errors import JobFailed
from schema.training.llm_hyperparameters import SftHyperparameters
from tests.jobs.conftest import FinishedTraining, load_weights, make_spec, messages
from tests.jobs.test_continuation import TrainingRun, assert_runs_identical
from tests.jobs.test_preferences import pairs

Train = Callable[..., FinishedTraining]

RANK, ALPHA = 4, 6


def make_adapted_models(base: Path, lora_init: str, *, use_rslora: bool = False) -> tuple[Any, Any]:
    """The tiny base with peft's own initialization, and with ours, both of the same rank."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    options = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", "use_rslora": use_rslora}
    hyperparameters = SftHyperparameters.model_validate(
        {"lora_rank": RANK, "lora_alpha": ALPHA, "lora_init": lora_init, "use_rslora": use_rslora}
    )
    models = []
    for arguments in ({"r": RANK, "lora_alpha": ALPHA, "init_lora_weights": lora_init}, adapter_arguments(hyperparameters)):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        models.append(get_peft_model(model, LoraConfig(**options, **arguments)))
    initialize_adapter(models[1], hyperparameters)
    return models[0], models[1]


def compute_loss(model: Any) -> Any:
    import torch

    ids = torch.randint(5, 900, (2, 12), generator=torch.Generator().manual_seed(1))
    return model(input_ids=ids, labels=ids).loss


@pytest.mark.parametrize("use_rslora", [False, True], ids=["LoRA", "rsLoRA"])
@pytest.mark.parametrize("lora_init", ["pissa", "olora"])
def test_training_follows_peft(base: Path, lora_init: str, use_rslora: bool) -> None:
    import torch

    losses: list[list[float]] = []
    for model in make_adapted_models(base, lora_init, use_rslora=use_rslora):
        hyperparameters = SftHyperparameters.model_validate({"lora_init": lora_init})
        optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.5)
        is_ours = bool(losses)
        losses.append([])
        for _ in range(4):
            loss = compute_loss(model)
            loss.backward()
            if is_ours:
                zero_initial_gradients(model, hyperparameters)
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(float(loss.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[1][-1] < losses[1][0] - 0.01


def test_fast_pissa_approximates_the_leading_part() -> None:
    import torch

    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(size, 8, generator=generator))[0] for size in (40, 30))
    singular_values = 2.0 ** -torch.arange(8)
    weight = u @ torch.diag(singular_values) @ v.T
    leading = u[:, :3] @ torch.diag(singular_values[:3]) @ v.T[:3]
    for lora_init in ("pissa", "pissa_niter_8"):
        a, b = factorize(weight, 3, 2.0, lora_init)
        torch.testing.assert_close(2.0 * b @ a, leading, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def base_loss(store: Path, tmp_path_factory: pytest.TempPathFactory) -> float | None:
    """The loss of the base on the held-out rows, as a training with peft's own initialization evaluates it."""
    run = TrainingRun(make_spec(store, hyperparameters={"max_steps": 1}), tmp_path_factory.mktemp("base"))
    metrics = run.finish().base_metrics
    return metrics and metrics.eval_loss


@pytest.mark.parametrize("lora_init", ["orthogonal", "eva", "pissa_niter_4", "olora"])
def test_training_starts_as_the_base(train: Train, base_loss: float | None, lora_init: str) -> None:
    trained = train("changed", lora_init=lora_init, max_steps=3, learning_rate=5e-3)
    assert trained.model.base_metrics is not None
    assert trained.model.metrics is not None
    assert trained.model.base_metrics.eval_loss == pytest.approx(base_loss, rel=1e-5)
    assert trained.model.metrics.eval_loss != trained.model.base_metrics.eval_loss
    ranks = {len(tensor) for name, tensor in trained.lora_weights().items() if "lora_A" in name}
    assert ranks == {4 if lora_init in ("orthogonal", "eva") else 8}


@pytest.mark.parametrize("lora_init", ["pissa_niter_4", "eva"])
def test_interrupted_run_matches_uninterrupted_run(store: Path, tmp_path: Path, lora_init: str) -> None:
    hyperparameters = {"lora_init": lora_init, "max_steps": 4, "learning_rate": 5e-3, "lora_dropout": 0.3, "save_strategy": "no"}
    uninterrupted = TrainingRun(make_spec(store, hyperparameters=hyperparameters), tmp_path / "uninterrupted")
    model = uninterrupted.finish()
    interrupted = TrainingRun(make_spec(store, hyperparameters=hyperparameters), tmp_path / "interrupted")
    assert interrupted.run_attempt(stop_after=2) == "pause"
    assert_runs_identical(interrupted, interrupted.finish(), uninterrupted, model)


@pytest.mark.parametrize("lora_init", ["pissa", "olora"])
def test_adapter_belongs_to_the_original_base(train: Train, base: Path, tmp_path: Path, lora_init: str) -> None:
    """The half that subtracts the initial part does not train, and the merged model computes what the trained one does."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from jobs.llm.exporters.tensor_merge import load_adapter_delta, merge_tensors

    trained = train(lora_init=lora_init, max_steps=3, learning_rate=5e-3)
    adapter = trained.model.folder
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    weight = model.model.layers[0].self_attn.q_proj.weight
    dtype = getattr(torch, trained.record.decisions["dtype"])
    a, b = factorize(weight.to(dtype).float(), 4, 16 / 4, lora_init)
    [lora_a] = [tensor for name, tensor in trained.lora_weights().items() if "layers.0.self_attn.q_proj.lora_A" in name]
    [lora_b] = [tensor for name, tensor in trained.lora_weights().items() if "layers.0.self_attn.q_proj.lora_B" in name]
    torch.testing.assert_close(lora_a[4:], a)
    torch.testing.assert_close(lora_b[:, 4:], -b)
    assert (lora_a[:4] - a).abs().max() > 1e-4
    delta, _ = load_adapter_delta(base, adapter, "causal")
    merge_tensors(base, tmp_path / "merged", torch.float32, delta)
    shutil.copy(base / "config.json", tmp_path / "merged")
    ids = torch.tensor([trained.model.held_out_examples[0].input_ids])
    with torch.inference_mode():
        expected = PeftModel.from_pretrained(model, str(adapter))(input_ids=ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)(input_ids=ids).logits
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)


def test_eva_starts_with_the_directions_of_the_inputs(base: Path) -> None:
    """The sampled positions are the labeled ones; A keeps as much of the inputs there as any projection of its rank can."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    inputs: list[Any] = []
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"))
    layer = model.model.layers[1].self_attn.v_proj
    hook = layer.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    rows = [torch.randint(5, 900, (12,), generator=torch.Generator().manual_seed(n)) for n in range(6)]
    trainer = SimpleNamespace(model=adapted, train_dataset=rows, args=SimpleNamespace(per_device_train_batch_size=2))

    def collate(batch: list[Any]) -> dict[str, Any]:
        ids = torch.stack(batch)
        labels = ids.clone()
        labels[:, :5] = -100
        return {"input_ids": ids, "labels": labels, "non_padding_tokens": 24}

    trainer.data_collator = collate
    assert initialize_from_activations(trainer, 3, lambda: None) == 6 * 7
    hook.remove()
    sampled = torch.cat([part[:, 5:].flatten(0, 1) for part in inputs]).detach()
    directions = layer.lora_A[ADAPTER].weight.detach()
    torch.testing.assert_close(directions @ directions.T, torch.eye(4), rtol=0, atol=1e-4)
    kept, possible = (sampled @ directions.T).square().sum(), torch.linalg.svdvals(sampled)[:4].square().sum()
    assert float(kept) == pytest.approx(float(possible), rel=1e-3)
    assert torch.equal(directions, model.model.layers[1].self_attn.q_proj.lora_A[ADAPTER].weight)


@pytest.mark.parametrize("lora_init", ["eva", "orthogonal"])
def test_initialization_reaches_quantized_layers(train: Train, lora_init: str) -> None:
    trained = train(spec={"method": "QLoRA", "held_out": []}, lora_init=lora_init, learning_rate=1e-12, max_steps=1)
    first = {name.split(".")[-2]: tensor for name, tensor in trained.lora_weights().items() if "layers.0.self_attn.q_proj" in name}
    if lora_init == "eva":
        assert first["lora_A"].square().sum(dim=1).tolist() == pytest.approx([1.0] * 4, abs=1e-3)
    else:
        assert first["lora_B"].abs().max() > 0.01  # zero in the other initializations


def test_eva_needs_as_many_tokens_as_its_rank(train: Train) -> None:
    with pytest.raises(JobFailed, match="needs at least lora_rank") as failed:
        train(spec={"train": messages(1)}, lora_init="eva", lora_rank=32)
    assert failed.value.failure.code == "invalid_data"


def test_reference_of_a_preference_loss_is_the_base(train: Train) -> None:
    spec: dict[str, Any] = {"trainer_type": "dpo", "dataset_type": "preference", "train": pairs(8), "held_out": pairs(2, first=50)}
    first = train(spec=spec, lora_init="pissa", max_steps=2).record.points[0].values
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-4)
    assert first["loss"] == pytest.approx(0.6931, abs=1e-3)


@pytest.mark.nightly
def test_second_half_does_not_train_in_a_sharded_model(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOB_PARALLELISM", "fsdp")
    weights = {}
    for processes in ("1", "2"):
        monkeypatch.setenv("JOB_PROCESSES", processes)
        hyperparameters = {"lora_init": "pissa", "max_steps": 2, "learning_rate": 5e-3, "gradient_accumulation_steps": 2}
        run = TrainingRun(make_spec(store, held_out=[], hyperparameters=hyperparameters), tmp_path / processes)
        weights[processes] = load_weights(run.finish().folder)
    for name, tensor in weights["2"].items():
        assert tensor.equal(weights["1"][name]) or (tensor - weights["1"][name]).abs().max() < 1e-3
        if "lora_A" in name:
            assert tensor[4:].equal(weights["1"][name][4:])

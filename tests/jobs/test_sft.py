"""Supervised fine-tuning on the tiny Gemma: every hyperparameter takes effect; evaluation, saved files and failures."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from jobs.runtime.errors import JobFailed, failure_of
from schema.events import DecisionMade, WarningRaised
from schema.training.llm_hyperparameters import SftHyperparameters
from tests.jobs.conftest import BASE, EventRecorder, FinishedTraining, make_context, make_row_tokenizer, make_spec, messages

Train = Callable[..., FinishedTraining]


def distance(one: FinishedTraining, other: FinishedTraining) -> float:
    """The largest difference between the LoRA weights of two trainings."""
    theirs = other.lora_weights()
    return max(float((tensor - theirs[name]).abs().max()) for name, tensor in one.lora_weights().items())


def learning_rates(trained: FinishedTraining) -> list[float]:
    return [point.values["learning_rate"] or 0.0 for point in trained.record.points]


def test_training_lowers_held_out_loss(train: Train) -> None:
    trained = train(learning_rate=5e-3, max_steps=20)
    assert trained.model.base_metrics is not None
    assert trained.model.metrics is not None
    assert (trained.model.metrics.perplexity or math.inf) < 0.7 * (trained.model.base_metrics.perplexity or 0)
    assert (trained.model.metrics.content_perplexity or math.inf) < 0.9 * (trained.model.base_metrics.content_perplexity or 0)
    assert [(event.when, event.step) for event in trained.record.evaluations] == [("before", 0), ("after", 20)]
    assert trained.record.evaluations[-1].metrics == trained.model.metrics
    point = trained.record.points[-1]
    assert {"loss", "learning_rate", "grad_norm", "tokens_per_second", "rss_bytes"} <= point.values.keys()
    assert point.progress is not None
    assert (point.progress.step, point.progress.total_steps, point.progress.eta_s) == (20, 20, 0.0)
    assert trained.model.train_rows == 24
    assert len(trained.model.held_out_examples) == 5
    assert (trained.model.folder / "tokenizer.json").exists()
    assert "<end_of_turn>" in (trained.model.folder / "chat_template.jinja").read_text()


def steps(trained: FinishedTraining) -> int:
    progress = trained.record.points[-1].progress
    assert progress is not None
    return progress.total_steps


def losses(trained: FinishedTraining) -> list[float | None]:
    return [point.values["loss"] for point in trained.record.points]


def logged_steps(trained: FinishedTraining) -> list[int]:
    return [point.step for point in trained.record.points]


def read_adapter_config(trained: FinishedTraining) -> dict[str, Any]:
    return json.loads((trained.model.folder / "adapter_config.json").read_text())


def max_lora_b(trained: FinishedTraining) -> float:
    """The largest weight of LoRA's B, which starts at zero."""
    return max(float(tensor.abs().max()) for name, tensor in trained.lora_weights().items() if "lora_B" in name)


def lora_a(trained: FinishedTraining) -> list[Any]:
    return [tensor for name, tensor in trained.lora_weights().items() if "lora_A" in name]


def lora_a_squared_norm(trained: FinishedTraining) -> float:
    return sum(float(tensor.square().sum()) for tensor in lora_a(trained))


@dataclass(frozen=True)
class HyperparameterCase:
    """A changed hyperparameter, and the effect that it must have compared with the baseline."""

    value: Any
    has_effect: Callable[[FinishedTraining, FinishedTraining], bool]  # (baseline, changed)
    required: dict[str, Any] = field(default_factory=dict)  # hyperparameters that both trainings need for the effect


BASELINE = {"max_steps": -1, "epochs": 1, "batch_size": 6, "gradient_accumulation_steps": 1, "warmup_ratio": 0.0}  # 24 rows: 4 steps

HYPERPARAMETER_CASES = {
    "learning_rate": HyperparameterCase(
        1e-9, lambda baseline, changed: max(learning_rates(changed)) == 1e-9 and max_lora_b(changed) < 1e-7 < 1e-5 < max_lora_b(baseline)
    ),
    "batch_size": HyperparameterCase(12, lambda baseline, changed: (steps(baseline), steps(changed)) == (4, 2)),
    "gradient_accumulation_steps": HyperparameterCase(
        3, lambda baseline, changed: steps(changed) == 2
    ),  # three batches, then the remaining one
    "epochs": HyperparameterCase(2, lambda baseline, changed: steps(changed) == 8),
    "max_steps": HyperparameterCase(
        5, lambda baseline, changed: steps(changed) == 5 and logged_steps(changed) == [1, 2, 3, 4, 5]
    ),  # more than an epoch
    "packing": HyperparameterCase(
        True, lambda baseline, changed: steps(changed) < steps(baseline) and changed.model.train_tokens == baseline.model.train_tokens
    ),
    "max_seq_length": HyperparameterCase(
        24, lambda baseline, changed: changed.model.train_tokens <= 24 * changed.model.train_rows < baseline.model.train_tokens
    ),
    "lr_scheduler_type": HyperparameterCase(
        "cosine",
        lambda baseline, changed: (
            learning_rates(changed)[0] == learning_rates(baseline)[0] and learning_rates(changed)[1] > learning_rates(baseline)[1]
        ),
    ),
    "lr_scheduler_kwargs": HyperparameterCase(
        {"num_cycles": 1.5},
        lambda baseline, changed: learning_rates(changed)[0] == learning_rates(baseline)[0] != learning_rates(changed)[1],
        {"lr_scheduler_type": "cosine"},
    ),
    "optim": HyperparameterCase(
        "sgd", lambda baseline, changed: "betas" in optimizer_settings(baseline) and "momentum" in optimizer_settings(changed)
    ),
    "adam_beta1": HyperparameterCase(
        0.5,
        lambda baseline, changed: (
            (optimizer_settings(baseline)["betas"], optimizer_settings(changed)["betas"]) == ((0.9, 0.999), (0.5, 0.999))
        ),
    ),
    "adam_beta2": HyperparameterCase(
        0.95, lambda baseline, changed: optimizer_settings(changed)["betas"] == (0.9, 0.95) and distance(baseline, changed) > 1e-7
    ),
    "adam_epsilon": HyperparameterCase(
        1.0, lambda baseline, changed: optimizer_settings(changed)["eps"] == 1.0 and max_lora_b(changed) < 0.9 * max_lora_b(baseline)
    ),
    "neftune_noise_alpha": HyperparameterCase(
        20.0, lambda baseline, changed: losses(baseline)[0] != losses(changed)[0] and distance(baseline, changed) > 1e-6
    ),
    "lora_init": HyperparameterCase(
        "gaussian", lambda baseline, changed: losses(baseline)[0] == losses(changed)[0] and distance(baseline, changed) > 1e-3
    ),  # all others: tests/jobs/test_lora_init.py
    "warmup_ratio": HyperparameterCase(
        0.5,
        lambda baseline, changed: (
            learning_rates(baseline).index(max(learning_rates(baseline))) == 0
            and learning_rates(changed).index(max(learning_rates(changed))) == 2
        ),
    ),
    "weight_decay": HyperparameterCase(0.9, lambda baseline, changed: lora_a_squared_norm(changed) < lora_a_squared_norm(baseline)),
    "max_grad_norm": HyperparameterCase(
        1e-8, lambda baseline, changed: max_lora_b(changed) < 0.9 * max_lora_b(baseline)
    ),  # Adam cancels a scale of the gradient, unless it is below epsilon
    # LoRA has no effect at first, so the first loss depends only on the rows that the seed selected.
    "seed": HyperparameterCase(
        2, lambda baseline, changed: distance(baseline, changed) > 1e-4 and losses(baseline)[0] != losses(changed)[0]
    ),
    # The last step is always saved.
    "save_strategy": HyperparameterCase(
        "epoch", lambda baseline, changed: (baseline.checkpoints, changed.checkpoints) == ([8], [4, 8]), {"epochs": 2}
    ),
    "save_steps": HyperparameterCase(
        3, lambda baseline, changed: (baseline.checkpoints, changed.checkpoints) == ([4], [3, 4]), {"save_strategy": "steps"}
    ),
    "save_total_limit": HyperparameterCase(
        1,
        lambda baseline, changed: (baseline.checkpoints, changed.checkpoints) == ([3, 4], [4]),
        {"save_strategy": "steps", "save_steps": 1},
    ),
    "logging_steps": HyperparameterCase(
        2, lambda baseline, changed: (logged_steps(baseline), logged_steps(changed)) == ([1, 2, 3, 4], [2, 4])
    ),
    "lora_rank": HyperparameterCase(
        8, lambda baseline, changed: read_adapter_config(changed)["r"] == 8 and {len(tensor) for tensor in lora_a(changed)} == {8}
    ),
    "lora_alpha": HyperparameterCase(
        64, lambda baseline, changed: read_adapter_config(changed)["lora_alpha"] == 64 and distance(baseline, changed) > 1e-6
    ),
    "use_dora": HyperparameterCase(
        True, lambda baseline, changed: any("magnitude" in name for name in changed.weights()) and distance(baseline, changed) > 1e-6
    ),
    "use_rslora": HyperparameterCase(
        True, lambda baseline, changed: read_adapter_config(changed)["use_rslora"] and distance(baseline, changed) > 1e-6
    ),
    "target_modules": HyperparameterCase(
        ["q_proj"], lambda baseline, changed: {name.split(".")[-3] for name in changed.lora_weights()} == {"q_proj"}
    ),
    "train_vision_tower": HyperparameterCase(
        False, lambda baseline, changed: distance(baseline, changed) == 0
    ),  # with images: tests/jobs/test_vision.py
    "gradient_checkpointing": HyperparameterCase(
        True, lambda baseline, changed: changed.record.decisions["gradient_checkpointing"] == "true" and distance(baseline, changed) < 1e-6
    ),
    "lora_dropout": HyperparameterCase(
        0.5, lambda baseline, changed: read_adapter_config(changed)["lora_dropout"] == 0.5 and distance(baseline, changed) > 1e-6
    ),
}
# use_fa2 needs a GPU (test_unavailable_flash_attention_is_rejected), torch_compile takes minutes, dataloader_num_workers does not
# change the model (test_device_config_follows_hyperparameters), and micro_batches is chosen on a GPU (test_memory.py).
TESTED_ELSEWHERE = {"use_fa2", "torch_compile", "dataloader_num_workers", "micro_batches"}


def optimizer_settings(trained: FinishedTraining) -> dict[str, Any]:
    """The settings of the first group of weights in the optimizer of the last checkpoint."""
    import torch

    spec, step = trained.context.spec, trained.checkpoints[-1]
    folder = Path(spec.stores.models.removeprefix("file://"), spec.checkpoints_prefix, "attempt-1")
    [path] = folder.glob(f"step-*{step}/optimizer.pt")
    return torch.load(path, weights_only=True)["param_groups"][0]


@pytest.fixture(scope="module")
def baseline(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., FinishedTraining]:
    """Trains the baseline with the required hyperparameters of a case, each combination at most once."""

    @cache
    def run(*required: tuple[str, Any]) -> FinishedTraining:
        return train_in(tmp_path_factory.mktemp("baseline"), store, BASELINE | dict(required))

    return run


def train_in(workdir: Path, store: Path, hyperparameters: dict[str, Any], **spec: Any) -> FinishedTraining:
    from jobs.llm.trainers.sft import train as train_sft

    record, job = EventRecorder(), make_spec(store, hyperparameters=hyperparameters, **spec)
    context = make_context(job, workdir, record)
    return FinishedTraining(train_sft(job.training_config, context), record, workdir, context)


@pytest.mark.parametrize("name", HYPERPARAMETER_CASES)
def test_every_hyperparameter_takes_effect(store: Path, tmp_path: Path, baseline: Callable[..., FinishedTraining], name: str) -> None:
    case = HYPERPARAMETER_CASES[name]
    unchanged = baseline(*case.required.items())
    changed = train_in(tmp_path, store, BASELINE | case.required | {name: case.value})
    assert case.has_effect(unchanged, changed)


def test_all_hyperparameters_are_covered() -> None:
    assert HYPERPARAMETER_CASES.keys() | TESTED_ELSEWHERE == SftHyperparameters.model_fields.keys()


def test_same_seed_gives_identical_weights(store: Path, tmp_path: Path, baseline: Callable[..., FinishedTraining]) -> None:
    first, again = baseline(), train_in(tmp_path, store, BASELINE)
    assert first.weights().keys() == again.weights().keys()
    assert all(bool((tensor == again.weights()[name]).all()) for name, tensor in first.weights().items())


def test_unavailable_flash_attention_is_rejected(train: Train) -> None:
    with pytest.raises(JobFailed) as failed:
        train(use_fa2=True)
    assert failed.value.failure.code == "invalid_config"
    assert "use_fa2" in failed.value.failure.message
    assert "use_fa2" in failed.value.failure.hint


@pytest.mark.parametrize(
    ("schedule", "parameters", "fractions"),
    [  # fractions of the peak in four steps, two of them warmup
        ("linear", {}, [0, 1 / 2, 1, 1 / 2]),
        ("cosine", {}, [0, 1 / 2, 1, (1 + math.cos(math.pi / 2)) / 2]),
        ("cosine_with_min_lr", {"min_lr_rate": 0.1}, [0, 1 / 2, 1, 0.55]),
        ("cosine_with_min_lr", {"min_lr": 3e-4}, [0, 1 / 2, 1, 0.55]),
        ("cosine_with_restarts", {"num_cycles": 2}, [0, 1 / 2, 1, 1]),
        ("polynomial", {"power": 2, "lr_end": 0}, [0, 1 / 2, 1, 1 / 4]),
        ("constant", {}, [1, 1, 1, 1]),
        ("constant_with_warmup", {}, [0, 1 / 2, 1, 1]),
        ("inverse_sqrt", {}, [0, 1 / 2, 1, math.sqrt(2 / 3)]),
        ("inverse_sqrt", {"timescale": 1}, [0, 1 / 2, 1, math.sqrt(1 / 2)]),
        ("warmup_stable_decay", {"num_decay_steps": 2}, [0, 1 / 2, 1, 1 / 2]),
    ],
)
def test_schedule_matches_its_name(train: Train, schedule: str, parameters: dict[str, float], fractions: list[float]) -> None:
    trained = train(learning_rate=3e-3, lr_scheduler_type=schedule, lr_scheduler_kwargs=parameters, warmup_ratio=0.5, max_steps=4)
    assert learning_rates(trained) == pytest.approx([3e-3 * fraction for fraction in fractions])


def test_truncated_rows_are_counted_per_split(train: Train) -> None:
    warnings = [event.message for event in train(max_steps=1, max_seq_length=24).record.events if isinstance(event, WarningRaised)]
    assert warnings == [
        "24 rows of train are longer than max_seq_length 24 and were truncated",
        "5 rows of eval are longer than max_seq_length 24 and were truncated",
    ]


def test_rows_without_reachable_answer_are_dropped_and_counted(train: Train) -> None:
    long = {"messages": [{"role": "user", "content": "copy " * 200}, {"role": "assistant", "content": "it returns"}]}
    trained = train(spec={"train": [long, *messages(8), long]}, max_steps=1)
    assert trained.record.warnings["rows_dropped"].startswith("2 rows of train")
    assert trained.model.train_rows == 8


def test_gradient_accumulation_matches_large_batch(train: Train) -> None:
    hyperparameters: dict[str, Any] = {"max_steps": 2, "spec": {"method": "Full"}}  # fp32, and no dropout
    large = train("a", batch_size=4, gradient_accumulation_steps=1, **hyperparameters)
    small = train("b", batch_size=1, gradient_accumulation_steps=4, **hyperparameters)
    for one, other in zip(large.record.points, small.record.points, strict=True):
        assert one.values["loss"] == pytest.approx(other.values["loss"], rel=1e-4)
        assert one.values["grad_norm"] == pytest.approx(other.values["grad_norm"], rel=1e-3)
    assert large.model.train_tokens == small.model.train_tokens


def test_all_linear_layers_except_head_are_adapted(train: Train) -> None:
    names = train(max_steps=1).lora_weights()
    modules = {name.split(".lora_")[0].rpartition(".")[2] for name in names}
    assert modules == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(names) == 6 * 7 * 2


def test_checkpoints_follow_save_strategy_and_limit(train: Train) -> None:
    assert train("a", save_strategy="steps", save_steps=2, max_steps=6).checkpoints == [4, 6]
    assert train("b", save_strategy="epoch", max_steps=-1, epochs=3, batch_size=12).checkpoints == [4, 6]


@pytest.mark.parametrize(
    ("eval_config", "steps"),
    [
        ({"eval_strategy": "no"}, []),
        ({"eval_strategy": "steps", "eval_steps": 3}, [3, 4]),  # the last step is always evaluated
        ({"eval_strategy": "steps", "eval_steps": 2}, [2, 4]),
        ({"eval_strategy": "epoch"}, [2, 4]),
    ],
)
def test_evaluation_runs_before_during_and_after(train: Train, eval_config: dict[str, Any], steps: list[int]) -> None:
    trained = train(spec={"eval_config": eval_config}, max_steps=-1, epochs=2, batch_size=12)
    evaluations = [(event.when, event.step) for event in trained.record.evaluations]
    assert evaluations == [("before", 0), *(("during", step) for step in steps), ("after", 4)]


def test_last_step_is_not_evaluated_twice(train: Train) -> None:
    trained = train(spec={"eval_config": {"eval_strategy": "steps", "eval_steps": 2}}, max_steps=2)
    during, after = trained.record.evaluations[1:]
    assert during.metrics == after.metrics  # its runtime too


@pytest.mark.parametrize("eval_config", [{}, {"eval_strategy": "steps", "eval_steps": 1, "compute_eval_metrics": True}])
def test_missing_held_out_rows_skip_evaluation_with_warning(train: Train, eval_config: dict[str, Any]) -> None:
    trained = train(spec={"held_out": [], "eval_config": eval_config}, max_steps=1)
    assert (trained.model.metrics, trained.model.base_metrics, trained.record.evaluations) == (None, None, [])
    assert "evaluation_skipped" in trained.record.warnings
    assert len(trained.model.held_out_examples) == 16  # training rows, because there are no others


def test_held_out_examples_are_first_eval_rows(train: Train, tokenizer: Any) -> None:
    held_out = messages(20, first=500)
    trained = train(spec={"held_out": held_out}, max_steps=1)
    assert len(trained.model.held_out_examples) == 16
    for probe, row in zip(trained.model.held_out_examples, held_out, strict=False):
        assert tokenizer.decode(probe.input_ids) == tokenizer.apply_chat_template(row["messages"], tokenize=False)
        assert tokenizer.decode(probe.input_ids[: probe.prompt_tokens]) == probe.prompt_text


def test_points_contain_speed_memory_and_progress(train: Train) -> None:
    points = train(max_steps=3).record.points
    assert all((point.values["tokens_per_second"] or 0) > 0 for point in points)
    assert all((point.values["rss_bytes"] or 0) > 50e6 for point in points)
    progress = [point.progress for point in points if point.progress is not None]
    assert [(point.step, point.total_steps) for point in progress] == [(1, 3), (2, 3), (3, 3)]
    assert (progress[0].eta_s or 0) > 0
    assert progress[-1].eta_s == 0
    assert all((each.remaining_s or 0) > (each.eta_s or 0) for each in progress)  # the export comes after the last step
    assert [each.loss for each in progress] == [point.values["loss"] for point in points]


def test_progress_has_loss_of_every_step(train: Train) -> None:
    progress = train(max_steps=3, logging_steps=10).record.progress
    steps = [each.step for each in progress]
    assert sorted(steps) == steps
    assert set(steps) == {1, 2, 3}  # the first once more, after the evaluation of the base
    assert all((each.loss or 0) > 0 for each in progress)


def test_accuracy_is_same_batched_or_gathered_and_optional(train: Train) -> None:
    gathered = train("a", spec={"eval_config": {"compute_eval_metrics": True}}).model.metrics
    batched = train("b", spec={"eval_config": {"compute_eval_metrics": True, "batch_eval_metrics": True}}).model.metrics
    absent = train("c").model.metrics
    assert gathered is not None
    assert batched is not None
    assert absent is not None
    assert gathered.accuracy is not None
    assert (gathered.accuracy, absent.accuracy) == (batched.accuracy, None)


def test_lora_saves_only_adapter_and_turn_tokens(train: Train) -> None:
    trained = train(max_steps=1)
    assert trained.model.is_adapter
    assert [path.name for path in trained.model.folder.glob("*.safetensors")] == ["adapter_model.safetensors"]
    others = [name for name in trained.weights() if ".lora_A." not in name and ".lora_B." not in name]
    assert others == ["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
    assert len(trained.weights()[others[0]]) == 2


def test_saved_adapter_has_reported_eval_loss(train: Train, base: Path, tokenizer: Any) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    trained = train(learning_rate=5e-3, max_steps=8)
    dtype = getattr(torch, trained.record.decisions["dtype"])
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), trained.model.folder)
    assert recompute_eval_loss(model, tokenizer) == pytest.approx(loss_of(trained), rel=1e-2 if dtype == torch.bfloat16 else 1e-5)
    assert loss_of(trained) < 0.95 * (trained.record.evaluations[0].metrics.eval_loss or 0)


def test_saved_full_model_has_reported_eval_loss(train: Train) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trained = train(spec={"method": "Full"}, learning_rate=1e-3, max_steps=8)
    model = AutoModelForCausalLM.from_pretrained(trained.model.folder, dtype="auto")
    assert recompute_eval_loss(model, AutoTokenizer.from_pretrained(trained.model.folder)) == pytest.approx(loss_of(trained), rel=1e-5)


def loss_of(trained: FinishedTraining) -> float:
    assert trained.model.metrics is not None
    assert trained.model.metrics.eval_loss is not None
    return trained.model.metrics.eval_loss


def recompute_eval_loss(model: Any, tokenizer: Any) -> float:
    """The mean loss of the held-out rows of `make_spec`, by the library's own loss, one row at a time."""
    import torch

    from jobs.llm.data.tokenize import IGNORE_INDEX, tokenize_split

    total, count = 0.0, 0
    for row in tokenize_split(iter(messages(5, first=100)), "messages", make_row_tokenizer(tokenizer), 128).rows:
        labeled = sum(label != IGNORE_INDEX for label in row.labels[1:])
        with torch.no_grad():
            loss = model.eval()(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss
        total, count = total + loss.item() * labeled, count + labeled
    return total / count


def test_full_training_changes_all_weights_and_sets_eos_tokens(train: Train, base: Path, tokenizer: Any) -> None:
    from safetensors.torch import load_file
    from transformers import GenerationConfig

    trained = train(spec={"method": "Full"}, learning_rate=1e-3)
    assert not trained.model.is_adapter
    before = load_file(base / "model.safetensors")
    after = trained.weights()
    assert before.keys() == after.keys()
    assert all((after[name] != before[name].to(after[name].dtype)).any() for name in before)
    eos_token_ids = GenerationConfig.from_pretrained(trained.model.folder).eos_token_id
    assert set(eos_token_ids) == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")}  # type: ignore[arg-type]  # a list here


@pytest.mark.parametrize(
    ("dataset_type", "row"),
    [("text", {"text": "it returns a list of files"}), ("prompt_completion", {"prompt": "what does open do", "completion": " a file"})],
)
def test_other_dataset_types_are_trained(train: Train, dataset_type: str, row: dict[str, str]) -> None:
    trained = train(spec={"train": [row] * 8, "held_out": [row], "dataset_type": dataset_type}, learning_rate=5e-3, max_steps=8)
    assert trained.model.metrics is not None
    assert trained.model.base_metrics is not None
    assert (trained.model.metrics.eval_loss or 9) < (trained.model.base_metrics.eval_loss or 0)


def test_rows_without_labels_fail_the_job_with_hint(train: Train) -> None:
    with pytest.raises(JobFailed) as failed:
        train(max_seq_length=8)
    assert failed.value.failure.code == "invalid_data"
    assert "max_seq_length" in failed.value.failure.hint


@pytest.fixture
def make_store_with_last_norm(base: Path, tmp_path: Path) -> Callable[[float], Path]:
    """Makes a store whose tiny base has a changed weight in its last norm, which scales all logits."""

    def make(weight: float) -> Path:
        import torch
        from safetensors.torch import load_file, save_file

        copy = tmp_path / "objects/pretrained_weights/huggingface" / BASE
        shutil.copytree(base, copy)
        weights = load_file(copy / "model.safetensors")
        weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], weight)
        save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
        return tmp_path / "objects"

    return make


@pytest.mark.parametrize("logging_steps", [1, 50])  # also for steps that are not logged
def test_nan_loss_fails_the_job_and_names_step(
    make_store_with_last_norm: Callable[[float], Path], tmp_path: Path, logging_steps: int
) -> None:
    with pytest.raises(JobFailed) as failed:
        train_in(tmp_path, make_store_with_last_norm(math.nan), {"logging_steps": logging_steps, "gradient_accumulation_steps": 2})
    failure = failure_of(failed.value)
    assert failure.code == "invalid_config"
    assert "step 1" in failure.message
    assert "learning_rate" in failure.hint


def test_infinite_grad_norm_is_null_with_reason(make_store_with_last_norm: Callable[[float], Path], tmp_path: Path) -> None:
    (point,) = train_in(tmp_path, make_store_with_last_norm(1e30), {"max_steps": 1}).record.points
    assert point.values["grad_norm"] is None
    assert point.notes == dict.fromkeys(("grad_norm", "embedding_grad_norm"), "the value is inf")


def test_nan_weights_fail_the_job() -> None:
    import torch

    from jobs.llm.model import check_finite_weights

    model = torch.nn.Linear(2, 2)
    check_finite_weights(model, 7)
    torch.nn.init.constant_(model.bias, math.nan)
    with pytest.raises(JobFailed, match="after step 7"):
        check_finite_weights(model, 7)


def test_nan_eval_loss_is_null_with_reason(store: Path, base: Path, tokenizer: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from jobs.llm.data.tokenize import tokenize_split
    from jobs.llm.loss import evaluate_likelihood
    from jobs.llm.turn_ends import TurnEnds

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.nn.init.constant_(model.model.norm.weight, math.nan)
    rows = tokenize_split(iter(messages(2)), "messages", make_row_tokenizer(tokenizer), 128).rows
    turn_ends = TurnEnds([tokenizer.eos_token_id], tokenizer)
    metrics = evaluate_likelihood(model, rows, 0, make_spec(store).training_config, turn_ends)
    assert (metrics.eval_loss, metrics.perplexity, metrics.content_perplexity) == (None, None, None)
    assert metrics.notes.keys() == {"eval_loss", "perplexity", "content_perplexity"}


def test_decisions_are_logged_with_reasons(train: Train) -> None:
    trained = train(max_steps=1)
    decisions = [event for event in trained.record.events if isinstance(event, DecisionMade)]
    chosen_by_trainer = {
        "gradient_checkpointing",
        "training_memory",
        "dataloader_num_workers",
        "torch_compile",
        "learning_rate",
        "parallelism",
        "attn_implementation",
        "target_modules",
    }
    assert {event.setting for event in decisions} == {"base_model", "chat_template", "device", "dtype"} | chosen_by_trainer
    assert all(event.value and event.reason for event in decisions)
    assert train("full", spec={"method": "Full"}, max_steps=1).record.decisions["dtype"] == "float32"


def test_device_config_follows_hyperparameters(store: Path, tmp_path: Path) -> None:
    from jobs.llm.training_context import prepare_training

    spec = make_spec(store, hyperparameters={"dataloader_num_workers": 3})
    training = prepare_training(spec.training_config, make_context(spec, tmp_path))
    assert training.device_config.dataloader_num_workers == 3


def test_unsupported_option_is_replaced_with_warning(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jobs.llm.hardware import choose_torch_compile
    from jobs.llm.memory_planner import get_training_shape, read_base_shape
    from jobs.llm.training_context import prepare_training

    monkeypatch.setenv("PATH", "")  # hides the C compiler
    spec, record = make_spec(store, hyperparameters={"torch_compile": True}), EventRecorder()
    context = make_context(spec, tmp_path, record)
    training = prepare_training(spec.training_config, context)
    shapes = read_base_shape(training.base_folder), get_training_shape(training)
    assert not choose_torch_compile(spec.training_config, context, training.device_config, *shapes, 10)
    assert "C compiler" in record.warnings["torch_compile_skipped"]

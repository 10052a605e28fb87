"""Every knob of a request changes the training in the way that its name says."""

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
from tests.jobs.conftest import BASE, EventRecorder, FinishedTraining, make_context, make_spec, messages

Train = Callable[..., FinishedTraining]


def distance(one: FinishedTraining, other: FinishedTraining) -> float:
    """The largest difference between the LoRA weights of two trainings; the untrained part of them is the same."""
    theirs = other.lora_weights()
    return max(float((part - theirs[name]).abs().max()) for name, part in one.lora_weights().items())


def rates(trained: FinishedTraining) -> list[float]:
    return [point.values["learning_rate"] or 0.0 for point in trained.record.points]


def test_training_lowers_held_out_loss(train: Train) -> None:
    trained = train(learning_rate=5e-3, max_steps=20)
    assert trained.model.base_metrics is not None
    assert trained.model.metrics is not None
    assert (trained.model.metrics.perplexity or math.inf) < 0.7 * (trained.model.base_metrics.perplexity or 0)
    assert [(told.when, told.step) for told in trained.record.evaluations] == [("before", 0), ("after", 20)]
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
    """How far the training went: LoRA's B begins at nought."""
    return max(float(part.abs().max()) for name, part in trained.lora_weights().items() if "lora_B" in name)


def lora_a(trained: FinishedTraining) -> list[Any]:
    return [part for name, part in trained.lora_weights().items() if "lora_A" in name]


def lora_a_squared_norm(trained: FinishedTraining) -> float:
    return sum(float(part.square().sum()) for part in lora_a(trained))


@dataclass(frozen=True)
class HyperparameterCase:
    """Another value of one hyperparameter, and what must be so in a training with it, compared with the baseline."""

    value: Any
    has_effect: Callable[[FinishedTraining, FinishedTraining], bool]  # (baseline, changed)
    required: dict[str, Any] = field(default_factory=dict)  # what else must be set, in both, for the knob to matter


BASELINE = {"max_steps": -1, "epochs": 1, "batch_size": 6, "gradient_accumulation_steps": 1, "warmup_ratio": 0.0}  # 24 rows: 4 steps

HYPERPARAMETER_CASES = {
    "learning_rate": HyperparameterCase(
        1e-9, lambda one, other: max(rates(other)) == 1e-9 and max_lora_b(other) < 1e-7 < 1e-5 < max_lora_b(one)
    ),
    "batch_size": HyperparameterCase(12, lambda one, other: (steps(one), steps(other)) == (4, 2)),
    "gradient_accumulation_steps": HyperparameterCase(3, lambda one, other: steps(other) == 2),  # three batches, then the one that is left
    "epochs": HyperparameterCase(2, lambda one, other: steps(other) == 8),
    "max_steps": HyperparameterCase(
        5, lambda one, other: steps(other) == 5 and logged_steps(other) == [1, 2, 3, 4, 5]
    ),  # more than an epoch
    "packing": HyperparameterCase(
        True, lambda one, other: steps(other) < steps(one) and other.model.train_tokens == one.model.train_tokens
    ),
    "max_seq_length": HyperparameterCase(
        24, lambda one, other: other.model.train_tokens <= 24 * other.model.train_rows < one.model.train_tokens
    ),
    "lr_scheduler_type": HyperparameterCase(
        "cosine", lambda one, other: rates(other)[0] == rates(one)[0] and rates(other)[1] > rates(one)[1]
    ),
    "warmup_ratio": HyperparameterCase(
        0.5, lambda one, other: rates(one).index(max(rates(one))) == 0 and rates(other).index(max(rates(other))) == 2
    ),
    "weight_decay": HyperparameterCase(0.9, lambda one, other: lora_a_squared_norm(other) < lora_a_squared_norm(one)),
    "max_grad_norm": HyperparameterCase(
        1e-8, lambda one, other: max_lora_b(other) < 0.9 * max_lora_b(one)
    ),  # Adam forgives a scale, but not one below its epsilon
    # LoRA begins without effect: the first loss is that of the first rows, which the seed chose.
    "seed": HyperparameterCase(2, lambda one, other: distance(one, other) > 1e-4 and losses(one)[0] != losses(other)[0]),
    # The end of a training is always saved.
    "save_strategy": HyperparameterCase("epoch", lambda one, other: (one.checkpoints, other.checkpoints) == ([8], [4, 8]), {"epochs": 2}),
    "save_steps": HyperparameterCase(
        3, lambda one, other: (one.checkpoints, other.checkpoints) == ([4], [3, 4]), {"save_strategy": "steps"}
    ),
    "save_total_limit": HyperparameterCase(
        1, lambda one, other: (one.checkpoints, other.checkpoints) == ([3, 4], [4]), {"save_strategy": "steps", "save_steps": 1}
    ),
    "logging_steps": HyperparameterCase(2, lambda one, other: (logged_steps(one), logged_steps(other)) == ([1, 2, 3, 4], [2, 4])),
    "lora_rank": HyperparameterCase(
        8, lambda one, other: read_adapter_config(other)["r"] == 8 and {len(part) for part in lora_a(other)} == {8}
    ),
    "lora_alpha": HyperparameterCase(64, lambda one, other: read_adapter_config(other)["lora_alpha"] == 64 and distance(one, other) > 1e-6),
    "use_dora": HyperparameterCase(
        True, lambda one, other: any("magnitude" in name for name in other.weights()) and distance(one, other) > 1e-6
    ),
    "use_rslora": HyperparameterCase(True, lambda one, other: read_adapter_config(other)["use_rslora"] and distance(one, other) > 1e-6),
    "target_modules": HyperparameterCase(
        ["q_proj"], lambda one, other: {name.split(".")[-3] for name in other.lora_weights()} == {"q_proj"}
    ),
    "train_vision_tower": HyperparameterCase(False, lambda one, other: distance(one, other) == 0),  # with images: tests/jobs/test_vision.py
    "gradient_checkpointing": HyperparameterCase(
        True, lambda one, other: other.record.decisions["gradient_checkpointing"] == "true" and distance(one, other) < 1e-6
    ),
    "lora_dropout": HyperparameterCase(
        0.5, lambda one, other: read_adapter_config(other)["lora_dropout"] == 0.5 and distance(one, other) > 1e-6
    ),
}
# One needs a GPU (test_unavailable_flash_attention_is_rejected), one a minute and more, and one leaves no trace in the model
# (test_device_config_follows_hyperparameters).
TESTED_ELSEWHERE = {"use_fa2", "torch_compile", "dataloader_num_workers"}


@pytest.fixture(scope="module")
def baseline(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., FinishedTraining]:
    """Trains the baseline, once for every set of knobs that it is given."""

    @cache
    def run(*given: tuple[str, Any]) -> FinishedTraining:
        return train_in(tmp_path_factory.mktemp("baseline"), store, BASELINE | dict(given))

    return run


def train_in(workdir: Path, store: Path, hyperparameters: dict[str, Any], **spec: Any) -> FinishedTraining:
    from jobs.llm.trainers.sft import train as train_sft

    record, job = EventRecorder(), make_spec(store, hyperparameters=hyperparameters, **spec)
    context = make_context(job, workdir, record)
    return FinishedTraining(train_sft(job.training_config, context), record, workdir, context)


@pytest.mark.parametrize("name", HYPERPARAMETER_CASES)
def test_every_hyperparameter_takes_effect(store: Path, tmp_path: Path, baseline: Callable[..., FinishedTraining], name: str) -> None:
    knob = HYPERPARAMETER_CASES[name]
    unchanged = baseline(*knob.required.items())
    changed = train_in(tmp_path, store, BASELINE | knob.required | {name: knob.value})
    assert knob.has_effect(unchanged, changed)


def test_all_hyperparameters_are_covered() -> None:
    assert HYPERPARAMETER_CASES.keys() | TESTED_ELSEWHERE == SftHyperparameters.model_fields.keys()


def test_same_seed_gives_identical_weights(store: Path, tmp_path: Path, baseline: Callable[..., FinishedTraining]) -> None:
    first, again = baseline(), train_in(tmp_path, store, BASELINE)
    assert first.weights().keys() == again.weights().keys()
    assert all(bool((part == again.weights()[name]).all()) for name, part in first.weights().items())


def test_unavailable_flash_attention_is_rejected(train: Train) -> None:
    with pytest.raises(JobFailed) as refused:
        train(use_fa2=True)
    assert refused.value.failure.code == "invalid_config"
    assert "use_fa2" in refused.value.failure.message
    assert "use_fa2" in refused.value.failure.hint


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [  # of the peak, in four steps of which two warm up
        ("linear", [0, 1 / 2, 1, 1 / 2]),
        ("cosine", [0, 1 / 2, 1, (1 + math.cos(math.pi / 2)) / 2]),
        ("constant", [1, 1, 1, 1]),
        ("constant_with_warmup", [0, 1 / 2, 1, 1]),
        ("inverse_sqrt", [0, 1 / 2, 1, math.sqrt(2 / 3)]),
    ],
)
def test_schedule_matches_its_name(train: Train, schedule: str, shares: list[float]) -> None:
    trained = train(learning_rate=3e-3, lr_scheduler_type=schedule, warmup_ratio=0.5, max_steps=4)
    assert rates(trained) == pytest.approx([3e-3 * share for share in shares])


def test_truncated_rows_are_counted_per_split(train: Train) -> None:
    told = [event.message for event in train(max_steps=1, max_seq_length=24).record.events if isinstance(event, WarningRaised)]
    assert told == [
        "24 rows of train are longer than max_seq_length 24 and were truncated",
        "5 rows of eval are longer than max_seq_length 24 and were truncated",
    ]


def test_rows_without_reachable_answer_are_dropped_and_counted(train: Train) -> None:
    long = {"messages": [{"role": "user", "content": "copy " * 200}, {"role": "assistant", "content": "it returns"}]}
    trained = train(spec={"train": [long, *messages(8), long]}, max_steps=1)
    assert trained.record.warnings["rows_dropped"].startswith("2 rows of train")
    assert trained.model.train_rows == 8


def test_gradient_accumulation_matches_large_batch(train: Train) -> None:
    knobs: dict[str, Any] = {"max_steps": 2, "spec": {"method": "Full"}}  # whole numbers of fp32, and no dropout
    large = train("a", batch_size=4, gradient_accumulation_steps=1, **knobs)
    small = train("b", batch_size=1, gradient_accumulation_steps=4, **knobs)
    for one, other in zip(large.record.points, small.record.points, strict=True):
        assert one.values["loss"] == pytest.approx(other.values["loss"], rel=1e-4)
        assert one.values["grad_norm"] == pytest.approx(other.values["grad_norm"], rel=1e-3)
    assert large.model.train_tokens == small.model.train_tokens


def test_all_linear_layers_except_head_are_adapted(train: Train) -> None:
    parts = train(max_steps=1).lora_weights()
    kinds = {name.split(".lora_")[0].rpartition(".")[2] for name in parts}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(parts) == 6 * 7 * 2


def test_checkpoints_follow_save_strategy_and_limit(train: Train) -> None:
    assert train("a", save_strategy="steps", save_steps=2, max_steps=6).checkpoints == [4, 6]
    assert train("b", save_strategy="epoch", max_steps=-1, epochs=3, batch_size=12).checkpoints == [4, 6]


@pytest.mark.parametrize(
    ("eval_config", "steps"),
    [
        ({"eval_strategy": "no"}, []),
        ({"eval_strategy": "steps", "eval_steps": 3}, [3, 4]),  # the last step is always one
        ({"eval_strategy": "steps", "eval_steps": 2}, [2, 4]),
        ({"eval_strategy": "epoch"}, [2, 4]),
    ],
)
def test_evaluation_runs_before_during_and_after(train: Train, eval_config: dict[str, Any], steps: list[int]) -> None:
    trained = train(spec={"eval_config": eval_config}, max_steps=-1, epochs=2, batch_size=12)
    told = [(event.when, event.step) for event in trained.record.evaluations]
    assert told == [("before", 0), *(("during", step) for step in steps), ("after", 4)]


def test_last_step_is_not_evaluated_twice(train: Train) -> None:
    trained = train(spec={"eval_config": {"eval_strategy": "steps", "eval_steps": 2}}, max_steps=2)
    during, after = trained.record.evaluations[1:]
    assert during.metrics == after.metrics  # its running time as well


@pytest.mark.parametrize("eval_config", [{}, {"eval_strategy": "steps", "eval_steps": 1, "compute_eval_metrics": True}])
def test_missing_held_out_rows_skip_evaluation_with_warning(train: Train, eval_config: dict[str, Any]) -> None:
    trained = train(spec={"held_out": [], "eval_config": eval_config}, max_steps=1)
    assert (trained.model.metrics, trained.model.base_metrics, trained.record.evaluations) == (None, None, [])
    assert "evaluation_skipped" in trained.record.warnings
    assert len(trained.model.held_out_examples) == 16  # of the rows it was trained on: there are no others


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
    told = [point.progress for point in points if point.progress is not None]
    assert [(at.step, at.total_steps) for at in told] == [(1, 3), (2, 3), (3, 3)]
    assert (told[0].eta_s or 0) > 0
    assert told[-1].eta_s == 0


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
    """The loss on the held-out rows of `a_spec`, by the library's own loss, one row at a time."""
    import torch

    from jobs.llm.data.tokenize import IGNORE_INDEX, tokenize_split

    total, count = 0.0, 0
    for row in tokenize_split(iter(messages(5, first=100)), "messages", tokenizer, 128).rows:
        learned = sum(label != IGNORE_INDEX for label in row.labels[1:])
        with torch.no_grad():
            loss = model.eval()(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss
        total, count = total + loss.item() * learned, count + learned
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
    stops = GenerationConfig.from_pretrained(trained.model.folder).eos_token_id
    assert set(stops) == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")}  # type: ignore[arg-type]  # a list here


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
    with pytest.raises(JobFailed) as refused:
        train(max_seq_length=8)
    assert refused.value.failure.code == "invalid_data"
    assert "max_seq_length" in refused.value.failure.hint


@pytest.fixture
def make_store_with_last_norm(base: Path, tmp_path: Path) -> Callable[[float], Path]:
    """Makes a store whose tiny base has another weight in its last norm: it multiplies all logits."""

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


@pytest.mark.parametrize("logging_steps", [1, 50])  # also where nothing is logged
def test_nan_loss_fails_the_job_and_names_step(
    make_store_with_last_norm: Callable[[float], Path], tmp_path: Path, logging_steps: int
) -> None:
    with pytest.raises(JobFailed) as refused:
        train_in(tmp_path, make_store_with_last_norm(math.nan), {"logging_steps": logging_steps, "gradient_accumulation_steps": 2})
    failure = failure_of(refused.value)
    assert failure.code == "invalid_config"
    assert "step 1" in failure.message
    assert "learning_rate" in failure.hint


def test_infinite_grad_norm_is_null_with_reason(make_store_with_last_norm: Callable[[float], Path], tmp_path: Path) -> None:
    (point,) = train_in(tmp_path, make_store_with_last_norm(1e30), {"max_steps": 1}).record.points
    assert point.values["grad_norm"] is None
    assert point.notes == {"grad_norm": "the value is inf"}


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

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.nn.init.constant_(model.model.norm.weight, math.nan)
    rows = tokenize_split(iter(messages(2)), "messages", tokenizer, 128).rows
    found = evaluate_likelihood(model, rows, 0, make_spec(store).training_config)
    assert (found.eval_loss, found.perplexity) == (None, None)
    assert found.notes.keys() == {"eval_loss", "perplexity"}


def test_decisions_are_logged_with_reasons(train: Train) -> None:
    trained = train(max_steps=1)
    decided = [event for event in trained.record.events if isinstance(event, DecisionMade)]
    chosen_here = {"gradient_checkpointing", "dataloader_num_workers", "torch_compile", "learning_rate", "parallelism"}
    assert {event.setting for event in decided} == {"base_model", "chat_template", "device", "dtype"} | chosen_here
    assert all(event.value and event.reason for event in decided)
    assert train("full", spec={"method": "Full"}, max_steps=1).record.decisions["dtype"] == "float32"


def test_device_config_follows_hyperparameters(store: Path, tmp_path: Path) -> None:
    from jobs.llm.training_context import prepare_training

    spec = make_spec(store, hyperparameters={"dataloader_num_workers": 3, "torch_compile": True, "gradient_checkpointing": True})
    ground = prepare_training(spec.training_config, make_context(spec, tmp_path))
    assert (ground.device_config.dataloader_num_workers, ground.device_config.gradient_checkpointing) == (3, True)


def test_unsupported_option_is_replaced_with_warning(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jobs.llm.hardware import choose_torch_compile
    from jobs.llm.training_context import prepare_training

    monkeypatch.setenv("PATH", "")  # no C compiler is found
    spec, record = make_spec(store, hyperparameters={"torch_compile": True}), EventRecorder()
    context = make_context(spec, tmp_path, record)
    ground = prepare_training(spec.training_config, context)
    assert not choose_torch_compile(spec.training_config, context, ground.device_config, ground.base_folder, 10)
    assert "C compiler" in record.warnings["torch_compile_skipped"]

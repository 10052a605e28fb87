"""Every knob of a request changes the training in the way that its name says."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.errors import JobFailed, failure_of
from schema.events import Warned
from tests.jobs.conftest import Trained, a_context, a_spec, messages

Train = Callable[..., Trained]


def distance(one: Trained, other: Trained) -> float:
    """The largest difference between the LoRA weights of two trainings; the untrained part of them is the same."""
    theirs = other.lora_weights()
    return max(float((part - theirs[name]).abs().max()) for name, part in one.lora_weights().items())


def rates(trained: Trained) -> list[float]:
    return [point.values["learning_rate"] or 0.0 for point in trained.record.points]


def test_a_training_lowers_the_loss_on_held_out_rows_and_says_so(train: Train) -> None:
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
    assert len(trained.model.probes) == 5
    assert (trained.model.folder / "tokenizer.json").exists()
    assert "<end_of_turn>" in (trained.model.folder / "chat_template.jinja").read_text()


def test_the_same_seed_gives_the_same_model_and_another_another(train: Train) -> None:
    first, again, other = train("a", seed=1), train("b", seed=1), train("c", seed=2)
    assert distance(first, again) == 0
    assert distance(first, other) > 1e-4


@pytest.mark.parametrize(
    ("knob", "value"), [("learning_rate", 1e-3), ("weight_decay", 0.9), ("max_grad_norm", 1e-8), ("lora_alpha", 64), ("lora_dropout", 0.5)]
)
def test_a_knob_of_the_update_changes_the_weights(train: Train, knob: str, value: float) -> None:
    assert distance(train("a"), train("b", **{knob: value})) > 1e-7


def test_the_learning_rate_is_the_peak_that_is_reached(train: Train) -> None:
    assert max(rates(train(learning_rate=3e-3, lr_scheduler_type="constant"))) == pytest.approx(3e-3)


def test_each_schedule_moves_the_learning_rate_in_its_own_way(train: Train) -> None:
    names = ("linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt")
    curves = {tuple(rates(train(name, lr_scheduler_type=name, warmup_ratio=0.5, max_steps=6, logging_steps=1))) for name in names}
    assert len(curves) == len(names)


def test_the_warm_up_takes_its_share_of_the_steps(train: Train) -> None:
    cold, warm = rates(train("a", warmup_ratio=0.0, max_steps=8)), rates(train("b", warmup_ratio=0.5, max_steps=8))
    assert cold.index(max(cold)) == 0
    assert warm.index(max(warm)) == 4


def test_batch_size_and_accumulation_and_epochs_make_the_number_of_steps(train: Train) -> None:
    def steps(**knobs: Any) -> int:
        trained = train(str(knobs), spec={"held_out": []}, max_steps=-1, **knobs)
        progress = trained.record.points[-1].progress
        assert progress is not None
        return progress.total_steps

    assert steps(epochs=1, batch_size=4, gradient_accumulation_steps=1) == 6
    assert steps(epochs=1, batch_size=8, gradient_accumulation_steps=1) == 3
    assert steps(epochs=1, batch_size=4, gradient_accumulation_steps=3) == 2
    assert steps(epochs=2, batch_size=8, gradient_accumulation_steps=1) == 6


def test_accumulated_small_batches_are_one_large_batch(train: Train) -> None:
    knobs: dict[str, Any] = {"max_steps": 2, "lora_dropout": 0.0}
    large = train("a", batch_size=4, gradient_accumulation_steps=1, **knobs)
    small = train("b", batch_size=1, gradient_accumulation_steps=4, **knobs)
    for one, other in zip(large.record.points, small.record.points, strict=True):
        assert one.values["loss"] == pytest.approx(other.values["loss"], rel=2e-2)  # bfloat16
        assert one.values["grad_norm"] == pytest.approx(other.values["grad_norm"], rel=5e-2)


def test_max_steps_ends_the_training_and_minus_one_leaves_it_to_the_epochs(train: Train) -> None:
    assert [point.step for point in train("a", max_steps=3, epochs=50).record.points] == [1, 2, 3]
    assert train("b", max_steps=-1, epochs=1, batch_size=12).record.points[-1].step == 2


def test_logging_steps_are_the_distance_between_points(train: Train) -> None:
    assert [point.step for point in train(max_steps=6, logging_steps=3).record.points] == [3, 6]


def test_packing_makes_fewer_sequences_of_the_same_tokens(train: Train) -> None:
    knobs: dict[str, Any] = {"max_steps": -1, "epochs": 1, "batch_size": 1}
    padded, packed = train("a", **knobs), train("b", packing=True, **knobs)
    assert padded.record.points[-1].step == 24
    assert packed.record.points[-1].step < 12
    assert packed.model.train_tokens == padded.model.train_tokens


def test_max_seq_length_cuts_rows_and_tells_how_many(train: Train) -> None:
    whole, cut = train("a", max_steps=-1, epochs=1), train("b", max_steps=-1, epochs=1, max_seq_length=24)
    assert "rows_cut" not in whole.record.warnings
    assert next(event.message for event in cut.record.events if isinstance(event, Warned)).startswith("24 rows of train")
    assert cut.model.train_tokens <= 24 * cut.model.train_rows < whole.model.train_tokens


def test_the_rank_is_the_width_of_the_adapter(train: Train) -> None:
    for rank in (2, 8):
        parts = train(str(rank), lora_rank=rank, max_steps=1).lora_weights()
        assert {part.shape[0] for name, part in parts.items() if "lora_A" in name} == {rank}


def test_every_linear_layer_but_the_head_is_adapted(train: Train) -> None:
    parts = train(max_steps=1).lora_weights()
    kinds = {name.split(".lora_")[0].rpartition(".")[2] for name in parts}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(parts) == 6 * 7 * 2


def test_checkpoints_are_written_as_the_strategy_says_and_the_last_two_kept(train: Train) -> None:
    assert train("a", save_strategy="no").checkpoints == []
    assert train("b", save_strategy="steps", save_steps=2, max_steps=6).checkpoints == [4, 6]
    assert train("c", save_strategy="epoch", max_steps=-1, epochs=3, batch_size=12).checkpoints == [4, 6]


@pytest.mark.parametrize(
    ("eval_config", "steps"), [({"eval_strategy": "steps", "eval_steps": 2}, [2, 4]), ({"eval_strategy": "epoch"}, [2, 4])]
)
def test_the_model_is_measured_during_the_training_when_asked(train: Train, eval_config: dict[str, Any], steps: list[int]) -> None:
    trained = train(spec={"eval_config": eval_config}, max_steps=-1, epochs=2, batch_size=12)
    assert [told.step for told in trained.record.evaluations if told.when == "during"] == steps


def test_accuracy_is_the_same_number_both_ways_and_absent_when_not_asked(train: Train) -> None:
    gathered = train("a", spec={"eval_config": {"compute_eval_metrics": True}}).model.metrics
    batched = train("b", spec={"eval_config": {"compute_eval_metrics": True, "batch_eval_metrics": True}}).model.metrics
    absent = train("c").model.metrics
    assert gathered is not None
    assert batched is not None
    assert absent is not None
    assert gathered.accuracy is not None
    assert (gathered.accuracy, absent.accuracy) == (batched.accuracy, None)


def test_full_changes_all_weights_and_leaves_a_model_that_stops_at_the_end_of_a_turn(train: Train, base: Path, tokenizer: Any) -> None:
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
def test_the_other_forms_of_rows_are_trained_on_as_well(train: Train, dataset_type: str, row: dict[str, str]) -> None:
    trained = train(spec={"train": [row] * 8, "held_out": [row], "dataset_type": dataset_type}, learning_rate=5e-3, max_steps=8)
    assert trained.model.metrics is not None
    assert trained.model.base_metrics is not None
    assert (trained.model.metrics.eval_loss or 9) < (trained.model.base_metrics.eval_loss or 0)


def test_flash_attention_is_refused_where_it_does_not_exist(train: Train) -> None:
    with pytest.raises(JobFailed) as refused:
        train(use_fa2=True)
    assert refused.value.failure.code == "invalid_config"
    assert "use_fa2" in refused.value.failure.hint + refused.value.failure.message


@pytest.mark.parametrize("changes", [{"method": "QLoRA"}, {"provider": "unsloth"}, {"modality": "vision"}])
def test_what_this_image_cannot_do_is_refused_even_if_the_service_let_it_through(train: Train, changes: dict[str, str]) -> None:
    with pytest.raises(JobFailed) as refused:
        train(spec=changes)
    assert refused.value.failure.code == "invalid_config"


def test_rows_without_anything_to_learn_fail_the_job_with_a_hint(train: Train) -> None:
    with pytest.raises(JobFailed) as refused:
        train(max_seq_length=8)
    assert refused.value.failure.code == "invalid_data"
    assert "max_seq_length" in refused.value.failure.hint


def test_a_loss_that_is_no_number_fails_the_job_and_names_the_step(store: Path, base: Path, tmp_path: Path) -> None:
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    from jobs.trainers.sft import train as train_sft

    broken = store / "pretrained_weights/huggingface/tiny/broken"
    shutil.copytree(base, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], math.nan)
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    spec = a_spec(store, base_model_id="tiny/broken")
    with pytest.raises(JobFailed) as refused:
        train_sft(spec.training_config, a_context(spec, tmp_path / "work"))
    failure = failure_of(refused.value)
    assert "step 1" in failure.message
    assert "learning_rate" in failure.hint


def test_a_measurement_that_is_no_number_is_null_with_a_reason(store: Path, base: Path, tokenizer: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from jobs.data.render import render
    from jobs.trainers.sft import measure

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.nn.init.constant_(model.model.norm.weight, math.nan)
    rows = render(iter(messages(2)), "messages", tokenizer, 128).rows
    found = measure(model, rows, 0, a_spec(store).training_config)
    assert (found.eval_loss, found.perplexity) == (None, None)
    assert found.notes.keys() == {"eval_loss", "perplexity"}


def test_what_was_decided_is_told_with_its_reason(train: Train) -> None:
    trained = train(max_steps=1)
    assert {"device", "dtype", "gradient_checkpointing", "base_model", "chat_template"} <= trained.record.decisions.keys()

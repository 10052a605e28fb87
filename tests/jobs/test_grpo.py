"""GRPO on the tiny Gemma: it increases the reward, resumes exactly and reports failing graders."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.llm.graders.base import FailedGrade
from jobs.llm.hardware import DeviceConfig
from jobs.llm.loss import compute_log_probs
from jobs.llm.trainers.grpo import choose_gradient_accumulation, compute_mean_reward, find_infinite
from jobs.llm.training_context import TrainingContext
from jobs.runtime.errors import JobFailed
from schema.events import SamplesGenerated
from schema.spec import JobSpec
from schema.training import GrpoConfig
from tests.jobs.conftest import (
    WORDS,
    EventRecorder,
    FinishedTraining,
    load_weights,
    make_context,
    make_row_tokenizer,
    make_spec,
    saved_steps,
)
from tests.jobs.test_continuation import TrainingRun

Train = Callable[..., FinishedTraining]

LETTER_GRADER = {"name": "letter", "type": "python", "source": "def grade(completion, row):\n    return completion.count('a') / 6"}
SIMILARITY_GRADER = {"name": "same", "type": "text_similarity"}
FAILING_GRADER = {"name": "broken", "type": "numeric_accuracy"}  # the answers in the rows are words

HYPERPARAMETERS: dict[str, Any] = {"max_steps": 3, "batch_size": 8, "num_generations": 4, "max_completion_length": 6, "warmup_ratio": 0.0}
HYPERPARAMETERS |= {"mask_truncated_completions": False, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "max_grad_norm": 1.0}


def prompts(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [
        {"prompt": [{"role": "user", "content": f"say {WORDS[n % 13]} {n}"}], "answer": WORDS[n % 13]} for n in range(first, first + count)
    ]


def make_grpo_job(*graders: dict[str, Any], **overrides: Any) -> dict[str, Any]:
    """The arguments of `make_spec` for a GRPO job."""
    defaults = {"trainer_type": "grpo", "dataset_type": "prompt", "columns": ("answer",), "reward_config": list(graders) or [LETTER_GRADER]}
    return defaults | {"train": prompts(8), "held_out": prompts(3, first=50)} | overrides


def rewards(trained: FinishedTraining) -> list[float]:
    return [point.values["reward"] or 0.0 for point in trained.record.points]


def test_model_learns_to_increase_reward(train: Train) -> None:
    trained = train(
        spec=make_grpo_job(method="Full"),
        **HYPERPARAMETERS | {"max_steps": 16, "batch_size": 16, "num_generations": 8, "learning_rate": 2e-2},
    )
    assert sum(rewards(trained)[:3]) / 3 < 0.2
    assert sum(rewards(trained)[-3:]) / 3 > 0.7
    assert trained.model.base_metrics is not None
    assert trained.model.metrics is not None
    before, after = trained.model.base_metrics.values, trained.model.metrics.values
    assert (before["reward"] or 0) < 0.2
    assert (after["reward"] or 0) > 0.7
    assert after["graders/letter/mean"] == pytest.approx(after["reward"])
    assert after["graders/letter/failed"] == 0.0
    assert trained.model.metrics.eval_rows == 3
    assert trained.model.train_tokens > 16 * 16 * 6  # completions and prompts
    point = trained.record.points[0].values
    assert {"graders/letter/mean", "graders/letter/failed", "reward", "reward_std", "entropy", "grad_norm"} <= point.keys()


def test_reward_is_weighted_sum_and_samples_are_reported(train: Train) -> None:
    graders = LETTER_GRADER | {"weight": 2.0}, SIMILARITY_GRADER | {"weight": -0.5}
    trained = train(spec=make_grpo_job(*graders, eval_config={"sample_prompts": 2}), **HYPERPARAMETERS)
    for point in trained.record.points:
        letter, same = (point.values[f"graders/{name}/mean"] or 0.0 for name in ("letter", "same"))
        assert point.values["reward"] == pytest.approx(2 * letter - 0.5 * same, abs=1e-6)
    shown = [event for event in trained.record.events if isinstance(event, SamplesGenerated)]
    assert [(event.when, event.step, len(event.samples)) for event in shown] == [("before", 0, 2), ("after", 3, 2)]
    assert "say " in shown[0].samples[0].prompt
    # Exported files are compared on the completions of the trained model.
    assert all(len(probe.input_ids) > probe.prompt_tokens for probe in trained.model.held_out_examples)


def test_completion_column_is_used_as_reference(train: Train) -> None:
    rows = [{"prompt": row["prompt"], "completion": [{"role": "assistant", "content": row["answer"]}]} for row in prompts(11)]
    spec = make_grpo_job(
        SIMILARITY_GRADER | {"reference_field": "completion"},
        train=rows[:8],
        held_out=rows[8:],
        dataset_type="prompt_completion",
        columns=(),
    )
    trained = train(spec=spec | {"eval_config": {"sample_prompts": 1}}, **HYPERPARAMETERS)
    assert trained.record.points[0].values["graders/same/failed"] == 0.0
    shown = [event for event in trained.record.events if isinstance(event, SamplesGenerated)]
    assert shown[0].samples[0].reference == WORDS[8]


def test_plain_text_prompts_are_accepted(train: Train) -> None:
    rows = [{"prompt": f"say {WORDS[n % 13]} ", "answer": WORDS[n % 13]} for n in range(11)]
    assert len(rewards(train(spec=make_grpo_job(train=rows[:8], held_out=rows[8:]), **HYPERPARAMETERS))) == 3


# --- failing graders -----------------------------------------------------------------------------------------------------


def test_failing_grader_is_counted_and_excluded_from_reward(train: Train) -> None:
    trained = train(spec=make_grpo_job(LETTER_GRADER, FAILING_GRADER), **HYPERPARAMETERS)
    for point in trained.record.points:
        assert point.values["graders/broken/failed"] == 1.0
        assert point.values.get("graders/broken/mean") is None
        assert point.values["reward"] == pytest.approx(point.values["graders/letter/mean"])
    assert "grader 'broken' could not grade" in trained.record.warnings["grader_failed"]
    assert trained.model.metrics is not None
    assert trained.model.metrics.values["reward"] is None
    assert trained.model.metrics.notes["reward"] == "there is no completion on which every grader succeeded"
    assert trained.model.metrics.values["graders/broken/failed"] == 1.0


def test_training_with_only_failing_grader_stops_and_logs_no_row(train: Train, caplog: pytest.LogCaptureFixture) -> None:
    """TRL would log the whole row when every grader fails on it."""
    with pytest.raises(JobFailed, match="grader 'broken' failed on every completion 10 times in a row") as failed:
        train(spec=make_grpo_job(FAILING_GRADER, train=prompts(30), held_out=[]), **HYPERPARAMETERS | {"max_steps": 14})
    assert failed.value.failure.code == "invalid_config"
    assert "say " not in caplog.text


def test_invalid_grader_fails_the_job_before_evaluation(train: Train) -> None:
    with pytest.raises(JobFailed, match="compares with column 'solution', which no row has"):
        train(spec=make_grpo_job(SIMILARITY_GRADER | {"reference_field": "solution"}), **HYPERPARAMETERS)


def test_mean_reward_excludes_failed_grades() -> None:
    grades: dict[str, list[float | FailedGrade]] = {"a": [1.0, 0.0, 1.0], "b": [0.5, FailedGrade("reason"), 1.0]}
    assert compute_mean_reward({"a": 1.0, "b": 2.0}, grades) == pytest.approx((2.0 + 3.0) / 2)
    assert compute_mean_reward({"a": 1.0}, {"a": [FailedGrade("reason")]}) is None


def test_sum_that_is_too_large_for_a_number_is_found() -> None:
    reward = compute_mean_reward({"a": 100.0}, {"a": [1e308]})
    assert find_infinite({"reward": reward, "a": 1e308, "b": None}) == {"reward"}


# --- invalid input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "hyperparameters", "reason"),
    [
        ({"train": prompts(1)}, {}, "an optimizer step takes 2"),
        ({}, {"max_completion_length": 127}, "no training row"),
    ],
)
def test_too_few_or_too_long_prompts_fail_the_job(
    train: Train, overrides: dict[str, Any], hyperparameters: dict[str, Any], reason: str
) -> None:
    with pytest.raises(JobFailed, match=reason):
        train(spec=make_grpo_job(**overrides), **HYPERPARAMETERS | hyperparameters)


def test_prompts_without_room_for_completion_are_dropped(train: Train) -> None:
    long = {"prompt": [{"role": "user", "content": "say " * 60}], "answer": "a"}
    trained = train(spec=make_grpo_job(train=[*prompts(8), long]), **HYPERPARAMETERS)
    assert trained.model.train_rows == 8
    assert trained.record.warnings["rows_dropped"].startswith("1 rows of train")


# --- log-probabilities ---------------------------------------------------------------------------------------------------


def test_prompt_tokens_match_chat_template(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "say files"}]
    tokenized = make_row_tokenizer(tokenizer).tokenize_prompt(messages)
    assert tokenized.input_ids == tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert tokenized.prompt_tokens == len(tokenized.input_ids)
    assert not tokenized.has_labels
    assert make_row_tokenizer(tokenizer).tokenize_prompt("say files") == tokenized


def test_log_probabilities_match_full_softmax(base: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base).eval()
    ids = torch.randint(5, 900, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0  # padding of a shorter prompt
    mask[1, 7:] = 0  # padding of a shorter completion
    log_probs, entropy, _ = compute_log_probs(model, ids, mask, 4, 2, temperature=0.7, compute_entropy=True)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, -5:-1].float() / 0.7
    full = logits.log_softmax(-1)
    is_token = mask[:, -4:] == 1
    assert torch.allclose(log_probs, full.gather(-1, ids[:, -4:, None]).squeeze(-1) * is_token, atol=1e-4)
    assert torch.allclose(entropy, -(full.exp() * full).sum(-1) * is_token, atol=1e-4)


def test_masked_completions_have_zero_gradient(base: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    ids = torch.randint(5, 900, (2, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[:, 3:] = 0
    log_probs, _, _ = compute_log_probs(model, ids, mask, 3, temperature=1.0)
    log_probs.sum().backward()
    assert log_probs.tolist() == [[0.0] * 3] * 2
    assert all(weight.grad is None or not weight.grad.any() for weight in model.parameters())


# --- resuming ------------------------------------------------------------------------------------------------------------


def make_training_run(store: Path, folder: Path, **overrides: Any) -> TrainingRun:
    """Four prompts, two per step: two steps in each of three epochs."""
    hyperparameters = (
        HYPERPARAMETERS | {"max_steps": -1, "epochs": 3, "lora_dropout": 0.1, "logging_steps": 2} | overrides.pop("hyperparameters", {})
    )
    spec: JobSpec = make_spec(
        store, **make_grpo_job(LETTER_GRADER, SIMILARITY_GRADER, train=prompts(4)) | overrides, hyperparameters=hyperparameters
    )
    return TrainingRun(spec, folder)


def curve(training_run: TrainingRun) -> dict[int, tuple[float | None, ...]]:
    names = ("reward", "graders/letter/mean", "graders/same/mean", "completions/mean_length", "entropy", "loss", "grad_norm")
    return {point.step: tuple(point.values[name] for name in names) for recorder in training_run.recorders for point in recorder.points}


@pytest.mark.parametrize(
    "overrides",
    [{}, {"method": "Full", "hyperparameters": {"beta": 0.1, "batch_size": 4, "gradient_accumulation_steps": 2}}],
    ids=["LoRA", "Full with a reference and accumulation"],
)
def test_interrupted_run_matches_uninterrupted_run(store: Path, tmp_path: Path, overrides: dict[str, Any]) -> None:
    uninterrupted = make_training_run(store, tmp_path / "uninterrupted", **overrides)
    model = uninterrupted.finish()
    interrupted = make_training_run(store, tmp_path / "interrupted", **overrides)
    assert interrupted.run_attempt(stop_after=1) == "pause"  # within the first epoch, and between two logged steps
    assert interrupted.run_attempt(stop_after=4) == "pause"  # at the end of the second epoch
    resumed = interrupted.finish()
    assert curve(interrupted) == curve(uninterrupted)
    assert (resumed.metrics and resumed.metrics.values) == (model.metrics and model.metrics.values)
    assert resumed.train_tokens == model.train_tokens
    theirs = load_weights(resumed.folder)
    assert all(tensor.equal(theirs[name]) for name, tensor in load_weights(model.folder).items())


def test_completions_train_in_several_iterations_and_resume_between_generations(store: Path, tmp_path: Path) -> None:
    """Each step on new completions logs their rewards, and the next step trains on them again. A stop waits for that step."""
    hyperparameters = {"num_iterations": 2, "epsilon": 1e-3, "epsilon_high": 2e-3, "lora_dropout": 0.0, "logging_steps": 1, "epochs": 2}
    uninterrupted = make_training_run(store, tmp_path / "uninterrupted", hyperparameters=hyperparameters)
    model = uninterrupted.finish()
    points = {point.step: point.values for point in uninterrupted.recorders[0].points}
    assert points.keys() == set(range(1, 9))  # two epochs with two generations each
    assert [step for step, values in points.items() if "reward" in values] == [1, 3, 5, 7]
    clipped = {step: (values["clip_ratio/region_mean"] or 0.0) > 0 for step, values in points.items()}
    assert [step for step in points if clipped[step]] == [2, 4, 6, 8]  # nothing has moved in the first step on a completion
    interrupted = make_training_run(store, tmp_path / "interrupted", hyperparameters=hyperparameters)
    assert interrupted.run_attempt(stop_after=1) == "pause"
    assert saved_steps(interrupted.spec) == [2]
    assert interrupted.run_attempt(stop_after=5) == "pause"
    assert saved_steps(interrupted.spec)[-1] == 6
    resumed = interrupted.finish()
    assert {
        point.step: (point.values["loss"], point.values["grad_norm"]) for recorder in interrupted.recorders for point in recorder.points
    } == {step: (values["loss"], values["grad_norm"]) for step, values in points.items()}
    theirs = load_weights(resumed.folder)
    assert all(tensor.equal(theirs[name]) for name, tensor in load_weights(model.folder).items())


@pytest.mark.parametrize(
    ("on_gpu", "batch_size", "num_generations", "num_prompts", "steps"),
    [
        (True, 8, 8, 100, 8),
        (True, 8, 4, 100, 4),
        (True, 4, 8, 100, 16),
        (True, 12, 8, 100, 6),  # two forward passes have three prompts
        (True, 8, 8, 5, 5),
        (True, 64, 8, 100, 1),
        (True, 32, 8, 3, 1),  # too few for a step, which the task rejects
        (False, 8, 8, 100, 1),
        (False, 4, 8, 100, 2),
    ],
)
def test_prompts_per_step_suit_device_and_dataset(
    store: Path, tmp_path: Path, on_gpu: bool, batch_size: int, num_generations: int, num_prompts: int, steps: int
) -> None:
    hyperparameters: dict[str, Any] = {"batch_size": batch_size, "num_generations": num_generations, "gradient_accumulation_steps": None}
    hyperparameters |= {"max_completion_length": 6}
    spec = make_spec(store, **make_grpo_job(), hyperparameters=hyperparameters)
    config, record = spec.training_config, EventRecorder()
    assert isinstance(config, GrpoConfig)
    device_config = DeviceConfig(device=None, dtype=None, autocast=False, on_gpu=on_gpu, gradient_checkpointing=False)
    context = make_context(spec, tmp_path, record)
    unused: Any = None  # the choice reads neither tokenizer nor template
    training = TrainingContext(config, context, tmp_path, {}, unused, unused, device_config, resume_checkpoint=None)
    chosen = choose_gradient_accumulation(config, training, num_prompts).hyperparameters.gradient_accumulation_steps
    assert (chosen, record.decisions["gradient_accumulation_steps"]) == (steps, str(steps))


def test_resumed_run_keeps_the_chosen_rows_per_step(store: Path, tmp_path: Path) -> None:
    """A GPU chose eight completions a step; a CPU, which would choose four, continues with eight."""
    hyperparameters = {"batch_size": 4, "num_generations": 4, "gradient_accumulation_steps": 2, "max_steps": 2}
    run = make_training_run(store, tmp_path, hyperparameters=hyperparameters)
    assert run.run_attempt(stop_after=1) == "pause"
    config = run.spec.training_config
    chosen = config.hyperparameters.model_copy(update={"gradient_accumulation_steps": None})
    run.spec = run.spec.model_copy(update={"training_config": config.model_copy(update={"hyperparameters": chosen})})
    run.finish()
    assert run.recorders[1].decisions["gradient_accumulation_steps"] == "2"


def test_generation_batch_shrinks_with_training_batch(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When memory runs out, fewer completions are generated at once, and the number per step stays the same."""
    import torch

    embedding = torch.nn.functional.embedding
    batch_sizes: list[int] = []

    def look_up(tokens: Any, *rest: Any, **named: Any) -> Any:
        batch_sizes.append(len(tokens))
        if len(tokens) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return embedding(tokens, *rest, **named)

    monkeypatch.setattr(torch.nn.functional, "embedding", look_up)
    run = make_training_run(store, tmp_path, hyperparameters={"epochs": 1, "logging_steps": 1})
    run.finish()
    assert run.recorders[0].decisions["batch_size"] == "4"
    assert max(batch_sizes) == 8
    assert len(run.recorders[0].points) == 2

"""DPO, ORPO, KTO and reward models on the tiny Gemma: they learn preferences, resume exactly and report exact metrics."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from jobs.llm.data.preference import UnpairedExample, split_pairs, tokenize_pairs, tokenize_unpaired
from jobs.llm.data.tokenize import IGNORE_INDEX, TokenizedExample, tokenize_split
from jobs.llm.oom import run_in_batches
from jobs.llm.preference import evaluate_trainer_metrics, patch_fused_head
from jobs.llm.trained_model import TrainedModel
from jobs.llm.trainers.dpo import null_accuracy_at_init
from jobs.llm.trainers.kto import class_balance_warning, mismatched_pair
from jobs.runtime.errors import JobFailed
from jobs.runtime.training_control import EvaluationInterrupted
from schema.job import EvalMetrics
from schema.spec import JobSpec
from tests.jobs.conftest import WORDS, FinishedTraining, load_weights, make_row_tokenizer, make_spec
from tests.jobs.test_continuation import TrainingRun
from tests.jobs.test_oom import LimitedMemory, limit_memory, reduced_batch_sizes  # noqa: F401  # limit_memory is a fixture

Train = Callable[..., FinishedTraining]

CHOSEN_TEXT, REJECTED_TEXT = "it returns a list", "string object call"


def pairs(count: int, first: int = 0) -> list[dict[str, Any]]:
    """Pairs whose chosen answer names lists, and whose rejected answer names strings."""
    return [
        {
            "prompt": [{"role": "user", "content": f"what does {WORDS[n % 13]} do {n}"}],
            "chosen": [{"role": "assistant", "content": CHOSEN_TEXT + f" {WORDS[n % 7]}" * (n % 3)}],
            "rejected": [{"role": "assistant", "content": REJECTED_TEXT + f" {WORDS[n % 5]}" * (n % 4)}],
        }
        for n in range(first, first + count)
    ]


def unpaired_rows(count: int, first: int = 0) -> list[dict[str, Any]]:
    """The same answers as unpaired rows: the good ones, then the bad ones."""
    rows = pairs(count, first)
    good = {n: n < (count + 1) // 2 for n in range(count)}
    return [
        {"prompt": row["prompt"], "completion": row["chosen" if good[n] else "rejected"], "label": good[n]} for n, row in enumerate(rows)
    ]


# --- learning and resuming ---

HYPERPARAMETERS: dict[str, Any] = {"batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": -1, "epochs": 2, "logging_steps": 2}
HYPERPARAMETERS |= {"learning_rate": 1e-2, "warmup_ratio": 0.0, "lr_scheduler_type": "constant", "beta": 0.2}
STEPS = 6  # two epochs of 11 rows, four per step, so that each epoch ends with a smaller batch


@dataclass(frozen=True)
class TrainingCase:
    """A trainer type with a method and hyperparameters."""

    trainer_type: str
    method: str = "LoRA"
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    improved_metric: str = "rewards/margins"  # metrics of the held-out rows that must increase

    def spec(self, store: Path) -> JobSpec:
        has_pairs = self.trainer_type != "kto"
        rows = pairs if has_pairs else unpaired_rows
        hyperparameters = (
            HYPERPARAMETERS | ({"lora_dropout": 0.3} if self.method != "Full" else {"learning_rate": 2e-3}) | self.hyperparameters
        )
        if self.trainer_type == "reward":
            del hyperparameters["beta"]
        return make_spec(
            store,
            train=rows(11),
            held_out=rows(5, first=100),
            dataset_type="preference" if has_pairs else "unpaired_preference",
            trainer_type=self.trainer_type,
            method=self.method,
            hyperparameters=hyperparameters,
            eval_config={"eval_strategy": "steps", "eval_steps": 3},
        )


CASES = {
    "dpo-LoRA": TrainingCase("dpo"),
    "dpo-Full": TrainingCase("dpo", "Full"),
    "dpo-QLoRA": TrainingCase("dpo", "QLoRA", {"loss_type": "robust", "label_smoothing": 0.1}),
    "orpo-LoRA": TrainingCase("orpo", improved_metric="logps/chosen"),
    "orpo-Full": TrainingCase("orpo", "Full", improved_metric="logps/chosen"),
    "kto-LoRA": TrainingCase("kto"),
    "kto-Full": TrainingCase("kto", "Full", {"desirable_weight": 1.2}),
    "reward-LoRA": TrainingCase("reward", hyperparameters={"center_rewards_coefficient": 0.01}),
    "reward-Full": TrainingCase("reward", "Full"),
}


@dataclass(frozen=True)
class UninterruptedRun:
    """A finished job without interruption."""

    case: TrainingCase
    training_run: TrainingRun
    model: TrainedModel


@pytest.fixture(scope="module", params=CASES)
def uninterrupted(request: pytest.FixtureRequest, store: Path, tmp_path_factory: pytest.TempPathFactory) -> UninterruptedRun:
    case = CASES[request.param]
    run = TrainingRun(case.spec(store), tmp_path_factory.mktemp("uninterrupted"))
    return UninterruptedRun(case, run, run.finish())


def is_system_metric(name: str) -> bool:
    return name.endswith(("per_second", "_bytes", "_percent", "_celsius", "_watts"))


def curve_points(training_run: TrainingRun) -> dict[int, dict[str, float | None]]:
    """All logged metrics by step, without speed and system metrics."""
    points = [point for recorder in training_run.recorders for point in recorder.points]
    assert len({point.step for point in points}) == len(points)
    return {point.step: {name: value for name, value in point.values.items() if not is_system_metric(name)} for point in points}


def evaluations_by_step(training_run: TrainingRun) -> dict[tuple[str, int], EvalMetrics]:
    events = [event for recorder in training_run.recorders for event in recorder.evaluations]
    return {(event.when, event.step): event.metrics.model_copy(update={"eval_runtime": None}) for event in events}


def test_training_learns_preferences(uninterrupted: UninterruptedRun) -> None:
    curve, before = curve_points(uninterrupted.training_run), uninterrupted.model.base_metrics
    after = uninterrupted.model.metrics
    assert before is not None
    assert after is not None
    assert curve.keys() == {2, 4, 6}
    losses, norms = [point["loss"] or 0.0 for point in curve.values()], [point["grad_norm"] or 0.0 for point in curve.values()]
    assert min(norms) > 0
    assert losses[-1] < losses[0]
    assert (after.eval_loss or 0) < (before.eval_loss or 0)
    assert (after.values[uninterrupted.case.improved_metric] or 0) > (before.values[uninterrupted.case.improved_metric] or 0) + 0.2
    for metrics in (before, after):  # the first counts the ends of turn too
        assert (metrics.perplexity is not None) == (metrics.content_perplexity is not None) == (uninterrupted.case.trainer_type != "reward")
        assert metrics.perplexity is None or metrics.perplexity != metrics.content_perplexity
    if uninterrupted.case.trainer_type != "kto":
        assert (after.values["rewards/accuracies"] or 0) >= 0.8
    assert (after.eval_rows, uninterrupted.model.train_rows) == (5, 11)


def test_interrupted_run_matches_uninterrupted_run(uninterrupted: UninterruptedRun, store: Path, tmp_path: Path) -> None:
    run = TrainingRun(uninterrupted.case.spec(store), tmp_path)
    assert run.run_attempt(stop_after=2) == "pause"
    assert run.run_attempt(stop_after=3, checks=1) == "pause"  # between two batches of held-out rows
    model = run.finish()
    assert curve_points(run) == curve_points(uninterrupted.training_run)
    assert evaluations_by_step(run) == evaluations_by_step(uninterrupted.training_run)
    assert {step for when, step in evaluations_by_step(run) if when == "during"} == {3, 6}
    ours, theirs = load_weights(model.folder), load_weights(uninterrupted.model.folder)
    assert ours.keys() == theirs.keys()
    assert [name for name, tensor in ours.items() if not tensor.equal(theirs[name])] == []
    assert model.train_tokens == uninterrupted.model.train_tokens


# --- trainer types ---


def make_job_config(trainer_type: str, dataset_type: str = "preference", **changes: Any) -> dict[str, Any]:
    rows = {"preference": pairs, "unpaired_preference": unpaired_rows}.get(dataset_type, pairs)
    return {"trainer_type": trainer_type, "dataset_type": dataset_type, "train": rows(12), "held_out": rows(3, first=100)} | changes


def test_dpo_reference_keeps_original_token_embeddings(train: Train) -> None:
    trained = train(spec=make_job_config("dpo"), max_steps=3, learning_rate=1e-2)
    token_weights = [name for name in trained.weights() if "token_adapter" in name or "trainable_tokens" in name]
    assert token_weights
    before, after = trained.model.base_metrics, trained.model.metrics
    assert before is not None
    assert after is not None
    assert (before.values["rewards/chosen"], before.values["rewards/accuracies"]) == (0.0, None)
    # The reward is beta times the log-probability that the chosen answers gained over the base.
    gained = (after.values["logps/chosen"] or 0) - (before.values["logps/chosen"] or 0)
    assert after.values["rewards/chosen"] == pytest.approx(0.1 * gained, rel=1e-3)


def test_gradient_checkpointing_gives_same_training(train: Train) -> None:
    plain = train("plain", spec=make_job_config("dpo"), max_steps=2, gradient_checkpointing=False)
    checkpointed = train("checkpointed", spec=make_job_config("dpo"), max_steps=2, gradient_checkpointing=True)
    assert [point.values["loss"] for point in checkpointed.record.points] == pytest.approx(
        [point.values["loss"] for point in plain.record.points]
    )
    assert all(tensor.equal(checkpointed.weights()[name]) for name, tensor in plain.weights().items())


def test_kto_splits_pairs_into_good_and_bad_rows(train: Train) -> None:
    trained = train(spec=make_job_config("kto"), max_steps=2, batch_size=4)
    assert trained.model.train_rows == 24
    assert "class_imbalance" not in trained.record.warnings


def test_kto_batch_of_one_row_still_has_kl_example(
    store: Path,
    tmp_path: Path,
    limit_memory: Callable[..., LimitedMemory],  # noqa: F811
) -> None:
    run = TrainingRun(
        make_spec(store, **make_job_config("kto", "unpaired_preference"), hyperparameters={"max_steps": 2, "logging_steps": 1}), tmp_path
    )
    limit_memory(run, 1)
    run.finish()
    assert reduced_batch_sizes(run) == ["1"]
    assert curve_points(run).keys() == {1, 2}


def test_reward_adapter_loads_with_peft_and_prefers_same_answer(train: Train, base: Path, tokenizer: Any) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    trained = train(spec=make_job_config("reward"), max_steps=8, learning_rate=1e-2)
    assert trained.weights()["base_model.model.score.weight"].shape == (1, 64)
    fresh = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    fresh.config.pad_token_id = tokenizer.pad_token_id
    model = PeftModel.from_pretrained(fresh, trained.model.folder).eval()
    (pair,) = tokenize_pairs(pairs(1, first=200), make_row_tokenizer(tokenizer), 128).rows
    with torch.no_grad():
        chosen, rejected = (float(model(input_ids=torch.tensor([row.input_ids])).logits) for row in (pair.chosen, pair.rejected))
    assert chosen > rejected + 0.5
    assert trained.model.metrics is not None
    for name in ("perplexity", "content_perplexity"):
        assert (getattr(trained.model.metrics, name), trained.model.metrics.notes[name]) == (None, "a reward model gives a score, not text")


# --- errors and warnings ---


@pytest.mark.parametrize(
    ("trainer_type", "dataset_type"), [("dpo", "unpaired_preference"), ("orpo", "messages"), ("kto", "text"), ("reward", "prompt")]
)
def test_wrong_dataset_type_is_rejected(train: Train, trainer_type: str, dataset_type: str) -> None:
    with pytest.raises(JobFailed) as failed:
        train(spec=make_job_config(trainer_type, dataset_type))
    assert failed.value.failure.code == "invalid_data"
    assert dataset_type in failed.value.failure.message
    assert "preference" in failed.value.failure.message


@pytest.mark.parametrize("trainer_type", ["dpo", "kto"])
def test_pairs_truncated_to_no_labels_are_rejected(train: Train, trainer_type: str) -> None:
    with pytest.raises(JobFailed) as failed:
        train(spec=make_job_config(trainer_type), max_seq_length=8)
    assert failed.value.failure.code == "invalid_data"
    assert "max_seq_length" in failed.value.failure.hint


def test_truncated_and_dropped_rows_are_reported(train: Train, tokenizer: Any) -> None:
    lengths = [
        len(row.input_ids)
        for pair in tokenize_pairs(pairs(12), make_row_tokenizer(tokenizer), 1000).rows
        for row in (pair.chosen, pair.rejected)
    ]
    trained = train(
        spec=make_job_config("reward", held_out=[], train=[*pairs(12), pairs(1)[0] | {"rejected": pairs(1)[0]["chosen"]}]),
        max_seq_length=max(lengths) - 1,
    )
    assert "rows of train are longer" in trained.record.warnings["rows_truncated"]
    assert trained.record.warnings["rows_dropped"].startswith("1 rows of train")
    assert trained.model.train_rows == 12


@pytest.mark.parametrize(
    ("good", "bad", "class_weights", "expected"),
    [
        (50, 50, (1.0, 1.0), None),
        (20, 100, (1.0, 1.0), "desirable_weight between 5.00 and 6.65"),
        (20, 100, (5.5, 1.0), None),
        (100, 20, (1.0, 1.0), "undesirable_weight between 3.76 and 5.00"),
        (100, 20, (1.0, 4.5), None),
        (10, 0, (1.0, 1.0), "no bad row"),
        (0, 10, (1.0, 1.0), "no good row"),
    ],
)
def test_class_imbalance_gives_weight_advice(good: int, bad: int, class_weights: tuple[float, float], expected: str | None) -> None:
    advice = class_balance_warning(good, bad, *class_weights)
    assert advice is None if expected is None else expected in (advice or "")


# --- rows ---


def test_answers_are_tokenized_as_in_sft(tokenizer: Any) -> None:
    (row,) = pairs(1)
    (pair,) = tokenize_pairs([row], make_row_tokenizer(tokenizer), 128).rows
    (chosen,) = tokenize_split(iter([{"messages": row["prompt"] + row["chosen"]}]), "messages", make_row_tokenizer(tokenizer), 128).rows
    assert pair.chosen == chosen
    texts = {"prompt": "what does it do?", "chosen": " it returns", "rejected": " it calls"}
    (pair,) = tokenize_pairs([texts], make_row_tokenizer(tokenizer), 128).rows
    (chosen,) = tokenize_split(
        iter([{"prompt": texts["prompt"], "completion": texts["chosen"]}]), "prompt_completion", make_row_tokenizer(tokenizer), 128
    ).rows
    assert pair.chosen == chosen
    assert tokenizer.decode(pair.rejected.labels[-2:]) == "<end_of_turn>\n"


def test_equal_or_fully_truncated_pairs_are_dropped(tokenizer: Any) -> None:
    row = {"prompt": "what does it do", "chosen": " it returns a list of files", "rejected": " it returns a list of names"}
    untruncated = tokenize_pairs([row], make_row_tokenizer(tokenizer), 128)
    common = next(
        n
        for n, (one, other) in enumerate(zip(untruncated.rows[0].chosen.input_ids, untruncated.rows[0].rejected.input_ids, strict=False))
        if one != other
    )
    assert (len(untruncated.rows), untruncated.truncated, untruncated.dropped) == (1, 0, 0)
    assert (
        tokenize_pairs([row], make_row_tokenizer(tokenizer), common + 1).dropped,
        tokenize_pairs([row], make_row_tokenizer(tokenizer), common + 1).truncated,
    ) == (0, 1)
    assert (
        tokenize_pairs([row], make_row_tokenizer(tokenizer), common).dropped,
        tokenize_pairs([row], make_row_tokenizer(tokenizer), 3).dropped,
    ) == (1, 1)
    assert tokenize_pairs([row | {"rejected": row["chosen"]}], make_row_tokenizer(tokenizer), 128).dropped == 1


def test_pair_becomes_one_good_and_one_bad_row(tokenizer: Any) -> None:
    unpaired = split_pairs(tokenize_pairs(pairs(2), make_row_tokenizer(tokenizer), 128)).rows
    paired = tokenize_pairs(pairs(2), make_row_tokenizer(tokenizer), 128).rows
    assert unpaired == [
        UnpairedExample(paired[0].chosen, True),
        UnpairedExample(paired[1].chosen, True),
        UnpairedExample(paired[0].rejected, False),
        UnpairedExample(paired[1].rejected, False),
    ]
    single = {"prompt": "a", "completion": " b", "label": False}
    assert [row.is_good for row in tokenize_unpaired([single], make_row_tokenizer(tokenizer), 128).rows] == [False]


def make_row(*prompt: int, answer: Sequence[int]) -> TokenizedExample:
    return TokenizedExample([*prompt, *answer], [IGNORE_INDEX] * len(prompt) + list(answer), str(prompt), len(prompt))


def test_mismatched_pair_joins_prompt_with_other_answer() -> None:
    mixed = mismatched_pair(make_row(2, 7, 8, answer=[9]), make_row(2, answer=[20, 21, 22]), max_length=5)
    assert (mixed.input_ids, mixed.labels) == ([2, 7, 8, 20, 21], [IGNORE_INDEX] * 3 + [20, 21])


def test_kl_example_uses_another_prompt() -> None:
    from jobs.llm.trainers.kto import add_kl_examples

    first, same, other = make_row(2, 7, answer=[9]), make_row(2, 7, answer=[10]), make_row(2, 8, answer=[11])
    rows = add_kl_examples([UnpairedExample(other, True), UnpairedExample(first, True), UnpairedExample(same, False)])
    assert [row.kl_fallback for row in rows] == [same, other, other]
    assert rows[1].choose_kl_example(rows[0]) == other  # the neighbor's
    assert rows[2].choose_kl_example(rows[1]) == other  # not the neighbor's, which has the same prompt
    assert rows[0].choose_kl_example(rows[0]) == same  # the only row of its batch


# --- fused head and metrics ---


def test_label_scores_match_trl(base: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    forward, ids = model.forward, torch.tensor([[2, 20, 30, 40, 50], [2, 21, 31, 0, 0]])
    labels = torch.tensor([[IGNORE_INDEX, IGNORE_INDEX, 30, 40, 50], [IGNORE_INDEX, IGNORE_INDEX, 31, IGNORE_INDEX, IGNORE_INDEX]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels, "use_cache": False, "fused_lm_head": True}
    fields = ("log_probs", "entropy", "mean_logits", "is_top1")
    add_fused_lm_head(model, outputs=fields)
    theirs = model(**inputs)
    theirs.log_probs.sum().backward()
    gradient = model.model.embed_tokens.weight.grad.clone()
    model.zero_grad()
    patch_fused_head(model, forward)
    ours = model(**inputs)
    ours.log_probs.sum().backward()
    for name in fields:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.model.embed_tokens.weight.grad, gradient, rtol=1e-3, atol=1e-4)
    plain = model(input_ids=ids).logits
    torch.testing.assert_close(plain[0, 1].log_softmax(-1)[30], ours.log_probs[0, 1])


@dataclass
class FakeTrainer:
    """A trainer for which the loss of a batch is the mean of its rows."""

    gathered: dict[str, list[float]] = field(default_factory=dict)
    rows_that_fit: int = 100
    model: Any = None

    def prediction_step(self, model: Any, batch: dict[str, Any], prediction_loss_only: bool) -> tuple[float, None, None]:
        assert not model.training
        rows = batch["rows"]
        if len(rows) > self.rows_that_fit:
            raise MemoryError
        self.gathered["eval_rewards/chosen"] = [sum(rows) / len(rows)]
        if any(row > 2 for row in rows):
            self.gathered["large"] = [1.0]
        return sum(rows) / len(rows), None, None


def evaluate_means(trainer: FakeTrainer, batch_size: int, check_stop: Callable[[], None] = lambda: None) -> dict[str, float]:
    import torch

    trainer.model = torch.nn.Dropout()
    metrics = evaluate_trainer_metrics(
        trainer, trainer.gathered, [1.0, 2.0, 6.0], lambda rows: {"rows": rows}, batch_size=batch_size, check_stop=check_stop
    )
    assert trainer.model.training
    return metrics


@pytest.mark.parametrize(("batch_size", "rows_that_fit"), [(1, 100), (2, 100), (3, 100), (3, 1), (3, 2)])
def test_metrics_do_not_depend_on_batch_size_or_oom(batch_size: int, rows_that_fit: int) -> None:
    trainer = FakeTrainer(rows_that_fit=rows_that_fit)
    metrics = evaluate_means(trainer, batch_size)
    assert (metrics["loss"], metrics["rewards/chosen"], metrics["large"]) == (pytest.approx(3), pytest.approx(3), 1.0)
    assert trainer.gathered == {}


def test_oom_with_single_row_fails() -> None:
    with pytest.raises(JobFailed, match="a single held-out row"):
        evaluate_means(FakeTrainer(rows_that_fit=0), batch_size=2)


def test_interrupted_evaluation_leaves_no_metrics_behind() -> None:
    calls: list[int] = []

    def check_stop() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise EvaluationInterrupted

    trainer = FakeTrainer()
    with pytest.raises(EvaluationInterrupted):
        evaluate_means(trainer, 1, check_stop)
    assert trainer.gathered == {}


def test_other_errors_are_not_hidden() -> None:
    def fail(_: Sequence[int]) -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        run_in_batches([1, 2], 2, fail, lambda: None)


def test_accuracy_at_initialization_is_none() -> None:
    zero = {"rewards/chosen": 0.0, "rewards/rejected": 0.0, "rewards/margins": 0.0, "rewards/accuracies": 0.0}
    assert null_accuracy_at_init(EvalMetrics(values={**zero})).values["rewards/accuracies"] is None
    assert null_accuracy_at_init(EvalMetrics(values={**zero, "rewards/chosen": 0.1})).values["rewards/accuracies"] == 0.0

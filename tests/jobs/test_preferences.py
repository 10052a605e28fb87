"""The trainers that learn from judged answers: they learn, they are measured, and they go on as if never interrupted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from jobs.data.pairs import JudgedRow, render_judged, render_pairs
from jobs.data.render import NO_LABEL, TokenRow, render
from jobs.errors import JobFailed
from jobs.trained import TrainedModel
from jobs.trainers.course import EvaluationInterrupted
from jobs.trainers.dpo import unless_the_base
from jobs.trainers.kto import advice_on_balance, answered_otherwise
from jobs.trainers.preferences import in_batches, library_means, score_labels
from schema.job import EvalMetrics
from schema.spec import JobSpec
from tests.jobs.conftest import WORDS, Trained, a_spec
from tests.jobs.test_continuation import Story, weights
from tests.jobs.test_healing import Memory, batches, short_of_memory  # noqa: F401  # the last is a fixture

Train = Callable[..., Trained]

LISTS, STRINGS = "it returns a list", "string object call"


def pairs(count: int, first: int = 0) -> list[dict[str, Any]]:
    """The chosen answer speaks of lists, the rejected one of strings."""
    return [
        {
            "prompt": [{"role": "user", "content": f"what does {WORDS[n % 13]} do {n}"}],
            "chosen": [{"role": "assistant", "content": LISTS + f" {WORDS[n % 7]}" * (n % 3)}],
            "rejected": [{"role": "assistant", "content": STRINGS + f" {WORDS[n % 5]}" * (n % 4)}],
        }
        for n in range(first, first + count)
    ]


def judged(count: int, first: int = 0) -> list[dict[str, Any]]:
    """The same, one by one: all good ones, and then all bad ones."""
    rows = pairs(count, first)
    good = {n: n < (count + 1) // 2 for n in range(count)}
    return [
        {"prompt": row["prompt"], "completion": row["chosen" if good[n] else "rejected"], "label": good[n]} for n, row in enumerate(rows)
    ]


# --- they learn, and go on exactly ---

KNOBS: dict[str, Any] = {"batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": -1, "epochs": 2, "logging_steps": 2}
KNOBS |= {"learning_rate": 1e-2, "warmup_ratio": 0.0, "lr_scheduler_type": "constant", "beta": 0.2}
STEPS = 6  # of both epochs: 11 rows, four to a step, so that every epoch ends with a batch of one row


@dataclass(frozen=True)
class Case:
    """A way to learn from judged answers."""

    trainer_type: str
    method: str = "LoRA"
    knobs: dict[str, Any] = field(default_factory=dict)
    better: str = "rewards/margins"  # what is higher afterwards on held-out rows

    def spec(self, store: Path) -> JobSpec:
        of_pairs = self.trainer_type != "kto"
        rows = pairs if of_pairs else judged
        knobs = KNOBS | ({"lora_dropout": 0.3} if self.method != "Full" else {"learning_rate": 2e-3}) | self.knobs
        if self.trainer_type == "reward":
            del knobs["beta"]
        return a_spec(
            store,
            train=rows(11),
            held_out=rows(5, first=100),
            dataset_type="preference" if of_pairs else "unpaired_preference",
            trainer_type=self.trainer_type,
            method=self.method,
            hyperparameters=knobs,
            eval_config={"eval_strategy": "steps", "eval_steps": 3},
        )


CASES = {
    "dpo-LoRA": Case("dpo"),
    "dpo-Full": Case("dpo", "Full"),
    "dpo-QLoRA": Case("dpo", "QLoRA", {"loss_type": "robust", "label_smoothing": 0.1}),
    "orpo-LoRA": Case("orpo", better="logps/chosen"),
    "orpo-Full": Case("orpo", "Full", better="logps/chosen"),
    "kto-LoRA": Case("kto"),
    "kto-Full": Case("kto", "Full", {"desirable_weight": 1.2}),
    "reward-LoRA": Case("reward", knobs={"center_rewards_coefficient": 0.01}),
    "reward-Full": Case("reward", "Full"),
}


@dataclass(frozen=True)
class Unbroken:
    """A job that nothing interrupted."""

    case: Case
    story: Story
    model: TrainedModel


@pytest.fixture(scope="module", params=CASES)
def unbroken(request: pytest.FixtureRequest, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    case = CASES[request.param]
    story = Story(case.spec(store), tmp_path_factory.mktemp("unbroken"))
    return Unbroken(case, story, story.finish())


def is_timed(name: str) -> bool:
    return name.endswith(("per_second", "_bytes", "_percent", "_celsius", "_watts"))


def drawn(story: Story) -> dict[int, dict[str, float | None]]:
    """All figures of the curve, but those of the machine."""
    points = [point for listener in story.heard for point in listener.points]
    assert len({point.step for point in points}) == len(points)
    return {point.step: {name: value for name, value in point.values.items() if not is_timed(name)} for point in points}


def measured(story: Story) -> dict[tuple[str, int], EvalMetrics]:
    told = [event for listener in story.heard for event in listener.evaluations]
    return {(event.when, event.step): event.metrics.model_copy(update={"eval_runtime": None}) for event in told}


def test_it_learns_what_is_preferred(unbroken: Unbroken) -> None:
    curve, before = drawn(unbroken.story), unbroken.model.base_metrics
    after = unbroken.model.metrics
    assert before is not None
    assert after is not None
    assert curve.keys() == {2, 4, 6}
    losses, norms = [point["loss"] or 0.0 for point in curve.values()], [point["grad_norm"] or 0.0 for point in curve.values()]
    assert min(norms) > 0
    assert losses[-1] < losses[0]
    assert (after.eval_loss or 0) < (before.eval_loss or 0)
    assert (after.values[unbroken.case.better] or 0) > (before.values[unbroken.case.better] or 0) + 0.2
    if unbroken.case.trainer_type != "kto":
        assert (after.values["rewards/accuracies"] or 0) >= 0.8
    assert (after.eval_rows, unbroken.model.train_rows) == (5, 11)


def test_interrupted_between_windows_and_inside_one_at_an_epoch_s_end_it_is_the_unbroken_one(
    unbroken: Unbroken, store: Path, tmp_path: Path
) -> None:
    story = Story(unbroken.case.spec(store), tmp_path)
    assert story.attempt(stop_after=2) == "pause"
    assert story.attempt(stop_after=3, checks=1) == "pause"  # between two batches of held-out rows
    model = story.finish()
    assert drawn(story) == drawn(unbroken.story)
    assert measured(story) == measured(unbroken.story)
    assert {step for when, step in measured(story) if when == "during"} == {3, 6}
    ours, theirs = weights(model), weights(unbroken.model)
    assert ours.keys() == theirs.keys()
    assert [name for name, part in ours.items() if not part.equal(theirs[name])] == []
    assert model.train_tokens == unbroken.model.train_tokens


# --- each in its own way ---


def job(trainer_type: str, form: str = "preference", **changes: Any) -> dict[str, Any]:
    rows = {"preference": pairs, "unpaired_preference": judged}.get(form, pairs)
    return {"trainer_type": trainer_type, "dataset_type": form, "train": rows(12), "held_out": rows(3, first=100)} | changes


def test_the_base_that_is_compared_with_has_the_rows_of_the_turn_tokens_that_it_had(train: Train) -> None:
    trained = train(spec=job("dpo"), max_steps=3, learning_rate=1e-2)
    moved = [name for name in trained.weights() if "token_adapter" in name or "trainable_tokens" in name]
    assert moved
    before, after = trained.model.base_metrics, trained.model.metrics
    assert before is not None
    assert after is not None
    assert (before.values["rewards/chosen"], before.values["rewards/accuracies"]) == (0.0, None)
    # The reward is beta times what the chosen answers have gained on the base.
    gained = (after.values["logps/chosen"] or 0) - (before.values["logps/chosen"] or 0)
    assert after.values["rewards/chosen"] == pytest.approx(0.1 * gained, rel=1e-3)


def test_recomputed_activations_are_the_same_training(train: Train) -> None:
    kept = train("kept", spec=job("dpo"), max_steps=2, gradient_checkpointing=False)
    again = train("again", spec=job("dpo"), max_steps=2, gradient_checkpointing=True)
    assert [point.values["loss"] for point in again.record.points] == pytest.approx([point.values["loss"] for point in kept.record.points])
    assert all(part.equal(again.weights()[name]) for name, part in kept.weights().items())


def test_pairs_are_good_and_bad_rows_to_kto(train: Train) -> None:
    trained = train(spec=job("kto"), max_steps=2, batch_size=4)
    assert trained.model.train_rows == 24
    assert "unbalanced" not in trained.record.warnings


def test_a_single_row_that_fits_in_memory_is_compared_with_another_all_the_same(
    store: Path,
    tmp_path: Path,
    short_of_memory: Callable[..., Memory],  # noqa: F811
) -> None:
    story = Story(a_spec(store, **job("kto", "unpaired_preference"), hyperparameters={"max_steps": 2, "logging_steps": 1}), tmp_path)
    short_of_memory(story, 1)
    story.finish()
    assert batches(story) == ["1"]
    assert drawn(story).keys() == {1, 2}


def test_a_reward_model_is_loaded_by_peft_alone_and_prefers_the_same(train: Train, base: Path, tokenizer: Any) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    trained = train(spec=job("reward"), max_steps=8, learning_rate=1e-2)
    assert trained.weights()["base_model.model.score.weight"].shape == (1, 64)
    fresh = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    fresh.config.pad_token_id = tokenizer.pad_token_id
    model = PeftModel.from_pretrained(fresh, trained.model.folder).eval()
    (pair,) = render_pairs(pairs(1, first=200), tokenizer, 128).rows
    with torch.no_grad():
        chosen, rejected = (float(model(input_ids=torch.tensor([row.input_ids])).logits) for row in (pair.chosen, pair.rejected))
    assert chosen > rejected + 0.5
    assert trained.model.metrics is not None
    assert (trained.model.metrics.perplexity, trained.model.metrics.notes["perplexity"]) == (None, "a reward model gives a score, not text")


# --- what is refused or told ---


@pytest.mark.parametrize(
    ("trainer_type", "form"), [("dpo", "unpaired_preference"), ("orpo", "messages"), ("kto", "text"), ("reward", "prompt")]
)
def test_rows_of_another_form_are_refused(train: Train, trainer_type: str, form: str) -> None:
    with pytest.raises(JobFailed) as refused:
        train(spec=job(trainer_type, form))
    assert refused.value.failure.code == "invalid_data"
    assert form in refused.value.failure.message
    assert "preference" in refused.value.failure.message


@pytest.mark.parametrize("trainer_type", ["dpo", "kto"])
def test_pairs_of_which_nothing_is_left_are_refused(train: Train, trainer_type: str) -> None:
    with pytest.raises(JobFailed) as refused:
        train(spec=job(trainer_type), max_seq_length=8)
    assert refused.value.failure.code == "invalid_data"
    assert "max_seq_length" in refused.value.failure.hint


def test_rows_that_are_cut_or_left_out_are_told(train: Train, tokenizer: Any) -> None:
    lengths = [len(row.input_ids) for pair in render_pairs(pairs(12), tokenizer, 1000).rows for row in (pair.chosen, pair.rejected)]
    trained = train(
        spec=job("reward", held_out=[], train=[*pairs(12), pairs(1)[0] | {"rejected": pairs(1)[0]["chosen"]}]),
        max_seq_length=max(lengths) - 1,
    )
    assert "rows of train are longer" in trained.record.warnings["rows_cut"]
    assert trained.record.warnings["rows_dropped"].startswith("1 rows of train")
    assert trained.model.train_rows == 12


@pytest.mark.parametrize(
    ("good", "bad", "weights_given", "says"),
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
def test_rows_that_weigh_too_differently_are_told_with_what_to_do(
    good: int, bad: int, weights_given: tuple[float, float], says: str | None
) -> None:
    advice = advice_on_balance(good, bad, *weights_given)
    assert advice is None if says is None else says in (advice or "")


# --- rows ---


def test_an_answer_is_read_as_it_is_by_the_other_trainers(tokenizer: Any) -> None:
    (row,) = pairs(1)
    (pair,) = render_pairs([row], tokenizer, 128).rows
    (chosen,) = render(iter([{"messages": row["prompt"] + row["chosen"]}]), "messages", tokenizer, 128).rows
    assert pair.chosen == chosen
    texts = {"prompt": "what does it do?", "chosen": " it returns", "rejected": " it calls"}
    (pair,) = render_pairs([texts], tokenizer, 128).rows
    (chosen,) = render(iter([{"prompt": texts["prompt"], "completion": texts["chosen"]}]), "prompt_completion", tokenizer, 128).rows
    assert pair.chosen == chosen
    assert pair.rejected.labels[-1] == tokenizer.eos_token_id


def test_pairs_that_are_the_same_or_have_no_answer_left_teach_nothing(tokenizer: Any) -> None:
    row = {"prompt": "what does it do", "chosen": " it returns a list of files", "rejected": " it returns a list of names"}
    whole = render_pairs([row], tokenizer, 128)
    common = next(
        n
        for n, (one, other) in enumerate(zip(whole.rows[0].chosen.input_ids, whole.rows[0].rejected.input_ids, strict=False))
        if one != other
    )
    assert (len(whole.rows), whole.cut, whole.dropped) == (1, 0, 0)
    assert (render_pairs([row], tokenizer, common + 1).dropped, render_pairs([row], tokenizer, common + 1).cut) == (0, 1)
    assert (render_pairs([row], tokenizer, common).dropped, render_pairs([row], tokenizer, 3).dropped) == (1, 1)
    assert render_pairs([row | {"rejected": row["chosen"]}], tokenizer, 128).dropped == 1


def test_a_pair_is_a_good_row_and_a_bad_one(tokenizer: Any) -> None:
    found = render_judged(pairs(2), "preference", tokenizer, 128).rows
    both = render_pairs(pairs(2), tokenizer, 128).rows
    assert found == [
        JudgedRow(both[0].chosen, True),
        JudgedRow(both[1].chosen, True),
        JudgedRow(both[0].rejected, False),
        JudgedRow(both[1].rejected, False),
    ]
    alone = {"prompt": "a", "completion": " b", "label": False}
    assert [row.is_good for row in render_judged([alone], "unpaired_preference", tokenizer, 128).rows] == [False]


def a_row(*prompt: int, answer: Sequence[int]) -> TokenRow:
    return TokenRow([*prompt, *answer], [NO_LABEL] * len(prompt) + list(answer), str(prompt), len(prompt))


def test_a_prompt_is_answered_with_another_row_s_answer() -> None:
    mixed = answered_otherwise(a_row(2, 7, 8, answer=[9]), a_row(2, answer=[20, 21, 22]), longest=5)
    assert (mixed.input_ids, mixed.labels) == ([2, 7, 8, 20, 21], [NO_LABEL] * 3 + [20, 21])


def test_a_row_is_compared_with_an_answer_to_another_prompt() -> None:
    from jobs.trainers.kto import _placed

    first, same, other = a_row(2, 7, answer=[9]), a_row(2, 7, answer=[10]), a_row(2, 8, answer=[11])
    placed = _placed([JudgedRow(other, True), JudgedRow(first, True), JudgedRow(same, False)])
    assert [row.other for row in placed] == [same, other, other]
    assert placed[1].compared_with(placed[0]) == other  # the neighbour's
    assert placed[2].compared_with(placed[1]) == other  # not the neighbour's, which answers the same
    assert placed[0].compared_with(placed[0]) == same  # alone in a batch


# --- heads and means ---


def test_labelled_positions_are_scored_as_the_library_scores_them(base: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    forward, ids = model.forward, torch.tensor([[2, 20, 30, 40, 50], [2, 21, 31, 0, 0]])
    labels = torch.tensor([[NO_LABEL, NO_LABEL, 30, 40, 50], [NO_LABEL, NO_LABEL, 31, NO_LABEL, NO_LABEL]])
    asked = {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels, "use_cache": False, "fused_lm_head": True}
    fields = ("log_probs", "entropy", "mean_logits", "is_top1")
    add_fused_lm_head(model, outputs=fields)
    theirs = model(**asked)
    theirs.log_probs.sum().backward()
    gradient = model.model.embed_tokens.weight.grad.clone()
    model.zero_grad()
    score_labels(model, forward)
    ours = model(**asked)
    ours.log_probs.sum().backward()
    for name in fields:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.model.embed_tokens.weight.grad, gradient, rtol=1e-3, atol=1e-4)
    plain = model(input_ids=ids).logits
    torch.testing.assert_close(plain[0, 1].log_softmax(-1)[30], ours.log_probs[0, 1])


@dataclass
class FakeTrainer:
    """The library's, as far as it is asked: the loss of a batch is the mean of its rows."""

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


def means_of(trainer: FakeTrainer, size: int, pulse: Callable[[], None] = lambda: None) -> dict[str, float]:
    import torch

    trainer.model = torch.nn.Dropout()
    found = library_means(trainer, trainer.gathered, [1.0, 2.0, 6.0], lambda rows: {"rows": rows}, size=size, pulse=pulse)
    assert trainer.model.training
    return found


@pytest.mark.parametrize(("size", "rows_that_fit"), [(1, 100), (2, 100), (3, 100), (3, 1), (3, 2)])
def test_each_row_counts_the_same_in_any_batches_and_after_a_lack_of_memory(size: int, rows_that_fit: int) -> None:
    trainer = FakeTrainer(rows_that_fit=rows_that_fit)
    found = means_of(trainer, size)
    assert (found["loss"], found["rewards/chosen"], found["large"]) == (pytest.approx(3), pytest.approx(3), 1.0)
    assert trainer.gathered == {}


def test_a_row_that_does_not_fit_alone_is_refused() -> None:
    with pytest.raises(JobFailed, match="a single held-out row"):
        means_of(FakeTrainer(rows_that_fit=0), size=2)


def test_an_interrupted_measurement_leaves_nothing_behind() -> None:
    calls: list[int] = []

    def pulse() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise EvaluationInterrupted

    trainer = FakeTrainer()
    with pytest.raises(EvaluationInterrupted):
        means_of(trainer, 1, pulse)
    assert trainer.gathered == {}


def test_an_error_that_is_no_lack_of_memory_is_not_hidden() -> None:
    def work(_: Sequence[int]) -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        in_batches([1, 2], 2, work, lambda: None)


def test_a_model_that_is_still_the_base_is_not_called_wrong() -> None:
    zero = {"rewards/chosen": 0.0, "rewards/rejected": 0.0, "rewards/margins": 0.0, "rewards/accuracies": 0.0}
    assert unless_the_base(EvalMetrics(values={**zero})).values["rewards/accuracies"] is None
    assert unless_the_base(EvalMetrics(values={**zero, "rewards/chosen": 0.1})).values["rewards/accuracies"] == 0.0

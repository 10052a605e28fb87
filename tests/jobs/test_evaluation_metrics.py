"""Text metrics: correct values, and None with a reason where a metric is undefined."""

import math
from collections.abc import Sequence
from random import Random

import pytest

from jobs.llm.evaluation.text_metrics import METRICS, task_metrics

CAT = "the cat is on the mat"


def values(answers: Sequence[str], references: Sequence[str]) -> dict[str, float | None]:
    return task_metrics(answers, references)[0]


def test_perfect_answer_scores_one() -> None:
    metrics, notes = task_metrics([CAT, "a b c d"], [CAT, "a b c d"])
    assert {name: value for name, value in metrics.items() if value is not None} == pytest.approx(
        dict.fromkeys(["exact_match", "bleu", "chrf", "rouge_1", "rouge_2", "rouge_l"], 1.0)
    )
    assert notes.keys() == {"accuracy_labels", "f1_macro"}


def test_answer_without_overlap_scores_zero() -> None:
    metrics = values(["zzz qqq"], [CAT])
    assert [metrics[name] for name in ("exact_match", "bleu", "chrf", "rouge_1", "rouge_2", "rouge_l")] == [0.0] * 6


@pytest.mark.parametrize(("answer", "matches"), [(CAT, 1), (f"  {CAT}\n", 1), (CAT.replace(" ", "  \n"), 1), (CAT.upper(), 0), ("", 0)])
def test_exact_match_ignores_only_whitespace(answer: str, matches: float) -> None:
    assert values([answer], [CAT])["exact_match"] == matches


def test_rouge_is_mean_f1_over_rows() -> None:
    # in the first row 5 of 6 words and 3 of 5 pairs are in common, and the longest common sequence has 5 words
    metrics = values(["the cat sat on the mat", CAT], [CAT, CAT])
    assert metrics["rouge_1"] == pytest.approx((5 / 6 + 1) / 2)
    assert metrics["rouge_2"] == pytest.approx((3 / 5 + 1) / 2)
    assert metrics["rouge_l"] == pytest.approx((5 / 6 + 1) / 2)


def test_rouge_combines_precision_and_recall() -> None:
    # precision 2/2, recall 2/6: F = 2 · 1 · 1/3 / (4/3); the order is wrong, so the longest common sequence has one word
    metrics = values(["mat cat"], [CAT])
    assert metrics["rouge_1"] == pytest.approx(0.5)
    assert metrics["rouge_l"] == pytest.approx(2 * (1 / 2) * (1 / 6) / (1 / 2 + 1 / 6))


def test_rouge_matches_rouge_score_package() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    random = Random(5)
    words = [*CAT.split(), "Don't", "x-y", "A_B", "3.5%", "!"]
    answers, references = ([" ".join(random.choices(words, k=random.randint(0, 30))) for _ in range(40)] for _ in range(2))
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    theirs = [scorer.score(reference, answer) for answer, reference in zip(answers, references, strict=True)]
    metrics = values(answers, references)
    for ours, name in {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}.items():
        assert metrics[ours] == pytest.approx(sum(row[name].fmeasure for row in theirs) / 40)


def test_bleu_is_computed_over_whole_corpus() -> None:
    # precision of 1 to 4 words: 7/7, 5/5, 3/3, 1/1, but the answers have 7 words instead of 12
    metrics = values(["the cat is", "a b c d"], [CAT, "a b c d e f"])
    assert metrics["bleu"] == pytest.approx(math.exp(1 - 12 / 7))
    # precision 7/8, 5/6, 3/4 and 1/2, and the lengths are equal
    metrics = values(["the cat is on", "x b c d"], ["the cat is on", "a b c d"])
    assert metrics["bleu"] == pytest.approx((7 / 8 * 5 / 6 * 3 / 4 * 1 / 2) ** (1 / 4))


def test_chrf_counts_characters() -> None:
    # "ab" of "abc": sequences of one and two characters, precision 1 and 1, recall 2/3 and 1/2; beta is 2: recall weighs 4 times
    recall = (2 / 3 + 1 / 2) / 2
    assert values(["ab"], ["abc"])["chrf"] == pytest.approx(5 * 1 * recall / (4 * 1 + recall))


@pytest.mark.parametrize("text", ["猫坐在垫子上面", "ねこがマットのうえにいる", "แมวนั่งบนเสื่อ"])
def test_scripts_without_spaces_are_scored_per_character(text: str) -> None:
    perfect, half = values([text], [text]), values([text[:5] + "xxxx"], [text])
    for name in ("bleu", "rouge_1", "rouge_2", "rouge_l"):
        assert perfect[name] == pytest.approx(1)
        assert 0 < (half[name] or 0) < 1, name


@pytest.mark.parametrize("text", ["Кот сидит на ковре", "बिल्ली चटाई पर है", "η γάτα είναι εδώ", "قطة على حصير هنا"])
def test_rouge_handles_all_scripts(text: str) -> None:
    assert values([text], [text])["rouge_l"] == 1
    assert values([text.split()[0]], [text])["rouge_1"] == pytest.approx(2 * (1 / 4) / (1 + 1 / 4))


# --- labels ---

REFERENCES = ["positive", "negative", "negative", "neutral", "positive", "negative"]


def test_text_labels_are_scored_as_labels() -> None:
    """Regression: they were 0 because the metric expected numbers and its error was scored as 0."""
    metrics, notes = task_metrics(["positive", "negative", "positive", "neutral", "negative", "negative"], REFERENCES)
    assert metrics["accuracy_labels"] == pytest.approx(4 / 6)
    # positive: 1 right, 2 answered, 2 expected; negative: 2 right, 3 answered, 3 expected; neutral: 1, 1, 1
    assert metrics["f1_macro"] == pytest.approx((2 * 1 / 4 + 2 * 2 / 6 + 2 * 1 / 2) / 3)
    assert "f1_macro" not in notes


def test_label_case_and_punctuation_are_ignored() -> None:
    metrics = values(["Positive.", " NEGATIVE", '"negative"', "Neutral!", "positive\n", "negative"], REFERENCES)
    assert metrics["accuracy_labels"] == metrics["f1_macro"] == 1
    assert metrics["exact_match"] == pytest.approx(2 / 6)


def test_non_label_answer_counts_as_wrong() -> None:
    metrics = values(["I think it is positive", "negative", "negative", "neutral", "positive", "negative"], REFERENCES)
    assert metrics["accuracy_labels"] == pytest.approx(5 / 6)
    assert metrics["f1_macro"] == pytest.approx((2 * 1 / (1 + 2) + 1 + 1) / 3)


def test_labels_may_be_punctuation() -> None:
    assert values(["?", "!", "?", "?"], ["?", "!", "!", "?"])["accuracy_labels"] == pytest.approx(3 / 4)


@pytest.mark.parametrize(
    ("references", "reason"),
    [
        (["yes", "no", "maybe", "yes"], "3 different ones in 4 rows"),
        ([f"label {n % 21}" for n in range(100)], "21 different ones in 100 rows"),
        (["one two three four five six", "a"] * 4, "one has 6 words"),
    ],
)
def test_free_text_is_not_treated_as_labels(references: list[str], reason: str) -> None:
    metrics, notes = task_metrics(references, references)
    assert metrics["f1_macro"] is None
    assert metrics["accuracy_labels"] is None
    assert reason in notes["f1_macro"]


# --- undefined metrics ---


@pytest.mark.parametrize(
    ("reference", "name", "reason"),
    [
        ("yes", "bleu", "no reference is that long"),
        ("yes", "rouge_2", "no reference has two words"),
        ("!?", "rouge_1", "no reference has a word"),
        ("!?", "rouge_l", "no reference has a word"),
        (" ", "chrf", "every reference is empty"),
    ],
)
def test_undefined_metric_is_none_with_reason(reference: str, name: str, reason: str) -> None:
    metrics, notes = task_metrics([reference], [reference])
    assert metrics[name] is None
    assert reason in notes[name]
    assert metrics["exact_match"] == 1


@pytest.mark.parametrize("error", [ValueError("bad row"), ZeroDivisionError("bad row"), KeyError("bad row"), TypeError("bad row")])
def test_failing_metric_is_none_and_others_are_computed(error: Exception) -> None:
    def broken(answers: Sequence[str], references: Sequence[str]) -> float:
        raise error

    metrics, notes = task_metrics(["a"], ["a"], {"broken": broken, **METRICS})
    assert metrics["broken"] is None
    assert type(error).__name__ in notes["broken"]
    assert "bad row" in notes["broken"]
    assert metrics["exact_match"] == metrics["chrf"] == 1


def test_no_rows_give_none_with_reason() -> None:
    metrics, notes = task_metrics([], [])
    assert metrics == dict.fromkeys(METRICS)
    assert notes == dict.fromkeys(METRICS, "no held-out row has a prompt and an answer to compare with")


def test_answer_and_reference_counts_must_match() -> None:
    with pytest.raises(ValueError, match="2 answers for 1 references"):
        task_metrics(["a", "b"], ["a"])


def test_metrics_are_between_zero_and_one_or_noted() -> None:
    answers, references = ["the cat", "", "yes", "\ud800 \x00", "猫"], [CAT, "a b c d", "yes", "?", "no"]
    metrics, notes = task_metrics(answers, references)
    assert all(value is None or 0 <= value <= 1 for value in metrics.values())
    assert {name for name, value in metrics.items() if value is None} == notes.keys()

"""The promotion gate: which checks pass, and the reason of each that fails."""

import math
from typing import Any

import pytest

from jobs.runtime.promotion_gate import evaluate_gate
from schema.job import EvalMetrics, Gate, GateCheck
from schema.training.evaluation import Threshold

BASE = EvalMetrics(
    eval_loss=2.0,
    perplexity=7.4,
    content_perplexity=4.0,
    accuracy=0.5,
    eval_runtime=4.0,
    values={"exact_match": 0.0, "reward": -2.0, "rouge_l": 0.4, "bleu": None},
    notes={"bleu": "the metric failed: KeyError: x"},
)
TRAINED = EvalMetrics(
    eval_loss=1.5,
    perplexity=4.5,
    content_perplexity=3.0,
    accuracy=0.6,
    eval_runtime=2.0,
    eval_rows=5,
    values={"exact_match": 0.25, "reward": -1.0, "rouge_l": 0.5, "f1_macro": None, "lm_eval/tiny/acc": 0.75, "lm_eval/mmlu": None},
    notes={"f1_macro": "the references are not labels", "lm_eval/mmlu": "it is not installed"},
)


def check(metrics: EvalMetrics | None = TRAINED, base: EvalMetrics | None = BASE, **threshold: Any) -> GateCheck:
    gate = evaluate_gate([Threshold(**threshold)], metrics, base)
    assert gate.passed == gate.checks[0].passed
    assert gate.passed == (gate.checks[0].reason == "")
    return gate.checks[0]


@pytest.mark.parametrize(
    ("threshold", "passes"),
    [
        ({"metric": "eval_loss", "at_most": 1.5}, True),
        ({"metric": "eval_loss", "at_most": 1.49}, False),
        ({"metric": "accuracy", "at_least": 0.6}, True),
        ({"metric": "accuracy", "at_least": 0.61}, False),
        ({"metric": "accuracy", "at_least": 0.5, "at_most": 0.7}, True),
        ({"metric": "accuracy", "at_least": 0.5, "at_most": 0.55}, False),
        ({"metric": "accuracy", "at_least": 0.65, "at_most": 0.7}, False),
        ({"metric": "eval_runtime", "at_most": 10}, True),
        ({"metric": "eval_rows", "at_least": 5}, True),
        ({"metric": "rouge_l", "at_least": 0.5}, True),
        ({"metric": "reward", "at_least": -1.5}, True),
        ({"metric": "lm_eval/tiny/acc", "at_least": 0.8}, False),
        ({"metric": "perplexity", "at_most": 0.9, "relative_to_base": True}, True),
        ({"metric": "perplexity", "at_most": 0.6, "relative_to_base": True}, False),
        ({"metric": "content_perplexity", "at_most": 0.8, "relative_to_base": True}, True),
        ({"metric": "eval_runtime", "at_most": 0.5, "relative_to_base": True}, True),
        ({"metric": "rouge_l", "at_least": 1.25, "relative_to_base": True}, True),
        ({"metric": "rouge_l", "at_least": 1.26, "relative_to_base": True}, False),
        ({"metric": "exact_match", "at_least": 1.5, "relative_to_base": True}, True),  # more than a base of 0
    ],
)
def test_bound_passes_or_fails(threshold: dict[str, Any], passes: bool) -> None:
    assert check(**threshold).passed is passes


@pytest.mark.parametrize(
    ("threshold", "reason"),
    [
        ({"metric": "eval_loss", "at_most": 1.0}, "1.5 is above 1"),
        ({"metric": "accuracy", "at_least": 0.9}, "0.6 is below 0.9"),
        ({"metric": "perplexity", "at_most": 0.5, "relative_to_base": True}, "4.5 is above 3.7, 0.5 of the base's 7.4"),
        ({"metric": "rouge_l", "at_least": 2, "relative_to_base": True}, "0.5 is below 0.8, 2 of the base's 0.4"),
        ({"metric": "f1_macro", "at_least": 0.1}, "f1_macro of the trained model was not measured: the references are not labels"),
        ({"metric": "eval_tokens", "at_least": 1}, "eval_tokens of the trained model was not measured"),
        ({"metric": "lm_eval/mmlu/acc", "at_least": 0.1}, "lm_eval/mmlu/acc of the trained model was not measured: it is not installed"),
        (
            {"metric": "f1", "at_least": 0.1},
            "the trained model has no metric 'f1'; known: accuracy, content_perplexity, eval_loss, eval_rows, eval_runtime, "
            "exact_match, lm_eval/tiny/acc, perplexity, reward, rouge_l",
        ),
        (
            {"metric": "lm_eval/tiny/acc", "at_least": 1, "relative_to_base": True},
            "the base model has no metric 'lm_eval/tiny/acc'; known: accuracy, content_perplexity, eval_loss, eval_runtime, "
            "exact_match, perplexity, reward, rouge_l",
        ),
        (
            {"metric": "reward", "at_least": 0.9, "relative_to_base": True},
            "the base model has -2, and a factor of a negative number has no meaning; set an absolute bound",
        ),
    ],
)
def test_failed_check_gives_reason(threshold: dict[str, Any], reason: str) -> None:
    assert check(**threshold).reason == reason


def test_metric_missing_on_base_fails_relative_bound() -> None:
    trained = TRAINED.model_copy(update={"values": {"bleu": 0.9}})
    result = check(trained, metric="bleu", at_least=1.0, relative_to_base=True)
    assert result.reason == "bleu of the base model was not measured: the metric failed: KeyError: x"
    assert (result.value, result.base, result.at_least) == (0.9, None, None)
    assert check(trained, metric="bleu", at_least=0.5).passed


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("bound", [{"at_least": -1e9}, {"at_most": 1e9}, {"at_least": 0.0, "relative_to_base": True}])
def test_non_finite_metric_fails(value: float, bound: dict[str, Any]) -> None:
    metrics = EvalMetrics().model_copy(update={"eval_loss": value, "values": {"reward": value}})  # as evaluations add theirs
    for name in ("eval_loss", "reward"):
        result = check(metrics, metric=name, **bound)
        assert result.reason == f"{name} of the trained model is not a finite number"
        assert result.value is None  # NaN is not JSON
    assert not check(base=metrics, metric="eval_loss", at_most=1.0, relative_to_base=True).passed


def test_zero_is_a_valid_metric_value() -> None:
    zero = EvalMetrics(eval_loss=0.0, values={"exact_match": 0.0})
    assert check(zero, metric="eval_loss", at_most=0.1).value == 0.0
    assert check(zero, metric="exact_match", at_least=0.0).passed


def test_relative_bound_on_zero_base_requires_more_than_zero() -> None:
    zero = EvalMetrics(values={"exact_match": 0.0})
    assert check(zero, metric="exact_match", at_least=1.5, relative_to_base=True).reason == "0 is not better than the base's 0"
    assert check(zero, metric="exact_match", at_least=1.0, relative_to_base=True).passed


def test_missing_metrics_fail_the_gate() -> None:
    assert check(None, metric="perplexity", at_most=9).reason == "the trained model was not evaluated; a gate needs held-out rows"
    relative = check(base=None, metric="perplexity", at_most=0.9, relative_to_base=True)
    assert relative.reason == "the base model was not evaluated; a gate needs held-out rows"
    assert check(base=None, metric="perplexity", at_most=9).passed


def test_check_shows_absolute_bound_and_base_value() -> None:
    result = check(metric="perplexity", at_most=0.5, at_least=0.25, relative_to_base=True, base=EvalMetrics(perplexity=10.0))
    assert result == GateCheck(metric="perplexity", value=4.5, at_most=5.0, at_least=2.5, base=10.0, passed=True)
    assert check(metric="perplexity", at_most=9) == GateCheck(metric="perplexity", value=4.5, at_most=9, passed=True)


def test_one_failed_check_fails_the_gate() -> None:
    good, bad = (Threshold.model_validate({"metric": "eval_loss", "at_most": bound}) for bound in (2, 1))
    assert [result.passed for result in evaluate_gate([good, bad, good], TRAINED, BASE).checks] == [True, False, True]
    assert not evaluate_gate([good, bad, good], TRAINED, BASE).passed
    assert evaluate_gate([good, good], TRAINED, BASE).passed


def test_gate_without_thresholds_passes() -> None:
    assert evaluate_gate([], None, None) == Gate(passed=True, checks=())

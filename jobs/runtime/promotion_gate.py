"""The promotion gate: whether a trained model is good enough to be published."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from schema.job import EvalMetrics, Gate, GateCheck
from schema.training.evaluation import Threshold

# The metrics that have a field of their own; all others are in `values`.
BUILTIN_METRICS = ("eval_loss", "perplexity", "accuracy", "eval_runtime", "eval_rows", "eval_tokens")


def evaluate_gate(thresholds: Sequence[Threshold], metrics: EvalMetrics | None, base: EvalMetrics | None) -> Gate:
    """Every threshold, looked up in what was measured of the trained model, and whether all of them hold.

    A number that is missing, or is none, passes nothing. A bound `relative_to_base` is that factor of what the base reached on
    the same rows. A factor of a negative number turns better into worse, so nothing is compared with a negative base; and where
    the base reached 0, a factor above 1 asks for more than 0.
    """
    checks = tuple(_check(threshold, metrics, base) for threshold in thresholds)
    return Gate(passed=all(check.passed for check in checks), checks=checks)


def _check(threshold: Threshold, metrics: EvalMetrics | None, base: EvalMetrics | None) -> GateCheck:
    value, why = _look_up(threshold.metric, metrics, "the trained model")
    bounds = _bounds(threshold, base)
    why = why or bounds.reason
    if value is not None and not why:
        why = _describe_failed_check(value, threshold, bounds)
    return GateCheck(
        metric=threshold.metric,
        value=value,
        at_most=bounds.at_most,
        at_least=bounds.at_least,
        base=bounds.base,
        passed=not why,
        reason=why,
    )


@dataclass(frozen=True)
class _Bounds:
    """What a value is compared with, and what the base reached if that decides it; or why there is nothing to compare with."""

    at_most: float | None = None
    at_least: float | None = None
    base: float | None = None
    reason: str = ""


def _bounds(threshold: Threshold, base: EvalMetrics | None) -> _Bounds:
    if not threshold.relative_to_base:
        return _Bounds(threshold.at_most, threshold.at_least)
    reached, why = _look_up(threshold.metric, base, "the base model")
    if reached is None:
        return _Bounds(reason=why)
    if reached < 0:
        why = f"the base model reached {_format_number(reached)}, and a factor of a negative number has no meaning; give the bound itself"
        return _Bounds(base=reached, reason=why)
    return _Bounds(_scale_bound(threshold.at_most, reached), _scale_bound(threshold.at_least, reached), reached)


def _look_up(name: str, metrics: EvalMetrics | None, model_label: str) -> tuple[float | None, str]:
    """The number of that name; or None, and why there is none."""
    if metrics is None:
        return None, f"{model_label} was not measured; a gate needs held-out rows"
    known = {own: getattr(metrics, own) for own in BUILTIN_METRICS} | metrics.values
    value = known.get(name)
    if value is not None and math.isfinite(value):
        return float(value), ""
    if value is not None:
        return None, f"{name} of {model_label} is not a finite number"
    note = _find_note(name, metrics.notes)
    if name not in known and not note:
        return (
            None,
            f"{model_label} has no metric {name!r}; known: {', '.join(sorted(found for found in known if known[found] is not None))}",
        )
    return None, f"{name} of {model_label} was not measured" + (f": {note}" if note else "")


def _find_note(name: str, notes: dict[str, str]) -> str:
    """Why a metric has no value. A task that did not run has a note, and none of its metrics is known: lm_eval/mmlu/acc, lm_eval/mmlu."""
    while name:
        if name in notes:
            return notes[name]
        name = name.rpartition("/")[0]
    return ""


def _describe_failed_check(value: float, threshold: Threshold, bounds: _Bounds) -> str:
    """By what the value misses a bound; empty if it does not."""
    if bounds.at_most is not None and value > bounds.at_most:
        return f"{_format_number(value)} is above {_format_number(bounds.at_most)}" + _describe_base_factor(threshold.at_most, bounds.base)
    if bounds.at_least is not None and value < bounds.at_least:
        return f"{_format_number(value)} is below {_format_number(bounds.at_least)}" + _describe_base_factor(
            threshold.at_least, bounds.base
        )
    if bounds.base == 0 and value <= 0 and threshold.at_least is not None and threshold.at_least > 1:
        return f"{_format_number(value)} is no better than the base's 0"
    return ""


def _describe_base_factor(factor: float | None, base: float | None) -> str:
    return "" if base is None or factor is None else f", {_format_number(factor)} of the base's {_format_number(base)}"


def _scale_bound(bound: float | None, factor: float) -> float | None:
    return None if bound is None else bound * factor


def _format_number(value: float) -> str:
    return f"{value:.4g}"

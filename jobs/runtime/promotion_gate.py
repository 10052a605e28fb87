"""The promotion gate: whether a trained model is good enough to be published."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from schema.job import EvalMetrics, Gate, GateCheck
from schema.training.evaluation import Threshold


def evaluate_gate(thresholds: Sequence[Threshold], metrics: EvalMetrics | None, base: EvalMetrics | None) -> Gate:
    """Check every threshold against the metrics of the trained model, and whether all of them pass.

    A metric that is missing or not finite does not pass. A bound `relative_to_base` is a factor of the base model's metric on the same
    rows. A factor of a negative number would turn better into worse, so a negative base does not pass; and if the base has 0, a factor
    above 1 requires more than 0.
    """
    checks = tuple(_check(threshold, metrics, base) for threshold in thresholds)
    return Gate(passed=all(check.passed for check in checks), checks=checks)


def _check(threshold: Threshold, metrics: EvalMetrics | None, base: EvalMetrics | None) -> GateCheck:
    value, reason = _look_up(threshold.metric, metrics, "the trained model")
    bounds = _bounds(threshold, base)
    reason = reason or bounds.reason
    if value is not None and not reason:
        reason = _describe_failed_check(value, threshold, bounds)
    return GateCheck(
        metric=threshold.metric,
        value=value,
        at_most=bounds.at_most,
        at_least=bounds.at_least,
        base=bounds.base,
        passed=not reason,
        reason=reason,
    )


@dataclass(frozen=True)
class _Bounds:
    """The bounds of a value, with the base model's metric if they depend on it; or the reason why there are no bounds."""

    at_most: float | None = None
    at_least: float | None = None
    base: float | None = None
    reason: str = ""


def _bounds(threshold: Threshold, base: EvalMetrics | None) -> _Bounds:
    if not threshold.relative_to_base:
        return _Bounds(threshold.at_most, threshold.at_least)
    base_value, reason = _look_up(threshold.metric, base, "the base model")
    if base_value is None:
        return _Bounds(reason=reason)
    if base_value < 0:
        reason = f"the base model has {_format_number(base_value)}, and a factor of a negative number has no meaning; set an absolute bound"
        return _Bounds(base=base_value, reason=reason)
    return _Bounds(_scale_bound(threshold.at_most, base_value), _scale_bound(threshold.at_least, base_value), base_value)


def _look_up(name: str, metrics: EvalMetrics | None, model_label: str) -> tuple[float | None, str]:
    """The metric of that name, or None and the reason."""
    if metrics is None:
        return None, f"{model_label} was not evaluated; a gate needs held-out rows"
    known = metrics.model_dump(exclude={"notes", "values"}) | metrics.values
    value = known.get(name)
    if value is not None and math.isfinite(value):
        return float(value), ""
    if value is not None:
        return None, f"{name} of {model_label} is not a finite number"
    note = _find_note(name, metrics.notes)
    if name not in known and not note:
        measured = ", ".join(sorted(metric for metric in known if known[metric] is not None))
        return None, f"{model_label} has no metric {name!r}; known: {measured}"
    return None, f"{name} of {model_label} was not measured" + (f": {note}" if note else "")


def _find_note(name: str, notes: dict[str, str]) -> str:
    """Why a metric has no value. The note may be that of the whole task: lm_eval/mmlu for lm_eval/mmlu/acc."""
    while name:
        if name in notes:
            return notes[name]
        name = name.rpartition("/")[0]
    return ""


def _describe_failed_check(value: float, threshold: Threshold, bounds: _Bounds) -> str:
    """Which bound the value misses; empty if it misses none."""
    if bounds.at_most is not None and value > bounds.at_most:
        return f"{_format_number(value)} is above {_format_number(bounds.at_most)}" + _describe_base_factor(threshold.at_most, bounds.base)
    if bounds.at_least is not None and value < bounds.at_least:
        return f"{_format_number(value)} is below {_format_number(bounds.at_least)}" + _describe_base_factor(
            threshold.at_least, bounds.base
        )
    if bounds.base == 0 and value <= 0 and threshold.at_least is not None and threshold.at_least > 1:
        return f"{_format_number(value)} is not better than the base's 0"
    return ""


def _describe_base_factor(factor: float | None, base: float | None) -> str:
    return "" if base is None or factor is None else f", {_format_number(factor)} of the base's {_format_number(base)}"


def _scale_bound(bound: float | None, factor: float) -> float | None:
    return None if bound is None else bound * factor


def _format_number(value: float) -> str:
    return f"{value:.4g}"

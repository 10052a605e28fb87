"""The time left is that of all phases that are left; it never reaches zero before the end, and is None where it is not known."""

from dataclasses import dataclass

import pytest

from jobs.runtime.remaining_time import PlannedPhase, RemainingTime
from schema.estimate.llm_export import PARAMETERS_MEASURED, plan_export_phases


@dataclass
class Clock:
    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def remaining(clock: Clock) -> RemainingTime:
    """In phase training, of which 20 seconds are left; 10 s of evaluating and 30 s of merging follow."""
    remaining = RemainingTime(clock)
    remaining.plan([PlannedPhase("training", None), PlannedPhase("evaluating", 10.0), PlannedPhase("merging", 30.0)])
    remaining.enter("training")
    remaining.estimate_current(20.0)
    return remaining


def test_time_left_is_that_of_all_phases(remaining: RemainingTime) -> None:
    assert remaining.read() == 60.0


def test_time_passes_between_two_estimates(remaining: RemainingTime, clock: Clock) -> None:
    clock.now_s = 5.0
    assert remaining.read() == 55.0


def test_finished_phases_do_not_count(remaining: RemainingTime, clock: Clock) -> None:
    clock.now_s = 8.0  # sooner than planned
    remaining.enter("evaluating")
    assert remaining.read() == 40.0
    remaining.enter("merging")
    assert remaining.read() == 30.0


def test_skipped_phase_does_not_count(remaining: RemainingTime) -> None:
    remaining.enter("merging")
    assert remaining.read() == 30.0


def test_phase_that_takes_longer_never_has_zero_left(remaining: RemainingTime, clock: Clock) -> None:
    remaining.enter("merging")
    clock.now_s = 1000.0
    assert remaining.read() == 1.5  # a twentieth of what was planned
    remaining.estimate_current(0.0)
    assert remaining.read() == 1.0


def test_measured_time_replaces_estimate(remaining: RemainingTime) -> None:
    remaining.estimate("evaluating", 12.0)
    remaining.estimate("converting", 99.0)  # not planned
    assert remaining.read() == 62.0


def test_unknown_phase_makes_time_unknown(remaining: RemainingTime) -> None:
    remaining.estimate_current(None)
    assert remaining.read() is None
    remaining.enter("evaluating")
    assert remaining.read() == 40.0
    remaining.plan([PlannedPhase("merging", None)])
    assert remaining.read() is None


def test_phase_that_is_not_planned_keeps_plan(remaining: RemainingTime) -> None:
    remaining.enter("downloading")
    assert remaining.read() is None
    remaining.enter("evaluating")
    assert remaining.read() == 40.0


def test_nothing_is_known_without_plan_and_after_end(remaining: RemainingTime) -> None:
    assert RemainingTime().read() is None
    remaining.end()
    assert remaining.read() is None


def test_exports_are_estimated_in_order_of_their_phases() -> None:
    phases = plan_export_phases(("adapter", "merged", "gguf"), quantization_count=2, parameters=PARAMETERS_MEASURED)
    assert [phase for phase, _ in phases] == ["verifying", "merging", "converting", "verifying", "uploading"]
    assert all(seconds > 0 for _, seconds in phases)


def test_larger_models_and_more_files_take_longer() -> None:
    def total(quantization_count: int, parameters: float) -> float:
        return sum(seconds for _, seconds in plan_export_phases(("gguf",), quantization_count=quantization_count, parameters=parameters))

    assert total(1, 1e9) > total(1, 1e8)
    assert total(3, 1e8) > total(1, 1e8)
    assert [phase for phase, _ in plan_export_phases(("adapter",), 0, 1e8)] == ["verifying", "uploading"]

"""The GPU benchmark: its dry run trains with every trainer that is installed, and its budget of time is kept."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from bench.gpu_training import Budget, detect_setting, main, tokens_per_second
from bench.peers_training.plan import TrainingRecord

TUNESMITH_ROWS = ("Tunesmith, defaults", "Tunesmith, packed")
TRL_ROWS = ("TRL, defaults", "TRL, the same flags")


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu_training", *arguments])
    return main()


@pytest.mark.timeout(600)  # three processes that load the libraries
def test_dry_run_measures_every_trainer_and_reports_failed_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--dry-run", "--json", str(tmp_path / "table.json"), "--unsloth", "no-python")
    assert run_main(monkeypatch, *arguments) == 1
    results = {result["trainer"]: result for result in json.loads((tmp_path / "table.json").read_text())}
    for trainer in TUNESMITH_ROWS + TRL_ROWS:
        assert results[trainer]["problem"] == ""
        assert results[trainer]["tokens_per_s"] > 0
        assert results[trainer]["peak_memory_mb"] > 0
        (run,) = results[trainer]["runs"]
        assert (run["steps"], len(run["step_tokens"]), len(run["losses"])) == (5, 5, 5)
    packed_tokens = [results[trainer]["runs"][0]["step_tokens"][-1] for trainer in ("Tunesmith, packed", "TRL, the same flags")]
    assert packed_tokens[0] == pytest.approx(packed_tokens[1], rel=0.1)
    assert results["Unsloth, packed"]["tokens_per_s"] is None
    assert results["Unsloth, packed"]["problem"].startswith("failed: ")
    output = capsys.readouterr().out
    assert all(trainer in output for trainer in results)


@pytest.mark.skipif(find_spec("unsloth") is not None, reason="Unsloth is installed")
def test_used_up_budget_is_reported_for_every_trainer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run_main(monkeypatch, "--dry-run", "--budget-s", "0")
    output = capsys.readouterr().out
    assert output.count("not measured: the budget of 0 s was used up") == 4
    assert output.count("absent: the package unsloth is not installed") == 1
    assert "No further round was started: the budget of 0 s was used up." in output


def test_budget_starts_only_what_its_time_is_left_for() -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 10  # each look at the clock takes ten seconds
        return now[0]

    budget = Budget(75, clock)  # until 85
    assert budget.run([sys.executable, "-c", ""], "1b", "a script") == ""  # from 20 to 40, with a look in between
    assert budget.allows("1b", "another script")  # 35 s are left
    assert budget.allows("1b", "a script")  # 25 s are left, and it took 20
    assert not budget.allows("1b", "a script")  # 15 s are left
    assert not Budget(0).allows("1b", "a script")


def test_script_that_hangs_is_stopped_at_the_end_of_the_budget() -> None:
    assert "ended before it did" in Budget(1).run([sys.executable, "-c", "import time; time.sleep(60)"], "1b", "a script")


def test_speed_counts_the_tokens_of_measured_steps() -> None:
    run = TrainingRecord(tokens=1000, steps=4, step_ends_s=[9.0, 10.0, 11.0, 12.0], step_tokens=[100, 200, 600, 1000])
    assert tokens_per_second(run, warmup_steps=2) == 400
    run.step_tokens = []
    assert tokens_per_second(run, warmup_steps=2) == 250


@pytest.mark.parametrize(
    ("losses", "grad_norms", "learned"),
    [([3.0, 2.9, 2.5, 2.0], [1.0] * 4, True), ([2.0, 2.9, 2.5, 2.0], [1.0] * 4, False), ([3.0, 2.0], [1.0, 0.0], False), ([], [], False)],
)
def test_training_counts_only_if_it_learned(losses: list[float], grad_norms: list[float], learned: bool) -> None:
    assert TrainingRecord(losses=losses, grad_norms=grad_norms).has_learned is learned


def test_without_gpu_the_benchmark_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if detect_setting(1) is not None:
        pytest.skip("this machine has a GPU")
    assert run_main(monkeypatch) == 2
    assert "no GPU" in capsys.readouterr().err

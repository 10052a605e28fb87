"""Where the base is the model without its adapter, it is measured after the first step: with the same numbers, whatever interrupts it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.runtime.save_policy import TrainingControlState
from schema.checkpoint import checkpoint_key
from schema.events import EvaluationCompleted, Event, MetricsLogged, PhaseChanged
from schema.job import ExportSource
from schema.spec import JobSpec
from tests.jobs.conftest import FinishedTraining, make_spec
from tests.jobs.test_continuation import TrainingRun, assert_runs_identical

Train = Callable[..., FinishedTraining]

EVALUATED: dict[str, Any] = {"eval_config": {"compute_eval_metrics": True, "sample_prompts": 2, "max_new_tokens": 8}}
DROPOUT = {"lora_dropout": 0.3, "learning_rate": 5e-3}


def describe(event: Event) -> str | None:
    match event:
        case PhaseChanged():
            return event.phase
        case MetricsLogged():
            return f"metrics {event.step}"
        case EvaluationCompleted():
            return f"{event.when} {event.step}"
        case _:
            return None


def timeline(trained: FinishedTraining) -> list[str]:
    """Phases, metrics and evaluations in their order, from the first phase of the training on."""
    events = [name for name in map(describe, trained.record.events) if name]
    return events[events.index("tokenizing") + 1 :]


@pytest.fixture
def evaluated(train: Train) -> FinishedTraining:
    return train("evaluated", spec=EVALUATED, max_steps=3, **DROPOUT)


def test_base_is_measured_after_first_step(evaluated: FinishedTraining) -> None:
    assert timeline(evaluated) == [
        *("training", "evaluating", "before 0", "training", "metrics 1", "metrics 2", "metrics 3"),
        *("evaluating", "after 3"),
    ]
    assert [progress.step for progress in evaluated.record.progress][:2] == [1, 1]
    assert evaluated.record.progress[1].remaining_s is not None  # the evaluation is measured by now


def test_base_has_same_metrics_as_before_first_step(evaluated: FinishedTraining, train: Train) -> None:
    eva = train("eva", spec=EVALUATED, max_steps=1, lora_init="eva", **DROPOUT)  # its adapter adds zero before the first step
    assert timeline(eva)[:2] == ["evaluating", "before 0"]
    ours, theirs = evaluated.model.base_metrics, eva.model.base_metrics
    assert ours is not None
    assert theirs is not None
    assert ours.model_dump(exclude={"eval_runtime"}) == theirs.model_dump(exclude={"eval_runtime"})


def test_measuring_the_base_does_not_change_the_training(evaluated: FinishedTraining, train: Train) -> None:
    alone = train("alone", spec={"held_out": []}, max_steps=3, **DROPOUT)
    assert [point.values["loss"] for point in alone.record.points] == [point.values["loss"] for point in evaluated.record.points]
    ours, theirs = evaluated.weights(), alone.weights()
    assert ours.keys() == theirs.keys()
    assert all(tensor.equal(theirs[name]) for name, tensor in ours.items())


def test_training_of_one_step_measures_base_at_its_end(train: Train, evaluated: FinishedTraining) -> None:
    trained = train("one-step", spec=EVALUATED, max_steps=1)
    assert timeline(trained) == ["training", "metrics 1", "evaluating", "before 0", "after 1"]
    assert trained.model.base_metrics is not None
    assert evaluated.model.base_metrics is not None
    assert trained.model.base_metrics.eval_loss == evaluated.model.base_metrics.eval_loss


@pytest.mark.parametrize("spec", [{"method": "Full"}, {"hyperparameters": {"lora_init": "pissa"}}, {"hyperparameters": {"use_dora": True}}])
def test_base_that_is_not_the_model_without_adapter_is_measured_before_first_step(train: Train, spec: dict[str, Any]) -> None:
    options = dict(spec)
    trained = train(spec=options, max_steps=1, **options.pop("hyperparameters", {}))
    assert timeline(trained) == ["evaluating", "before 0", "training", "metrics 1", "evaluating", "after 1"]


def make_evaluated_spec(store: Path) -> JobSpec:
    return make_spec(store, hyperparameters={"max_steps": 4, **DROPOUT}, eval_config={"compute_eval_metrics": True})


def test_pause_while_base_is_measured_leaves_it_to_next_attempt(store: Path, tmp_path: Path) -> None:
    uninterrupted, run = (TrainingRun(make_evaluated_spec(store), tmp_path / name) for name in ("uninterrupted", "paused"))
    model = uninterrupted.finish()
    assert run.run_attempt(stop_after=1, checks=2) == "pause"
    assert run.recorders[0].evaluations == []
    resumed = run.finish()
    assert [(event.when, event.step) for event in run.recorders[1].evaluations] == [("before", 0), ("after", 4)]
    assert_runs_identical(run, resumed, uninterrupted, model)


def test_export_of_checkpoint_without_base_metrics_measures_the_base(store: Path, tmp_path: Path) -> None:
    spec = make_evaluated_spec(store)
    trained = TrainingRun(spec, tmp_path / "trained")
    trained.run_attempt(stop_after=1, checks=2)
    key = checkpoint_key(spec.checkpoints_prefix, attempt=1, step=1)
    assert TrainingControlState.read(Path(store, key)).base_metrics is None
    source = ExportSource(job_id=spec.job_id, attempt=1, step=1, key=key)
    run = TrainingRun(spec.model_copy(update={"export_of": source}), tmp_path / "exported")
    model = run.finish()
    assert list(run.evaluations) == [("before", 0), ("after", 1)]
    assert model.base_metrics is not None

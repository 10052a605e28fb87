"""Interrupted and resumed trainings equal uninterrupted ones bit for bit, wherever and however they were interrupted."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from jobs.llm.trained_model import TrainedModel
from jobs.runtime.context import TrainingListener
from jobs.runtime.errors import Stopped, StopReason
from jobs.runtime.save_policy import STATE_FILE, SavePolicy, TrainingControlState, compute_checkpoint_interval_s
from jobs.runtime.training_control import TrainingControl
from schema.checkpoint import MANIFEST, Checkpoint, checkpoint_key
from schema.events import CheckpointRestored, EvaluationCompleted, MetricsLogged
from schema.job import EvalMetrics, ExportSource, Progress
from schema.spec import JobSpec
from tests.jobs.conftest import EventRecorder, load_saved_checkpoints, load_trainer, load_weights, make_context, make_spec, saved_steps


class Killed(BaseException):
    """Simulates kill -9: nothing is cleaned up, and only saved files remain."""


@dataclass
class ProgressRecorder(EventRecorder):
    """An event sink that records the current step and can kill the attempt at a step."""

    step: int = 0
    checks: int = 0  # since the last step
    kill_at_step: int | None = None

    def set_progress(self, *, phase: Any = None, progress: Progress | None = None) -> None:
        if progress is not None:
            self.step, self.checks = progress.step, 0
            if progress.step == self.kill_at_step:
                raise Killed


@dataclass
class StopAfter:
    """Requests a stop at `step`, once the training has called `check` `checks` times since that step."""

    recorder: ProgressRecorder
    step: int
    reason: StopReason = "pause"
    checks: int = 0

    @property
    def stop_reason(self) -> StopReason | None:
        is_reached = self.recorder.step >= self.step and self.recorder.checks >= self.checks
        return self.reason if is_reached and self.reason != "time_slice" else None

    def check(self) -> None:
        self.recorder.checks += 1
        if self.stop_reason == "cancel":
            raise Stopped("cancel")

    def defer_stop(self) -> AbstractContextManager[None]:
        return nullcontext()

    def time_left_s(self) -> float | None:
        return 0.9 if self.reason == "time_slice" and self.recorder.step >= self.step else None


@dataclass
class KilledWhileSaving:
    """A listener that kills the attempt when the files of a checkpoint are written but not uploaded."""

    step: int

    def log_checkpoint(self, folder: Path, step: int) -> None:
        assert (folder / "optimizer.pt").exists()
        if step == self.step:
            raise Killed

    def log_metrics(self, event: MetricsLogged) -> None:
        pass

    def log_evaluation(self, event: EvaluationCompleted) -> None:
        pass

    def log_model(self, folder: Path) -> None:
        pass


@dataclass
class TrainingRun:
    """One job, and the events of all its attempts."""

    spec: JobSpec
    workdir: Path
    recorders: list[ProgressRecorder] = field(default_factory=list)

    def run_attempt(
        self,
        *,
        stop_after: int | None = None,
        kill_at_step: int | None = None,
        training_listener: TrainingListener | None = None,
        **stop_options: Any,
    ) -> TrainedModel | StopReason | None:
        """Run the next attempt. Returns the model, the reason it stopped, or None if it was killed."""
        self.recorders.append(recorder := ProgressRecorder(kill_at_step=kill_at_step))
        stop = None if stop_after is None else StopAfter(recorder, stop_after, **stop_options)
        number = len(self.recorders)
        context = make_context(self.spec, self.workdir / str(number), recorder, attempt=number, stop=stop)
        context.listeners += [training_listener] if training_listener else []
        try:
            return load_trainer(self.spec)(self.spec.training_config, context)
        except Stopped as stopped:
            return stopped.reason
        except Killed:
            return None
        finally:
            context.checkpoints.wait_until_uploaded()
            context.checkpoints.close()

    def finish(self) -> TrainedModel:
        model = self.run_attempt()
        assert isinstance(model, TrainedModel)
        return model

    @property
    def curve(self) -> dict[int, tuple[float | None, ...]]:
        """The logged metrics by step. Steps that were logged twice must be equal."""
        points: dict[int, tuple[float | None, ...]] = {}
        for point in (point for recorder in self.recorders for point in recorder.points):
            values = (point.epoch, *(point.values[name] for name in ("loss", "learning_rate", "grad_norm")))
            assert points.setdefault(point.step, values) == values
        return points

    @property
    def evaluations(self) -> dict[tuple[str, int], tuple[float | None, int | None]]:
        return {
            (event.when, event.step): (event.metrics.eval_loss, event.metrics.eval_tokens)
            for recorder in self.recorders
            for event in recorder.evaluations
        }


def assert_runs_identical(training_run: TrainingRun, model: TrainedModel, other: TrainingRun, other_model: TrainedModel) -> None:
    """Fail unless all logged metrics, evaluations and weights are equal bit for bit."""
    assert training_run.curve == other.curve
    assert training_run.evaluations == other.evaluations
    ours, theirs = load_weights(model.folder), load_weights(other_model.folder)
    assert ours.keys() == theirs.keys()
    assert [name for name, tensor in ours.items() if not tensor.equal(theirs[name])] == []
    assert (model.train_tokens, model.train_rows, model.held_out_examples) == (
        other_model.train_tokens,
        other_model.train_rows,
        other_model.held_out_examples,
    )
    assert (model.metrics and model.metrics.eval_loss) == (other_model.metrics and other_model.metrics.eval_loss)
    assert (model.base_metrics and model.base_metrics.eval_loss) == (other_model.base_metrics and other_model.base_metrics.eval_loss)


BASE_HYPERPARAMETERS: dict[str, Any] = {
    "max_steps": -1,
    "epochs": 2,
    "learning_rate": 5e-3,
    "lora_dropout": 0.3,
    "logging_steps": 3,
    "save_strategy": "no",
}


@dataclass(frozen=True)
class TrainingCase:
    """A method with its hyperparameters."""

    method: str
    eval_strategy: str
    hyperparameters: dict[str, Any]
    steps: int  # in both epochs

    def spec(self, store: Path, **hyperparameters: Any) -> JobSpec:
        eval_config = {"eval_strategy": self.eval_strategy, "eval_steps": 2, "compute_eval_metrics": True}
        return make_spec(
            store,
            method=self.method,
            hyperparameters=BASE_HYPERPARAMETERS | self.hyperparameters | hyperparameters,
            eval_config=eval_config,
        )


CASES = {
    "lora": TrainingCase("LoRA", "epoch", {"batch_size": 6, "gradient_accumulation_steps": 1}, 8),
    "lora-packed-accumulated": TrainingCase(
        "LoRA", "steps", {"batch_size": 1, "gradient_accumulation_steps": 2, "packing": True, "max_seq_length": 96}, 8
    ),
    "full-accumulated": TrainingCase(
        "Full", "steps", {"batch_size": 2, "gradient_accumulation_steps": 5}, 6
    ),  # two batches remain for the last step
    "full-packed": TrainingCase(
        "Full", "epoch", {"batch_size": 2, "packing": True, "max_seq_length": 96, "lr_scheduler_type": "cosine"}, 8
    ),
}


@dataclass(frozen=True)
class UninterruptedRun:
    """A finished job without interruption."""

    case: TrainingCase
    training_run: TrainingRun
    model: TrainedModel


@pytest.fixture(scope="module")
def train_uninterrupted(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], UninterruptedRun]:
    """Trains a case of CASES, each at most once."""

    @cache
    def train(name: str) -> UninterruptedRun:
        run = TrainingRun(CASES[name].spec(store), tmp_path_factory.mktemp("uninterrupted"))
        return UninterruptedRun(CASES[name], run, run.finish())

    return train


@pytest.fixture(params=CASES)
def uninterrupted(request: pytest.FixtureRequest, train_uninterrupted: Callable[[str], UninterruptedRun]) -> UninterruptedRun:
    return train_uninterrupted(request.param)


@pytest.fixture
def lora(train_uninterrupted: Callable[[str], UninterruptedRun]) -> UninterruptedRun:
    return train_uninterrupted("lora-packed-accumulated")


def test_one_step_per_time_slice_matches_uninterrupted_run(uninterrupted: UninterruptedRun, store: Path, tmp_path: Path) -> None:
    run = TrainingRun(uninterrupted.case.spec(store), tmp_path)
    for step in range(1, uninterrupted.case.steps):
        assert run.run_attempt(stop_after=step, reason="time_slice") == "time_slice"
        assert load_saved_checkpoints(run.spec)[-1].step == step
    model = run.finish()
    assert uninterrupted.training_run.curve.keys() == {step for step in range(1, uninterrupted.case.steps + 1) if step % 3 == 0}
    assert_runs_identical(run, model, uninterrupted.training_run, uninterrupted.model)


# --- with the packed LoRA case ---

LORA = CASES["lora-packed-accumulated"]


@pytest.fixture
def training_run(store: Path, tmp_path: Path) -> TrainingRun:
    """The job of `lora`, not started yet."""
    return TrainingRun(LORA.spec(store), tmp_path)


def rewrite_as_version_1(folder: Path) -> None:
    """Give a stored checkpoint the form that 0.1 wrote: the batch at the top, a state without a version, and checksums to match."""
    state = json.loads((folder / STATE_FILE).read_text())
    del state["schema_version"]
    content = json.dumps(state.pop("details") | state, indent=1).encode()
    (folder / STATE_FILE).write_bytes(content)
    manifest = json.loads((folder / MANIFEST).read_text()) | {"schema_version": 1}
    del manifest["checksum"]
    manifest |= manifest.pop("details")
    for file in manifest["files"]:
        if file["path"] == STATE_FILE:
            file |= {"size_bytes": len(content), "sha256": sha256(content).hexdigest()}
    checksum = sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest | {"checksum": checksum}))


def test_run_resumed_from_checkpoint_of_version_1_matches_uninterrupted_run(
    lora: UninterruptedRun, training_run: TrainingRun, store: Path
) -> None:
    assert training_run.run_attempt(stop_after=3) == "pause"
    rewrite_as_version_1(store / checkpoint_key(training_run.spec.checkpoints_prefix, 1, 3))
    model = training_run.finish()
    assert training_run.recorders[1].points[0].step == 6  # the steps before are not repeated
    assert_runs_identical(training_run, model, lora.training_run, lora.model)


@pytest.mark.parametrize("step", [3, 4, 8])  # within an epoch, at its end, and at the end of the training
def test_paused_and_resumed_run_matches_uninterrupted_run(lora: UninterruptedRun, training_run: TrainingRun, step: int) -> None:
    assert training_run.run_attempt(stop_after=step) == "pause"
    (checkpoint,) = load_saved_checkpoints(training_run.spec)  # uploaded before the attempt returned
    assert (checkpoint.step, checkpoint.total_steps, checkpoint.reason) == (step, 8, "end" if step == 8 else "pause")
    model = training_run.finish()
    assert_runs_identical(training_run, model, lora.training_run, lora.model)
    assert "before" not in [event.when for event in training_run.recorders[1].evaluations]  # the base is evaluated once
    assert model.base_metrics == training_run.recorders[0].evaluations[0].metrics


def test_killed_run_resumes_from_last_checkpoint_and_matches(lora: UninterruptedRun, store: Path, tmp_path: Path) -> None:
    run = TrainingRun(LORA.spec(store, save_strategy="steps", save_steps=2), tmp_path)
    assert run.run_attempt(kill_at_step=7) is None
    model = run.finish()
    assert [event.step for event in run.recorders[-1].events if isinstance(event, CheckpointRestored)] == [6]
    assert_runs_identical(run, model, lora.training_run, lora.model)


def test_kill_during_save_resumes_from_previous_checkpoint(lora: UninterruptedRun, store: Path, tmp_path: Path) -> None:
    run = TrainingRun(LORA.spec(store, save_strategy="steps", save_steps=2), tmp_path)
    assert run.run_attempt(training_listener=KilledWhileSaving(6)) is None
    assert saved_steps(run.spec) == [2, 4]
    assert_runs_identical(run, run.finish(), lora.training_run, lora.model)


@pytest.mark.parametrize("reason", ["pause", "preempted", "time_slice"])
def test_checkpoint_records_its_reason(training_run: TrainingRun, reason: StopReason) -> None:
    assert training_run.run_attempt(stop_after=3, reason=reason) == reason
    assert [(checkpoint.step, checkpoint.reason) for checkpoint in load_saved_checkpoints(training_run.spec)] == [(3, reason)]


def test_cancel_saves_no_checkpoint(training_run: TrainingRun) -> None:
    assert training_run.run_attempt(stop_after=3, reason="cancel") == "cancel"
    assert load_saved_checkpoints(training_run.spec) == []


@pytest.mark.parametrize("checks", [1, 3])
def test_pause_aborts_evaluation_and_resume_repeats_it(lora: UninterruptedRun, training_run: TrainingRun, checks: int) -> None:
    assert training_run.run_attempt(stop_after=4, checks=checks) == "pause"  # between two batches of held-out rows
    (checkpoint,) = load_saved_checkpoints(training_run.spec)
    assert (checkpoint.step, checkpoint.eval_loss) == (4, None)
    assert [event.step for event in training_run.recorders[0].evaluations] == [0, 2]
    model = training_run.finish()
    assert [(event.when, event.step) for event in training_run.recorders[1].evaluations] == [
        ("during", 4),
        ("during", 6),
        ("during", 8),
        ("after", 8),
    ]
    assert_runs_identical(training_run, model, lora.training_run, lora.model)


def test_checkpoint_records_eval_loss_of_its_step(store: Path, tmp_path: Path) -> None:
    run = TrainingRun(LORA.spec(store, save_strategy="steps", save_steps=1, save_total_limit=9), tmp_path)
    run.finish()
    losses = {step: loss for (when, step), (loss, _) in run.evaluations.items() if when == "during"}
    assert {checkpoint.step: checkpoint.eval_loss for checkpoint in load_saved_checkpoints(run.spec)} == {
        step: losses.get(step) for step in range(1, 9)
    }


def test_finished_training_is_evaluated_but_not_trained_again(lora: UninterruptedRun, store: Path, tmp_path: Path) -> None:
    run = TrainingRun(replace(LORA, eval_strategy="no").spec(store), tmp_path)
    first = run.finish()
    assert [checkpoint.reason for checkpoint in load_saved_checkpoints(run.spec)] == ["end"]
    again = run.finish()
    recorder = run.recorders[1]
    assert (recorder.points, [(event.when, event.step) for event in recorder.evaluations]) == ([], [("after", 8)])
    assert_runs_identical(run, again, run, first)
    assert again.train_runtime_s == pytest.approx(first.train_runtime_s, rel=0.1)  # without the save, which is not training time
    assert saved_steps(run.spec) == [8]


def test_more_epochs_continue_with_the_longer_schedule(lora: UninterruptedRun, store: Path, tmp_path: Path) -> None:
    config = lora.training_run.spec.training_config
    longer = config.model_copy(update={"hyperparameters": config.hyperparameters.model_copy(update={"epochs": 3, "logging_steps": 1})})
    run = TrainingRun(
        lora.training_run.spec.model_copy(update={"training_config": longer}), tmp_path / "more", recorders=[ProgressRecorder()]
    )
    run.finish()
    uninterrupted = TrainingRun(LORA.spec(store, epochs=3, logging_steps=1), tmp_path / "uninterrupted")
    uninterrupted.finish()
    points = run.recorders[-1].points
    assert [point.step for point in points] == [9, 10, 11, 12]
    assert [point.values["learning_rate"] for point in points] == [
        point.values["learning_rate"] for point in uninterrupted.recorders[0].points if point.step > 8
    ]
    assert points[-1].progress is not None
    assert (points[-1].progress.step, points[-1].progress.total_steps, points[-1].progress.total_epochs) == (12, 12, 3.0)


@pytest.mark.parametrize("name", ["lora", "full-accumulated"])
def test_checkpoint_is_exported_without_training(store: Path, tmp_path: Path, name: str) -> None:
    trained = TrainingRun(CASES[name].spec(store), tmp_path / "trained")
    trained.run_attempt(stop_after=4)
    source = ExportSource(
        job_id=trained.spec.job_id, attempt=1, step=4, key=checkpoint_key(trained.spec.checkpoints_prefix, attempt=1, step=4)
    )
    run = TrainingRun(CASES[name].spec(store).model_copy(update={"export_of": source}), tmp_path / "exported")
    model = run.finish()
    assert (run.curve, saved_steps(run.spec)) == ({}, [])
    assert [(when, step) for when, step in run.evaluations] == [("after", 4)]
    assert model.metrics is not None
    assert model.base_metrics is not None
    assert model.base_metrics == trained.recorders[0].evaluations[0].metrics
    assert model.metrics.eval_loss != model.base_metrics.eval_loss
    stored = load_weights(Path(store, source.key))
    assert all(tensor.equal(stored[name]) for name, tensor in load_weights(model.folder).items())

    # As the retention of a completed job leaves it: smaller, and the exported model is the same byte for byte.
    folder = Path(store, source.key)
    checkpoint = Checkpoint.from_verified_bytes((folder / MANIFEST).read_bytes())
    surplus = run.spec.training_config.resume_only_files
    reduced = checkpoint.without_files(surplus)
    assert len(reduced.files) == len(checkpoint.files) - 1
    (folder / MANIFEST).write_bytes(reduced.with_checksum())
    for path in surplus:
        (folder / path).unlink()
    again = TrainingRun(run.spec, tmp_path / "exported-again").finish()
    weights = [path.name for path in model.folder.glob("*.safetensors")]
    assert weights
    assert all((again.folder / name).read_bytes() == (model.folder / name).read_bytes() for name in weights)
    assert again.metrics is not None
    assert again.metrics.eval_loss == model.metrics.eval_loss


# --- when to save ---


@pytest.mark.parametrize(
    ("strategy", "step", "epoch_ended", "since_last_save_s", "save_s", "due"),
    [
        ("steps", 50, False, 1.0, 1.0, True),
        ("steps", 51, False, 1.0, 1.0, False),
        ("steps", 51, True, 1.0, 1.0, False),
        ("steps", 51, False, 300.0, 1.0, True),  # the safety interval is over
        ("epoch", 50, True, 1.0, 1.0, True),
        ("epoch", 50, False, 299.0, 1.0, False),
        ("epoch", 50, False, 300.0, 15.0, True),
        ("epoch", 50, False, 300.0, 16.0, False),  # saves take long, so the safety interval is 320 s
        ("epoch", 50, False, 320.0, 16.0, True),
        ("no", 50, True, 1e6, 1.0, False),
    ],
)
def test_save_is_due_by_strategy_or_safety_interval(
    strategy: Any, step: int, epoch_ended: bool, since_last_save_s: float, save_s: float, due: bool
) -> None:
    policy = SavePolicy(strategy, save_steps=50)
    assert policy.is_due(step, epoch_ended=epoch_ended, since_last_save_s=since_last_save_s, save_s=save_s) is due


@pytest.mark.parametrize("save_s", [0.01, 1.0, 15.0, 60.0, 600.0])
def test_safety_interval_costs_at_most_five_percent(save_s: float) -> None:
    assert save_s / compute_checkpoint_interval_s(save_s) <= 0.05


def test_training_state_roundtrips(tmp_path: Path) -> None:
    state = TrainingControlState(
        details={"batch_size": 3, "gradient_accumulation_steps": 2}, step=7, train_s=0.1 + 0.2, loss_buffer=(1 / 3, 2.0**-40, 1e300)
    )
    state.write(tmp_path)
    assert TrainingControlState.read(tmp_path) == state


@dataclass
class Clock:
    """A clock that the test sets."""

    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class TimeLimit(StopAfter):
    """No stop is requested, but the time is limited."""

    clock: Clock = field(default_factory=Clock)
    ends_at_s: float = 1e9

    def time_left_s(self) -> float | None:
        return self.ends_at_s - self.clock()


@dataclass
class ControlDriver:
    """Drives a TrainingControl through a training of 100 steps."""

    control: TrainingControl
    clock: Clock
    folder: Path

    def step(self, duration_s: float) -> None:
        self.control.on_step_begin()
        self.clock.now_s += duration_s
        self.control.on_step_end(self.control.step + 1, loss=1.0)

    def evaluate(self, duration_s: float) -> None:
        def run(_: Callable[[], None]) -> EvalMetrics:
            self.clock.now_s += duration_s
            return EvalMetrics(eval_loss=1.0)

        self.control.evaluate(run)

    def save(self, duration_s: float) -> None:
        def write() -> None:
            self.folder.mkdir(parents=True)
            (self.folder / "weights").write_text("some")
            self.clock.now_s += duration_s

        self.control.save(self.folder, 0.5, write)


@pytest.fixture
def make_control_driver(store: Path, tmp_path: Path) -> Callable[..., ControlDriver]:
    def make(ends_at_s: float = 1e9) -> ControlDriver:
        clock = Clock()
        stop = TimeLimit(ProgressRecorder(), step=1000, clock=clock, ends_at_s=ends_at_s)
        context = make_context(make_spec(store), tmp_path, stop=stop)
        state = TrainingControlState()
        return ControlDriver(
            TrainingControl(context, SavePolicy("epoch", 50), state, total_steps=100, clock=clock), clock, tmp_path / "checkpoint"
        )

    return make


def test_safety_checkpoints_in_long_epoch_depend_on_save_cost(make_control_driver: Callable[..., ControlDriver]) -> None:
    driver = make_control_driver()
    driver.step(duration_s=299)
    assert not driver.control.should_save(epoch_ended=False)
    driver.step(duration_s=1)
    assert driver.control.should_save(epoch_ended=False)
    driver.save(duration_s=20)
    driver.step(duration_s=399)
    assert not driver.control.should_save(epoch_ended=False)
    driver.step(duration_s=1)
    assert driver.control.should_save(epoch_ended=False)


def test_training_yields_when_step_and_checkpoint_no_longer_fit(make_control_driver: Callable[..., ControlDriver]) -> None:
    driver = make_control_driver(ends_at_s=200)
    driver.control.checkpoint_bytes = 500_000_000  # estimated to take ten seconds until one has been saved
    driver.step(duration_s=30)
    assert not driver.control.should_stop()  # 170 s are left, and (30 + 10) x 1.5 + 1 are needed
    driver.step(duration_s=10)
    driver.clock.now_s = 138
    assert not driver.control.should_stop()
    driver.clock.now_s = 140
    assert driver.control.should_stop()
    assert driver.control.stop_reason == "time_slice"


def test_eta_uses_speed_of_current_attempt(make_control_driver: Callable[..., ControlDriver]) -> None:
    driver = make_control_driver()
    assert driver.control.eta_s is None
    driver.step(duration_s=10)
    driver.step(duration_s=30)
    assert driver.control.eta_s == 20 * 98


def test_eta_counts_evaluations_before_last_step(make_control_driver: Callable[..., ControlDriver]) -> None:
    driver = make_control_driver()
    driver.control.evaluation_interval = 25
    for _ in range(25):
        driver.step(duration_s=2)
    assert driver.control.eta_s == 2 * 75  # how long an evaluation takes is not known
    driver.evaluate(duration_s=40)
    assert driver.control.eta_s == 2 * 75 + 2 * 40  # of steps 50 and 75; that of step 100 is the published model's
    assert driver.control.state.evaluation_s == 40

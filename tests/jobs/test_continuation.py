"""A training that was interrupted, anywhere and however, and went on: to the last bit the one that never was."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from jobs.context import Mirror
from jobs.errors import Reason, Stopped
from jobs.trained import TrainedModel
from jobs.trainers.course import Course
from jobs.trainers.saving import SavePolicy, TrainingState, safety_interval_s
from schema.checkpoint import checkpoint_key
from schema.events import Evaluated, Metrics, Resumed
from schema.job import ExportSource, Progress
from schema.spec import JobSpec
from tests.jobs.conftest import Record, a_context, a_spec, saved, saved_steps, trainer_of


class Killed(BaseException):
    """As kill -9 would end it: nothing is tidied up, only what was saved remains."""


@dataclass
class Listener(Record):
    """A voice that knows how far the training is; it dies when told to."""

    step: int = 0
    checks: int = 0  # since the last step
    dies_at: int | None = None

    def place(self, *, phase: Any = None, progress: Progress | None = None) -> None:
        if progress is not None:
            self.step, self.checks = progress.step, 0
            if progress.step == self.dies_at:
                raise Killed


@dataclass
class StopAfter:
    """Somebody asks to stop in or after a step, once it has been looked `checks` times whether anybody did."""

    listener: Listener
    step: int
    reason: Reason = "pause"
    checks: int = 0

    @property
    def wanted(self) -> Reason | None:
        there = self.listener.step >= self.step and self.listener.checks >= self.checks
        return self.reason if there and self.reason != "time_slice" else None

    def check(self) -> None:
        self.listener.checks += 1
        if self.wanted == "cancel":
            raise Stopped("cancel")

    def politely(self) -> AbstractContextManager[None]:
        return nullcontext()

    def time_left_s(self) -> float | None:
        return 0.9 if self.reason == "time_slice" and self.listener.step >= self.step else None


@dataclass
class DiesWhileSaving:
    """A mirror that takes the whole process with it, when the files of a checkpoint are there and nothing is durable yet."""

    step: int

    def checkpoint(self, folder: Path, step: int) -> None:
        assert (folder / "optimizer.pt").exists()
        if step == self.step:
            raise Killed

    def metrics(self, event: Metrics) -> None:
        pass

    def evaluated(self, event: Evaluated) -> None:
        pass

    def model(self, folder: Path) -> None:
        pass


@dataclass
class Story:
    """One job, and what all its attempts told together."""

    spec: JobSpec
    workdir: Path
    heard: list[Listener] = field(default_factory=list)

    def attempt(
        self, *, stop_after: int | None = None, dies_at: int | None = None, mirror: Mirror | None = None, **how: Any
    ) -> TrainedModel | Reason | None:
        """What the next attempt came to: the model, why it stopped, or None when it was killed."""
        self.heard.append(listener := Listener(dies_at=dies_at))
        stop = None if stop_after is None else StopAfter(listener, stop_after, **how)
        number = len(self.heard)
        context = a_context(self.spec, self.workdir / str(number), listener, attempt=number, stop=stop)
        context.mirrors += [mirror] if mirror else []
        try:
            return trainer_of(self.spec)(self.spec.training_config, context)
        except Stopped as stopped:
            return stopped.reason
        except Killed:
            return None
        finally:
            context.checkpoints.settle()
            context.checkpoints.close()

    def finish(self) -> TrainedModel:
        model = self.attempt()
        assert isinstance(model, TrainedModel)
        return model

    @property
    def curve(self) -> dict[int, tuple[float | None, ...]]:
        """What was drawn, by step. What was drawn twice must be the same."""
        points: dict[int, tuple[float | None, ...]] = {}
        for point in (point for listener in self.heard for point in listener.points):
            drawn = (point.epoch, *(point.values[name] for name in ("loss", "learning_rate", "grad_norm")))
            assert points.setdefault(point.step, drawn) == drawn
        return points

    @property
    def evaluations(self) -> dict[tuple[str, int], tuple[float | None, int | None]]:
        return {
            (told.when, told.step): (told.metrics.eval_loss, told.metrics.eval_tokens) for one in self.heard for told in one.evaluations
        }


def weights(model: TrainedModel) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: part for path in model.folder.glob("*.safetensors") for name, part in load_file(path).items()}


def assert_same(story: Story, model: TrainedModel, other: Story, unbroken: TrainedModel) -> None:
    """Bit by bit: every point of the curve, every measurement, every weight."""
    assert story.curve == other.curve
    assert story.evaluations == other.evaluations
    ours, theirs = weights(model), weights(unbroken)
    assert ours.keys() == theirs.keys()
    assert [name for name, part in ours.items() if not part.equal(theirs[name])] == []
    assert (model.train_tokens, model.train_rows, model.probes) == (unbroken.train_tokens, unbroken.train_rows, unbroken.probes)
    assert (model.metrics and model.metrics.eval_loss) == (unbroken.metrics and unbroken.metrics.eval_loss)
    assert (model.base_metrics and model.base_metrics.eval_loss) == (unbroken.base_metrics and unbroken.base_metrics.eval_loss)


LONG: dict[str, Any] = {"max_steps": -1, "epochs": 2, "learning_rate": 5e-3, "lora_dropout": 0.3, "logging_steps": 3, "save_strategy": "no"}


@dataclass(frozen=True)
class Case:
    """A way to train."""

    method: str
    eval_strategy: str
    knobs: dict[str, Any]
    steps: int  # of both epochs

    def spec(self, store: Path, **knobs: Any) -> JobSpec:
        eval_config = {"eval_strategy": self.eval_strategy, "eval_steps": 2, "compute_eval_metrics": True}
        return a_spec(store, method=self.method, hyperparameters=LONG | self.knobs | knobs, eval_config=eval_config)


CASES = {
    "lora": Case("LoRA", "epoch", {"batch_size": 6, "gradient_accumulation_steps": 1}, 8),
    "lora-packed-accumulated": Case(
        "LoRA", "steps", {"batch_size": 1, "gradient_accumulation_steps": 2, "packing": True, "max_seq_length": 96}, 8
    ),
    "full-accumulated": Case("Full", "steps", {"batch_size": 2, "gradient_accumulation_steps": 5}, 6),  # two batches are left over
    "full-packed": Case("Full", "epoch", {"batch_size": 2, "packing": True, "max_seq_length": 96, "lr_scheduler_type": "cosine"}, 8),
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


def test_a_training_of_one_step_per_time_slice_is_the_unbroken_one(unbroken: Unbroken, store: Path, tmp_path: Path) -> None:
    story = Story(unbroken.case.spec(store), tmp_path)
    for step in range(1, unbroken.case.steps):
        assert story.attempt(stop_after=step, reason="time_slice") == "time_slice"
        assert saved(story.spec)[-1].step == step
    model = story.finish()
    assert unbroken.story.curve.keys() == {step for step in range(1, unbroken.case.steps + 1) if step % 3 == 0}
    assert_same(story, model, unbroken.story, unbroken.model)


# --- in one of these ways of training ---

LORA = CASES["lora-packed-accumulated"]


@pytest.fixture(scope="module")
def lora(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    story = Story(LORA.spec(store), tmp_path_factory.mktemp("lora"))
    return Unbroken(LORA, story, story.finish())


@pytest.fixture
def story(store: Path, tmp_path: Path) -> Story:
    """The job of `lora`, not yet begun."""
    return Story(LORA.spec(store), tmp_path)


@pytest.mark.parametrize("step", [3, 4, 8])  # in the middle, at the end of an epoch, and of the training
def test_a_training_that_was_paused_is_the_unbroken_one(lora: Unbroken, story: Story, step: int) -> None:
    assert story.attempt(stop_after=step) == "pause"
    (checkpoint,) = saved(story.spec)  # durable already
    assert (checkpoint.step, checkpoint.total_steps, checkpoint.reason) == (step, 8, "end" if step == 8 else "pause")
    model = story.finish()
    assert_same(story, model, lora.story, lora.model)
    assert "before" not in [told.when for told in story.heard[1].evaluations]  # the base is measured once
    assert model.base_metrics == story.heard[0].evaluations[0].metrics


def test_a_training_that_was_killed_loses_what_came_after_the_last_checkpoint_and_nothing_else(
    lora: Unbroken, store: Path, tmp_path: Path
) -> None:
    story = Story(LORA.spec(store, save_strategy="steps", save_steps=2), tmp_path)
    assert story.attempt(dies_at=7) is None
    model = story.finish()
    assert [event.step for event in story.heard[-1].events if isinstance(event, Resumed)] == [6]
    assert_same(story, model, lora.story, lora.model)


def test_a_training_that_was_killed_while_it_saved_goes_on_from_the_checkpoint_before(lora: Unbroken, store: Path, tmp_path: Path) -> None:
    story = Story(LORA.spec(store, save_strategy="steps", save_steps=2), tmp_path)
    assert story.attempt(mirror=DiesWhileSaving(6)) is None
    assert saved_steps(story.spec) == [2, 4]
    assert_same(story, story.finish(), lora.story, lora.model)


@pytest.mark.parametrize("reason", ["pause", "preempted", "time_slice"])
def test_a_checkpoint_says_why_it_was_written(story: Story, reason: Reason) -> None:
    assert story.attempt(stop_after=3, reason=reason) == reason
    assert [(checkpoint.step, checkpoint.reason) for checkpoint in saved(story.spec)] == [(3, reason)]


def test_a_cancel_saves_nothing(story: Story) -> None:
    assert story.attempt(stop_after=3, reason="cancel") == "cancel"
    assert saved(story.spec) == []


@pytest.mark.parametrize("checks", [1, 3])
def test_a_measurement_is_given_up_for_a_pause_and_made_when_the_training_goes_on(lora: Unbroken, story: Story, checks: int) -> None:
    assert story.attempt(stop_after=4, checks=checks) == "pause"  # between two batches of held-out rows
    (checkpoint,) = saved(story.spec)
    assert (checkpoint.step, checkpoint.eval_loss) == (4, None)
    assert [told.step for told in story.heard[0].evaluations] == [0, 2]
    model = story.finish()
    assert [(told.when, told.step) for told in story.heard[1].evaluations] == [("during", 4), ("during", 6), ("during", 8), ("after", 8)]
    assert_same(story, model, lora.story, lora.model)


def test_a_checkpoint_knows_what_was_measured_at_its_step(store: Path, tmp_path: Path) -> None:
    story = Story(LORA.spec(store, save_strategy="steps", save_steps=1, save_total_limit=9), tmp_path)
    story.finish()
    losses = {step: loss for (when, step), (loss, _) in story.evaluations.items() if when == "during"}
    assert {found.step: found.eval_loss for found in saved(story.spec)} == {step: losses.get(step) for step in range(1, 9)}


def test_a_training_that_is_over_is_not_trained_again_but_measured_and_left(lora: Unbroken, store: Path, tmp_path: Path) -> None:
    story = Story(replace(LORA, eval_strategy="no").spec(store), tmp_path)
    first = story.finish()
    assert [checkpoint.reason for checkpoint in saved(story.spec)] == ["end"]
    again = story.finish()
    told = story.heard[1]
    assert (told.points, [(event.when, event.step) for event in told.evaluations]) == ([], [("after", 8)])
    assert_same(story, again, story, first)
    assert again.train_runtime_s == pytest.approx(first.train_runtime_s, rel=0.1)  # up to the save, which is not training
    assert saved_steps(story.spec) == [8]


def test_more_epochs_go_on_from_a_finished_training_at_the_rate_of_the_longer_plan(lora: Unbroken, store: Path, tmp_path: Path) -> None:
    config = lora.story.spec.training_config
    longer = config.model_copy(update={"hyperparameters": config.hyperparameters.model_copy(update={"epochs": 3, "logging_steps": 1})})
    story = Story(lora.story.spec.model_copy(update={"training_config": longer}), tmp_path / "more", heard=[Listener()])
    story.finish()
    unbroken = Story(LORA.spec(store, epochs=3, logging_steps=1), tmp_path / "unbroken")
    unbroken.finish()
    points = story.heard[-1].points
    assert [point.step for point in points] == [9, 10, 11, 12]
    assert [point.values["learning_rate"] for point in points] == [
        point.values["learning_rate"] for point in unbroken.heard[0].points if point.step > 8
    ]
    assert points[-1].progress is not None
    assert (points[-1].progress.step, points[-1].progress.total_steps, points[-1].progress.total_epochs) == (12, 12, 3.0)


@pytest.mark.parametrize("name", ["lora", "full-accumulated"])
def test_a_checkpoint_is_exported_without_training(store: Path, tmp_path: Path, name: str) -> None:
    trained = Story(CASES[name].spec(store), tmp_path / "trained")
    trained.attempt(stop_after=4)
    source = ExportSource(job_id=trained.spec.job_id, attempt=1, step=4, key=checkpoint_key(trained.spec.checkpoints, attempt=1, step=4))
    story = Story(CASES[name].spec(store).model_copy(update={"export_of": source}), tmp_path / "exported")
    model = story.finish()
    assert (story.curve, saved_steps(story.spec)) == ({}, [])
    assert [(when, step) for when, step in story.evaluations] == [("after", 4)]
    assert model.metrics is not None
    assert model.base_metrics is not None
    assert model.base_metrics == trained.heard[0].evaluations[0].metrics
    assert model.metrics.eval_loss != model.base_metrics.eval_loss
    stored = weights(TrainedModel(Path(store, source.key), model.is_adapter, model.base_folder, (), None, None, 0, 0, 0.0))
    assert all(part.equal(stored[name]) for name, part in weights(model).items())


# --- when it is saved ---


@pytest.mark.parametrize(
    ("strategy", "step", "epoch_ended", "since_s", "blocked_s", "due"),
    [
        ("steps", 50, False, 1.0, 1.0, True),
        ("steps", 51, False, 1.0, 1.0, False),
        ("steps", 51, True, 1.0, 1.0, False),
        ("steps", 51, False, 300.0, 1.0, True),  # a long interval is broken
        ("epoch", 50, True, 1.0, 1.0, True),
        ("epoch", 50, False, 299.0, 1.0, False),
        ("epoch", 50, False, 300.0, 15.0, True),
        ("epoch", 50, False, 300.0, 16.0, False),  # saving is dear here: after 320 s
        ("epoch", 50, False, 320.0, 16.0, True),
        ("no", 50, True, 1e6, 1.0, False),
    ],
)
def test_a_save_is_due_as_the_strategy_says_and_after_the_safety_interval(
    strategy: Any, step: int, epoch_ended: bool, since_s: float, blocked_s: float, due: bool
) -> None:
    policy = SavePolicy(strategy, save_steps=50)
    assert policy.is_due(step, epoch_ended=epoch_ended, since_s=since_s, blocked_s=blocked_s) is due


@pytest.mark.parametrize("blocked_s", [0.01, 1.0, 15.0, 60.0, 600.0])
def test_the_safety_interval_never_costs_more_than_a_twentieth(blocked_s: float) -> None:
    assert blocked_s / safety_interval_s(blocked_s) <= 0.05


def test_the_state_is_read_as_it_was_written(tmp_path: Path) -> None:
    state = TrainingState(batch_size=3, gradient_accumulation_steps=2, step=7, train_s=0.1 + 0.2, window=(1 / 3, 2.0**-40, 1e300))
    state.write(tmp_path)
    assert TrainingState.read(tmp_path) == state


@dataclass
class Clock:
    """It goes when the test says so."""

    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class TimeLimit(StopAfter):
    """Nobody asks for anything, but the time is limited."""

    clock: Clock = field(default_factory=Clock)
    ends_at_s: float = 1e9

    def time_left_s(self) -> float | None:
        return self.ends_at_s - self.clock()


@dataclass
class Drive:
    """A training of a hundred steps, driven by hand."""

    course: Course
    clock: Clock
    folder: Path

    def step(self, takes_s: float) -> None:
        self.course.step_begins()
        self.clock.now_s += takes_s
        self.course.step_done(self.course.step + 1, loss=1.0)

    def save(self, takes_s: float) -> None:
        def write() -> None:
            self.folder.mkdir(parents=True)
            (self.folder / "weights").write_text("some")
            self.clock.now_s += takes_s

        self.course.save(self.folder, 0.5, write)


@pytest.fixture
def drive(store: Path, tmp_path: Path) -> Callable[..., Drive]:
    def begin(ends_at_s: float = 1e9) -> Drive:
        clock = Clock()
        stop = TimeLimit(Listener(), step=1000, clock=clock, ends_at_s=ends_at_s)
        context = a_context(a_spec(store), tmp_path, stop=stop)
        state = TrainingState(batch_size=2, gradient_accumulation_steps=1)
        return Drive(Course(context, SavePolicy("epoch", 50), state, total_steps=100, clock=clock), clock, tmp_path / "checkpoint")

    return begin


def test_a_long_epoch_is_broken_by_checkpoints_as_often_as_they_are_cheap(drive: Callable[..., Drive]) -> None:
    driven = drive()
    driven.step(takes_s=299)
    assert not driven.course.must_save(epoch_ended=False)
    driven.step(takes_s=1)
    assert driven.course.must_save(epoch_ended=False)
    driven.save(takes_s=20)
    driven.step(takes_s=399)
    assert not driven.course.must_save(epoch_ended=False)
    driven.step(takes_s=1)
    assert driven.course.must_save(epoch_ended=False)


def test_a_training_yields_when_its_longest_step_and_a_checkpoint_would_not_fit_any_more(drive: Callable[..., Drive]) -> None:
    driven = drive(ends_at_s=200)
    driven.course.checkpoint_bytes = 500_000_000  # ten seconds, as long as nobody has seen one
    driven.step(takes_s=30)
    assert not driven.course.must_end()  # 170 s are left, and (30 + 10) x 1.5 + 1 are wanted
    driven.step(takes_s=10)
    driven.clock.now_s = 138
    assert not driven.course.must_end()
    driven.clock.now_s = 140
    assert driven.course.must_end()
    assert driven.course.stopping == "time_slice"


def test_the_time_that_is_left_is_told_from_the_speed_of_this_attempt(drive: Callable[..., Drive]) -> None:
    driven = drive()
    assert driven.course.eta_s is None
    driven.step(takes_s=10)
    driven.step(takes_s=30)
    assert driven.course.eta_s == 20 * 98

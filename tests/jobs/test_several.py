"""A training in several processes: the one that a single process makes of the same request, whatever happens to the others."""

import copy
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from jobs.errors import JobFailed, failure_of
from jobs.settings import environment_of_rank, gpus_shown, most_processes
from jobs.trained import TrainedModel
from jobs.trainers.healing import BatchPlan, is_out_of_memory
from jobs.trainers.loop import Ground, Lesson
from jobs.trainers.model import Machine
from jobs.trainers.saving import TrainingState
from jobs.trainers.several import (
    LEFT_ALONE,
    OUT_OF_MEMORY,
    Choice,
    FirstStep,
    LostProcess,
    Places,
    choose,
    random_state,
    save_random_states,
    together,
    verdict,
)
from schema.checkpoint import checkpoint_key
from schema.events import Evaluated, Metrics, Resumed, Sampled
from tests.jobs.conftest import Record, a_context, a_spec, messages, saved, trainer_of
from tests.jobs.test_continuation import Story, assert_same, weights
from tests.jobs.test_grpo import LETTER, SAME, grpo, prompts
from tests.jobs.test_preferences import drawn, judged, measured, pairs
from tests.jobs.test_vision import SEEING, squares
from tests.tiny_gemma_vision import build_tiny_gemma_vision

# Nine rows, one at a time, four before each step: the last step of an epoch has a single one, and the other process nothing.
KNOBS: dict[str, Any] = {"max_steps": -1, "epochs": 2, "learning_rate": 1e-3, "logging_steps": 1, "batch_size": 1}
KNOBS |= {"gradient_accumulation_steps": 4, "save_strategy": "steps", "save_steps": 2}


@pytest.fixture
def begin(store: Path, tmp_path: Path) -> Callable[[str], Story]:
    return lambda name: Story(
        a_spec(store, method="Full", train=messages(9), hyperparameters=KNOBS, eval_config={"eval_strategy": "epoch"}), tmp_path / name
    )


@pytest.fixture
def two_processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("JOB_PROCESSES", "2")
    yield
    assert not psutil.Process().children()
    assert not {"RANK", "WORLD_SIZE", "MASTER_PORT"} & os.environ.keys()


@dataclass
class Killer:
    """A mirror that kills the other process in the middle of the training."""

    step: int
    killed_at: float = 0.0

    def metrics(self, event: Metrics) -> None:
        if event.step == self.step:
            (other,) = psutil.Process().children()
            other.kill()
            self.killed_at = time.monotonic()

    def evaluated(self, event: Evaluated) -> None:
        pass

    def sampled(self, event: Sampled) -> None:
        pass

    def checkpoint(self, folder: Path, step: int) -> None:
        pass

    def model(self, folder: Path) -> None:
        pass


@pytest.fixture
def alone(begin: Callable[[str], Story]) -> tuple[Story, TrainedModel]:
    """The training in one process."""
    story = begin("alone")
    return story, story.finish()


@pytest.mark.usefixtures("alone", "two_processes")
def test_two_processes_take_the_steps_of_one_and_go_on_to_the_last_bit_after_a_kill_and_a_pause(
    begin: Callable[[str], Story], alone: tuple[Story, TrainedModel]
) -> None:
    unbroken = begin("unbroken")
    model = unbroken.finish()
    assert unbroken.heard[0].decisions["processes"] == "2"
    assert_close((unbroken, model), alone)

    broken, killer = begin("broken"), Killer(3)
    with pytest.raises(JobFailed) as failed:
        broken.attempt(mirror=killer)
    assert time.monotonic() - killer.killed_at < 20
    assert failed.value.failure.code == "out_of_memory"  # a kernel that has none left kills; below a single row there is no smaller batch
    assert broken.attempt(stop_after=5) == "pause"
    paused = {file.path: file.sha256 for file in saved(broken.spec)[-1].files}
    assert paused["rng_state_0.pth"] != paused["rng_state_1.pth"]
    assert_same(broken, broken.finish(), unbroken, model)
    assert [event.step for listener in broken.heard for event in listener.events if isinstance(event, Resumed)] == [2, 5]


def assert_close(two: tuple[Story, TrainedModel], one: tuple[Story, TrainedModel]) -> None:
    """The same, but for the order in which numbers are added up."""
    (ours, our_model), (theirs, their_model) = two, one
    assert our_model.train_tokens == their_model.train_tokens
    for point, other in zip(ours.heard[0].points, theirs.heard[0].points, strict=True):
        assert point.values["loss"] == pytest.approx(other.values["loss"], abs=1e-5)
        assert point.values["grad_norm"] == pytest.approx(other.values["grad_norm"], rel=1e-5)
    assert [(told.when, told.step) for told in ours.heard[0].evaluations] == [
        (told.when, told.step) for told in theirs.heard[0].evaluations
    ]
    expected = weights(their_model)
    assert max(float((part - expected[name]).abs().max()) for name, part in weights(our_model).items()) < 1e-5


# --- every way to train ------------------------------------------------------------------------------------------------

# Two batches for each process and then, of the last row, one for the two of them: with figures, a loss, and tokens that count once.
SHORT: dict[str, Any] = {"max_steps": -1, "epochs": 1, "batch_size": 2, "learning_rate": 1e-3, "lora_dropout": 0.0, "logging_steps": 1}
SHORT |= {"gradient_accumulation_steps": 4, "warmup_ratio": 0.0}
PAIRS: dict[str, Any] = {"dataset_type": "preference", "train": pairs(9), "held_out": pairs(2, first=100)}
# A group of four answers is made by both processes, and its rewards are compared.
ANSWERS: dict[str, Any] = {"batch_size": 1, "num_generations": 4, "max_completion_length": 6, "beta": 0.1, "max_steps": 3}

WAYS: dict[str, dict[str, Any]] = {
    "dpo": PAIRS
    | {"trainer_type": "dpo", "hyperparameters": SHORT | {"epochs": 2, "logging_steps": 3, "save_strategy": "steps", "save_steps": 2}},
    "orpo": PAIRS | {"trainer_type": "orpo", "hyperparameters": SHORT},
    "reward": PAIRS | {"trainer_type": "reward", "hyperparameters": SHORT},
    "kto": {"trainer_type": "kto", "dataset_type": "unpaired_preference", "train": judged(9), "hyperparameters": SHORT}
    | {"held_out": judged(3, first=100)},
    "vision": {"modality": "vision", "base_model_id": SEEING, "train": [*squares(6), *messages(3)], "held_out": squares(2, first=500)}
    | {"hyperparameters": SHORT | {"train_vision_tower": True}},  # which some batches leave aside
    "grpo": grpo(LETTER, SAME, train=prompts(2)) | {"hyperparameters": SHORT | ANSWERS | {"mask_truncated_completions": False}},
}


@pytest.fixture
def tell(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, int], Story]:
    """A training of that kind, under a name, in so many processes; to be told."""

    def begin(way: str, name: str, processes: int) -> Story:
        monkeypatch.setenv("JOB_PROCESSES", str(processes))
        seeing = store / "pretrained_weights/huggingface" / SEEING
        if way == "vision" and not seeing.exists():
            build_tiny_gemma_vision(seeing)
        return Story(a_spec(store, eval_config={"eval_strategy": "epoch"}, **copy.deepcopy(WAYS[way])), tmp_path / name)

    return begin


def assert_one_training(ours: tuple[Story, TrainedModel], theirs: tuple[Story, TrainedModel]) -> None:
    """Every figure of the curve and of the measurements, and every weight: the same, but for the order in which numbers are added up."""
    (two, our_model), (one, their_model) = ours, theirs
    assert two.heard[0].decisions["processes"] == "2"
    assert two.heard[0].warnings == one.heard[0].warnings
    points, expected = drawn(two), drawn(one)
    assert points.keys() == expected.keys() != set()
    for step, values in points.items():
        assert values == pytest.approx(expected[step], rel=1e-5, abs=1e-5), step
    found, wanted = measured(two), measured(one)
    assert found.keys() == wanted.keys()
    assert [of.eval_loss for of in found.values()] == pytest.approx([of.eval_loss for of in wanted.values()], rel=1e-5, abs=1e-5)
    assert our_model.train_tokens == their_model.train_tokens > 0
    learned = weights(their_model)
    # A fifth of what a step moves a weight: where a gradient is next to nothing, Adam makes much of how it was rounded.
    assert max(float((part - learned[name]).abs().max()) for name, part in weights(our_model).items()) < 2e-4


# Always one whose batches are shared, and the one that shares as the library does: each start of a process takes seconds.
ALWAYS = ("kto", "grpo")


@pytest.mark.parametrize("way", [pytest.param(way, marks=[] if way in ALWAYS else pytest.mark.nightly) for way in WAYS if way != "dpo"])
def test_two_processes_train_as_one_does_whatever_is_learned(tell: Callable[[str, str, int], Story], way: str) -> None:
    alone = tell(way, "alone", 1)
    theirs = (alone, alone.finish())
    shared = tell(way, "shared", 2)
    assert_one_training((shared, shared.finish()), theirs)
    assert not psutil.Process().children()


def test_a_point_of_the_curve_has_the_figures_of_both_processes_also_where_the_training_was_resumed_before_it(
    tell: Callable[[str, str, int], Story], store: Path
) -> None:
    alone = tell("dpo", "alone", 1)
    theirs = (alone, alone.finish())
    unbroken = tell("dpo", "unbroken", 2)
    model = unbroken.finish()
    assert_one_training((unbroken, model), theirs)
    resumed = Story(unbroken.spec, unbroken.workdir / "resumed", [*unbroken.heard])
    shutil.rmtree(store / checkpoint_key(resumed.spec.checkpoints, attempt=1, step=4))
    assert_same(resumed, resumed.finish(), unbroken, model)
    again = resumed.heard[1]
    assert [event.step for event in again.events if isinstance(event, Resumed)] == [2]  # at an epoch's end, and before a point
    assert drawn(Story(resumed.spec, resumed.workdir, [again])) == drawn(unbroken)


def cannot(_: Ground) -> Lesson:
    raise JobFailed("invalid_data", "image 1 in row 5 of train is broken", "leave it out")


def test_what_another_process_cannot_do_is_told_in_its_own_words(store: Path, tmp_path: Path) -> None:
    spec = a_spec(store, held_out=[])
    machine = Machine("cpu", None, autocast=False, on_gpu=False, gradient_checkpointing=False)
    ground = Ground(
        spec.training_config, a_context(spec, tmp_path), tmp_path, {}, None, template_is_ours=False, machine=machine, restored=None
    )
    told = {"state": TrainingState(batch_size=1, gradient_accumulation_steps=2), "total_steps": 1, "checkpoint": None}
    with pytest.raises(JobFailed, match="row 5") as failed, together(ground, cannot, Places(2), told):
        pass
    assert (failed.value.failure.code, failed.value.failure.hint) == ("invalid_data", "leave it out")


@pytest.mark.usefixtures("two_processes")
def test_where_a_second_process_cannot_begin_one_trains_alone_and_says_so(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONHOME", "/nowhere")
    record = Record()
    spec = a_spec(store, held_out=[], hyperparameters={"max_steps": 2, "gradient_accumulation_steps": 2})
    model = trainer_of(spec)(spec.training_config, a_context(spec, tmp_path, record))
    assert model.step == 2
    assert "process 1 of the training ended with code 1" in record.warnings["one_process"]


# --- without a second process ------------------------------------------------------------------------------------------


def test_each_process_goes_on_with_its_own_random_numbers(tmp_path: Path) -> None:
    import torch
    from transformers import Trainer
    from transformers.training_args import ParallelMode

    states, drawn = [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append(random_state())
        drawn.append(torch.rand(3))
    save_random_states(tmp_path, states)
    for rank in (1, 0):
        arguments = SimpleNamespace(world_size=2, process_index=rank, parallel_mode=ParallelMode.DISTRIBUTED)
        Trainer._load_rng_state(SimpleNamespace(args=arguments), str(tmp_path))
        assert torch.rand(3).equal(drawn[rank])


def test_what_cannot_share_its_steps_is_trained_in_one_process_and_says_what_could(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOB_PROCESSES", "2")
    record = Record()
    spec = a_spec(store, held_out=[], hyperparameters={"max_steps": 1, "gradient_accumulation_steps": 3})
    trainer_of(spec)(spec.training_config, a_context(spec, tmp_path, record))
    assert record.decisions["processes"] == "1"
    assert "gradient_accumulation_steps 3 cannot be shared" in record.warnings["idle_processors"]
    assert "multiple of 2" in record.warnings["idle_processors"]


@pytest.mark.parametrize(
    ("plan", "items", "most", "processes", "idle"),
    [
        ((2, 4), 100, 4, 4, ""),
        ((2, 4), 100, 8, 4, "multiple of 8"),
        ((2, 6), 100, 4, 3, "multiple of 4"),
        ((2, 1), 100, 2, 1, "multiple of 2"),
        ((2, 4), 5, 4, 2, "only 3 batches"),
    ],
)
def test_a_step_has_as_many_rows_however_many_share_it(plan: tuple[int, int], items: int, most: int, processes: int, idle: str) -> None:
    found = choose(BatchPlan(*plan), items, most)
    assert found.processes == processes
    assert plan[1] % processes == 0
    assert (idle in found.idle) if idle else found == Choice(processes, found.why)


@pytest.mark.parametrize("code", [OUT_OF_MEMORY, -signal.SIGKILL])
def test_a_process_that_ran_out_of_memory_or_was_killed_makes_the_batch_smaller(code: int) -> None:
    assert is_out_of_memory(verdict({1: 1, 2: code}))  # pyright: ignore[reportArgumentType]


def test_a_process_that_ended_otherwise_fails_the_attempt_and_says_which() -> None:
    failed = verdict({2: 1})
    assert isinstance(failed, LostProcess)
    assert "process 2" in failure_of(failed).message
    assert LEFT_ALONE not in (0, 1, OUT_OF_MEMORY)


def test_another_process_sees_its_own_gpu_and_no_token() -> None:
    found = environment_of_rank(1, 2, 4711, "3", {"JOB_TOKEN": "t0ken", "CUDA_VISIBLE_DEVICES": "2", "PATH": "/bin"})
    assert found.items() >= {"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "4711", "CUDA_VISIBLE_DEVICES": "3", "PATH": "/bin"}.items()
    assert "t0ken" not in found.values()


@pytest.mark.parametrize(
    ("environment", "names"),
    [({}, ("0", "1", "2", "3")), ({"JOB_GPUS": "2, 3"}, ("2", "3")), ({"JOB_GPUS": "MIG-a,MIG-b"}, ("MIG-a",)), ({"JOB_GPUS": ""}, ("",))],
)
def test_the_gpus_are_those_that_the_attempt_was_shown(environment: dict[str, str], names: tuple[str, ...]) -> None:
    assert gpus_shown(4, environment) == names


def test_a_first_step_is_late_only_between_its_begin_and_its_end() -> None:
    now = 0.0
    step = FirstStep(patience_s=10.0, clock=lambda: now)
    now = 100.0  # the base is being measured
    assert not step.is_late
    step.begins()
    now = 109.0
    assert not step.is_late
    now = 111.0
    assert step.is_late
    step.is_done()
    assert not step.is_late


def test_a_number_of_processes_below_one_is_refused() -> None:
    assert (most_processes({}), most_processes({"JOB_PROCESSES": "3"})) == (None, 3)
    with pytest.raises(JobFailed, match="JOB_PROCESSES"):
        most_processes({"JOB_PROCESSES": "0"})

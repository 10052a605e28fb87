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

from jobs.llm.distributed import StartupWatchdog, capture_rng_state, save_rng_states
from jobs.llm.hardware import DeviceConfig
from jobs.llm.oom import is_out_of_memory
from jobs.llm.parallelism import DeviceSlots, WorldSizeDecision, choose_world_size
from jobs.llm.trained_model import TrainedModel
from jobs.llm.training_context import TrainingContext, TrainingTask
from jobs.llm.worker_pool import EXIT_OOM, EXIT_PEER_LOST, WorkerFailed, worker_error, worker_pool
from jobs.runtime.batch_config import BatchConfig
from jobs.runtime.errors import JobFailed, failure_of
from jobs.runtime.save_policy import TrainingControlState
from jobs.runtime.settings import read_max_processes, visible_gpus, worker_environment
from schema.checkpoint import checkpoint_key
from schema.events import CheckpointRestored, EvaluationCompleted, MetricsLogged, SamplesGenerated
from tests.jobs.conftest import EventRecorder, load_saved_checkpoints, load_trainer, make_context, make_spec, messages
from tests.jobs.test_continuation import TrainingRun, assert_runs_identical, weights
from tests.jobs.test_grpo import LETTER_GRADER, SIMILARITY_GRADER, make_grpo_job, prompts
from tests.jobs.test_preferences import curve_points, evaluations_by_step, pairs, unpaired_rows
from tests.jobs.test_vision import VISION_BASE, make_square_rows
from tests.tiny_gemma_vision import build_tiny_gemma_vision

# Nine rows, one at a time, four before each step: the last step of an epoch has a single one, and the other process nothing.
HYPERPARAMETERS: dict[str, Any] = {"max_steps": -1, "epochs": 2, "learning_rate": 1e-3, "logging_steps": 1, "batch_size": 1}
HYPERPARAMETERS |= {"gradient_accumulation_steps": 4, "save_strategy": "steps", "save_steps": 2}


@pytest.fixture
def make_training_run(store: Path, tmp_path: Path) -> Callable[[str], TrainingRun]:
    return lambda name: TrainingRun(
        make_spec(store, method="Full", train=messages(9), hyperparameters=HYPERPARAMETERS, eval_config={"eval_strategy": "epoch"}),
        tmp_path / name,
    )


@pytest.fixture
def two_processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("JOB_PROCESSES", "2")
    yield
    assert not psutil.Process().children()
    assert not {"RANK", "WORLD_SIZE", "MASTER_PORT"} & os.environ.keys()


@dataclass
class KillWorkerListener:
    """A mirror that kills the other process in the middle of the training."""

    step: int
    killed_at: float = 0.0

    def log_metrics(self, event: MetricsLogged) -> None:
        if event.step == self.step:
            (other,) = psutil.Process().children()
            other.kill()
            self.killed_at = time.monotonic()

    def log_evaluation(self, event: EvaluationCompleted) -> None:
        pass

    def log_samples(self, event: SamplesGenerated) -> None:
        pass

    def log_checkpoint(self, folder: Path, step: int) -> None:
        pass

    def log_model(self, folder: Path) -> None:
        pass


@pytest.fixture
def single_process_run(make_training_run: Callable[[str], TrainingRun]) -> tuple[TrainingRun, TrainedModel]:
    """The training in one process."""
    story = make_training_run("alone")
    return story, story.finish()


@pytest.mark.usefixtures("single_process_run", "two_processes")
def test_two_processes_match_one_and_resume_after_kill_and_pause(
    make_training_run: Callable[[str], TrainingRun], single_process_run: tuple[TrainingRun, TrainedModel]
) -> None:
    unbroken = make_training_run("unbroken")
    model = unbroken.finish()
    assert unbroken.recorders[0].decisions["world_size"] == "2"
    assert_runs_close((unbroken, model), single_process_run)

    broken, killer = make_training_run("broken"), KillWorkerListener(3)
    with pytest.raises(JobFailed) as failed:
        broken.run_attempt(training_listener=killer)
    assert time.monotonic() - killer.killed_at < 20
    assert failed.value.failure.code == "out_of_memory"  # a kernel that has none left kills; below a single row there is no smaller batch
    assert broken.run_attempt(stop_after=5) == "pause"
    paused = {file.path: file.sha256 for file in load_saved_checkpoints(broken.spec)[-1].files}
    assert paused["rng_state_0.pth"] != paused["rng_state_1.pth"]
    assert_runs_identical(broken, broken.finish(), unbroken, model)
    assert [event.step for listener in broken.recorders for event in listener.events if isinstance(event, CheckpointRestored)] == [2, 5]


def assert_runs_close(two: tuple[TrainingRun, TrainedModel], one: tuple[TrainingRun, TrainedModel]) -> None:
    """The same, but for the order in which numbers are added up."""
    (ours, our_model), (theirs, their_model) = two, one
    assert our_model.train_tokens == their_model.train_tokens
    for point, other in zip(ours.recorders[0].points, theirs.recorders[0].points, strict=True):
        assert point.values["loss"] == pytest.approx(other.values["loss"], abs=1e-5)
        assert point.values["grad_norm"] == pytest.approx(other.values["grad_norm"], rel=1e-5)
    assert [(told.when, told.step) for told in ours.recorders[0].evaluations] == [
        (told.when, told.step) for told in theirs.recorders[0].evaluations
    ]
    expected = weights(their_model)
    assert max(float((part - expected[name]).abs().max()) for name, part in weights(our_model).items()) < 1e-5


# --- every way to train ------------------------------------------------------------------------------------------------

# Two batches for each process and then, of the last row, one for the two of them: with figures, a loss, and tokens that count once.
SHORT_TRAINING: dict[str, Any] = {
    "max_steps": -1,
    "epochs": 1,
    "batch_size": 2,
    "learning_rate": 1e-3,
    "lora_dropout": 0.0,
    "logging_steps": 1,
}
SHORT_TRAINING |= {"gradient_accumulation_steps": 4, "warmup_ratio": 0.0}
PREFERENCE_DATA: dict[str, Any] = {"dataset_type": "preference", "train": pairs(9), "held_out": pairs(2, first=100)}
# A group of four answers is made by both processes, and its rewards are compared.
GRPO_HYPERPARAMETERS: dict[str, Any] = {"batch_size": 1, "num_generations": 4, "max_completion_length": 6, "beta": 0.1, "max_steps": 3}

TRAINER_CONFIGS: dict[str, dict[str, Any]] = {
    "dpo": PREFERENCE_DATA
    | {
        "trainer_type": "dpo",
        "hyperparameters": SHORT_TRAINING | {"epochs": 2, "logging_steps": 3, "save_strategy": "steps", "save_steps": 2},
    },
    "orpo": PREFERENCE_DATA | {"trainer_type": "orpo", "hyperparameters": SHORT_TRAINING},
    "reward": PREFERENCE_DATA | {"trainer_type": "reward", "hyperparameters": SHORT_TRAINING},
    "kto": {"trainer_type": "kto", "dataset_type": "unpaired_preference", "train": unpaired_rows(9), "hyperparameters": SHORT_TRAINING}
    | {"held_out": unpaired_rows(3, first=100)},
    "vision": {
        "modality": "vision",
        "base_model_id": VISION_BASE,
        "train": [*make_square_rows(6), *messages(3)],
        "held_out": make_square_rows(2, first=500),
    }
    | {"hyperparameters": SHORT_TRAINING | {"train_vision_tower": True}},  # which some batches leave aside
    "grpo": make_grpo_job(LETTER_GRADER, SIMILARITY_GRADER, train=prompts(2))
    | {"hyperparameters": SHORT_TRAINING | GRPO_HYPERPARAMETERS | {"mask_truncated_completions": False}},
}


@pytest.fixture
def make_distributed_run(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, int], TrainingRun]:
    """A training of that kind, under a name, in so many processes; to be told."""

    def begin(way: str, name: str, processes: int) -> TrainingRun:
        monkeypatch.setenv("JOB_PROCESSES", str(processes))
        seeing = store / "pretrained_weights/huggingface" / VISION_BASE
        if way == "vision" and not seeing.exists():
            build_tiny_gemma_vision(seeing)
        return TrainingRun(make_spec(store, eval_config={"eval_strategy": "epoch"}, **copy.deepcopy(TRAINER_CONFIGS[way])), tmp_path / name)

    return begin


def assert_same_training(ours: tuple[TrainingRun, TrainedModel], theirs: tuple[TrainingRun, TrainedModel]) -> None:
    """Every figure of the curve and of the measurements, and every weight: the same, but for the order in which numbers are added up."""
    (two, our_model), (one, their_model) = ours, theirs
    assert two.recorders[0].decisions["world_size"] == "2"
    assert two.recorders[0].warnings == one.recorders[0].warnings
    points, expected = curve_points(two), curve_points(one)
    assert points.keys() == expected.keys() != set()
    for step, values in points.items():
        assert values == pytest.approx(expected[step], rel=1e-5, abs=1e-5), step
    found, wanted = evaluations_by_step(two), evaluations_by_step(one)
    assert found.keys() == wanted.keys()
    assert [of.eval_loss for of in found.values()] == pytest.approx([of.eval_loss for of in wanted.values()], rel=1e-5, abs=1e-5)
    assert our_model.train_tokens == their_model.train_tokens > 0
    learned = weights(their_model)
    # A fifth of what a step moves a weight: where a gradient is next to nothing, Adam makes much of how it was rounded.
    assert max(float((part - learned[name]).abs().max()) for name, part in weights(our_model).items()) < 2e-4


# Always one whose batches are shared, and the one that shares as the library does: each start of a process takes seconds.
NOT_NIGHTLY = ("kto", "grpo")


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[] if way in NOT_NIGHTLY else pytest.mark.nightly) for way in TRAINER_CONFIGS if way != "dpo"]
)
def test_two_processes_match_one_for_every_trainer(make_distributed_run: Callable[[str, str, int], TrainingRun], way: str) -> None:
    alone = make_distributed_run(way, "alone", 1)
    theirs = (alone, alone.finish())
    shared = make_distributed_run(way, "shared", 2)
    assert_same_training((shared, shared.finish()), theirs)
    assert not psutil.Process().children()


def test_metrics_of_both_processes_are_logged_after_resume(
    make_distributed_run: Callable[[str, str, int], TrainingRun], store: Path
) -> None:
    alone = make_distributed_run("dpo", "alone", 1)
    theirs = (alone, alone.finish())
    unbroken = make_distributed_run("dpo", "unbroken", 2)
    model = unbroken.finish()
    assert_same_training((unbroken, model), theirs)
    resumed = TrainingRun(unbroken.spec, unbroken.workdir / "resumed", [*unbroken.recorders])
    shutil.rmtree(store / checkpoint_key(resumed.spec.checkpoints_prefix, attempt=1, step=4))
    assert_runs_identical(resumed, resumed.finish(), unbroken, model)
    again = resumed.recorders[1]
    assert [event.step for event in again.events if isinstance(event, CheckpointRestored)] == [2]  # at an epoch's end, and before a point
    assert curve_points(TrainingRun(resumed.spec, resumed.workdir, [again])) == curve_points(unbroken)


def raise_invalid_data(_: TrainingContext) -> TrainingTask:
    raise JobFailed("invalid_data", "image 1 in row 5 of train is broken", "leave it out")


def test_worker_failure_keeps_code_and_hint(store: Path, tmp_path: Path) -> None:
    spec = make_spec(store, held_out=[])
    machine = DeviceConfig("cpu", None, autocast=False, on_gpu=False, gradient_checkpointing=False)
    ground = TrainingContext(
        spec.training_config,
        make_context(spec, tmp_path),
        tmp_path,
        {},
        None,
        uses_default_chat_template=False,
        device_config=machine,
        resume_checkpoint=None,
    )
    told = {"state": TrainingControlState(batch_size=1, gradient_accumulation_steps=2), "total_steps": 1, "checkpoint": None}
    with pytest.raises(JobFailed, match="row 5") as failed, worker_pool(ground, raise_invalid_data, DeviceSlots(2), told):
        pass
    assert (failed.value.failure.code, failed.value.failure.hint) == ("invalid_data", "leave it out")


@pytest.mark.usefixtures("two_processes")
def test_failed_worker_start_falls_back_to_single_process_fallback(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHOME", "/nowhere")
    record = EventRecorder()
    spec = make_spec(store, held_out=[], hyperparameters={"max_steps": 2, "gradient_accumulation_steps": 2})
    model = load_trainer(spec)(spec.training_config, make_context(spec, tmp_path, record))
    assert model.step == 2
    assert "process 1 of the training ended with code 1" in record.warnings["single_process_fallback"]


# --- without a second process ------------------------------------------------------------------------------------------


def test_each_process_restores_its_own_rng_state(tmp_path: Path) -> None:
    import torch
    from transformers import Trainer
    from transformers.training_args import ParallelMode

    states, drawn = [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append(capture_rng_state())
        drawn.append(torch.rand(3))
    save_rng_states(tmp_path, states)
    for rank in (1, 0):
        arguments = SimpleNamespace(world_size=2, process_index=rank, parallel_mode=ParallelMode.DISTRIBUTED)
        Trainer._load_rng_state(SimpleNamespace(args=arguments), str(tmp_path))
        assert torch.rand(3).equal(drawn[rank])


def test_unshareable_steps_use_single_process_fallback_with_advice(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOB_PROCESSES", "2")
    record = EventRecorder()
    spec = make_spec(store, held_out=[], hyperparameters={"max_steps": 1, "gradient_accumulation_steps": 3})
    load_trainer(spec)(spec.training_config, make_context(spec, tmp_path, record))
    assert record.decisions["world_size"] == "1"
    assert "gradient_accumulation_steps 3 is not divisible" in record.warnings["idle_cpu_slots"]
    assert "multiple of 2" in record.warnings["idle_cpu_slots"]


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
def test_effective_batch_is_independent_of_process_count(plan: tuple[int, int], items: int, most: int, processes: int, idle: str) -> None:
    found = choose_world_size(BatchConfig(*plan), items, most)
    assert found.world_size == processes
    assert plan[1] % processes == 0
    assert (idle in found.idle_reason) if idle else found == WorldSizeDecision(processes, found.reason)


@pytest.mark.parametrize("code", [EXIT_OOM, -signal.SIGKILL])
def test_killed_or_oom_worker_reduces_batch_size(code: int) -> None:
    assert is_out_of_memory(worker_error({1: 1, 2: code}))  # pyright: ignore[reportArgumentType]


def test_other_worker_exit_fails_attempt_and_names_process() -> None:
    failed = worker_error({2: 1})
    assert isinstance(failed, WorkerFailed)
    assert "process 2" in failure_of(failed).message
    assert EXIT_PEER_LOST not in (0, 1, EXIT_OOM)


def test_worker_environment_has_own_gpu_and_no_token() -> None:
    found = worker_environment(1, 2, 4711, "3", {"JOB_TOKEN": "t0ken", "CUDA_VISIBLE_DEVICES": "2", "PATH": "/bin"})
    assert found.items() >= {"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "4711", "CUDA_VISIBLE_DEVICES": "3", "PATH": "/bin"}.items()
    assert "t0ken" not in found.values()


@pytest.mark.parametrize(
    ("environment", "names"),
    [
        ({}, ("0", "1", "2", "3")),
        ({"JOB_VISIBLE_GPUS": "2, 3"}, ("2", "3")),
        ({"JOB_VISIBLE_GPUS": "MIG-a,MIG-b"}, ("MIG-a",)),
        ({"JOB_VISIBLE_GPUS": ""}, ("",)),
    ],
)
def test_visible_gpus_come_from_job_gpus(environment: dict[str, str], names: tuple[str, ...]) -> None:
    assert visible_gpus(4, environment) == names


def test_first_step_timeout_applies_only_during_the_step() -> None:
    now = 0.0
    step = StartupWatchdog(timeout_s=10.0, clock=lambda: now)
    now = 100.0  # the base is being measured
    assert not step.has_timed_out
    step.start()
    now = 109.0
    assert not step.has_timed_out
    now = 111.0
    assert step.has_timed_out
    step.stop()
    assert not step.has_timed_out


def test_process_count_below_one_is_rejected() -> None:
    assert (read_max_processes({}), read_max_processes({"JOB_PROCESSES": "3"})) == (None, 3)
    with pytest.raises(JobFailed, match="JOB_PROCESSES"):
        read_max_processes({"JOB_PROCESSES": "0"})

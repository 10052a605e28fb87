"""Training in several processes: the same result as in one, also after a worker fails or is killed."""

import copy
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from jobs.llm.chat_format import ChatFormat
from jobs.llm.distributed import StartupWatchdog, capture_rng_state, restore_rng_state, save_rng_states
from jobs.llm.hardware import DeviceConfig
from jobs.llm.json_objects import exchange_objects_as_json
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
from tests.jobs.conftest import EventRecorder, load_saved_checkpoints, load_trainer, load_weights, make_context, make_spec, messages
from tests.jobs.test_continuation import TrainingRun, assert_runs_identical
from tests.jobs.test_grpo import LETTER_GRADER, SIMILARITY_GRADER, make_grpo_job, prompts
from tests.jobs.test_preferences import curve_points, evaluations_by_step, pairs, unpaired_rows
from tests.jobs.test_vision import VISION_BASE, make_square_rows
from tests.tiny_gemma_vision import build_tiny_gemma_vision

# Nine batches of one row, four per step: the last step of an epoch has one batch, and the second process gets padding only.
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
    """A listener that kills the worker process at a step."""

    step: int
    killed_at: float = 0.0

    def log_metrics(self, event: MetricsLogged) -> None:
        if event.step == self.step:
            (worker,) = psutil.Process().children()
            worker.kill()
            self.killed_at = time.monotonic()

    def log_evaluation(self, event: EvaluationCompleted) -> None:
        pass

    def log_samples(self, event: SamplesGenerated) -> None:
        pass

    def log_checkpoint(self, folder: Path, step: int) -> None:
        pass

    def log_model(self, folder: Path) -> None:
        pass


@dataclass
class SocketListener:
    """A listener that records the addresses on which the processes of the training listen, and the permissions of their meeting place."""

    workdir: Path
    addresses: set[str] = field(default_factory=set)
    connections: int = 0
    folder_modes: set[int] = field(default_factory=set)

    def log_metrics(self, event: MetricsLogged) -> None:
        process = psutil.Process()
        for connection in [each for part in (process, *process.children(recursive=True)) for each in part.net_connections("inet")]:
            self.connections += connection.status == psutil.CONN_ESTABLISHED
            if connection.status == psutil.CONN_LISTEN:
                self.addresses.add(connection.laddr.ip)
        self.folder_modes |= {path.stat().st_mode & 0o777 for path in self.workdir.glob("processes-*")}

    def log_evaluation(self, event: EvaluationCompleted) -> None:
        pass

    def log_samples(self, event: SamplesGenerated) -> None:
        pass

    def log_checkpoint(self, folder: Path, step: int) -> None:
        pass

    def log_model(self, folder: Path) -> None:
        pass


@pytest.mark.usefixtures("two_processes")
def test_processes_listen_on_loopback_only_and_send_no_pickles(store: Path, tmp_path: Path) -> None:
    from torch.distributed import distributed_c10d

    spec = make_spec(store, held_out=[], hyperparameters={"max_steps": 2, "batch_size": 1, "gradient_accumulation_steps": 2})
    context, sockets = make_context(spec, tmp_path, record := EventRecorder()), SocketListener(tmp_path)
    context.listeners.append(sockets)
    load_trainer(spec)(spec.training_config, context)
    assert record.decisions["world_size"] == "2"
    assert sockets.connections > 0
    assert sockets.addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert sockets.folder_modes == {0o700}
    assert not list(tmp_path.glob("processes-*"))
    assert "pickle" not in f"{distributed_c10d._pickler.__module__} {distributed_c10d._unpickler.__module__}"


def test_collectives_of_objects_refuse_what_is_not_json() -> None:
    import pickle

    import torch
    from torch.distributed import distributed_c10d

    exchange_objects_as_json()
    content, size = distributed_c10d._object_to_tensor([["a", 1.5, None]], torch.device("cpu"), None)
    assert distributed_c10d._tensor_to_object(content, size, None) == [["a", 1.5, None]]
    with pytest.raises(TypeError, match="not JSON serializable"):
        distributed_c10d._object_to_tensor(Path("a"), torch.device("cpu"), None)
    attack = torch.frombuffer(bytearray(pickle.dumps(KillWorkerListener(1))), dtype=torch.uint8)
    with pytest.raises(ValueError, match="decode"):
        distributed_c10d._tensor_to_object(attack, len(attack), None)


@pytest.fixture
def single_process_run(make_training_run: Callable[[str], TrainingRun]) -> tuple[TrainingRun, TrainedModel]:
    """The training in a single process."""
    run = make_training_run("alone")
    return run, run.finish()


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
    assert failed.value.failure.code == "out_of_memory"  # SIGKILL counts as out of memory, and a batch of one row cannot be reduced
    assert broken.recorders[0].decisions["gradient_checkpointing"] == "true"  # which was tried before giving up
    assert broken.run_attempt(stop_after=5) == "pause"
    paused = {file.path: file.sha256 for file in load_saved_checkpoints(broken.spec)[-1].files}
    assert paused["rng_state_0.pth"] != paused["rng_state_1.pth"]
    assert_runs_identical(broken, broken.finish(), unbroken, model)
    assert [event.step for recorder in broken.recorders for event in recorder.events if isinstance(event, CheckpointRestored)] == [2, 2, 5]


def assert_runs_close(two: tuple[TrainingRun, TrainedModel], one: tuple[TrainingRun, TrainedModel]) -> None:
    """Fail unless logged metrics, evaluations and weights are equal up to the order of summation."""
    (ours, our_model), (theirs, their_model) = two, one
    assert our_model.train_tokens == their_model.train_tokens
    for point, other in zip(ours.recorders[0].points, theirs.recorders[0].points, strict=True):
        assert point.values["loss"] == pytest.approx(other.values["loss"], abs=1e-5)
        assert point.values["grad_norm"] == pytest.approx(other.values["grad_norm"], rel=1e-5)
    assert [(event.when, event.step) for event in ours.recorders[0].evaluations] == [
        (event.when, event.step) for event in theirs.recorders[0].evaluations
    ]
    expected = load_weights(their_model.folder)
    assert max(float((part - expected[name]).abs().max()) for name, part in load_weights(our_model.folder).items()) < 1e-5


# --- every trainer type ------------------------------------------------------------------------------------------------

# Nine rows in batches of two: two batches for each process, then a last batch of one row in one process and padding in the other.
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
# Both processes generate completions of the same group of four.
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
    | {"hyperparameters": SHORT_TRAINING | {"train_vision_tower": True}},  # batches without images do not use the tower
    "grpo": make_grpo_job(LETTER_GRADER, SIMILARITY_GRADER, train=prompts(2))
    | {"hyperparameters": SHORT_TRAINING | GRPO_HYPERPARAMETERS | {"mask_truncated_completions": False}},
}


@pytest.fixture
def make_distributed_run(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, int], TrainingRun]:
    """Makes the job of a trainer type, to run in `processes` processes."""

    def make(trainer: str, name: str, processes: int) -> TrainingRun:
        monkeypatch.setenv("JOB_PROCESSES", str(processes))
        vision_base = store / "pretrained_weights/huggingface" / VISION_BASE
        if trainer == "vision" and not vision_base.exists():
            build_tiny_gemma_vision(vision_base)
        return TrainingRun(
            make_spec(store, eval_config={"eval_strategy": "epoch"}, **copy.deepcopy(TRAINER_CONFIGS[trainer])), tmp_path / name
        )

    return make


def assert_same_training(ours: tuple[TrainingRun, TrainedModel], theirs: tuple[TrainingRun, TrainedModel]) -> None:
    """Like `assert_runs_close`, for every logged metric and for trainings with warnings."""
    (two, our_model), (one, their_model) = ours, theirs
    assert two.recorders[0].decisions["world_size"] == "2"
    assert two.recorders[0].warnings == one.recorders[0].warnings
    points, expected = curve_points(two), curve_points(one)
    assert points.keys() == expected.keys() != set()
    for step, values in points.items():
        assert values == pytest.approx(expected[step], rel=1e-5, abs=1e-5), step
    ours_by_step, theirs_by_step = evaluations_by_step(two), evaluations_by_step(one)
    assert ours_by_step.keys() == theirs_by_step.keys()
    expected_losses = [metrics.eval_loss for metrics in theirs_by_step.values()]
    assert [metrics.eval_loss for metrics in ours_by_step.values()] == pytest.approx(expected_losses, rel=1e-5, abs=1e-5)
    assert our_model.train_tokens == their_model.train_tokens > 0
    expected_weights = load_weights(their_model.folder)
    # The tolerance is a fifth of a step: for gradients near zero, Adam amplifies rounding differences.
    assert max(float((part - expected_weights[name]).abs().max()) for name, part in load_weights(our_model.folder).items()) < 2e-4


# One trainer of each loss reduction that test_two_processes_match_one_and_resume_after_kill_and_pause does not cover; starting
# processes takes seconds, so the other trainers run nightly.
ALWAYS_RUN = ("kto", "grpo")


@pytest.mark.parametrize(
    "trainer",
    [pytest.param(name, marks=[] if name in ALWAYS_RUN else pytest.mark.nightly) for name in TRAINER_CONFIGS if name != "dpo"],
)
def test_two_processes_match_one_for_every_trainer(make_distributed_run: Callable[[str, str, int], TrainingRun], trainer: str) -> None:
    alone = make_distributed_run(trainer, "alone", 1)
    theirs = (alone, alone.finish())
    shared = make_distributed_run(trainer, "shared", 2)
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
    recorder = resumed.recorders[1]
    # Step 2 is at the end of an epoch and between two logged steps.
    assert [event.step for event in recorder.events if isinstance(event, CheckpointRestored)] == [2]
    assert curve_points(TrainingRun(resumed.spec, resumed.workdir, [recorder])) == curve_points(unbroken)


def raise_invalid_data(_: TrainingContext) -> TrainingTask:
    raise JobFailed("invalid_data", "image 1 in row 5 of train is broken", "leave it out")


def test_worker_failure_keeps_code_and_hint(store: Path, tmp_path: Path) -> None:
    spec = make_spec(store, held_out=[])
    device_config = DeviceConfig("cpu", None, autocast=False, on_gpu=False, gradient_checkpointing=False)
    training = TrainingContext(
        spec.training_config,
        make_context(spec, tmp_path),
        tmp_path,
        {},
        None,
        chat_format=ChatFormat("raw", "raw", None, None, (), (), turn_tokens_are_trained=True),
        device_config=device_config,
        resume_checkpoint=None,
    )
    resume_args = {"state": TrainingControlState(details=BatchConfig(1, 2).details), "total_steps": 1, "checkpoint": None}
    with pytest.raises(JobFailed, match="row 5") as failed, worker_pool(training, raise_invalid_data, DeviceSlots(2), resume_args):
        pass
    assert (failed.value.failure.code, failed.value.failure.hint) == ("invalid_data", "leave it out")


@pytest.mark.usefixtures("two_processes")
def test_failed_worker_start_falls_back_to_single_process(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text("import os; os._exit(1)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    record = EventRecorder()
    spec = make_spec(store, held_out=[], hyperparameters={"max_steps": 2, "gradient_accumulation_steps": 2})
    model = load_trainer(spec)(spec.training_config, make_context(spec, tmp_path, record))
    assert model.step == 2
    assert "process 1 of the training ended with code 1" in record.warnings["single_process_fallback"]


# --- without worker processes ------------------------------------------------------------------------------------------


def test_each_process_restores_its_own_rng_state(tmp_path: Path) -> None:
    import torch
    from transformers import Trainer
    from transformers.training_args import ParallelMode

    states, drawn = [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append(restore_rng_state(json.loads(json.dumps(capture_rng_state()))))  # as it is sent
        drawn.append(torch.rand(3))
    save_rng_states(tmp_path, states)
    for rank in (1, 0):
        arguments = SimpleNamespace(world_size=2, process_index=rank, parallel_mode=ParallelMode.DISTRIBUTED)
        Trainer._load_rng_state(SimpleNamespace(args=arguments), str(tmp_path))
        assert torch.rand(3).equal(drawn[rank])


def test_indivisible_steps_train_in_single_process_with_advice(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOB_PROCESSES", "2")
    record = EventRecorder()
    spec = make_spec(store, held_out=[], hyperparameters={"max_steps": 1, "gradient_accumulation_steps": 3})
    load_trainer(spec)(spec.training_config, make_context(spec, tmp_path, record))
    assert record.decisions["world_size"] == "1"
    assert "gradient_accumulation_steps 3 is not divisible" in record.warnings["idle_cpu_slots"]
    assert "multiple of 2" in record.warnings["idle_cpu_slots"]


@pytest.mark.parametrize(
    ("batch", "examples", "max_world_size", "world_size", "idle_reason"),
    [
        ((2, 4), 100, 4, 4, ""),
        ((2, 4), 100, 8, 4, "multiple of 8"),
        ((2, 6), 100, 4, 3, "multiple of 4"),
        ((2, 1), 100, 2, 1, "multiple of 2"),
        ((2, 4), 5, 4, 2, "only 3 batches"),
    ],
)
def test_effective_batch_is_independent_of_process_count(
    batch: tuple[int, int], examples: int, max_world_size: int, world_size: int, idle_reason: str
) -> None:
    decision = choose_world_size(BatchConfig(*batch), examples, max_world_size)
    assert decision.world_size == world_size
    assert batch[1] % world_size == 0
    assert (idle_reason in decision.idle_reason) if idle_reason else decision == WorldSizeDecision(world_size, decision.reason)


@pytest.mark.parametrize("code", [EXIT_OOM, -signal.SIGKILL])
def test_killed_or_oom_worker_reduces_batch_size(code: int) -> None:
    assert is_out_of_memory(worker_error({1: 1, 2: code}))  # pyright: ignore[reportArgumentType]


def test_other_worker_exit_fails_attempt_and_names_process() -> None:
    failed = worker_error({2: 1})
    assert isinstance(failed, WorkerFailed)
    assert "process 2" in failure_of(failed).message
    assert EXIT_PEER_LOST not in (0, 1, EXIT_OOM)


def test_worker_environment_has_own_gpu_and_no_token() -> None:
    secrets = {"JOB_TOKEN": "t0ken", "HF_TOKEN": "t0ken", "WANDB_API_KEY": "t0ken", "AWS_SECRET_ACCESS_KEY": "t0ken"}
    environment = worker_environment(1, 2, "3", secrets | {"CUDA_VISIBLE_DEVICES": "2", "PATH": "/bin"})
    assert environment.items() >= {"RANK": "1", "WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "3", "PATH": "/bin"}.items()
    assert "t0ken" not in environment.values()
    assert "MASTER_PORT" not in environment


@pytest.mark.parametrize(
    ("environment", "names"),
    [
        ({}, ("0", "1", "2", "3")),
        ({"JOB_VISIBLE_GPUS": "2, 3"}, ("2", "3")),
        ({"JOB_VISIBLE_GPUS": "MIG-a,MIG-b"}, ("MIG-a",)),
        ({"JOB_VISIBLE_GPUS": ""}, ("",)),
    ],
)
def test_visible_gpus_come_from_job_visible_gpus(environment: dict[str, str], names: tuple[str, ...]) -> None:
    assert visible_gpus(4, environment) == names


def test_first_step_timeout_applies_only_during_the_step() -> None:
    now = 0.0
    watchdog = StartupWatchdog(timeout_s=10.0, clock=lambda: now)
    now = 100.0  # the base is being evaluated
    assert not watchdog.has_timed_out
    watchdog.start()
    now = 109.0
    assert not watchdog.has_timed_out
    now = 111.0
    assert watchdog.has_timed_out
    watchdog.stop()
    assert not watchdog.has_timed_out


def test_process_count_below_one_is_rejected() -> None:
    assert (read_max_processes({}), read_max_processes({"JOB_PROCESSES": "3"})) == (None, 3)
    with pytest.raises(JobFailed, match="JOB_PROCESSES"):
        read_max_processes({"JOB_PROCESSES": "0"})

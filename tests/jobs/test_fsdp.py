"""Training with a sharded model (FSDP): the same result as in a single process, and checkpoints that any process count resumes."""

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import psutil
import pytest

from jobs.llm.parallelism import MemoryEstimate, choose_parallelism, fsdp_unsupported_reason
from jobs.llm.trained_model import TrainedModel
from jobs.runtime.errors import JobFailed
from jobs.runtime.settings import read_parallelism
from schema.checkpoint import checkpoints_prefix
from schema.events import CheckpointRestored, MetricsLogged, SamplesGenerated
from tests.jobs.conftest import load_saved_checkpoints, load_weights, make_spec, messages
from tests.jobs.test_continuation import TrainingRun, assert_runs_identical
from tests.jobs.test_distributed import HYPERPARAMETERS, KillWorkerListener, assert_runs_close


@pytest.fixture
def make_training_run(store: Path, tmp_path: Path) -> Callable[..., TrainingRun]:
    def run(name: str, hyperparameters: dict[str, Any] | None = None, **config: Any) -> TrainingRun:
        config = {"method": "Full", "eval_config": {"eval_strategy": "epoch"}} | config
        return TrainingRun(
            make_spec(store, train=messages(9), hyperparameters=HYPERPARAMETERS | (hyperparameters or {}), **config), tmp_path / name
        )

    return run


@pytest.fixture
def set_fsdp(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], None]]:
    """Selects two processes that shard the model, or one."""
    monkeypatch.setenv("JOB_PARALLELISM", "fsdp")
    yield lambda sharded: monkeypatch.setenv("JOB_PROCESSES", "2" if sharded else "1")
    assert not psutil.Process().children()
    assert not {"RANK", "WORLD_SIZE", "MASTER_PORT"} & os.environ.keys()


@dataclass
class ShardSizeListener(KillWorkerListener):
    """A listener that records which fraction of the model and optimizer this process holds. It kills no worker."""

    step: int = -1
    shard_fractions: list[float] = field(default_factory=list)

    def log_metrics(self, event: MetricsLogged) -> None:
        from torch.distributed.tensor import DTensor
        from torch.optim import AdamW

        optimizer = [instance for instance in gc.get_objects() if type(instance) is AdamW][-1]  # an earlier one may not be collected yet
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        parts = weights + [optimizer.state[weight][moment] for weight in weights for moment in ("exp_avg", "exp_avg_sq")]
        assert all(isinstance(part, DTensor) for part in parts)
        self.shard_fractions.append(sum(part.to_local().nbytes for part in parts) / sum(part.nbytes for part in parts))


def test_fsdp_matches_single_process_and_checkpoints_resume_anywhere(
    make_training_run: Callable[..., TrainingRun], set_fsdp: Callable[[bool], None], store: Path, tmp_path: Path
) -> None:
    set_fsdp(False)
    alone = make_training_run("alone")
    expected = alone.finish()
    set_fsdp(True)
    unbroken, listener = make_training_run("unbroken"), ShardSizeListener()
    model = unbroken.run_attempt(training_listener=listener)
    assert isinstance(model, TrainedModel)
    assert_runs_close((unbroken, model), (alone, expected))
    assert unbroken.recorders[0].decisions["parallelism"] == "fsdp"
    assert len(listener.shard_fractions) == 6
    assert all(0.45 < fraction < 0.55 for fraction in listener.shard_fractions)

    broken = make_training_run("broken")
    with pytest.raises(JobFailed):
        broken.run_attempt(training_listener=KillWorkerListener(3))
    spec = broken.spec.model_copy(update={"checkpoints_prefix": checkpoints_prefix(f"{broken.spec.job_id}-copied", None)})
    copied = TrainingRun(spec, tmp_path / "copied", list(broken.recorders))
    shutil.copytree(store / broken.spec.checkpoints_prefix, store / copied.spec.checkpoints_prefix)
    assert_runs_identical(broken, broken.finish(), unbroken, model)
    assert resumed_steps(broken) == [2, 2]  # a killed process counts as out of memory: first gradient checkpointing was turned on

    set_fsdp(False)
    assert max_weight_difference(copied.finish(), expected) < 1e-5
    assert resumed_steps(copied) == [2, 2]


def resumed_steps(training_run: TrainingRun) -> list[int]:
    return [event.step for recorder in training_run.recorders for event in recorder.events if isinstance(event, CheckpointRestored)]


def max_weight_difference(one: TrainedModel, other: TrainedModel) -> float:
    ours, theirs = load_weights(one.folder), load_weights(other.folder)
    assert ours.keys() == theirs.keys()
    return max(float((part - theirs[name]).abs().max()) for name, part in ours.items())


@pytest.fixture
def oom_in_evaluation(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Memory runs out in a middle layer when more than one row is evaluated. The value lists the batch sizes that failed."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention

    forward, failed_batch_sizes = Gemma3Attention.forward, []

    def run_out_of_memory(part: Any, *, hidden_states: Any, **options: Any) -> Any:
        if not part.training and part.layer_idx == 3 and len(hidden_states) > 1:
            failed_batch_sizes.append(len(hidden_states))
            raise RuntimeError("CUDA out of memory")
        return forward(part, hidden_states=hidden_states, **options)

    monkeypatch.setattr(Gemma3Attention, "forward", run_out_of_memory)
    return failed_batch_sizes


def test_best_adapter_with_fsdp_is_evaluated_despite_oom_and_published(
    make_training_run: Callable[..., TrainingRun], set_fsdp: Callable[[bool], None], oom_in_evaluation: list[int]
) -> None:
    # The first step has a learning rate of 0; the later steps make the model worse.
    hyperparameters = {"gradient_checkpointing": True, "max_steps": 3, "learning_rate": 1.0, "save_strategy": "no"}
    hyperparameters |= {"batch_size": 2, "gradient_accumulation_steps": 2}
    eval_config = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "sample_prompts": 1, "max_new_tokens": 4}
    set_fsdp(True)
    run = make_training_run("adapter", hyperparameters, method="LoRA", eval_config=eval_config)
    model = run.finish()
    evaluations = run.evaluations
    assert oom_in_evaluation == [2] * 5  # once in each evaluation, which continues with single rows
    best = min((1, 2, 3), key=lambda step: evaluations["during", step])
    assert model.step == best < 3
    assert evaluations["after", best] == evaluations["during", best]
    sampled = [event.when for event in run.recorders[0].events if isinstance(event, SamplesGenerated)]
    assert sampled == ["before", "during", "during", "during", "after"]
    (checkpoint,) = [checkpoint for checkpoint in load_saved_checkpoints(run.spec) if checkpoint.step == best]
    files = {file.path: file.sha256 for file in checkpoint.files}
    assert files.keys() >= {"optimizer.pt", "rng_state_0.pth", "rng_state_1.pth"}
    assert files["adapter_model.safetensors"] == sha256((model.folder / "adapter_model.safetensors").read_bytes()).hexdigest()


# --- without worker processes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world_size", "unsupported_reason", "requested", "memory", "value"),
    [
        (1, "", "fsdp", None, "none"),
        (4, "", None, MemoryEstimate(full_model_bytes=30, shard_bytes=10, available_bytes=40), "ddp"),
        (4, "", None, MemoryEstimate(full_model_bytes=50, shard_bytes=20, available_bytes=40), "fsdp"),
        (4, "", None, MemoryEstimate(full_model_bytes=500, shard_bytes=200, available_bytes=40), "ddp"),
        (4, "not supported", None, MemoryEstimate(full_model_bytes=50, shard_bytes=20, available_bytes=40), "ddp"),
        (4, "not supported", "fsdp", None, "ddp"),
        (4, "", "fsdp", MemoryEstimate(full_model_bytes=30, shard_bytes=10, available_bytes=40), "fsdp"),
        (4, "", "ddp", MemoryEstimate(full_model_bytes=50, shard_bytes=20, available_bytes=40), "ddp"),
        (4, "", None, None, "ddp"),
    ],
)
def test_fsdp_is_chosen_by_memory_or_on_request(
    world_size: int, unsupported_reason: str, requested: Any, memory: MemoryEstimate | None, value: str
) -> None:
    decision = choose_parallelism(world_size, unsupported_reason, requested, memory)
    assert decision.value == value
    assert unsupported_reason in decision.reason
    assert decision.reason


def test_fsdp_is_not_used_for_qlora_or_other_trainers(store: Path) -> None:
    def unsupported_reason(**config: Any) -> str:
        return fsdp_unsupported_reason(make_spec(store, **config).training_config)

    assert not unsupported_reason(method="Full")
    assert not unsupported_reason(method="LoRA")
    assert "4-bit" in unsupported_reason(method="QLoRA")
    assert "sft" in unsupported_reason(trainer_type="dpo", dataset_type="preference")


def test_only_known_parallelism_values_are_accepted() -> None:
    assert (read_parallelism({}), read_parallelism({"JOB_PARALLELISM": "fsdp"})) == (None, "fsdp")
    with pytest.raises(JobFailed, match="JOB_PARALLELISM"):
        read_parallelism({"JOB_PARALLELISM": "zero"})

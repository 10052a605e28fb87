"""A training whose model is divided among its processes: the one that a single process makes, and its checkpoints are anybody's."""

import gc
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import psutil
import pytest

from jobs.errors import JobFailed
from jobs.settings import parallelism
from jobs.trained import TrainedModel
from jobs.trainers.model import training_bytes
from jobs.trainers.sharded import Room, obstacle_of, parallelism_of
from schema.checkpoint import checkpoints_prefix
from schema.events import Metrics, Resumed, Sampled
from tests.jobs.conftest import a_spec, messages, saved
from tests.jobs.test_continuation import Story, assert_same, weights
from tests.jobs.test_several import KNOBS, Killer, assert_close


@pytest.fixture
def begin(store: Path, tmp_path: Path) -> Callable[..., Story]:
    def run(name: str, hyperparameters: dict[str, Any] | None = None, **config: Any) -> Story:
        config = {"method": "Full", "eval_config": {"eval_strategy": "epoch"}} | config
        return Story(a_spec(store, train=messages(9), hyperparameters=KNOBS | (hyperparameters or {}), **config), tmp_path / name)

    return run


@pytest.fixture
def divide(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], None]]:
    """Lets what follows train in two processes that divide the model, or in one."""
    monkeypatch.setenv("JOB_PARALLELISM", "fsdp")
    yield lambda wanted: monkeypatch.setenv("JOB_PROCESSES", "2" if wanted else "1")
    assert not psutil.Process().children()
    assert not {"RANK", "WORLD_SIZE", "MASTER_PORT"} & os.environ.keys()


@dataclass
class Scales(Killer):
    """A mirror that weighs what of the model and its optimizer is in this process, and kills nobody."""

    step: int = -1
    shares: list[float] = field(default_factory=list)

    def metrics(self, event: Metrics) -> None:
        from torch.distributed.tensor import DTensor
        from torch.optim import AdamW

        optimizer = [one for one in gc.get_objects() if type(one) is AdamW][-1]  # the one before may still be there
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        parts = weights + [optimizer.state[weight][moment] for weight in weights for moment in ("exp_avg", "exp_avg_sq")]
        assert all(isinstance(part, DTensor) for part in parts)
        self.shares.append(sum(part.to_local().nbytes for part in parts) / sum(part.nbytes for part in parts))


def test_a_divided_model_is_trained_as_a_whole_one_and_its_checkpoint_is_gone_on_with_by_two_processes_or_one(
    begin: Callable[..., Story], divide: Callable[[bool], None], store: Path, tmp_path: Path
) -> None:
    divide(False)
    alone = begin("alone")
    expected = alone.finish()
    divide(True)
    unbroken, scales = begin("unbroken"), Scales()
    model = unbroken.attempt(mirror=scales)
    assert isinstance(model, TrainedModel)
    assert_close((unbroken, model), (alone, expected))
    assert unbroken.heard[0].decisions["parallelism"] == "fsdp"
    assert len(scales.shares) == 6
    assert all(0.45 < share < 0.55 for share in scales.shares)

    broken = begin("broken")
    with pytest.raises(JobFailed):
        broken.attempt(mirror=Killer(3))
    spec = broken.spec.model_copy(update={"checkpoints": checkpoints_prefix(f"{broken.spec.job_id}-passed-on", None)})
    passed_on = Story(spec, tmp_path / "passed-on", list(broken.heard))
    shutil.copytree(store / broken.spec.checkpoints, store / passed_on.spec.checkpoints)
    assert_same(broken, broken.finish(), unbroken, model)
    assert resumed(broken) == [2]

    divide(False)
    assert weights_apart(passed_on.finish(), expected) < 1e-5
    assert resumed(passed_on) == [2]


def resumed(story: Story) -> list[int]:
    return [event.step for listener in story.heard for event in listener.events if isinstance(event, Resumed)]


def weights_apart(one: TrainedModel, other: TrainedModel) -> float:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    return max(float((part - theirs[name]).abs().max()) for name, part in ours.items())


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Memory runs out in rank 0 in the midst of a model that measures more than one row; what happened so far."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention

    forward, happened = Gemma3Attention.forward, []

    def short(part: Any, *, hidden_states: Any, **options: Any) -> Any:
        if not part.training and part.layer_idx == 3 and len(hidden_states) > 1:
            happened.append(len(hidden_states))
            raise RuntimeError("CUDA out of memory")
        return forward(part, hidden_states=hidden_states, **options)

    monkeypatch.setattr(Gemma3Attention, "forward", short)
    return happened


def test_the_best_adapter_beside_a_divided_base_is_measured_whatever_happens_and_published(
    begin: Callable[..., Story], divide: Callable[[bool], None], no_memory: list[int]
) -> None:
    # The first step has a learning rate of 0, and the others ruin the model.
    knobs = {"gradient_checkpointing": True, "max_steps": 3, "learning_rate": 1.0, "save_strategy": "no"}
    knobs |= {"batch_size": 2, "gradient_accumulation_steps": 2}
    judged = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "sample_prompts": 1, "max_new_tokens": 4}
    divide(True)
    story = begin("adapter", knobs, method="LoRA", eval_config=judged)
    model = story.finish()
    measured = story.evaluations
    assert no_memory == [2] * 5  # once in each measurement, which goes on with a row at a time
    best = min((1, 2, 3), key=lambda step: measured["during", step])
    assert model.step == best < 3
    assert measured["after", best] == measured["during", best]
    answered = [event.when for event in story.heard[0].events if isinstance(event, Sampled)]
    assert answered == ["before", "during", "during", "during", "after"]
    (kept,) = [kept for kept in saved(story.spec) if kept.step == best]
    files = {file.path: file.sha256 for file in kept.files}
    assert files.keys() >= {"optimizer.pt", "rng_state_0.pth", "rng_state_1.pth"}
    assert files["adapter_model.safetensors"] == sha256((model.folder / "adapter_model.safetensors").read_bytes()).hexdigest()


# --- without a second process ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("processes", "obstacle", "asked", "room", "value"),
    [
        (1, "", "fsdp", None, "none"),
        (4, "", None, Room(whole=30, part=10, there=40), "ddp"),
        (4, "", None, Room(whole=50, part=20, there=40), "fsdp"),
        (4, "", None, Room(whole=500, part=200, there=40), "ddp"),
        (4, "cannot be", None, Room(whole=50, part=20, there=40), "ddp"),
        (4, "cannot be", "fsdp", None, "ddp"),
        (4, "", "fsdp", Room(whole=30, part=10, there=40), "fsdp"),
        (4, "", "ddp", Room(whole=50, part=20, there=40), "ddp"),
        (4, "", None, None, "ddp"),
    ],
)
def test_a_model_is_divided_where_it_does_not_fit_whole_or_somebody_says_so(
    processes: int, obstacle: str, asked: Any, room: Room | None, value: str
) -> None:
    found = parallelism_of(processes, obstacle, asked, room)
    assert found.value == value
    assert obstacle in found.why
    assert found.why


def test_weights_of_four_bits_and_other_trainers_are_not_divided(store: Path) -> None:
    def obstacle(**config: Any) -> str:
        return obstacle_of(a_spec(store, **config).training_config)

    assert not obstacle(method="Full")
    assert not obstacle(method="LoRA")
    assert "4 bits" in obstacle(method="QLoRA")
    assert "sft" in obstacle(trainer_type="dpo", dataset_type="preference")


@pytest.mark.parametrize("method", ["Full", "LoRA"])
def test_a_part_of_a_model_needs_less_memory_the_more_parts_there_are(tmp_path: Path, store: Path, method: str) -> None:
    layers, width, words = 48, 3840, 262_208
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": width, "num_hidden_layers": layers, "vocab_size": words}))
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(24_000_000_000)  # 12 billion weights in bf16, and no byte of it on the disk
    config = a_spec(store, method=method).training_config
    needed = [training_bytes(config, tmp_path, recomputes=True, parts=parts) for parts in (1, 2, 4, 8)]
    whole = {"Full": 16, "LoRA": 2}[method] * 12e9
    assert needed[0] > whole
    assert needed[1:] == sorted(needed[1:], reverse=True)
    assert needed[1] - needed[3] == pytest.approx(whole * (1 / 2 - 1 / 8))
    assert training_bytes(config, tmp_path) > needed[0]


def test_only_the_two_ways_to_share_a_training_may_be_asked_for() -> None:
    assert (parallelism({}), parallelism({"JOB_PARALLELISM": "fsdp"})) == (None, "fsdp")
    with pytest.raises(JobFailed, match="JOB_PARALLELISM"):
        parallelism({"JOB_PARALLELISM": "zero"})

"""What the attempt gets over by itself: too little memory, and a full disk. And what it does not: numbers that are none."""

import errno
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from jobs.llm.oom import is_out_of_memory, reduce_batch_size
from jobs.runtime.batch_config import BatchConfig
from jobs.runtime.errors import JobFailed
from jobs.runtime.training_control import is_disk_full
from schema.events import DecisionMade
from schema.spec import JobSpec
from tests.jobs.conftest import load_saved_checkpoints, make_spec, saved_steps
from tests.jobs.test_continuation import TrainingRun, weights

# Without dropout, whose draws depend on the shape of a batch, and in fp32: then a step does not depend on how it is split.
HYPERPARAMETERS: dict[str, Any] = {"max_steps": -1, "epochs": 2, "learning_rate": 1e-3, "logging_steps": 1}
HYPERPARAMETERS |= {"batch_size": 16, "gradient_accumulation_steps": 1}


@dataclass
class LimitedMemory:
    """A machine with room for so many rows at once, from so many steps on."""

    training_run: TrainingRun
    rows_that_fit: int
    from_step: int = 0  # the first step in which memory is short
    in_training: bool = True
    failures: int = 0
    make_error: Callable[[], BaseException] | None = None

    def wrap_embedding(self, embedding: Callable[..., Any]) -> Callable[..., Any]:
        """torch's own look-up of embeddings, which runs out of memory."""
        import torch

        def look_up(tokens: Any, *rest: Any, **named: Any) -> Any:
            here = torch.is_grad_enabled() == self.in_training and self.training_run.recorders[-1].step + 1 >= self.from_step
            if here and len(tokens) > self.rows_that_fit:
                self.failures += 1
                raise self.make_error() if self.make_error else torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return embedding(tokens, *rest, **named)

        return look_up


@pytest.fixture
def spec(store: Path) -> Callable[..., JobSpec]:
    return lambda **knobs: make_spec(store, method="Full", hyperparameters=HYPERPARAMETERS | knobs)


@pytest.fixture
def limit_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[..., LimitedMemory]:
    def make(story: TrainingRun, rows_that_fit: int, **how: Any) -> LimitedMemory:
        import torch

        memory = LimitedMemory(story, rows_that_fit, **how)
        monkeypatch.setattr(torch.nn.functional, "embedding", memory.wrap_embedding(torch.nn.functional.embedding))
        return memory

    return make


@pytest.fixture(scope="module")
def reference(store: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingRun:
    """The same training with enough memory: four steps of 16, 8, 16 and 8 rows."""
    story = TrainingRun(make_spec(store, method="Full", hyperparameters=HYPERPARAMETERS), tmp_path_factory.mktemp("reference"))
    story.finish()
    return story


def losses(training_run: TrainingRun) -> dict[int, float]:
    """The newest point of every step: after a lack of memory some are drawn again, with other last digits."""
    return {point.step: point.values["loss"] or math.nan for listener in training_run.recorders for point in listener.points}


def reduced_batch_sizes(training_run: TrainingRun) -> list[str]:
    decided = [event for listener in training_run.recorders for event in listener.events if isinstance(event, DecisionMade)]
    return [event.value for event in decided if event.setting == "batch_size"]


@pytest.mark.parametrize(
    ("step", "rows_that_fit", "found"),
    [(1, 8, ["8"]), (3, 5, ["8", "4"]), (3, 2, ["8", "4", "2"]), (1, 1, ["8", "4", "2", "1"]), (3, 1, ["8", "4", "2", "1"])],
)
def test_oom_reduces_batch_size_and_keeps_losses(
    reference: TrainingRun,
    spec: Callable[..., JobSpec],
    limit_memory: Callable[..., LimitedMemory],
    tmp_path: Path,
    step: int,
    rows_that_fit: int,
    found: list[str],
) -> None:
    story = TrainingRun(spec(save_strategy="steps", save_steps=1), tmp_path)
    memory = limit_memory(story, rows_that_fit, from_step=step)
    model = story.finish()
    assert (reduced_batch_sizes(story), memory.failures) == (found, len(found))
    assert losses(story).keys() == losses(reference).keys()
    assert max(abs(loss - losses(reference)[step]) for step, loss in losses(story).items()) < 1e-5
    last = load_saved_checkpoints(story.spec)[-1]
    assert (last.batch_size, last.batch_size * last.gradient_accumulation_steps) == (int(found[-1]), 16)
    assert model.train_tokens == 2 * sum(len(row) for row in tokenized_train_rows(story, model))
    assert len([told for told in story.recorders[0].evaluations if told.when == "before"]) == 1


def tokenized_train_rows(training_run: TrainingRun, model: Any) -> list[list[int]]:
    """The train rows as the trainer saw them."""
    from transformers import AutoTokenizer

    from jobs.llm.data.tokenize import read_rows, tokenize_split

    path = Path(training_run.spec.stores.datasets.removeprefix("file://"), training_run.spec.dataset.splits["train"].key)
    return [row.input_ids for row in tokenize_split(read_rows(path), "messages", AutoTokenizer.from_pretrained(model.folder), 128).rows]


def test_batch_size_decision_gives_step_and_reason(
    spec: Callable[..., JobSpec], limit_memory: Callable[..., LimitedMemory], tmp_path: Path
) -> None:
    story = TrainingRun(spec(), tmp_path)
    limit_memory(story, 8, from_step=3)
    story.finish()
    (decided,) = [event for event in story.recorders[0].events if isinstance(event, DecisionMade) and event.setting == "batch_size"]
    assert decided.reason == "out of memory in step 3 with batch_size 16; gradient_accumulation_steps 2 keeps the effective batch size"


def test_next_attempt_starts_with_reduced_batch_size(
    spec: Callable[..., JobSpec], limit_memory: Callable[..., LimitedMemory], tmp_path: Path
) -> None:
    story = TrainingRun(spec(), tmp_path)
    memory = limit_memory(story, 4)
    assert story.run_attempt(stop_after=2) == "pause"
    assert memory.failures == 2
    story.finish()
    assert memory.failures == 2


@pytest.mark.parametrize(
    "raises",
    [
        lambda: RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
        MemoryError,
    ],
)
def test_cpu_out_of_memory_is_recognized(
    spec: Callable[..., JobSpec], limit_memory: Callable[..., LimitedMemory], tmp_path: Path, raises: Callable[[], BaseException]
) -> None:
    story = TrainingRun(spec(epochs=1), tmp_path)
    limit_memory(story, 8, make_error=raises)
    story.finish()
    assert reduced_batch_sizes(story) == ["8"]


@pytest.mark.parametrize(("batch_size", "tried"), [(2, ["1"]), (24, ["12", "6", "3", "1"])])
def test_oom_with_single_row_fails_with_hint(
    spec: Callable[..., JobSpec], limit_memory: Callable[..., LimitedMemory], tmp_path: Path, batch_size: int, tried: list[str]
) -> None:
    story = TrainingRun(spec(batch_size=batch_size), tmp_path)
    limit_memory(story, 0)
    with pytest.raises(JobFailed) as failed:
        story.finish()
    failure = failed.value.failure
    assert (failure.code, reduced_batch_sizes(story)) == ("out_of_memory", tried)
    assert "in step 1 with batch_size 1" in failure.message
    assert "max_seq_length" in failure.hint
    assert "LoRA" in failure.hint
    assert "hardware" in failure.hint


def test_oom_retries_stop_after_four() -> None:
    plan = BatchConfig(64, 1)
    for healed in range(4):
        plan = reduce_batch_size(plan, 1, healed)
    assert plan == BatchConfig(4, 16)
    with pytest.raises(JobFailed) as failed:
        reduce_batch_size(plan, 7, 4)
    assert "step 7 with batch_size 4" in failed.value.failure.message
    assert "batch_size 2 and gradient_accumulation_steps 32" in failed.value.failure.hint


@pytest.mark.parametrize(
    ("plan", "smaller"),
    [((8, 1), (4, 2)), ((5, 1), (1, 5)), ((5, 2), (2, 5)), ((3, 4), (1, 12)), ((7, 3), (3, 7)), ((2, 4), (1, 8)), ((1, 4), None)],
)
def test_reduced_batch_size_is_a_divisor_of_at_most_half(plan: tuple[int, int], smaller: tuple[int, int] | None) -> None:
    assert BatchConfig(*plan).reduce() == (BatchConfig(*smaller) if smaller else None)


def test_changed_effective_batch_overrides_reduced_batch_size() -> None:
    assert BatchConfig(8, 1).adopt_if_compatible(BatchConfig(2, 4)) == BatchConfig(2, 4)
    assert BatchConfig(8, 2).adopt_if_compatible(BatchConfig(2, 4)) == BatchConfig(8, 2)


@pytest.mark.parametrize("rows_that_fit", [1, 3])
def test_oom_in_evaluation_does_not_change_training(
    reference: TrainingRun, spec: Callable[..., JobSpec], limit_memory: Callable[..., LimitedMemory], tmp_path: Path, rows_that_fit: int
) -> None:
    story = TrainingRun(spec(), tmp_path)
    memory = limit_memory(story, rows_that_fit, in_training=False)
    model = story.finish()
    assert memory.failures > 0
    assert reduced_batch_sizes(story) == []
    assert losses(story) == losses(reference)
    (after,) = [told.metrics for told in reference.recorders[0].evaluations if told.when == "after"]
    assert model.metrics is not None
    assert (model.metrics.eval_loss, model.metrics.eval_tokens) == (pytest.approx(after.eval_loss, rel=1e-6), after.eval_tokens)


def test_oom_with_single_held_out_row_fails_the_job(
    spec: Callable[..., JobSpec], limit_memory: Callable[..., LimitedMemory], tmp_path: Path
) -> None:
    story = TrainingRun(spec(), tmp_path)
    limit_memory(story, 0, in_training=False)
    with pytest.raises(JobFailed, match="single held-out row") as failed:
        story.finish()
    assert failed.value.failure.code == "out_of_memory"


# --- a full disk ---


@pytest.mark.parametrize("name", ["config.json", "optimizer.pt", "rng_state.pth", "trainer_state.json", "tunesmith.json"])
def test_full_disk_skips_checkpoint_but_not_training(
    reference: TrainingRun, spec: Callable[..., JobSpec], tmp_path: Path, name: str
) -> None:
    story = TrainingRun(spec(save_strategy="steps", save_steps=1, save_total_limit=9), tmp_path)
    half = tmp_path / "1/checkpoints/checkpoint-2"
    half.mkdir(parents=True)
    (half / name).symlink_to("/dev/full")  # it answers every write with ENOSPC
    model = story.finish()
    assert saved_steps(story.spec) == [1, 3, 4]
    assert "step 2" in story.recorders[0].warnings["disk_full"]
    assert not half.exists()
    assert losses(story) == losses(reference)
    assert weights(model).keys()


def test_pending_uploads_are_deleted_to_free_disk(spec: Callable[..., JobSpec], tmp_path: Path) -> None:
    story = TrainingRun(spec(save_strategy="steps", save_steps=1, save_total_limit=9), tmp_path)
    half = tmp_path / "1/checkpoints/checkpoint-2"
    half.mkdir(parents=True)
    (half / "optimizer.pt").symlink_to("/dev/full")
    (tmp_path / "1/checkpoints/checkpoint-0").mkdir()  # a leftover
    story.finish()
    assert saved_steps(story.spec) == [1, 2, 3, 4]
    assert "disk_full" not in story.recorders[0].warnings


def test_other_save_errors_are_not_treated_as_full_disk(spec: Callable[..., JobSpec], tmp_path: Path) -> None:
    story = TrainingRun(spec(save_strategy="steps", save_steps=1), tmp_path)
    (tmp_path / "1/checkpoints/checkpoint-2/tunesmith.json").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        story.finish()


def test_disk_full_errors_are_recognized() -> None:
    from safetensors import SafetensorError

    assert is_disk_full(OSError(errno.ENOSPC, "no"))
    assert is_disk_full(OSError(errno.EDQUOT, "no"))
    assert not is_disk_full(OSError(errno.EIO, "no"))
    assert not is_disk_full(RuntimeError("a shape is wrong"))
    assert is_disk_full(SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"))
    wrapped = RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")
    assert is_disk_full(wrapped)
    caused = ValueError("could not save")
    caused.__cause__ = OSError(errno.ENOSPC, "no")
    assert is_disk_full(caused)


def test_other_errors_are_not_treated_as_oom() -> None:
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("can't allocate memory"))


# --- numbers that are none ---


@pytest.mark.parametrize("step", [1, 3])
def test_nan_loss_fails_training_and_is_never_saved(
    spec: Callable[..., JobSpec], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, step: int
) -> None:
    import torch

    story = TrainingRun(spec(save_strategy="steps", save_steps=1), tmp_path)
    log_softmax = torch.log_softmax  # of which the loss is made in training, and in training alone

    def broken(*given: Any, **named: Any) -> Any:
        likely = log_softmax(*given, **named)
        return likely * math.nan if story.recorders[-1].step + 1 == step else likely

    monkeypatch.setattr(torch, "log_softmax", broken)
    with pytest.raises(JobFailed, match=f"step {step}") as failed:
        story.finish()
    assert "learning_rate" in failed.value.failure.hint
    assert all(saved < step for saved in saved_steps(story.spec))


def test_nan_weights_are_never_saved(spec: Callable[..., JobSpec], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    story = TrainingRun(spec(save_strategy="steps", save_steps=1), tmp_path)
    clip = torch.nn.utils.clip_grad_norm_

    def spoil(parameters: Any, *rest: Any, **named: Any) -> Any:
        found = list(parameters)
        if story.recorders[-1].step == 2:
            next(part.grad for part in found if part.grad is not None).fill_(math.nan)
        return clip(found, *rest, **named)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spoil)
    with pytest.raises(JobFailed, match="after step 3"):
        story.finish()
    assert saved_steps(story.spec) == [1, 2]

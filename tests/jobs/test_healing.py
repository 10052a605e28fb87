"""What the attempt gets over by itself: too little memory, and a full disk. And what it does not: numbers that are none."""

import errno
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from jobs.errors import JobFailed
from jobs.trainers.healing import BatchPlan, is_disk_full, is_out_of_memory, plan_with_less_memory
from schema.events import Decided
from schema.spec import JobSpec
from tests.jobs.conftest import a_spec, saved, saved_steps
from tests.jobs.test_continuation import Story, weights

# Without dropout, whose draws depend on the shape of a batch, and in fp32: then a step does not depend on how it is split.
KNOBS: dict[str, Any] = {"max_steps": -1, "epochs": 2, "learning_rate": 1e-3, "logging_steps": 1}
KNOBS |= {"batch_size": 16, "gradient_accumulation_steps": 1}


@dataclass
class Memory:
    """A machine with room for so many rows at once, from so many steps on."""

    story: Story
    rows_that_fit: int
    from_step: int = 0  # the first step in which memory is short
    in_training: bool = True
    failures: int = 0
    raises: Callable[[], BaseException] | None = None

    def look_up(self, embedding: Callable[..., Any]) -> Callable[..., Any]:
        """torch's own look-up of embeddings, which runs out of memory."""
        import torch

        def look_up(tokens: Any, *rest: Any, **named: Any) -> Any:
            here = torch.is_grad_enabled() == self.in_training and self.story.heard[-1].step + 1 >= self.from_step
            if here and len(tokens) > self.rows_that_fit:
                self.failures += 1
                raise self.raises() if self.raises else torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return embedding(tokens, *rest, **named)

        return look_up


@pytest.fixture
def spec(store: Path) -> Callable[..., JobSpec]:
    return lambda **knobs: a_spec(store, method="Full", hyperparameters=KNOBS | knobs)


@pytest.fixture
def short_of_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Memory]:
    def make(story: Story, rows_that_fit: int, **how: Any) -> Memory:
        import torch

        memory = Memory(story, rows_that_fit, **how)
        monkeypatch.setattr(torch.nn.functional, "embedding", memory.look_up(torch.nn.functional.embedding))
        return memory

    return make


@pytest.fixture(scope="module")
def reference(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Story:
    """The same training with enough memory: four steps of 16, 8, 16 and 8 rows."""
    story = Story(a_spec(store, method="Full", hyperparameters=KNOBS), tmp_path_factory.mktemp("reference"))
    story.finish()
    return story


def losses(story: Story) -> dict[int, float]:
    """The newest point of every step: after a lack of memory some are drawn again, with other last digits."""
    return {point.step: point.values["loss"] or math.nan for listener in story.heard for point in listener.points}


def batches(story: Story) -> list[str]:
    decided = [event for listener in story.heard for event in listener.events if isinstance(event, Decided)]
    return [event.value for event in decided if event.what == "batch_size"]


@pytest.mark.parametrize(
    ("step", "rows_that_fit", "found"),
    [(1, 8, ["8"]), (3, 5, ["8", "4"]), (3, 2, ["8", "4", "2"]), (1, 1, ["8", "4", "2", "1"]), (3, 1, ["8", "4", "2", "1"])],
)
def test_a_lack_of_memory_makes_the_batch_smaller_and_the_training_the_same(
    reference: Story,
    spec: Callable[..., JobSpec],
    short_of_memory: Callable[..., Memory],
    tmp_path: Path,
    step: int,
    rows_that_fit: int,
    found: list[str],
) -> None:
    story = Story(spec(save_strategy="steps", save_steps=1), tmp_path)
    memory = short_of_memory(story, rows_that_fit, from_step=step)
    model = story.finish()
    assert (batches(story), memory.failures) == (found, len(found))
    assert losses(story).keys() == losses(reference).keys()
    assert max(abs(loss - losses(reference)[step]) for step, loss in losses(story).items()) < 1e-5
    last = saved(story.spec)[-1]
    assert (last.batch_size, last.batch_size * last.gradient_accumulation_steps) == (int(found[-1]), 16)
    assert model.train_tokens == 2 * sum(len(row) for row in tokens_of(story, model))
    assert len([told for told in story.heard[0].evaluations if told.when == "before"]) == 1


def tokens_of(story: Story, model: Any) -> list[list[int]]:
    """The train rows as the trainer saw them."""
    from transformers import AutoTokenizer

    from jobs.data.render import read_rows, render

    path = Path(story.spec.stores.datasets.removeprefix("file://"), story.spec.dataset.splits["train"].key)
    return [row.input_ids for row in render(read_rows(path), "messages", AutoTokenizer.from_pretrained(model.folder), 128).rows]


def test_what_was_decided_says_in_which_step_and_what_for(
    spec: Callable[..., JobSpec], short_of_memory: Callable[..., Memory], tmp_path: Path
) -> None:
    story = Story(spec(), tmp_path)
    short_of_memory(story, 8, from_step=3)
    story.finish()
    (decided,) = [event for event in story.heard[0].events if isinstance(event, Decided) and event.what == "batch_size"]
    assert decided.why == "memory ran out in step 3 with 16 rows at once; 2 batches of 8 make the same step"


def test_the_next_attempt_begins_with_the_smaller_batch(
    spec: Callable[..., JobSpec], short_of_memory: Callable[..., Memory], tmp_path: Path
) -> None:
    story = Story(spec(), tmp_path)
    memory = short_of_memory(story, 4)
    assert story.attempt(stop_after=2) == "pause"
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
def test_a_lack_of_memory_on_the_cpu_is_one_as_well(
    spec: Callable[..., JobSpec], short_of_memory: Callable[..., Memory], tmp_path: Path, raises: Callable[[], BaseException]
) -> None:
    story = Story(spec(epochs=1), tmp_path)
    short_of_memory(story, 8, raises=raises)
    story.finish()
    assert batches(story) == ["8"]


@pytest.mark.parametrize(("batch_size", "tried"), [(2, ["1"]), (24, ["12", "6", "3", "1"])])
def test_what_does_not_fit_at_all_fails_with_what_would(
    spec: Callable[..., JobSpec], short_of_memory: Callable[..., Memory], tmp_path: Path, batch_size: int, tried: list[str]
) -> None:
    story = Story(spec(batch_size=batch_size), tmp_path)
    short_of_memory(story, 0)
    with pytest.raises(JobFailed) as failed:
        story.finish()
    failure = failed.value.failure
    assert (failure.code, batches(story)) == ("out_of_memory", tried)
    assert "in step 1 with a single row" in failure.message
    assert "max_seq_length" in failure.hint
    assert "LoRA" in failure.hint
    assert "hardware" in failure.hint


def test_after_four_times_it_is_enough() -> None:
    plan = BatchPlan(64, 1)
    for healed in range(4):
        plan = plan_with_less_memory(plan, 1, healed)
    assert plan == BatchPlan(4, 16)
    with pytest.raises(JobFailed) as failed:
        plan_with_less_memory(plan, 7, 4)
    assert "step 7 with 4 rows at once" in failed.value.failure.message
    assert "batch_size 2 and gradient_accumulation_steps 32" in failed.value.failure.hint


@pytest.mark.parametrize(
    ("plan", "smaller"),
    [((8, 1), (4, 2)), ((5, 1), (1, 5)), ((5, 2), (2, 5)), ((3, 4), (1, 12)), ((7, 3), (3, 7)), ((2, 4), (1, 8)), ((1, 4), None)],
)
def test_a_smaller_batch_is_a_divisor_and_at_most_half(plan: tuple[int, int], smaller: tuple[int, int] | None) -> None:
    assert BatchPlan(*plan).smaller() == (BatchPlan(*smaller) if smaller else None)


def test_an_effective_batch_that_was_changed_since_counts_more_than_an_old_lack_of_memory() -> None:
    assert BatchPlan(8, 1).if_it_fits(BatchPlan(2, 4)) == BatchPlan(2, 4)
    assert BatchPlan(8, 2).if_it_fits(BatchPlan(2, 4)) == BatchPlan(8, 2)


@pytest.mark.parametrize("rows_that_fit", [1, 3])
def test_a_lack_of_memory_in_a_measurement_leaves_the_training_alone(
    reference: Story, spec: Callable[..., JobSpec], short_of_memory: Callable[..., Memory], tmp_path: Path, rows_that_fit: int
) -> None:
    story = Story(spec(), tmp_path)
    memory = short_of_memory(story, rows_that_fit, in_training=False)
    model = story.finish()
    assert memory.failures > 0
    assert batches(story) == []
    assert losses(story) == losses(reference)
    (after,) = [told.metrics for told in reference.heard[0].evaluations if told.when == "after"]
    assert model.metrics is not None
    assert (model.metrics.eval_loss, model.metrics.eval_tokens) == (pytest.approx(after.eval_loss, rel=1e-6), after.eval_tokens)


def test_a_held_out_row_that_does_not_fit_fails_the_job(
    spec: Callable[..., JobSpec], short_of_memory: Callable[..., Memory], tmp_path: Path
) -> None:
    story = Story(spec(), tmp_path)
    short_of_memory(story, 0, in_training=False)
    with pytest.raises(JobFailed, match="single held-out row") as failed:
        story.finish()
    assert failed.value.failure.code == "out_of_memory"


# --- a full disk ---


@pytest.mark.parametrize("name", ["config.json", "optimizer.pt", "rng_state.pth", "trainer_state.json", "tunesmith.json"])
def test_a_full_disk_costs_a_checkpoint_and_not_the_training(
    reference: Story, spec: Callable[..., JobSpec], tmp_path: Path, name: str
) -> None:
    story = Story(spec(save_strategy="steps", save_steps=1, save_total_limit=9), tmp_path)
    half = tmp_path / "1/checkpoints/checkpoint-2"
    half.mkdir(parents=True)
    (half / name).symlink_to("/dev/full")  # it answers every write with ENOSPC
    model = story.finish()
    assert saved_steps(story.spec) == [1, 3, 4]
    assert "step 2" in story.heard[0].warnings["disk_full"]
    assert not half.exists()
    assert losses(story) == losses(reference)
    assert weights(model).keys()


def test_what_is_only_waiting_to_be_uploaded_makes_room(spec: Callable[..., JobSpec], tmp_path: Path) -> None:
    story = Story(spec(save_strategy="steps", save_steps=1, save_total_limit=9), tmp_path)
    half = tmp_path / "1/checkpoints/checkpoint-2"
    half.mkdir(parents=True)
    (half / "optimizer.pt").symlink_to("/dev/full")
    (tmp_path / "1/checkpoints/checkpoint-0").mkdir()  # a leftover
    story.finish()
    assert saved_steps(story.spec) == [1, 2, 3, 4]
    assert "disk_full" not in story.heard[0].warnings


def test_other_errors_while_saving_are_not_taken_for_a_full_disk(spec: Callable[..., JobSpec], tmp_path: Path) -> None:
    story = Story(spec(save_strategy="steps", save_steps=1), tmp_path)
    (tmp_path / "1/checkpoints/checkpoint-2/tunesmith.json").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        story.finish()


def test_a_full_disk_is_known_by_what_the_libraries_say() -> None:
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


def test_not_every_error_is_a_lack_of_memory() -> None:
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("can't allocate memory"))


# --- numbers that are none ---


@pytest.mark.parametrize("step", [1, 3])
def test_a_loss_that_is_no_number_ends_the_training_and_is_never_saved(
    spec: Callable[..., JobSpec], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, step: int
) -> None:
    import torch

    story = Story(spec(save_strategy="steps", save_steps=1), tmp_path)
    log_softmax = torch.log_softmax  # of which the loss is made in training, and in training alone

    def broken(*given: Any, **named: Any) -> Any:
        likely = log_softmax(*given, **named)
        return likely * math.nan if story.heard[-1].step + 1 == step else likely

    monkeypatch.setattr(torch, "log_softmax", broken)
    with pytest.raises(JobFailed, match=f"step {step}") as failed:
        story.finish()
    assert "learning_rate" in failed.value.failure.hint
    assert all(saved < step for saved in saved_steps(story.spec))


def test_weights_that_are_no_numbers_are_never_saved(spec: Callable[..., JobSpec], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    story = Story(spec(save_strategy="steps", save_steps=1), tmp_path)
    clip = torch.nn.utils.clip_grad_norm_

    def spoil(parameters: Any, *rest: Any, **named: Any) -> Any:
        found = list(parameters)
        if story.heard[-1].step == 2:
            next(part.grad for part in found if part.grad is not None).fill_(math.nan)
        return clip(found, *rest, **named)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spoil)
    with pytest.raises(JobFailed, match="after step 3"):
        story.finish()
    assert saved_steps(story.spec) == [1, 2]

"""Failures within an attempt: it survives running out of memory and a full disk; NaN losses and weights fail it."""

import errno
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from jobs.llm.memory_plan import MemoryPlan
from jobs.llm.oom import is_out_of_memory, recover_from_oom
from jobs.runtime.batch_config import BatchConfig
from jobs.runtime.disk_full import is_disk_full
from jobs.runtime.errors import JobFailed
from schema.events import DecisionMade
from schema.spec import JobSpec
from tests.jobs.conftest import load_saved_checkpoints, load_weights, make_row_tokenizer, make_spec, saved_steps
from tests.jobs.test_continuation import TrainingRun

# In fp32 and without dropout, whose random numbers depend on the batch shape. So the split of a step into batches does not matter.
HYPERPARAMETERS: dict[str, Any] = {"max_steps": -1, "epochs": 2, "learning_rate": 1e-3, "logging_steps": 1}
HYPERPARAMETERS |= {"batch_size": 16, "gradient_accumulation_steps": 1}


@dataclass
class LimitedMemory:
    """Memory for `rows_that_fit` rows at once, from step `from_step` on."""

    training_run: TrainingRun
    rows_that_fit: int
    from_step: int = 0  # earlier steps have enough memory
    in_training: bool = True
    failures: int = 0
    make_error: Callable[[], BaseException] | None = None

    def wrap_embedding(self, embedding: Callable[..., Any]) -> Callable[..., Any]:
        """Return torch's embedding function, changed to run out of memory."""
        import torch

        def look_up(tokens: Any, *rest: Any, **named: Any) -> Any:
            is_limited = torch.is_grad_enabled() == self.in_training and self.training_run.recorders[-1].step + 1 >= self.from_step
            if is_limited and len(tokens) > self.rows_that_fit:
                self.failures += 1
                raise self.make_error() if self.make_error else torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return embedding(tokens, *rest, **named)

        return look_up


@pytest.fixture
def spec(store: Path) -> Callable[..., JobSpec]:
    return lambda **hyperparameters: make_spec(store, method="Full", hyperparameters=HYPERPARAMETERS | hyperparameters)


@pytest.fixture
def limit_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[..., LimitedMemory]:
    def make(run: TrainingRun, rows_that_fit: int, **options: Any) -> LimitedMemory:
        import torch

        memory = LimitedMemory(run, rows_that_fit, **options)
        monkeypatch.setattr(torch.nn.functional, "embedding", memory.wrap_embedding(torch.nn.functional.embedding))
        return memory

    return make


@pytest.fixture(scope="module")
def reference(store: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingRun:
    """The same training with enough memory: four steps of 16, 8, 16 and 8 rows."""
    run = TrainingRun(make_spec(store, method="Full", hyperparameters=HYPERPARAMETERS), tmp_path_factory.mktemp("reference"))
    run.finish()
    return run


def losses(training_run: TrainingRun) -> dict[int, float]:
    """The last logged loss of each step. After memory runs out, some steps are repeated, with different last digits."""
    return {point.step: point.values["loss"] or math.nan for recorder in training_run.recorders for point in recorder.points}


def reduced_batch_sizes(training_run: TrainingRun) -> list[str]:
    decisions = [event for recorder in training_run.recorders for event in recorder.events if isinstance(event, DecisionMade)]
    return [event.value for event in decisions if event.setting == "batch_size"]


@pytest.mark.parametrize(
    ("step", "rows_that_fit", "reduced"),
    [(1, 8, ["8"]), (3, 5, ["8", "4"]), (3, 2, ["8", "4", "2"]), (1, 1, ["8", "4", "2", "1"]), (3, 1, ["8", "4", "2", "1"])],
)
def test_oom_reduces_batch_size_and_keeps_losses(
    reference: TrainingRun,
    spec: Callable[..., JobSpec],
    limit_memory: Callable[..., LimitedMemory],
    tmp_path: Path,
    step: int,
    rows_that_fit: int,
    reduced: list[str],
) -> None:
    run = TrainingRun(spec(save_strategy="steps", save_steps=1), tmp_path)
    memory = limit_memory(run, rows_that_fit, from_step=step)
    model = run.finish()
    assert (reduced_batch_sizes(run), memory.failures) == (reduced, len(reduced))
    assert losses(run).keys() == losses(reference).keys()
    assert max(abs(loss - losses(reference)[step]) for step, loss in losses(run).items()) < 1e-5
    checkpoint = load_saved_checkpoints(run.spec)[-1]
    assert BatchConfig.from_details(checkpoint.details) == BatchConfig(int(reduced[-1]), 16 // int(reduced[-1]))
    assert model.train_tokens == 2 * sum(len(row) for row in tokenized_train_rows(run, model))
    assert len([event for event in run.recorders[0].evaluations if event.when == "before"]) == 1


def tokenized_train_rows(training_run: TrainingRun, model: Any) -> list[list[int]]:
    """The training rows as tokens."""
    from transformers import AutoTokenizer

    from jobs.llm.data.tokenize import read_rows, tokenize_split

    path = Path(training_run.spec.stores.datasets.removeprefix("file://"), training_run.spec.dataset.splits["train"].key)
    return [
        row.input_ids
        for row in tokenize_split(read_rows(path), "messages", make_row_tokenizer(AutoTokenizer.from_pretrained(model.folder)), 128).rows
    ]


def test_batch_size_decision_gives_step_and_reason(
    spec: Callable[..., JobSpec], limit_memory: Callable[..., LimitedMemory], tmp_path: Path
) -> None:
    run = TrainingRun(spec(), tmp_path)
    limit_memory(run, 8, from_step=3)
    run.finish()
    (decision,) = [event for event in run.recorders[0].events if isinstance(event, DecisionMade) and event.setting == "batch_size"]
    assert decision.reason == "out of memory in step 3 with batch_size 16; gradient_accumulation_steps 2 keeps the effective batch size"


def test_next_attempt_starts_with_reduced_batch_size(
    spec: Callable[..., JobSpec], limit_memory: Callable[..., LimitedMemory], tmp_path: Path
) -> None:
    run = TrainingRun(spec(), tmp_path)
    memory = limit_memory(run, 4)
    assert run.run_attempt(stop_after=2) == "pause"
    assert memory.failures == 2
    run.finish()
    assert memory.failures == 2


@pytest.mark.parametrize(
    "make_error",
    [
        lambda: RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
        MemoryError,
    ],
)
def test_cpu_out_of_memory_is_recognized(
    spec: Callable[..., JobSpec], limit_memory: Callable[..., LimitedMemory], tmp_path: Path, make_error: Callable[[], BaseException]
) -> None:
    run = TrainingRun(spec(epochs=1), tmp_path)
    limit_memory(run, 8, make_error=make_error)
    run.finish()
    assert reduced_batch_sizes(run) == ["8"]


@pytest.mark.parametrize(("batch_size", "tried"), [(2, ["1"]), (24, ["12", "6", "3", "1"])])
def test_oom_with_single_row_fails_with_hint(
    spec: Callable[..., JobSpec], limit_memory: Callable[..., LimitedMemory], tmp_path: Path, batch_size: int, tried: list[str]
) -> None:
    run = TrainingRun(spec(batch_size=batch_size), tmp_path)
    limit_memory(run, 0)
    with pytest.raises(JobFailed) as failed:
        run.finish()
    failure = failed.value.failure
    assert (failure.code, reduced_batch_sizes(run)) == ("out_of_memory", tried)
    assert "in step 1 with batch_size 1 and gradient_checkpointing" in failure.message
    assert checkpointing_decisions(run)[-1] == ("true", "out of memory in step 1 with batch_size 1 and without it")
    assert "max_seq_length" in failure.hint
    assert "LoRA" in failure.hint
    assert "hardware" in failure.hint


def checkpointing_decisions(training_run: TrainingRun) -> list[tuple[str, str]]:
    """The decisions about gradient checkpointing, with their reasons."""
    decisions = [event for recorder in training_run.recorders for event in recorder.events if isinstance(event, DecisionMade)]
    return [(event.value, event.reason) for event in decisions if event.setting == "gradient_checkpointing"]


@dataclass
class LimitedActivations:
    """Memory for a training step only if activations are recomputed."""

    recomputes: bool = False  # the current model has done so
    failures: int = 0


@pytest.fixture
def limited_activations(monkeypatch: pytest.MonkeyPatch) -> LimitedActivations:
    import torch
    import transformers.modeling_utils

    memory = LimitedActivations()
    checkpoint, log_softmax = transformers.modeling_utils.checkpoint, torch.log_softmax  # the latter computes the loss in training

    def run_checkpointed(*arguments: Any, **options: Any) -> Any:
        memory.recomputes = True
        return checkpoint(*arguments, **options)

    def compute_loss(*arguments: Any, **options: Any) -> Any:
        if not memory.recomputes:
            memory.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return log_softmax(*arguments, **options)

    monkeypatch.setattr(transformers.modeling_utils, "checkpoint", run_checkpointed)
    monkeypatch.setattr(torch, "log_softmax", compute_loss)
    return memory


def test_oom_with_single_row_turns_gradient_checkpointing_on(
    reference: TrainingRun, spec: Callable[..., JobSpec], limited_activations: LimitedActivations, tmp_path: Path
) -> None:
    run = TrainingRun(spec(batch_size=2, gradient_accumulation_steps=8), tmp_path)
    model = run.finish()
    assert (reduced_batch_sizes(run), limited_activations.failures) == (["1"], 2)
    assert [value for value, _ in checkpointing_decisions(run)] == ["false", "true"]
    assert checkpointing_decisions(run)[-1][1] == "out of memory in step 1 with batch_size 1 and without it"
    assert max(abs(loss - losses(reference)[step]) for step, loss in losses(run).items()) < 1e-5
    assert load_weights(model.folder).keys()
    details = load_saved_checkpoints(run.spec)[-1].details
    assert details == {"batch_size": 1, "gradient_accumulation_steps": 16, "gradient_checkpointing": True}


def test_next_attempt_keeps_gradient_checkpointing_on_and_continues_exactly(
    spec: Callable[..., JobSpec], limited_activations: LimitedActivations, tmp_path: Path
) -> None:
    options = {"batch_size": 1, "gradient_accumulation_steps": 16}
    whole, interrupted = TrainingRun(spec(**options), tmp_path / "whole"), TrainingRun(spec(**options), tmp_path / "interrupted")
    uninterrupted_model = whole.finish()
    limited_activations.recomputes = False
    assert interrupted.run_attempt(stop_after=2) == "pause"
    limited_activations.recomputes = False
    resumed_model = interrupted.finish()
    assert limited_activations.failures == 2  # one in each job, none in the second attempt
    weights, resumed = load_weights(uninterrupted_model.folder), load_weights(resumed_model.folder)
    assert all(bool((weights[name] == resumed[name]).all()) for name in weights)


def test_gradient_checkpointing_that_the_request_forbids_stays_off(
    spec: Callable[..., JobSpec], limited_activations: LimitedActivations, tmp_path: Path
) -> None:
    run = TrainingRun(spec(batch_size=1, gradient_checkpointing=False), tmp_path)
    with pytest.raises(JobFailed) as failed:
        run.finish()
    assert limited_activations.failures == 1
    assert "gradient_checkpointing, which the request sets to false" in failed.value.failure.hint


def test_oom_retries_stop_after_four() -> None:
    plan = MemoryPlan(BatchConfig(64, 1), gradient_checkpointing=True)
    for oom_retries in range(4):
        plan = recover_from_oom(plan, 1, oom_retries, may_recompute=True)
    assert plan.batch_config == BatchConfig(4, 16)
    with pytest.raises(JobFailed) as failed:
        recover_from_oom(plan, 7, 4, may_recompute=True)
    assert "step 7 with batch_size 4" in failed.value.failure.message
    assert "batch_size 2 and gradient_accumulation_steps 32" in failed.value.failure.hint


@pytest.mark.parametrize(
    ("batch", "reduced"),
    [((8, 1), (4, 2)), ((5, 1), (1, 5)), ((5, 2), (2, 5)), ((3, 4), (1, 12)), ((7, 3), (3, 7)), ((2, 4), (1, 8)), ((1, 4), None)],
)
def test_reduced_batch_size_is_a_divisor_of_at_most_half(batch: tuple[int, int], reduced: tuple[int, int] | None) -> None:
    assert BatchConfig(*batch).reduce() == (BatchConfig(*reduced) if reduced else None)


def test_changed_effective_batch_overrides_reduced_batch_size() -> None:
    assert BatchConfig(8, 1).adopt_if_compatible(BatchConfig(2, 4)) == BatchConfig(2, 4)
    assert BatchConfig(8, 2).adopt_if_compatible(BatchConfig(2, 4)) == BatchConfig(8, 2)


@pytest.mark.parametrize("rows_that_fit", [1, 3])
def test_oom_in_evaluation_does_not_change_training(
    reference: TrainingRun, spec: Callable[..., JobSpec], limit_memory: Callable[..., LimitedMemory], tmp_path: Path, rows_that_fit: int
) -> None:
    run = TrainingRun(spec(), tmp_path)
    memory = limit_memory(run, rows_that_fit, in_training=False)
    model = run.finish()
    assert memory.failures > 0
    assert reduced_batch_sizes(run) == []
    assert losses(run) == losses(reference)
    (after,) = [event.metrics for event in reference.recorders[0].evaluations if event.when == "after"]
    assert model.metrics is not None
    assert (model.metrics.eval_loss, model.metrics.eval_tokens) == (pytest.approx(after.eval_loss, rel=1e-6), after.eval_tokens)


def test_oom_with_single_held_out_row_fails_the_job(
    spec: Callable[..., JobSpec], limit_memory: Callable[..., LimitedMemory], tmp_path: Path
) -> None:
    run = TrainingRun(spec(), tmp_path)
    limit_memory(run, 0, in_training=False)
    with pytest.raises(JobFailed, match="single held-out row") as failed:
        run.finish()
    assert failed.value.failure.code == "out_of_memory"


# --- a full disk ---


@pytest.mark.parametrize("name", ["config.json", "optimizer.pt", "rng_state.pth", "trainer_state.json", "tunesmith.json"])
def test_full_disk_skips_checkpoint_but_not_training(
    reference: TrainingRun, spec: Callable[..., JobSpec], tmp_path: Path, name: str
) -> None:
    run = TrainingRun(spec(save_strategy="steps", save_steps=1, save_total_limit=9), tmp_path)
    incomplete = tmp_path / "1/checkpoints/checkpoint-2"
    incomplete.mkdir(parents=True)
    (incomplete / name).symlink_to("/dev/full")  # every write fails with ENOSPC
    model = run.finish()
    assert saved_steps(run.spec) == [1, 3, 4]
    assert "step 2" in run.recorders[0].warnings["disk_full"]
    assert not incomplete.exists()
    assert losses(run) == losses(reference)
    assert load_weights(model.folder).keys()


def test_pending_uploads_are_deleted_to_free_disk(spec: Callable[..., JobSpec], tmp_path: Path) -> None:
    run = TrainingRun(spec(save_strategy="steps", save_steps=1, save_total_limit=9), tmp_path)
    incomplete = tmp_path / "1/checkpoints/checkpoint-2"
    incomplete.mkdir(parents=True)
    (incomplete / "optimizer.pt").symlink_to("/dev/full")
    (tmp_path / "1/checkpoints/checkpoint-0").mkdir()  # left over from an earlier attempt
    run.finish()
    assert saved_steps(run.spec) == [1, 2, 3, 4]
    assert "disk_full" not in run.recorders[0].warnings


def test_other_save_errors_are_not_treated_as_full_disk(spec: Callable[..., JobSpec], tmp_path: Path) -> None:
    run = TrainingRun(spec(save_strategy="steps", save_steps=1), tmp_path)
    (tmp_path / "1/checkpoints/checkpoint-2/tunesmith.json").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        run.finish()


def test_disk_full_errors_are_recognized() -> None:
    from safetensors import SafetensorError

    assert is_disk_full(OSError(errno.ENOSPC, "no"))
    assert is_disk_full(OSError(errno.EDQUOT, "no"))
    assert not is_disk_full(OSError(errno.EIO, "no"))
    assert not is_disk_full(RuntimeError("a shape is wrong"))
    assert is_disk_full(SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"))
    assert is_disk_full(RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"))
    chained = ValueError("could not save")
    chained.__cause__ = OSError(errno.ENOSPC, "no")
    assert is_disk_full(chained)


def test_other_errors_are_not_treated_as_oom() -> None:
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("can't allocate memory"))


# --- NaN ---


@pytest.mark.parametrize("step", [1, 3])
def test_nan_loss_fails_training_and_is_never_saved(
    spec: Callable[..., JobSpec], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, step: int
) -> None:
    import torch

    run = TrainingRun(spec(save_strategy="steps", save_steps=1), tmp_path)
    log_softmax = torch.log_softmax  # computes the loss in training, and only in training

    def return_nan(*arguments: Any, **options: Any) -> Any:
        log_probs = log_softmax(*arguments, **options)
        return log_probs * math.nan if run.recorders[-1].step + 1 == step else log_probs

    monkeypatch.setattr(torch, "log_softmax", return_nan)
    with pytest.raises(JobFailed, match=f"step {step}") as failed:
        run.finish()
    assert "learning_rate" in failed.value.failure.hint
    assert all(saved < step for saved in saved_steps(run.spec))


def test_nan_weights_are_never_saved(spec: Callable[..., JobSpec], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    run = TrainingRun(spec(save_strategy="steps", save_steps=1), tmp_path)
    clip = torch.nn.utils.clip_grad_norm_

    def clip_nan(parameters: Any, *rest: Any, **named: Any) -> Any:
        weights = list(parameters)
        if run.recorders[-1].step == 2:
            next(weight.grad for weight in weights if weight.grad is not None).fill_(math.nan)
        return clip(weights, *rest, **named)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_nan)
    with pytest.raises(JobFailed, match="after step 3"):
        run.finish()
    assert saved_steps(run.spec) == [1, 2]

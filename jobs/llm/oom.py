"""Recognize that memory ran out, and continue with less: smaller batches, then gradient checkpointing."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from jobs.llm.memory_plan import MemoryPlan
from jobs.runtime.errors import JobFailed

Row = TypeVar("Row")

MAX_OOM_RETRIES = 4  # four halvings: a sixteenth of the requested batch size

# Parts of the libraries' error messages. torch.OutOfMemoryError is recognized by its name, so that this module does not import torch.
OUT_OF_MEMORY_MESSAGES = ("can't allocate memory", "not enough memory", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def recover_from_oom(plan: MemoryPlan, step: int, oom_retries: int, *, may_recompute: bool) -> MemoryPlan:
    """The plan to continue with after memory ran out in `step`: a smaller batch, then gradient checkpointing.

    `oom_retries` counts earlier reductions; `may_recompute` is false if the request forbids gradient checkpointing. Raises JobFailed when
    neither is left.
    """
    smaller = plan.batch_config.reduce()
    if smaller is not None and oom_retries < MAX_OOM_RETRIES:
        return replace(plan, batch_config=smaller)
    if may_recompute and not plan.gradient_checkpointing:
        return replace(plan, gradient_checkpointing=True)
    hint = "lower max_seq_length, use LoRA where the method is Full, or request hardware with more memory"
    if smaller is not None:
        hint = f"start with batch_size {smaller.batch_size} and gradient_accumulation_steps {smaller.gradient_accumulation_steps}, " + hint
    if not plan.gradient_checkpointing:
        hint = "leave out gradient_checkpointing, which the request sets to false, " + hint
    with_checkpointing = " and gradient_checkpointing" if plan.gradient_checkpointing else ""
    raise JobFailed("out_of_memory", f"out of memory in step {step} with {plan.batch_config}{with_checkpointing}", hint)


def run_in_batches(
    rows: Sequence[Row], batch_size: int, process_batch: Callable[[Sequence[Row]], None], check_stop: Callable[[], None]
) -> None:
    """Process held-out rows in batches, in smaller ones after memory runs out. `check_stop` is called before each batch, and may raise.

    Raises JobFailed when memory runs out with a single row.
    """
    rows_done = 0
    while rows_done < len(rows):
        check_stop()
        batch = rows[rows_done : rows_done + batch_size]
        try:
            process_batch(batch)
            rows_done += len(batch)
            continue
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Python has deleted the error here, and with its traceback the tensors of the batch.
        if len(batch) == 1:
            hint = "lower max_seq_length, or request hardware with more memory"
            raise JobFailed("out_of_memory", "out of memory while evaluating a single held-out row", hint)
        batch_size = len(batch) // 2
        free_memory()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error means that GPU or host memory ran out."""
    is_torch_error = any(error_class.__name__ == "OutOfMemoryError" for error_class in type(error).__mro__)
    return (
        is_torch_error
        or isinstance(error, MemoryError)
        or (isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY_MESSAGES))
    )


def free_memory() -> None:
    """Return the memory of deleted models to the device."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

"""Recognize that memory ran out, and continue with smaller batches."""

import gc
from collections.abc import Callable, Sequence
from typing import TypeVar

from jobs.runtime.batch_config import BatchConfig
from jobs.runtime.errors import JobFailed

Row = TypeVar("Row")

MAX_OOM_RETRIES = 4  # four halvings: a sixteenth of the requested batch size

# Parts of the libraries' error messages. torch.OutOfMemoryError is recognized by its name, so that this module does not import torch.
OUT_OF_MEMORY_MESSAGES = ("can't allocate memory", "not enough memory", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def reduce_batch_size(batch_config: BatchConfig, step: int, oom_retries: int) -> BatchConfig:
    """The batch to continue with after memory ran out in `step`. `oom_retries` counts earlier reductions.

    Raises JobFailed when the batch is a single row or MAX_OOM_RETRIES is reached.
    """
    smaller = batch_config.reduce()
    if smaller is not None and oom_retries < MAX_OOM_RETRIES:
        return smaller
    hint = "lower max_seq_length, use method LoRA, or request hardware with more memory"
    if smaller is not None:
        hint = f"start with batch_size {smaller.batch_size} and gradient_accumulation_steps {smaller.gradient_accumulation_steps}, " + hint
    raise JobFailed("out_of_memory", f"out of memory in step {step} with {batch_config}", hint)


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

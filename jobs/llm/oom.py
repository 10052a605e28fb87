"""What can go wrong in a training and be mended by the attempt itself: too little memory, and a full disk."""

import errno
import gc
from collections.abc import Iterator
from dataclasses import dataclass

from jobs.runtime.errors import JobFailed

MAX_OOM_RETRIES = 4  # a sixteenth of the batch that was asked for

# What the libraries say. torch.OutOfMemoryError is known by its name, so that nothing heavy is imported here.
OUT_OF_MEMORY_MESSAGES = ("can't allocate memory", "not enough memory", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
# torch's writer of archives loses the error number: any failed write reads like this. So does what it finds when it closes the file.
DISK_FULL_MESSAGES = ("No space left on device", "Disk quota exceeded", "PytorchStreamWriter failed writing", "unexpected pos")


@dataclass(frozen=True)
class BatchConfig:
    """How many rows go through the model at once, and how often before each optimizer step."""

    batch_size: int
    gradient_accumulation_steps: int

    def __str__(self) -> str:
        return "a single row" if self.batch_size == 1 else f"{self.batch_size} rows at once"

    @property
    def effective_batch_size(self) -> int:
        """Rows of one optimizer step."""
        return self.batch_size * self.gradient_accumulation_steps

    def reduce(self) -> "BatchConfig | None":
        """At most half the batch, and as many rows in every optimizer step; None below one row."""
        size = max((size for size in range(1, self.batch_size // 2 + 1) if self.effective_batch_size % size == 0), default=None)
        return None if size is None else BatchConfig(size, self.effective_batch_size // size)

    def adopt_if_compatible(self, saved: "BatchConfig") -> "BatchConfig":
        """`other`, which an earlier attempt came down to, unless the effective batch has been changed since."""
        return saved if saved.effective_batch_size == self.effective_batch_size else self


def reduce_batch_size(batch_config: BatchConfig, step: int, oom_retries: int) -> BatchConfig:
    """What to go on with after memory ran out in `step`, for the `healed + 1`st time. Raises JobFailed when nothing is left to try."""
    smaller = batch_config.reduce()
    if smaller is not None and oom_retries < MAX_OOM_RETRIES:
        return smaller
    hint = "lower max_seq_length, use method LoRA, or ask for hardware with more memory"
    if smaller is not None:
        hint = f"start with batch_size {smaller.batch_size} and gradient_accumulation_steps {smaller.gradient_accumulation_steps}, " + hint
    raise JobFailed("out_of_memory", f"memory ran out in step {step} with {batch_config}", hint)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that memory ran out, on the GPU or beside it."""
    named = any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)
    return (
        named
        or isinstance(error, MemoryError)
        or (isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY_MESSAGES))
    )


def is_disk_full(error: BaseException) -> bool:
    """Whether the error, or what led to it, says that there is no room to write."""
    for one in _iter_exception_chain(error):
        if isinstance(one, OSError) and one.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(text in str(one) for text in DISK_FULL_MESSAGES):
            return True
    return False


def free_memory() -> None:
    """Give back what a model that is gone held."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _iter_exception_chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__

"""Writing a checkpoint to a disk that may be full: recognize the error, free space and try again."""

import errno
import shutil
from collections.abc import Callable
from pathlib import Path

from jobs.runtime.errors import exception_chain

# torch's archive writer loses the errno: a failed write gives the third message, and closing the incomplete file gives the fourth.
DISK_FULL_MESSAGES = ("No space left on device", "Disk quota exceeded", "PytorchStreamWriter failed writing", "unexpected pos")


def write_folder(folder: Path, write_files: Callable[[], object], prune_local: Callable[[], int]) -> bool:
    """Let `write_files` fill the folder; False, without the folder, if the disk is full. Other errors of `write_files` are raised.

    `prune_local` frees space for a second try and returns how many folders it deleted; without any there is no second try.
    """
    from safetensors import SafetensorError

    for is_last_try in (False, True):
        try:
            write_files()
            return True
        except (OSError, RuntimeError, SafetensorError) as error:
            if not is_disk_full(error):
                raise
        shutil.rmtree(folder, ignore_errors=True)
        deleted_count = prune_local()
        if is_last_try or not deleted_count:
            break
    return False


def is_disk_full(error: BaseException) -> bool:
    """Whether the error, or one in its chain, means that the disk or a quota is full."""
    for cause in exception_chain(error):
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(message in str(cause) for message in DISK_FULL_MESSAGES):
            return True
    return False

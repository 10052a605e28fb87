"""Limits of a process that reads what strangers wrote."""

import resource

MAX_OPEN_FILES = 256


def limit_process(memory_bytes: int) -> None:
    """A file that takes more is not read: it may have been made to."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_NOFILE, (MAX_OPEN_FILES, MAX_OPEN_FILES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

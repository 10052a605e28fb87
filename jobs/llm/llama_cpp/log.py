"""What llama.cpp logs: errors only. For child processes only."""

import sys

LOG_LEVEL_ERROR = 4  # of ggml_log_level

# ctypes keeps no reference: llama.cpp crashes when it calls a callback that Python has garbage-collected.
_live_callbacks: list[object] = []


def log_errors_only() -> list[str]:
    """Make llama.cpp log errors only, to stderr and to the returned list."""
    import ctypes

    import llama_cpp

    errors: list[str] = []

    @llama_cpp.llama_log_callback
    def errors_only(level: int, text: bytes, _: object) -> None:
        if level == LOG_LEVEL_ERROR:
            errors.append(text.decode(errors="replace").strip())
            print(errors[-1], file=sys.stderr)

    _live_callbacks.append(errors_only)
    llama_cpp.llama_log_set(errors_only, ctypes.c_void_p(0))
    return errors

"""The processes that an attempt started: converters, llama.cpp, a tracker's helper."""


def kill_children() -> None:
    """End them all, and theirs, at once. Nothing of an attempt outlives it."""
    import psutil

    for child in psutil.Process().children(recursive=True):
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue

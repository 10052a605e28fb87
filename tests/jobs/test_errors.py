"""Exceptions become failures with a code and a hint."""

import errno
from typing import Any

import pytest

from jobs.runtime.errors import JobFailed, Stopped, failure_of
from jobs.runtime.settings import read_settings, use_one_gpu
from schema.training import SftConfig
from storage import NoSuchObject, StoreUnavailable


def out_of_memory() -> Exception:
    import torch

    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


@pytest.mark.parametrize(
    ("error", "code", "hint"),
    [
        (JobFailed("invalid_data", "m", "h"), "invalid_data", "h"),
        (out_of_memory, "out_of_memory", "more memory"),
        (MemoryError(), "out_of_memory", "more memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), "out_of_memory", "more memory"),
        (OSError(errno.ENOSPC, "No space left on device"), "internal", "free some space"),
        (StoreUnavailable("no room left"), "internal", "object store"),
        (NoSuchObject("nothing is stored at x"), "internal", "upload"),
        (KeyError("x"), "internal", "log"),
    ],
)
def test_an_exception_becomes_a_failure_with_a_hint(error: Any, code: str, hint: str) -> None:
    failure = failure_of(error if isinstance(error, Exception) else error())
    assert failure.code == code
    assert hint in failure.hint


def test_family_says_what_helps_when_memory_runs_out() -> None:
    assert "batch_size" in failure_of(MemoryError(), SftConfig.out_of_memory_hint).hint


def test_an_unknown_error_shows_its_type_and_its_first_line_only() -> None:
    failure = failure_of(ValueError("first line\nsecond line"))
    assert failure.message == "ValueError: first line"
    assert len(failure_of(ValueError("x" * 5000)).message) <= 300


def test_stopped_is_not_an_exception_subclass() -> None:
    assert not issubclass(Stopped, Exception)
    assert Stopped("pause").reason == str(Stopped("pause")) == "pause"


def test_missing_or_invalid_variable_is_named() -> None:
    complete = dict.fromkeys(("JOB_ID", "JOB_SPEC_STORE_URL", "JOB_TOKEN", "SERVICE_URL", "JOB_WORKDIR"), "x") | {"JOB_ATTEMPT": "2"}
    assert read_settings(complete).attempt == 2
    for name in complete:
        with pytest.raises(JobFailed, match=name):
            read_settings({**complete, name: ""})
    with pytest.raises(JobFailed, match="JOB_ATTEMPT"):
        read_settings({**complete, "JOB_ATTEMPT": "two"})


def test_settings_do_not_show_the_token() -> None:
    complete = dict.fromkeys(("JOB_ID", "JOB_SPEC_STORE_URL", "SERVICE_URL", "JOB_WORKDIR"), "x") | {"JOB_ATTEMPT": "2"}
    assert "t0ken" not in repr(read_settings(complete | {"JOB_TOKEN": "t0ken"}))


@pytest.mark.parametrize(("environment", "used"), [({}, "0"), ({"CUDA_VISIBLE_DEVICES": "2,3"}, "2"), ({"CUDA_VISIBLE_DEVICES": ""}, "")])
def test_use_one_gpu_keeps_full_list_in_job_visible_gpus(environment: dict[str, str], used: str) -> None:
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    use_one_gpu(environment)
    assert environment == {"CUDA_VISIBLE_DEVICES": used} | ({} if visible is None else {"JOB_VISIBLE_GPUS": visible})

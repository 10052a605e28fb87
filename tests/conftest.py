"""Runs the longest test files first, so that no worker of `pytest -n` starts one of them when the others are done."""

import pytest

# By measured duration; a file that is not listed takes less than 15 s. Only speed depends on this list.
LONGEST_FIRST = (
    *("test_readme", "test_cloud_local", "test_restarts", "test_controls", "test_main_job", "test_tuning"),
    *("test_matrix", "test_continuation", "test_distributed", "test_run", "test_exporters", "test_fsdp", "test_oom", "test_other_models"),
    *("test_model", "test_sft", "test_vision"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST_FIRST.index(item.path.stem) if item.path.stem in LONGEST_FIRST else len(LONGEST_FIRST))
